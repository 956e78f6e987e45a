"""What an attack's labels say: shares of items with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from lethebench.attack.record import Share
from lethebench.stats import mean_difference

if TYPE_CHECKING:
    from lethebench.row import Difference

Outcomes = NDArray[np.bool_]
"""Whether each item came out, ``[items]``."""


def share(out: Outcomes) -> Share:
    """The share of items with Wilson's 95 % interval (1927): items are independent, and few."""
    found = binomtest(int(out.sum()), len(out)).proportion_ci(0.95, method="wilson")
    return Share(value=float(out.mean()), low=float(found.low), high=float(found.high), n=len(out))


def difference(
    values: NDArray[np.float64], items: Sequence[str], resamples: int, seed_parts: Sequence[object]
) -> Difference:
    """The mean of paired differences over items (two at least), bootstrapped, with the sign-flip p-value.

    Items are of one cluster each, and so the units of resampling.
    """
    found = mean_difference(values, np.array(items), resamples=resamples, seed_parts=seed_parts)
    assert found is not None
    return found
