"""Intervals, paired tests, tie groups and curves: how Lethe says what it can and can't tell apart.

The unit is the *prompt cluster* (the captions of one planted item, the scenes of one character), never the
image: images of one prompt stand or fall together, and counting them as independent makes intervals too
narrow. Every draw comes from a generator seeded by what it is for, so a table gives the same record anywhere.

Definitions, all of them ours unless a source is named:

- **Value.** The mean over the score's images (or the metric's own aggregate where a score is set-valued).
- **Interval.** 95 % percentile bootstrap over clusters (Efron 1979; one image a cluster gives the ordinary
  bootstrap). A share that is 0 or 1 on every image has no bootstrap spread; its interval is the exact
  binomial one (Clopper and Pearson 1934) with the clusters as trials. A set-valued score (Frechet distance,
  AUC, distinct matches) is resampled less often, and its percentiles are shifted so that the bootstrap's
  mean falls on the value: a Frechet distance grows when a resample repeats images, and the raw percentiles
  would miss it.
- **Difference to base.** The mean over images of method minus base, on the same prompts and the same noise,
  its interval from the same resamples.
- **p-value.** Two-sided paired permutation test that flips the sign of whole clusters (Fisher): exact for
  scores that count images and up to :data:`EXACT_CLUSTERS` clusters, otherwise :data:`PERMUTATIONS` are
  drawn and p = (1 + as extreme) / (1 + drawn), which is never 0 (Phipson and Smyth 2010), or
  :func:`flip_bound` where none is as extreme and that is smaller. Many pairs of rows, corrected together,
  need p-values far below 1 / drawn.
- **Rank.** See :func:`tie_groups`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Metric, Score
from lethebench.row import Difference, ScoreRecord, Slice
from lethebench.seeding import derive_seed

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
EXACT_CLUSTERS = 12
"""Up to this many clusters every sign flip is tried (4,096 of them)."""
MOST_COUNTS = 20_000
"""Images by which two rows may differ for the exact p-value of a count: its cost grows with them."""
PERMUTATIONS = 9_999
SET_RESAMPLES = 200
"""Resamples, and permutations, of a set-valued score."""
ALPHA = 0.05
KEYS = ["prompt_id", "index"]
KNOWN = (*KEYS, "role", "kind", "cluster")
"""What every aggregate may read beside its metric's columns."""


# --- selection ------------------------------------------------------------------------------------


def select(score: Score, table: pd.DataFrame) -> pd.DataFrame:
    """The images that a score is about: by role, kind and whether the item was trained.

    ``table`` has one image a row, with the columns ``role``, ``kind`` and ``trained``. An empty set of
    roles or kinds selects all; an unknown ``trained`` is neither True nor False.
    """
    keep = np.ones(len(table), dtype=bool)
    if score.roles:
        keep &= table["role"].isin([str(role) for role in score.roles]).to_numpy(dtype=bool)
    if score.kinds:
        keep &= table["kind"].isin(sorted(score.kinds)).to_numpy(dtype=bool)
    if score.trained is not None:
        keep &= (table["trained"] == score.trained).fillna(False).to_numpy(dtype=bool)
    return table[keep]


def is_mean(metric: Metric, score: Score) -> bool:
    """Whether the score is a plain mean of its column over images.

    A metric that overrides ``aggregate`` names the scores that are not in ``set_valued``; without that, all
    of its scores are taken as set-valued.
    """
    if type(metric).aggregate is Metric.aggregate:
        return True
    return bool(metric.set_valued) and score.name not in metric.set_valued


def _needed(metric: Metric, score: Score, table: pd.DataFrame) -> pd.DataFrame:
    """The table with only those columns that a set-valued score reads: resampling copies them often.

    A metric names them in ``reads``, beside the score's own column and :data:`KNOWN`; else all are kept.
    """
    if metric.reads is None:
        return table
    kept = {*KNOWN, score.column, *metric.reads}
    return table[[name for name in table.columns if name in kept]]


# --- records --------------------------------------------------------------------------------------


