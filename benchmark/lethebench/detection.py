"""How well a value tells memorized images from others: AUC, accuracy, and TPR at 1 % FPR, with intervals.

An image is called memorized if its value reaches a threshold; the ROC curve has a point for every threshold
that the values allow, none left out, and starts at (0, 0).

- **AUC**: area under it by trapezoids (ties count half).
- **Accuracy**: the greatest of 1 - (FPR + 1 - TPR) / 2, as in Wen et al.'s notebook: both classes weigh
  the same.
- **TPR at 1 % FPR** by three conventions, because papers differ:

  - ``last-below``: at the last point with FPR < 0.01 (Wen et al.);
  - ``closest``: at the first of the points whose FPR is closest to 0.01 (Ren et al., Jeon et al.). Their
    code thins the curve first (scikit-learn's ``drop_intermediate``) and may land on another point;
  - ``interpolated``: at FPR = 0.01 on straight lines between points (ours).

With fewer than 100 negatives 1 % is less than one of them, and the conventions part: ``last-below`` is the
TPR with no false positive; ``interpolated`` reads the line towards the first one; ``closest`` is the TPR just
before the first one if its FPR is below 0.02, else 0 (fewer than 51 negatives, or ties: the closest point is
then the curve's start). The record's ``note`` says so.

Intervals are 95 % percentiles of a bootstrap over prompt clusters (Efron 1979), clusters with a memorized
image and clusters without drawn apart, each as many as there are. They aren't centred, and don't cover what
lies beyond the sample: perfect separation has the interval 1 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.stats import percentile_interval, rng

Floats = NDArray[np.float64]
FPR = 0.01
FEW = 100
"""Negatives below which a TPR at 1 % FPR says little."""
CONVENTIONS = ("last-below", "closest", "interpolated")
_CELLS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; None where there is none (one class only, fewer than two clusters of one)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Detection:
    """How well one column detects. ``tpr`` is by convention (:data:`CONVENTIONS`).

    ``missing`` counts images without a value, which are left out. ``hard`` is the same against hard
    negatives alone, None where none were named; the record itself is against the others.
    """

    auc: Estimate
    accuracy: Estimate
    tpr: Mapping[str, Estimate]
    positives: int
    negatives: int
    clusters: int
    missing: int
    note: str
    hard: Detection | None = None


def detection(
    values: NDArray[Any],
    memorized: NDArray[Any],
    clusters: NDArray[Any] | Sequence[Any],
    *,
    hard: NDArray[Any] | None = None,
    end: Literal["high", "low"] = "high",
    resamples: int = 2000,
    seed_parts: Sequence[object] = (),
) -> Detection:
    """How well ``values`` ``[n]`` tell the ``memorized`` images (bool ``[n]``) from the others.

    ``clusters`` ``[n]`` are the units of resampling; ``end`` is the end of the values that says memorized;
    ``hard`` (bool ``[n]``) marks hard negatives, which are judged apart. NaN values are left out and counted.
    Raises ValueError for arrays of different lengths or truth that is not bool.

    >>> detection(np.array([3.0, 2.0, 1.0]), np.array([True, False, False]), ["a", "b", "c"]).auc.value
    1.0
    """
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters).astype(str)
    memorized = _truth("memorized", memorized, len(values))
    marked = np.zeros(len(values), dtype=bool) if hard is None else _truth("hard", hard, len(values))
    if values.ndim != 1 or clusters.shape != values.shape:
        raise ValueError(
            f"detection: values and clusters must be [n]; got {list(values.shape)} and {list(clusters.shape)}"
        )
    if end not in ("high", "low"):
        raise ValueError(f"detection: end={end!r} must be 'high' or 'low'")
    scores = values if end == "high" else -values

    def against(negatives: NDArray[np.bool_], name: str, apart: Detection | None = None) -> Detection:
        rows = memorized | negatives
        parts = (*seed_parts, "detection", name)
        return _detection(scores[rows], memorized[rows], clusters[rows], resamples, parts, apart)

    difficult = against(~memorized & marked, "hard") if (marked & ~memorized).any() else None
    return against(~memorized & ~marked, "all", difficult)


def _truth(name: str, given: Any, count: int) -> NDArray[np.bool_]:
    found = np.asarray(given)
    if found.dtype != bool or found.shape != (count,):
        raise ValueError(
            f"detection: {name} must be bool [{count}], as the values; got {found.dtype} {list(found.shape)}"
        )
    return found


def _detection(
    scores: Floats,
    memorized: NDArray[np.bool_],
    clusters: NDArray[Any],
    resamples: int,
    seed_parts: Sequence[object],
    apart: Detection | None,
) -> Detection:
    known = ~np.isnan(scores)
    scores, memorized, clusters = scores[known], memorized[known], clusters[known]
    names, code = np.unique(clusters, return_inverse=True)
    values = {
        name: float(v[0]) for name, v in _measures(scores, memorized, np.ones((1, len(scores)))).items()
    }
    drawn = _resampled(scores, memorized, code, resamples, seed_parts)
    estimates = {name: _estimate(values[name], drawn.get(name)) for name in values}
    negatives = int((~memorized).sum())
    note = ""
    if negatives < FEW:
        note = f"{negatives} negatives: 1 % of them is less than one, so the TPR at 1 % FPR degenerates"
    return Detection(
        auc=estimates["auc"],
        accuracy=estimates["accuracy"],
        tpr={name: estimates[name] for name in CONVENTIONS},
        positives=int(memorized.sum()),
        negatives=negatives,
        clusters=len(names),
        missing=int((~known).sum()),
        note=note,
        hard=apart,
    )


def _estimate(value: float, drawn: Floats | None) -> Estimate:
    if np.isnan(value):
        return Estimate(None, None, None)
    if drawn is None or np.isnan(drawn).all():
        return Estimate(value, None, None)
    return Estimate(value, *percentile_interval(drawn))


# --- the curve ------------------------------------------------------------------------------------


def roc(scores: Floats, memorized: NDArray[np.bool_], weights: Floats | None = None) -> tuple[Floats, Floats]:
    """FPR and TPR at each threshold, falling, from (0, 0) to (1, 1): each ``[r, thresholds + 1]``.

    ``weights`` ``[r, n]`` say how often each image counts (once by default, r = 1). NaN where a class has
    no weight.
    """
    if weights is None:
        weights = np.ones((1, len(scores)))
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], memorized[order]
    last = (
        np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(scores) else np.zeros(0, np.intp)
    )

    def rate(of: NDArray[np.bool_]) -> Floats:
        counts = np.cumsum(weights[:, order] * of, axis=1)[:, last]
        total = counts[:, -1:] if counts.shape[1] else np.zeros((len(weights), 1))
        counts = np.concatenate([np.zeros((len(weights), 1)), counts], axis=1)
        return np.where(total > 0, counts / np.where(total > 0, total, 1), np.nan)

    return rate(~positive), rate(positive)


def _measures(scores: Floats, memorized: NDArray[np.bool_], weights: Floats) -> dict[str, Floats]:
    """Each measure, ``[r]``, under weights ``[r, n]``."""
    fpr, tpr = roc(scores, memorized, weights)
    one_class = np.isnan(fpr[:, 0]) | np.isnan(tpr[:, 0])
    fpr, tpr = np.nan_to_num(fpr), np.nan_to_num(tpr)
    found = {
        "auc": (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2).sum(axis=1),
        "accuracy": (1 - (fpr + 1 - tpr) / 2).max(axis=1),
        "last-below": _at(tpr, (fpr < FPR).sum(axis=1) - 1),
        "closest": _at(tpr, np.abs(fpr - FPR).argmin(axis=1)),
        "interpolated": _interpolated(fpr, tpr),
    }
    return {name: np.where(one_class, np.nan, value) for name, value in found.items()}


def _at(values: Floats, index: NDArray[np.intp]) -> Floats:
    return np.asarray(np.take_along_axis(values, index[:, None], axis=1)[:, 0])


def _interpolated(fpr: Floats, tpr: Floats) -> Floats:
    before = (fpr <= FPR).sum(axis=1) - 1
    after = np.minimum(before + 1, fpr.shape[1] - 1)
    low, high = _at(fpr, before), _at(fpr, after)
    share = np.where(high > low, (FPR - low) / np.where(high > low, high - low, 1), 0.0)
    return _at(tpr, before) + share * (_at(tpr, after) - _at(tpr, before))


# --- the bootstrap --------------------------------------------------------------------------------


def _resampled(
    scores: Floats,
    memorized: NDArray[np.bool_],
    code: NDArray[np.intp],
    resamples: int,
    seed_parts: Sequence[object],
) -> dict[str, Floats]:
    """Each measure in each resample of clusters; empty with fewer than two clusters of a class."""
    clusters = int(code.max()) + 1 if len(code) else 0
    with_positive = np.bincount(code[memorized], minlength=clusters) > 0
    strata = [np.flatnonzero(with_positive), np.flatnonzero(~with_positive)]
    if not resamples or min(len(s) for s in strata) < 2:
        return {}
    drawn = np.zeros((resamples, clusters))
    generator = rng(*seed_parts, "bootstrap")
    for members in strata:
        share = np.full(len(members), 1 / len(members))
        drawn[:, members] = generator.multinomial(len(members), share, size=resamples)
    size = max(1, _CELLS // len(scores))
    parts = [
        _measures(scores, memorized, drawn[start : start + size][:, code])
        for start in range(0, resamples, size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
