"""Agreement between judges beyond chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nominal_alpha(ratings: NDArray[np.float64]) -> float:
    """Krippendorff's alpha (2011) for nominal values: ``ratings`` ``[judges, images]``, NaN where missing.

    1 is full agreement, 0 what chance would give; below 0 the judges contradict each other. Images with
    fewer than two values don't count. NaN where no image has two, or all values are the same (there is
    nothing to agree on).
    """
    ratings = np.asarray(ratings, dtype=np.float64)
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = np.stack([(ratings == value).sum(axis=0) for value in values] or [np.zeros(ratings.shape[1])])
    pairable = counts[:, counts.sum(axis=0) > 1].astype(np.float64)
    totals, judges = pairable.sum(axis=1), pairable.sum(axis=0)
    n = totals.sum()
    expected = n**2 - totals @ totals
    if expected == 0:
        return float("nan")
    observed = ((judges**2 - (pairable**2).sum(axis=0)) / (judges - 1)).sum()
    return float(1 - (n - 1) * observed / expected)