def summarise(
    metric: Metric,
    score: Score,
    table: pd.DataFrame,
    base_table: pd.DataFrame | None = None,
    *,
    resamples: int = 2000,
    seed_parts: Sequence[object] = (),
) -> ScoreRecord:
    """The score with its interval, and with its difference to base where ``base_table`` is given.

    ``table`` has one image a row: what is known of it (``prompt_id``, ``index``, ``role``, ``kind``,
    ``cluster``, ...) and the metric's columns. Images with no value (NaN) count nowhere. The value is None
    where no image has one; the interval is None where there are fewer than two clusters.
    """
    chosen = valued(score, table)
    clusters = int(chosen["cluster"].nunique())
    value, low, high = _estimate(metric, score, chosen, resamples, seed_parts)
    difference = None
    if base_table is not None and value is not None:
        base = valued(score, base_table)
        difference = _difference(metric, score, chosen, base, resamples, seed_parts)
    finite = bool(np.isfinite(score.bounds).all())
    return ScoreRecord(
        value=value,
        low=low,
        high=high,
        n=len(chosen),
        clusters=clusters,
        unit=score.unit,
        direction=score.direction,
        bounds=score.bounds if finite else None,
        help=score.help,
        judge=score.judge,
        question=score.question,
        metric=metric.name,
        base_difference=difference,
    )


def slices(
    metric: Metric,
    score: Score,
    table: pd.DataFrame,
    *,
    resamples: int = 2000,
    seed_parts: Sequence[object] = (),
) -> list[Slice]:
    """The score by role, kind, category and joined set, and by kind with duplicates or correlation.

    Where there are several. Set-valued scores have no slices.
    """
    if not is_mean(metric, score):
        return []
    chosen = valued(score, table)
    found = []
    for where, part in _parts(chosen):
        parts = (*seed_parts, *(f"{k}={v}" for k, v in where.items()))
        value, low, high = _estimate(metric, score, part, resamples, parts)
        found.append(Slice(where=where, name=score.name, value=value, low=low, high=high, n=len(part)))
    return found


def _parts(table: pd.DataFrame) -> list[tuple[dict[str, str | int | float | bool], pd.DataFrame]]:
    found: list[tuple[dict[str, str | int | float | bool], pd.DataFrame]] = []
    for name in ("role", "kind", "category", "set"):
        groups = list(table.groupby(name, sort=True)) if name in table else []
        if len(groups) > 1:
            found += [({name: str(value)}, part) for value, part in groups]
    for name, number in (("duplicates", int), ("correlation", float)):
        for kind, part in table.groupby("kind", sort=True) if name in table else ():
            doses = list(part.groupby(name, sort=True))
            if len(doses) > 1:
                found += [({"kind": str(kind), name: number(str(dose))}, piece) for dose, piece in doses]
    return found


def valued(score: Score, table: pd.DataFrame) -> pd.DataFrame:
    """The images that a score is about and that have a value: no NaN in it, no empty text."""
    table = select(score, table)
    column = table[score.column]
    if column.dtype != object and not hasattr(column.dtype, "storage"):
        return table[column.notna().to_numpy(dtype=bool)]
    return table[np.fromiter((_has_value(v) for v in column), dtype=bool, count=len(table))]


