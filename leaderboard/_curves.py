"""Methods as curves over their settings, and the Pareto front, both with their uncertainty.

One bootstrap serves all: in each resample every row of the board is drawn on the same clusters, so
that what is common to the rows falls out of their comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from lethebench.leaderboard._rank import Key, mismatch, scorer
from lethebench.leaderboard._rows import measured, reference_of
from lethebench.row import Row

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from lethebench.metric import Metric, Score

    Floats = NDArray[np.float64]

LOSS = 0.05
"""The loss of adherence, as a share of the reference row's, at which methods are compared."""
MAX_LOSS = 0.10
"""The area under a method's curve is taken from no loss to this one."""
RESAMPLES = 400
DRAWN_FRONTS = 40
"""Resampled fronts on the plot: enough to see a band, few enough to see through it."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A method over its settings, at matched utility."""

    method: str
    at_loss: Estimate
    area: Estimate


@dataclass(frozen=True)
class Resampled:
    """Both axes of each row in every resample: arrays ``[RESAMPLES]`` by row."""

    x: Mapping[Key, Floats] = field(default_factory=dict)
    y: Mapping[Key, Floats] = field(default_factory=dict)

    def __contains__(self, key: Key) -> bool:
        return key in self.x and key in self.y


def resample(rows: Sequence[Row], tables: Mapping[Key, pd.DataFrame | None], x: str, y: str) -> Resampled:
    """Both axes of the rows on the same resamples of clusters. A row without a fitting table is left out."""
    return Resampled(_draws(rows, tables, x), _draws(rows, tables, y))


def _draws(rows: Sequence[Row], tables: Mapping[Key, pd.DataFrame | None], name: str) -> dict[Key, Floats]:
    from lethebench import stats

    with_score = [
        r for r in rows if r.status == "ok" and name in r.scores and r.scores[name].value is not None
    ]
    found = scorer(with_score[0], name) if with_score else None
    if found is None or not stats.is_mean(*found):
        return {}
    kept = {
        r.key: t
        for r in with_score
        if (t := tables.get(r.key)) is not None and not mismatch(*found, r.scores[name], t)
    }
    return _bootstrap(found[0], found[1], kept)


def _bootstrap(metric: Metric, score: Score, tables: Mapping[Key, pd.DataFrame]) -> dict[Key, Floats]:
    import numpy as np

    from lethebench import stats

    result: dict[Key, Floats] = {}
    clusters: Any = None
    for key, table in tables.items():
        chosen = stats.select(score, table)
        values = chosen[score.column].to_numpy(dtype=float)
        valued = np.isfinite(values)
        names = chosen["cluster"].to_numpy()[valued].astype(str)
        own = np.unique(names)
        clusters = own if clusters is None else clusters
        if len(own) < 2 or not np.array_equal(own, clusters):
            continue
        sums, counts = stats.cluster_sums(values[valued], names)
        indices = stats.rng("leaderboard", key[0], score.name).integers(0, len(own), (RESAMPLES, len(own)))
        result[key] = stats.bootstrap_means(sums, counts, indices)
    return result


# --- curves ---------------------------------------------------------------------------------------


def curves(rows: Sequence[Row], drawn: Resampled, x: str, y: str) -> list[Curve]:
    """Each method's curve, best area first. Settings that the guard flags are no part of one.

    Empty where the axes don't have the directions that suppression and loss are defined for, or where
    the row is missing that all are compared with.
    """
    usable = [r for r in rows if _value(r, x) is not None and _value(r, y) is not None]
    base = measured(usable, reference_of(rows))
    if base is None or base.scores[x].direction != "lower" or base.scores[y].direction != "higher":
        return []
    methods: dict[str, list[Row]] = {}
    for row in usable:
        if not row.control and not row.warnings:
            methods.setdefault(row.method, []).append(row)
    found = [_curve(m, settings, base, drawn, x, y) for m, settings in methods.items()]
    return sorted(found, key=lambda c: (-c.area.value, c.method))


def _value(row: Row, name: str) -> float | None:
    record = row.scores.get(name) if row.status == "ok" else None
    return None if record is None else record.value


def _curve(method: str, settings: Sequence[Row], base: Row, drawn: Resampled, x: str, y: str) -> Curve:
    points = [(cast("float", r.scores[x].value), cast("float", r.scores[y].value)) for r in settings]
    start = cast("float", base.scores[x].value), cast("float", base.scores[y].value)
    at_loss, area = _summary(points, start)
    if base.key not in drawn or not all(r.key in drawn for r in settings):
        return Curve(method, Estimate(at_loss), Estimate(area))
    both = [
        _summary(
            [(drawn.x[r.key][i], drawn.y[r.key][i]) for r in settings],
            (drawn.x[base.key][i], drawn.y[base.key][i]),
        )
        for i in range(RESAMPLES)
    ]
    return Curve(method, _interval(at_loss, [b[0] for b in both]), _interval(area, [b[1] for b in both]))


def _summary(points: Sequence[tuple[float, float]], base: tuple[float, float]) -> tuple[float, float]:
    """Suppression at :data:`LOSS`, and its mean over losses up to :data:`MAX_LOSS`."""
    from lethebench import stats

    gone = [stats.suppression(x, base[0]) for x, _ in points]
    lost = [stats.adherence_loss(y, base[1]) for _, y in points]
    return stats.suppression_at(lost, gone, LOSS), stats.area_under_curve(lost, gone, MAX_LOSS)


def _interval(value: float, drawn: Sequence[float]) -> Estimate:
    import numpy as np

    from lethebench import stats

    return Estimate(value, *stats.percentile_interval(np.asarray(drawn)))


# --- front ----------------------------------------------------------------------------------------

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Front:
    """The Pareto front: its rows, how often each row is on it, and the front of some resamples."""

    rows: frozenset[Key] = frozenset()
    share: Mapping[Key, float] = field(default_factory=dict)
    resampled: tuple[tuple[tuple[float, float], ...], ...] = ()


def front(rows: Sequence[Row], drawn: Resampled, x: str, y: str) -> Front:
    """The front of the methods' unflagged rows: those that no other beats on both axes."""
    from lethebench import stats

    usable = [r for r in rows if _competes(r, x) and _competes(r, y)]
    if not usable:
        return Front()
    better = cast("tuple[Better, Better]", (usable[0].scores[x].direction, usable[0].scores[y].direction))
    if "none" in better:
        return Front()
    points = [(cast("float", r.scores[x].value), cast("float", r.scores[y].value)) for r in usable]
    on = frozenset(r.key for r, yes in zip(usable, stats.pareto_front(points, better), strict=True) if yes)
    if not all(r.key in drawn for r in usable):
        return Front(on)
    counts = dict.fromkeys((r.key for r in usable), 0)
    fronts = []
    for i in range(RESAMPLES):
        points = [(float(drawn.x[r.key][i]), float(drawn.y[r.key][i])) for r in usable]
        flags = stats.pareto_front(points, better)
        for row, yes in zip(usable, flags, strict=True):
            counts[row.key] += yes
        if i < DRAWN_FRONTS:
            fronts.append(tuple(p for p, yes in zip(points, flags, strict=True) if yes))
    return Front(on, {k: n / RESAMPLES for k, n in counts.items()}, tuple(fronts))


def _competes(row: Row, name: str) -> bool:
    return not row.control and not row.warnings and _value(row, name) is not None
