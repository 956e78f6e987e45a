"""How far two samples of vectors are apart: the kernel two-sample statistic with an interval and a p-value.

The statistic is the squared maximum mean discrepancy of Gretton et al. (JMLR 2012) with the Gaussian kernel
k(x, y) = exp(-|x - y|^2 / (2 h^2)): 0 where the distributions are equal, at most 2. It is estimated by the
mean kernel within A, plus that within B, minus twice that across, **leaving out every pair of images of one
cluster** (of one prompt, say), in all three means. With independent clusters that is unbiased, so it can
fall below 0. Two special cases are Gretton's own: his equation 3 where each image is its own cluster, and
his equation 4 where A and B hold the same prompts, one image each.

Ours, since the paper has neither clusters nor intervals:

- **Bandwidth** h. The median distance between images of different clusters (the paper's heuristic), of a
  sample that the caller names, so that numbers of several rows share one kernel.
- **Interval.** 95 % percentile bootstrap over clusters. A cluster that is drawn twice is not compared with
  its own copy, which keeps the resamples' mean on the value. Where the samples hardly differ the interval
  is too wide (the statistic is degenerate there): the p-value says *whether*, the interval *how far*.
- **p-value**, (1 + as large) / (1 + drawn), never 0. Samples that are paired image by image
  (:func:`paired_two_sample`): A and B change places in whole clusters. Samples of other prompts
  (:func:`two_sample`): clusters are dealt to A and B afresh, which is exact where clusters are alike in size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethebench.seeding import derive_seed
from lethebench.stats import percentile_interval

Floats = NDArray[np.float64]
PERMUTATIONS = 999
RESAMPLES = 1000


@dataclass(frozen=True)
class Separation:
    """The squared maximum mean discrepancy of two samples of ``n`` and ``m`` images."""

    mmd2: float
    low: float
    high: float
    p: float
    n: int
    m: int
    clusters: int
    bandwidth: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def median_bandwidth(vectors: NDArray[Any], clusters: NDArray[Any]) -> float:
    """The median distance between vectors ``[n, d]`` of different clusters; ValueError where it is 0.

    >>> median_bandwidth(np.array([[0.0], [3.0], [4.0]]), np.array(["a", "b", "c"]))
    3.0
    """
    vectors, names = _sample("the sample", vectors, clusters)
    others = names[:, None] != names[None, :]
    found = float(np.median(np.sqrt(_squared_distances(vectors, vectors)[others]))) if others.any() else 0.0
    if found <= 0:
        raise ValueError("no bandwidth: it needs vectors of two clusters, and most of them different")
    return found


def gaussian_kernel(a: NDArray[Any], b: NDArray[Any], bandwidth: float) -> Floats:
    """exp(-|x - y|^2 / (2 bandwidth^2)) of vectors ``[n, d]`` and ``[m, d]``: ``[n, m]``."""
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth must be above 0; got {bandwidth}")
    return np.asarray(np.exp(_squared_distances(a, b) / (-2 * bandwidth**2)))


def paired_two_sample(
    a: NDArray[Any],
    b: NDArray[Any],
    clusters: NDArray[Any],
    *,
    bandwidth: float,
    permutations: int = PERMUTATIONS,
    resamples: int = RESAMPLES,
    seed_parts: tuple[object, ...] = (),
) -> Separation:
    """The separation of ``a`` from ``b``, both ``[n, d]``, row by row the same prompt and noise.

    ``clusters`` ``[n]`` are the images' clusters. Raises ValueError for other shapes, for values that are not
    finite, and for fewer than two clusters.
    """
    a, names = _sample("a", a, clusters)
    b, _ = _sample("b", b, clusters)
    if a.shape != b.shape:
        raise ValueError(f"paired samples must have one shape; got {list(a.shape)} and {list(b.shape)}")
    codes = _codes(names)
    aa, bb, ab = (
        _between(gaussian_kernel(x, y, bandwidth), codes, codes) for x, y in ((a, a), (b, b), (a, b))
    )
    difference = aa + bb - ab - ab.T
    sizes = np.bincount(codes).astype(np.float64)
    ones = np.ones((1, len(sizes)))
    value = _ratio(difference, sizes, ones)[0]
    random = _rng("interval", seed_parts)
    drawn = _ratio(difference, sizes, _resampled(random, len(sizes), resamples))
    signs = _rng("p", seed_parts).choice([-1.0, 1.0], (permutations, len(sizes)))
    null = _quadratic(signs, difference, signs) / _pairs(sizes, ones)
    return _separation(value, drawn, null, len(a), len(b), len(sizes), bandwidth)


def two_sample(
    a: NDArray[Any],
    b: NDArray[Any],
    clusters_a: NDArray[Any],
    clusters_b: NDArray[Any],
    *,
    bandwidth: float,
    permutations: int = PERMUTATIONS,
    resamples: int = RESAMPLES,
    seed_parts: tuple[object, ...] = (),
) -> Separation:
    """The separation of ``a`` ``[n, d]`` from ``b`` ``[m, d]``, samples of different prompts.

    Raises ValueError for other shapes, for values that are not finite, for clusters that are in both
    samples, and for fewer than two clusters in either.
    """
    a, names_a = _sample("a", a, clusters_a)
    b, names_b = _sample("b", b, clusters_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"samples must be of one width; got {a.shape[1]} and {b.shape[1]}")
    if set(names_a) & set(names_b):
        raise ValueError("a cluster is in both samples: compare them with paired_two_sample")
    pooled, codes = np.concatenate([a, b]), np.concatenate([_codes(names_a), _codes(names_b)])
    in_a = int(_codes(names_a).max()) + 1
    codes[len(a) :] += in_a
    between = _between(gaussian_kernel(pooled, pooled, bandwidth), codes, codes)
    sizes = np.bincount(codes).astype(np.float64)
    which = (np.arange(len(sizes)) < in_a).astype(np.float64)
    value = _discrepancy(between, sizes, which[None], 1 - which[None])[0]
    random = _rng("interval", seed_parts)
    weights = np.concatenate(
        [_resampled(random, count, resamples) for count in (in_a, len(sizes) - in_a)], axis=1
    )
    drawn = _discrepancy(between, sizes, weights * which, weights * (1 - which))
    dealt = _rng("p", seed_parts).permuted(np.tile(which, (permutations, 1)), axis=1)
    null = _discrepancy(between, sizes, dealt, 1 - dealt)
    return _separation(value, drawn, null, len(a), len(b), len(sizes), bandwidth)


# --- estimates ------------------------------------------------------------------------------------
# ``between`` [c, c] holds the sum of the kernel over the pairs of images of two clusters, its diagonal 0;
# ``sizes`` [c] the clusters' images; weights [r, c] how often each of r resamples takes each cluster.


def _discrepancy(between: Floats, sizes: Floats, in_a: Floats, in_b: Floats) -> Floats:
    """The statistic in each resample: clusters are taken ``in_a`` times for A, ``in_b`` times for B."""
    across = _quadratic(in_a, between, in_b) / ((in_a @ sizes) * (in_b @ sizes))
    return _ratio(between, sizes, in_a) + _ratio(between, sizes, in_b) - 2 * across


def _ratio(between: Floats, sizes: Floats, weights: Floats) -> Floats:
    """The mean over pairs of images of different clusters; NaN where a resample has one cluster only."""
    pairs = _pairs(sizes, weights)
    found = np.full(len(weights), np.nan)
    np.divide(_quadratic(weights, between, weights), pairs, out=found, where=pairs > 0)
    return found


def _pairs(sizes: Floats, weights: Floats) -> Floats:
    return np.asarray((weights @ sizes) ** 2 - (weights**2) @ sizes**2)


def _quadratic(left: Floats, matrix: Floats, right: Floats) -> Floats:
    return np.asarray(((left @ matrix) * right).sum(axis=1))


def _between(kernel: Floats, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Floats:
    count = int(rows.max()) + 1
    sums = np.zeros((count, kernel.shape[1]))
    np.add.at(sums, rows, kernel)
    found = np.zeros((count, count))
    np.add.at(found.T, columns, sums.T)
    np.fill_diagonal(found, 0.0)
    return found


def _separation(
    value: float, drawn: Floats, null: Floats, n: int, m: int, clusters: int, bandwidth: float
) -> Separation:
    low, high = percentile_interval(drawn)
    # Sums of one set of numbers in another order differ in their last digits: those are as large, too.
    p = (1 + int((null >= value - 1e-12).sum())) / (1 + len(null))
    return Separation(float(value), min(low, value), max(high, value), p, n, m, clusters, bandwidth)


def _resampled(random: np.random.Generator, clusters: int, resamples: int) -> Floats:
    """How often each of ``resamples`` bootstrap samples takes each cluster."""
    counts = random.multinomial(clusters, np.full(clusters, 1 / clusters), resamples)
    return np.asarray(counts, dtype=np.float64)


def _rng(what: str, seed_parts: tuple[object, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed("two-sample", what, *seed_parts)))


def _squared_distances(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), "sqeuclidean"))


def _codes(names: NDArray[Any]) -> NDArray[np.intp]:
    return np.unique(names, return_inverse=True)[1].astype(np.intp)


def _sample(name: str, vectors: NDArray[Any], clusters: NDArray[Any]) -> tuple[Floats, NDArray[Any]]:
    vectors, names = np.asarray(vectors, dtype=np.float64), np.asarray(clusters).astype(str)
    if vectors.ndim != 2 or names.shape != (len(vectors),):
        raise ValueError(
            f"{name} must be vectors [n, d] with n clusters; got {list(vectors.shape)}, {list(names.shape)}"
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name} holds values that are not finite: leave those images out")
    if len(set(names)) < 2:
        raise ValueError(f"{name} has {len(set(names))} clusters: a separation needs two at least")
    return vectors, names
