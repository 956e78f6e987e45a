"""Frechet distance and kernel distance of two sets of features: pure functions over arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROWS = 2048
"""Rows of a kernel matrix that are held at once."""


class Draws(Protocol):
    """What a subset is drawn with: a numpy Generator, or a RandomState."""

    def choice(self, a: int, size: int, replace: bool) -> Any:
        """``size`` of the numbers below ``a``."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian by its mean ``[d]`` and a root ``[d, r]`` of its covariance: ``root @ root.T``."""

    mean: Floats
    root: Floats

    @classmethod
    def of_features(cls, features: NDArray[Any], *, thin: bool = True) -> Gaussian:
        """Fitted to features ``[n, d]``, n > 1, with the unbiased covariance; exact for n <= d too.

        ``thin`` makes a root of no more than d columns by an eigendecomposition: worth it for a Gaussian
        that is compared often.
        """
        x = np.asarray(features, dtype=np.float64)
        mean = x.mean(axis=0)
        centred = (x - mean) / np.sqrt(len(x) - 1)
        return cls(mean, _small_root(centred) if thin else centred.T)

    @classmethod
    def of_moments(cls, mean: NDArray[Any], covariance: NDArray[Any]) -> Gaussian:
        """From a mean ``[d]`` and a covariance ``[d, d]``."""
        cov = np.asarray(covariance, dtype=np.float64)
        return cls(np.asarray(mean, dtype=np.float64), _root((cov + cov.T) / 2))


def _small_root(centred: Floats) -> Floats:
    """A root of ``centred.T @ centred`` with no more than d columns."""
    return centred.T if len(centred) <= centred.shape[1] else _root(centred.T @ centred)


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017 for its use).

    ``|ma - mb|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))``. With ``A = R R'`` and ``B = S S'`` the last trace is
    the sum of the singular values of ``R' S``: exact for singular covariances, where a matrix square root
    needs an offset, and no larger than the smaller number of images. Raises ValueError for two dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions can't be compared")
    product = a.root.T @ b.root
    small = product @ product.T if len(product) <= product.shape[1] else product.T @ product
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(small), 0)).sum()
    shift = a.mean - b.mean
    # Rounding leaves about 1e-9 of the traces, of either sign: a distance is not negative.
    return max(0.0, float(shift @ shift + (a.root**2).sum() + (b.root**2).sum() - 2 * cross))


def mean_kernel(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """The mean over ``b`` of the polynomial kernel ``(x . y / d + 1)^3``, for each of ``a``: ``[n, d]``,
    ``[m, d]`` to ``[n]``. Raises ValueError for two dimensions.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions can't be compared")
    found = np.empty(len(x))
    for i in range(0, len(x), ROWS):
        kernel = x[i : i + ROWS] @ y.T / x.shape[1] + 1
        found[i : i + ROWS] = (kernel * kernel * kernel).mean(axis=1)
    return found


def within(features: NDArray[Any]) -> float:
    """The mean kernel over the pairs of two different images of ``[n, d]``, n > 1."""
    x = np.asarray(features, dtype=np.float64)
    n, d = x.shape
    own = (((x * x).sum(axis=1) / d + 1) ** 3).mean()
    return float((n * mean_kernel(x, x).mean() - own) / (n - 1))


def kernel_distance(
    generated: NDArray[Any],
    reference: NDArray[Any],
    *,
    subsets: int = 0,
    subset_size: int = 1000,
    draws: Draws | None = None,
) -> float:
    """KID (Binkowski et al. 2018, eq. 4): the unbiased squared MMD with the cubic polynomial kernel.

    ``subsets=0`` takes all pairs at once, which draws nothing. Otherwise it is the mean over ``subsets``
    random subsets of both sets, without replacement, of the size ``min(n, m, subset_size)``, as clean-fid and
    torch-fidelity do: its expectation over the draws is the value over all pairs. May be negative. NaN with
    fewer than two of either.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if min(len(x), len(y)) < 2:
        return float("nan")
    if not subsets:
        return within(x) + within(y) - 2 * float(mean_kernel(x, y).mean())
    if draws is None:
        raise ValueError("subsets are drawn: give what to draw with")
    size = min(len(x), len(y), subset_size)
    found = []
    for _ in range(subsets):
        a = x[draws.choice(len(x), size, replace=False)]
        b = y[draws.choice(len(y), size, replace=False)]
        found.append(within(a) + within(b) - 2 * float(mean_kernel(a, b).mean()))
    return float(np.mean(found))