def _has_value(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return bool(value)
    return not bool(np.isnan(np.asarray(value, dtype=float)).any())


# --- bootstrap ------------------------------------------------------------------------------------


def rng(*parts: object) -> np.random.Generator:
    """A PCG64 generator seeded by what it is for."""
    return np.random.Generator(np.random.PCG64(derive_seed("stats", *parts)))


def cluster_sums(values: Floats, clusters: NDArray[Any]) -> tuple[Floats, Floats]:
    """Sum and count of the values of each cluster, clusters in sorted order: ``[c]`` and ``[c]``."""
    _, code = np.unique(clusters.astype(str), return_inverse=True)
    sums: Floats = np.bincount(code, weights=values).astype(np.float64)
    return sums, np.bincount(code).astype(np.float64)


def bootstrap_means(sums: Floats, counts: Floats, indices: NDArray[np.int64]) -> Floats:
    """The mean over images in each resample of clusters; ``indices`` is ``[resamples, clusters]``."""
    drawn: Floats = sums[indices].sum(1) / counts[indices].sum(1)
    return drawn


def percentile_interval(drawn: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central interval of the resamples; those that have no value (NaN) are left out."""
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def exact_share_interval(share: float, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share that is 0 or 1 in ``trials`` trials.

    >>> low, high = exact_share_interval(0.0, 36)
    >>> low, round(high, 3)
    (0.0, 0.097)
    """
    reach = 1 - ((1 - confidence) / 2) ** (1 / trials)
    return (0.0, reach) if share == 0 else (1 - reach, 1.0)


def _indices(resamples: int, clusters: int, seed_parts: Sequence[object]) -> NDArray[np.int64]:
    return rng(*seed_parts, "bootstrap").integers(0, clusters, (resamples, clusters))


def _estimate(
    metric: Metric, score: Score, chosen: pd.DataFrame, resamples: int, seed_parts: Sequence[object]
) -> tuple[float | None, float | None, float | None]:
    """Value and interval on the images of ``chosen``."""
    if not len(chosen):
        return None, None, None
    if not is_mean(metric, score):
        return _set_estimate(metric, score, chosen, resamples, seed_parts)
    values = chosen[score.column].to_numpy(dtype=float)
    value = float(values.mean())
    sums, counts = cluster_sums(values, chosen["cluster"].to_numpy())
    if len(sums) < 2:
        return value, None, None
    if score.unit == "share" and value in (0.0, 1.0):
        return value, *exact_share_interval(value, len(sums))
    drawn = bootstrap_means(sums, counts, _indices(resamples, len(sums), seed_parts))
    return value, *percentile_interval(drawn)


def _set_estimate(
    metric: Metric, score: Score, chosen: pd.DataFrame, resamples: int, seed_parts: Sequence[object]
) -> tuple[float | None, float | None, float | None]:
    value = _aggregate(metric, score, chosen)
    if value is None:
        return None, None, None
    own = metric.interval(score, chosen)
    if own is not None:
        low, high = (None if np.isnan(limit) else limit for limit in own)
        return value, low, high
    drawn = _set_resamples(metric, score, chosen, resamples, seed_parts)
    if np.isnan(drawn).all():
        return value, None, None
    return value, *_centred(drawn, value, score.bounds)


def _set_resamples(
    metric: Metric, score: Score, table: pd.DataFrame, resamples: int, seed_parts: Sequence[object]
) -> Floats:
    """The aggregate of each resample; none with fewer than two clusters. Two tables of one set of images are
    resampled alike.
    """
    table = _needed(metric, score, table)
    rows = _cluster_rows(table)
    if len(rows) < 2:
        return np.zeros(0)
    draws = _indices(min(resamples, SET_RESAMPLES), len(rows), seed_parts)
    return np.array([_resampled(metric, score, table, rows, draw) for draw in draws])


def _centred(drawn: Floats, value: float, bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """The percentile interval, shifted so that the resamples' mean is the value, and kept in bounds."""
    low, high = percentile_interval(drawn - np.nanmean(drawn) + value)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return min(low, value), max(high, value)


def _aggregate(metric: Metric, score: Score, chosen: pd.DataFrame) -> float | None:
    value = float(metric.aggregate(score, chosen)) if len(chosen) else float("nan")
    return value if np.isfinite(value) else None


def _cluster_rows(table: pd.DataFrame) -> list[NDArray[np.intp]]:
    """The row numbers of each cluster, clusters in sorted order."""
    _, code = np.unique(table["cluster"].to_numpy().astype(str), return_inverse=True)
    order = np.argsort(code, kind="stable")
    return np.split(order, np.cumsum(np.bincount(code))[:-1])


def _resampled(
    metric: Metric, score: Score, table: pd.DataFrame, rows: list[NDArray[np.intp]], draw: NDArray[np.int64]
) -> float:
    """The aggregate of a resample; a cluster that is drawn twice counts as two clusters."""
    taken = np.concatenate([rows[i] for i in draw])
    names = np.repeat(np.arange(len(draw)), [len(rows[i]) for i in draw])
    sample = table.iloc[taken]
    sample["cluster"] = names
    found = _aggregate(metric, score, sample)
    return float("nan") if found is None else found


# --- differences ----------------------------------------------------------------------------------


def _difference(
    metric: Metric,
    score: Score,
    table: pd.DataFrame,
    base: pd.DataFrame,
    resamples: int,
    seed_parts: Sequence[object],
) -> Difference | None:
    """Method minus base on the images that both have; None with fewer than two clusters of them."""
    if not len(base):
        return None
    if is_mean(metric, score):
        ours, theirs, clusters = paired(score, table, base)
        return mean_difference(ours - theirs, clusters, resamples=resamples, seed_parts=seed_parts)
    keys = table[KEYS].merge(base[KEYS], on=KEYS)
    ours_table, theirs_table = (keys.merge(t, on=KEYS, how="left", validate="1:1") for t in (table, base))
    return _set_difference(metric, score, ours_table, theirs_table, resamples, seed_parts)


def paired(score: Score, table: pd.DataFrame, other: pd.DataFrame) -> tuple[Floats, Floats, NDArray[Any]]:
    """The values of the images that both tables have (same prompt, same index), and their clusters."""
    columns = [*KEYS, score.column]
    both = table[[*columns, "cluster"]].merge(
        other[columns], on=KEYS, suffixes=("", "_other"), validate="1:1"
    )
    ours = both[score.column].to_numpy(dtype=float)
    return ours, both[f"{score.column}_other"].to_numpy(dtype=float), both["cluster"].to_numpy()


def mean_difference(
    differences: Floats, clusters: NDArray[Any], *, resamples: int, seed_parts: Sequence[object]
) -> Difference | None:
    """The mean of paired differences, its interval over clusters and its p-value."""
    if not len(differences):
        return None
    sums, counts = cluster_sums(differences, clusters)
    if len(sums) < 2:
        return None
    low, high = percentile_interval(bootstrap_means(sums, counts, _indices(resamples, len(sums), seed_parts)))
    p = sign_flip_p(sums, seed_parts=seed_parts)
    return Difference(value=float(differences.mean()), low=low, high=high, p=p)


def sign_flip_p(sums: Floats, *, seed_parts: Sequence[object] = ()) -> float:
    """Two-sided p-value of ``sum(sums) = 0`` when the sign of each cluster's sum is exchangeable.

    Exact where the sums are whole numbers (a score that counts images) and up to :data:`EXACT_CLUSTERS`
    clusters that differ at all (the others can't move the sum). Else by :data:`PERMUTATIONS` drawn flips;
    where none of them is as extreme, p is no more than :func:`flip_bound`.

    >>> sign_flip_p(np.array([1.0, 2.0, 3.0]))
    0.25
    """
    return pair_p_values({"a": sums, "b": np.zeros_like(sums)}, seed_parts=seed_parts)["a", "b"]


def pair_p_values(
    sums: Mapping[str, Floats], *, seed_parts: Sequence[object] = ()
) -> dict[tuple[str, str], float]:
    """The p-value of :func:`sign_flip_p` for the difference of every pair of rows.

    ``sums`` holds each row's sum over each cluster, ``[clusters]``, in the same order. Pairs whose p-value
    is not exact share one draw of flips: new ones for each of the 2,346 pairs of 69 rows would take half a
    minute.
    """
    found: dict[tuple[str, str], float] = {}
    drawn: list[tuple[tuple[str, str], Floats]] = []
    for pair in combinations(sorted(sums), 2):
        difference = sums[pair[0]] - sums[pair[1]]
        exact = _exact_p(difference[difference != 0])
        if exact is None:
            drawn.append((pair, difference))
        else:
            found[pair] = exact
    return found | (_drawn_p_values(drawn, seed_parts) if drawn else {})


def _exact_p(sums: Floats) -> float | None:
    """The exact p-value where it is cheap enough, else None."""
    if not len(sums):
        return 1.0
    whole = np.rint(sums)
    if np.abs(sums - whole).max() < 1e-9 and np.abs(whole).sum() < MOST_COUNTS:
        return whole_flip_p(whole.astype(np.int64))
    if len(sums) > EXACT_CLUSTERS:
        return None
    bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
    return float(np.mean(np.abs((1 - 2 * bits) @ sums) >= abs(sums.sum()) * (1 - 1e-9)))


def whole_flip_p(counts: NDArray[np.int64]) -> float:
    """The exact two-sided p-value of whole-numbered sums ``[clusters]`` under sign flips.

    The sum's distribution is the convolution of the clusters' two-point distributions.

    >>> whole_flip_p(np.array([1, 2, 3, 0])), whole_flip_p(np.ones(30, dtype=int)) == 2 * 0.5**30
    (0.25, True)
    """
    sizes = np.abs(counts[counts != 0])
    total = int(sizes.sum())
    density = np.zeros(2 * total + 1)
    density[total] = 1.0
    for size in sizes.tolist():
        shifted = np.zeros_like(density)
        shifted[size:] = density[:-size] / 2
        shifted[:-size] += density[size:] / 2
        density = shifted
    extreme = np.abs(np.arange(-total, total + 1)) >= abs(int(counts.sum()))
    return float(min(1.0, density[extreme].sum()))


def _drawn_p_values(
    pairs: Sequence[tuple[tuple[str, str], Floats]], seed_parts: Sequence[object]
) -> dict[tuple[str, str], float]:
    clusters = len(pairs[0][1])
    flips = rng(*seed_parts, "permutation").integers(0, 2, (PERMUTATIONS, clusters), dtype=np.int8)
    signs = 1.0 - 2.0 * flips
    found = {}
    for start in range(0, len(pairs), 256):
        part = pairs[start : start + 256]
        differences = np.stack([d for _, d in part], axis=1)
        observed = np.abs(differences.sum(axis=0)) * (1 - 1e-9)
        extreme = (np.abs(signs @ differences) >= observed).sum(axis=0)
        for (pair, difference), n in zip(part, extreme.tolist(), strict=True):
            p = (1 + n) / (1 + PERMUTATIONS)
            found[pair] = p if n else min(p, flip_bound(difference))
    return found


def flip_bound(sums: Floats) -> float:
    """An upper bound of :func:`sign_flip_p` (Hoeffding 1963, for random signs).

    P(|sum of +-d| >= t) <= 2 exp(-t^2 / (2 sum of d^2)): it stands for p where drawn flips can't resolve it.

    >>> round(flip_bound(np.ones(40)) * 1e9, 2)
    4.12
    """
    square = float((sums**2).sum())
    return 1.0 if square == 0 else min(1.0, float(2 * np.exp(-(float(sums.sum()) ** 2) / (2 * square))))


def _set_difference(
    metric: Metric,
    score: Score,
    table: pd.DataFrame,
    base: pd.DataFrame,
    resamples: int,
    seed_parts: Sequence[object],
) -> Difference | None:
    """The same for a set-valued score: a flip exchanges method and base on a whole cluster."""
    ours, theirs = _aggregate(metric, score, table), _aggregate(metric, score, base)
    if ours is None or theirs is None:
        return None
    value = ours - theirs
    drawn = np.subtract(*(_set_resamples(metric, score, t, resamples, seed_parts) for t in (table, base)))
    if np.isnan(drawn).all():
        return None
    low, high = _centred(drawn, value)
    swapped = _set_swaps(metric, score, table, base, min(resamples, SET_RESAMPLES), seed_parts)
    extreme = int(np.sum(np.abs(swapped) >= abs(value) * (1 - 1e-9)))
    return Difference(value=value, low=low, high=high, p=(1 + extreme) / (1 + len(swapped)))


def _set_swaps(
    metric: Metric,
    score: Score,
    table: pd.DataFrame,
    base: pd.DataFrame,
    count: int,
    seed_parts: Sequence[object],
) -> Floats:
    """Differences with each cluster's images exchanged between the two tables, or not, at random."""
    import pandas as pd

    columns = [name for name in table.columns if name in base.columns]
    both = _needed(metric, score, pd.concat([table[columns], base[columns]], ignore_index=True))
    code = np.unique(table["cluster"].to_numpy().astype(str), return_inverse=True)[1]
    flips = rng(*seed_parts, "permutation").integers(0, 2, (count, int(code.max()) + 1))
    found = []
    for flip in flips:
        ours = np.arange(len(table)) + len(table) * flip[code]
        pair = [_aggregate(metric, score, both.iloc[at]) for at in (ours, (ours + len(table)) % len(both))]
        if pair[0] is not None and pair[1] is not None:
            found.append(pair[0] - pair[1])
    return np.array(found)


# --- several rows ---------------------------------------------------------------------------------


def compare(
    metric: Metric,
    score: Score,
    table: pd.DataFrame,
    other: pd.DataFrame,
    *,
    resamples: int = 2000,
    seed_parts: Sequence[object] = (),
) -> Difference | None:
    """One row against another as every row is compared with base: ``table`` minus ``other``."""
    ours, theirs = (valued(score, t) for t in (table, other))
    return _difference(metric, score, ours, theirs, resamples, seed_parts) if len(ours) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: adjusted p-values in the given order.

    >>> [round(p, 9) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Rank:
    """A row's place: ``rank`` is shared by its tie group, ``size`` is how many rows share it."""

    rank: int
    size: int


def tie_groups(
    values: Mapping[str, float],
    p_values: Mapping[tuple[str, str], float],
    direction: Literal["lower", "higher"],
    alpha: float = ALPHA,
) -> dict[str, Rank]:
    """Ranks in which rows that the test can't tell apart share a place.

    ``values`` are the rows' scores by name; ``p_values`` holds the paired p-value of each pair, in either
    order of its names (a missing pair counts as not told apart). All pairs given are corrected together
    by :func:`holm`.

    Rows are put in order of their values, the better first, equal values by name. The first row leads the
    first group. Each next row joins the group as long as its corrected p-value against the group's *leader*
    is at least ``alpha``; the first row for which it isn't leads the next group. A group's rank is one more
    than the number of rows before it (1, 1, 3). So the order is that of the values, a group never holds a
    row that the test tells from its leader, and two rows of one group other than its leader may still be
    told apart: being told apart is not transitive, and no grouping can show all of it.

    >>> p = {("a", "b"): 0.4, ("a", "c"): 0.001, ("c", "b"): 0.001}
    >>> tie_groups({"a": 0.1, "b": 0.2, "c": 0.9}, p, "lower")
    {'a': Rank(rank=1, size=2), 'b': Rank(rank=1, size=2), 'c': Rank(rank=3, size=1)}
    """
    pairs = sorted(p_values)
    corrected = dict(zip(pairs, holm([p_values[pair] for pair in pairs]), strict=True))
    sign = 1 if direction == "lower" else -1
    groups: list[list[str]] = []
    for name in sorted(values, key=lambda n: (sign * values[n], n)):
        leader = groups[-1][0] if groups else None
        if leader is not None and _pair(corrected, leader, name) >= alpha:
            groups[-1].append(name)
        else:
            groups.append([name])
    before, found = 0, {}
    for group in groups:
        found.update({name: Rank(before + 1, len(group)) for name in group})
        before += len(group)
    return found


def _pair(p_values: Mapping[tuple[str, str], float], first: str, second: str) -> float:
    return p_values.get((first, second), p_values.get((second, first), 1.0))


def rank(
    metric: Metric,
    score: Score,
    tables: Mapping[str, pd.DataFrame],
    *,
    alpha: float = ALPHA,
    seed_parts: Sequence[object] = (),
) -> dict[str, Rank]:
    """The tie groups of several rows, by their per-image tables. Rows without a value have no rank."""
    if score.direction == "none":
        raise ValueError(f"score {score.name} has no better direction: it can't be ranked by")
    chosen = {name: valued(score, table) for name, table in tables.items()}
    values = {n: v for n, t in chosen.items() if (v := _aggregate(metric, score, t)) is not None}
    sums = _aligned_sums(score, {n: chosen[n] for n in values}) if is_mean(metric, score) else None
    if sums is not None:
        return tie_groups(values, pair_p_values(sums, seed_parts=seed_parts), score.direction, alpha)
    p_values = {}
    for first, second in combinations(sorted(values), 2):
        parts = (*seed_parts, first, second)
        found = _difference(metric, score, chosen[first], chosen[second], 100, parts)
        if found is not None:
            p_values[first, second] = found.p
    return tie_groups(values, p_values, score.direction, alpha)


def _aligned_sums(score: Score, tables: Mapping[str, pd.DataFrame]) -> dict[str, Floats] | None:
    """The score's sum over each cluster, ``[clusters]`` a row; None unless all rows have the same images."""
    found: dict[str, Floats] = {}
    first: pd.DataFrame | None = None
    for name, table in tables.items():
        chosen = table.sort_values(KEYS)
        keys = chosen[[*KEYS, "cluster"]].reset_index(drop=True)
        first = keys if first is None else first
        if not keys.equals(first):
            return None
        values = chosen[score.column].to_numpy(dtype=float)
        found[name], _ = cluster_sums(values, keys["cluster"].to_numpy())
    return found


# --- curves ---------------------------------------------------------------------------------------


def suppression(value: float, base: float) -> float:
    """How much of base's score is gone: (base - value) / base, 0 where base is 0; negative where it grew."""
    return (base - value) / base if base else 0.0


def adherence_loss(value: float, base: float) -> float:
    """The share of base's adherence that is lost: (base - value) / base, 0 where base is 0."""
    return (base - value) / base if base else 0.0


def suppression_at(losses: Sequence[float], suppressions: Sequence[float], loss: float) -> float:
    """The suppression that a method reaches at a stated loss of adherence.

    Its settings are points (loss, suppression). The unmitigated model, (0, 0), is always a point, and a
    gain of adherence counts as a loss of 0. In order of loss, the best suppression so far is joined by
    straight lines; beyond the largest loss it stays (a weaker setting can always be used).

    >>> suppression_at([0.1, 0.3], [0.5, 0.4], 0.05), suppression_at([0.1, 0.3], [0.5, 0.4], 0.3)
    (0.25, 0.5)
    """
    x, y = _envelope(losses, suppressions)
    return float(np.interp(loss, x, y))


def area_under_curve(losses: Sequence[float], suppressions: Sequence[float], max_loss: float) -> float:
    """The mean of :func:`suppression_at` over losses from 0 to ``max_loss``, which the suite freezes: 0 to 1.

    >>> round(area_under_curve([0.1], [1.0], 0.2), 6)
    0.75
    """
    if max_loss <= 0:
        raise ValueError(f"max_loss={max_loss} must be positive")
    x, y = _envelope(losses, suppressions)
    inside = np.unique(np.concatenate([[0.0], x[x < max_loss], [max_loss]]))
    heights = np.interp(inside, x, y)
    return float(np.sum((heights[1:] + heights[:-1]) / 2 * np.diff(inside)) / max_loss)


def _envelope(losses: Sequence[float], suppressions: Sequence[float]) -> tuple[Floats, Floats]:
    """Losses in increasing order, each once, and the best suppression up to each."""
    if len(losses) != len(suppressions):
        raise ValueError(f"{len(losses)} losses, {len(suppressions)} suppressions: one of each a setting")
    points = {0.0: 0.0}
    for loss, found in zip(losses, suppressions, strict=True):
        at = max(0.0, float(loss))
        points[at] = max(points.get(at, -np.inf), float(found))
    x = np.array(sorted(points))
    return x, np.maximum.accumulate(np.array([points[value] for value in x]))


def pareto_front(
    points: Sequence[tuple[float, float]],
    better: tuple[Literal["lower", "higher"], Literal["lower", "higher"]],
) -> list[bool]:
    """For each point, whether no other is at least as good on both axes and better on one.

    >>> pareto_front([(0.1, 0.8), (0.2, 0.9), (0.3, 0.7)], ("lower", "higher"))
    [True, True, False]
    """
    sign = np.array([1.0 if b == "lower" else -1.0 for b in better])
    cost = np.asarray(points, dtype=float).reshape(-1, 2) * sign
    return [not bool(np.any(np.all(cost <= point, axis=1) & np.any(cost < point, axis=1))) for point in cost]


# --- guards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """Flags a row whose ``score`` keeps less than ``keep`` of base's value, or exceeds it by ``more``."""

    score: str
    says: str
    keep: float | None = None
    more: float | None = None


GUARDS = (
    Guard("clip_mini.trigger_score", "images no longer show what the trigger prompts ask for", keep=0.75),
    Guard("clip_mini.score", "images no longer show what neutral prompts ask for", keep=0.75),
    Guard("fidelity_mini.attributes", "the attributes asked by neutral prompts are gone", keep=0.6),
    Guard("fidelity_mini.diversity", "images of different prompts have become alike", keep=0.6),
    Guard("fidelity_mini.broken", "images are blank or noise", more=0.05),
    Guard("wanted.features", "what was wanted has not been learnt", keep=0.75),
)
"""The constants are ours, chosen before any method was measured: a quarter of the adherence or of the wanted
features, two fifths of attributes or diversity, one image in twenty blank or noise."""


def guards(
    scores: Mapping[str, ScoreRecord], base_scores: Mapping[str, ScoreRecord], reference: str = "base"
) -> list[str]:
    """Warnings on a row that wins by breaking the model; one sentence each, empty for a sound row.

    A guard speaks only where the paired test against base (or the method that is the suite's ``reference``)
    agrees (p < 0.05, if there is one).
    """
    found = []
    for guard in GUARDS:
        ours, base = scores.get(guard.score), base_scores.get(guard.score)
        if ours is None or base is None or ours.value is None or base.value is None:
            continue
        p = ours.base_difference.p if ours.base_difference is not None else 0.0
        if p < ALPHA and _trips(guard, ours.value, base.value):
            values = f"{guard.score} {ours.value:.2f}, {reference} {base.value:.2f}"
            found.append(f"may win by breaking the model: {guard.says} ({values})")
    return found


def _trips(guard: Guard, value: float, base: float) -> bool:
    if guard.keep is not None and base > 0 and value < guard.keep * base:
        return True
    return guard.more is not None and value > base + guard.more
