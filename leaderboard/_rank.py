"""Ranks: tie groups of the rows that compete, by paired tests on the headline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from lethebench.leaderboard import _format as fmt
from lethebench.row import Row, ScoreRecord

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from lethebench.metric import Metric, Score

    Floats = NDArray[np.float64]

Key = tuple[str, str, str, str]
"""(suite@version, model, method, setting)."""


@dataclass(frozen=True)
class Rank:
    """A row's place: ``first`` to ``last``, or None with the reason in ``note``."""

    first: int | None
    last: int | None
    note: str

    @property
    def text(self) -> str:
        """``2``, ``2–4``, or a dash."""
        return "–" if self.first is None or self.last is None else fmt.rank_text(self.first, self.last)


def rank_rows(
    rows: Sequence[Row], tables: Mapping[Key, pd.DataFrame | None], headline: str
) -> tuple[dict[Key, Rank], str]:
    """The rank of every row of a board, and why there are none at all (or an empty text).

    Controls, rows that failed, and rows that the guard flags don't compete. A row competes only if its
    per-image table gives the score that the row records.
    """
    notes = {row.key: _barred(row, headline) for row in rows}
    competing = [row for row in rows if not notes[row.key]]
    if not competing:
        return {key: Rank(None, None, note) for key, note in notes.items()}, ""
    found = scorer(competing[0], headline)
    if found is None:
        name = competing[0].scores[headline].metric
        why = f"No ranks: the metric {name!r} of the headline is not installed here."
        return {key: Rank(None, None, note or why) for key, note in notes.items()}, why
    kept: dict[Key, pd.DataFrame] = {}
    for row in competing:
        table = tables.get(row.key)
        note = mismatch(*found, row.scores[headline], table)
        if note or table is None:
            notes[row.key] = f"Not ranked: {note}"
        else:
            kept[row.key] = table
    places = _places(*found, kept)
    return {row.key: places.get(row.key) or Rank(None, None, notes[row.key]) for row in rows}, ""


def _barred(row: Row, headline: str) -> str:
    if row.control:
        return "A control: not ranked"
    if row.status != "ok":
        return "Nothing was measured"
    record = row.scores.get(headline)
    if record is None or record.value is None or record.direction == "none":
        return f"Not ranked: {headline} was not measured"
    if row.warnings:
        return "Not ranked: flagged by the guard"
    return ""


def scorer(row: Row, name: str) -> tuple[Metric, Score] | None:
    """The installed metric that gave a row's score and its definition of it; None where there is none."""
    from lethebench.metric import configure_metric
    from lethebench.registry import METRICS

    made_by = row.scores[name].metric
    try:
        settings = row.metrics.get(made_by, {}).get("settings", {})
        metric: Metric = configure_metric(METRICS.get(made_by), settings)
    except Exception:  # a metric that can't be loaded must not cost the page
        return None
    score = next((s for s in metric.all_scores() if s.name == name), None)
    return None if score is None else (metric, score)


def mismatch(metric: Metric, score: Score, record: ScoreRecord, table: pd.DataFrame | None) -> str:
    """Why the table can't stand for the recorded score; empty where it can."""
    from lethebench import stats

    if table is None:
        return "no per-image table beside the row"
    if not {score.column, "cluster", "role", "kind"} <= set(table.columns):
        return f"its per-image table lacks a column of {score.name}"
    if not stats.is_mean(metric, score):
        return ""
    mean = stats.select(score, table)[score.column].astype(float).mean()
    if record.value is None or not abs(mean - record.value) < 1e-6 * max(1.0, abs(record.value)):
        return f"its per-image table doesn't give the {score.name} that the row records"
    return ""


def _places(metric: Metric, score: Score, tables: Mapping[Key, pd.DataFrame]) -> dict[Key, Rank]:
    from lethebench import stats

    by_name = {"\x1f".join(key): key for key in tables}
    named = {name: tables[key] for name, key in by_name.items()}
    sums = _aligned_sums(score, named) if stats.is_mean(metric, score) else None
    if sums is None or score.direction == "none":
        found = stats.rank(metric, score, named, seed_parts=("leaderboard",))
    else:
        totals = {name: float(row.sum()) for name, row in sums.items()}
        found = stats.tie_groups(totals, pair_p_values(sums), score.direction)
    return {by_name[name]: _place(place.rank, place.size) for name, place in found.items()}


def _aligned_sums(score: Score, tables: Mapping[str, pd.DataFrame]) -> dict[str, Floats] | None:
    """The score's sum over each cluster, ``[clusters]`` a row; None unless all rows have the same images."""
    import numpy as np

    from lethebench import stats

    found: dict[str, Floats] = {}
    first: pd.DataFrame | None = None
    for name, table in tables.items():
        chosen = stats.select(score, table).sort_values(stats.KEYS)
        chosen = chosen[np.isfinite(chosen[score.column].to_numpy(dtype=float))]
        keys = chosen[[*stats.KEYS, "cluster"]].reset_index(drop=True)
        first = keys if first is None else first
        if not keys.equals(first):
            return None
        values = chosen[score.column].to_numpy(dtype=float)
        found[name], _ = stats.cluster_sums(values, keys["cluster"].to_numpy())
    return found


def pair_p_values(sums: Mapping[str, Floats]) -> dict[tuple[str, str], float]:
    """The p-value of every pair of rows, as ``stats.sign_flip_p`` defines it, fit for large boards.

    The 2,346 pairs of 69 rows, corrected together, need p-values below 2e-5, and 9,999 drawn flips have
    none below 1e-4: nothing could be told apart. So a score that counts images (every share does) gets
    its exact p-value, at any number of clusters. For other scores all pairs share one draw of flips
    (new flips for each pair would take half a minute), and where none is as extreme, p is at most
    :func:`flip_bound`.
    """
    import numpy as np

    from lethebench import stats

    found: dict[tuple[str, str], float] = {}
    many: list[tuple[tuple[str, str], Floats]] = []
    for pair in combinations(sorted(sums), 2):
        difference = sums[pair[0]] - sums[pair[1]]
        whole = np.rint(difference)
        if np.abs(difference - whole).max(initial=0.0) < 1e-9 and np.abs(whole).sum() < MOST_COUNTS:
            found[pair] = exact_flip_p(whole.astype(np.int64))
        elif np.count_nonzero(difference) <= stats.EXACT_CLUSTERS:
            found[pair] = stats.sign_flip_p(difference)
        else:
            many.append((pair, difference))
    return found | (_drawn_p_values(many) if many else {})


MOST_COUNTS = 20_000
"""Images by which two rows may differ for the exact p-value: its cost grows with them."""


def exact_flip_p(counts: NDArray[np.int64]) -> float:
    """The exact two-sided p-value of whole-numbered sums ``[clusters]`` under sign flips.

    The sum's distribution is the convolution of the clusters' two-point distributions.

    >>> import numpy as np
    >>> exact_flip_p(np.array([1, 2, 3, 0])), exact_flip_p(np.ones(30, dtype=int)) == 2 * 0.5**30
    (0.25, True)
    """
    import numpy as np

    sizes = np.abs(counts[counts != 0])
    total = int(sizes.sum())
    density = np.zeros(2 * total + 1)
    density[total] = 1.0
    for size in sizes.tolist():
        shifted = np.zeros_like(density)
        shifted[size:] = density[:-size] / 2
        shifted[:-size] += density[size:] / 2
        density = shifted
    reach = abs(int(counts.sum()))
    extreme = np.abs(np.arange(-total, total + 1)) >= reach
    return float(min(1.0, density[extreme].sum()))


def _drawn_p_values(pairs: Sequence[tuple[tuple[str, str], Floats]]) -> dict[tuple[str, str], float]:
    import numpy as np

    from lethebench import stats

    clusters = len(pairs[0][1])
    flips = stats.rng("leaderboard", "permutation", clusters).integers(0, 2, (stats.PERMUTATIONS, clusters))
    signs = 1.0 - 2.0 * flips
    found = {}
    for start in range(0, len(pairs), 256):
        part = pairs[start : start + 256]
        differences = np.stack([d for _, d in part], axis=1)
        observed = np.abs(differences.sum(axis=0)) * (1 - 1e-9)
        extreme = (np.abs(signs @ differences) >= observed).sum(axis=0)
        for (pair, difference), n in zip(part, extreme.tolist(), strict=True):
            p = (1 + n) / (1 + len(signs))
            found[pair] = p if n else min(p, flip_bound(difference))
    return found


def flip_bound(sums: Floats) -> float:
    """An upper bound of the exact p-value of ``stats.sign_flip_p`` (Hoeffding 1963, for random signs).

    P(|sum of +-d| >= t) <= 2 exp(-t^2 / (2 sum of d^2)), so it may stand for p where drawn flips can't
    resolve it.

    >>> import numpy as np
    >>> round(flip_bound(np.ones(40)) * 1e9, 2)
    4.12
    """
    import math

    square = float((sums**2).sum())
    return 1.0 if square == 0 else min(1.0, 2 * math.exp(-(float(sums.sum()) ** 2) / (2 * square)))


def _place(rank: int, size: int) -> Rank:
    if size == 1:
        return Rank(rank, rank, "Told apart from the rows before and after it (paired test, Holm-corrected)")
    note = f"One of {size} rows that the paired test (Holm-corrected) can't tell from the best of them"
    return Rank(rank, rank + size - 1, note)
