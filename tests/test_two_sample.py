"""The kernel two-sample test: against naive loops, torchmetrics and closed forms; calibrated; bad input."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torchmetrics.image.kid import maximum_mean_discrepancy

from lethebench import two_sample as module
from lethebench.two_sample import gaussian_kernel, median_bandwidth, paired_two_sample, two_sample

Array = np.ndarray[Any, Any]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def naive(a: Array, b: Array, of_a: Array, of_b: Array, h: float) -> float:
    """The definition, pair by pair."""

    def mean(x: Array, y: Array, of_x: Array, of_y: Array) -> float:
        kept = [
            np.exp(-((x[i] - y[j]) ** 2).sum() / (2 * h**2))
            for i in range(len(x))
            for j in range(len(y))
            if of_x[i] != of_y[j]
        ]
        return float(np.mean(kept))

    return mean(a, a, of_a, of_a) + mean(b, b, of_b, of_b) - 2 * mean(a, b, of_a, of_b)


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_paired_statistic_is_the_naive_double_loop(seed: int) -> None:
    r = rng(seed)
    a = r.standard_normal((17, 5))
    b = a + 0.5 * r.standard_normal((17, 5)) + 0.3
    clusters = r.integers(0, 7, 17)
    found = paired_two_sample(a, b, clusters, bandwidth=2.0, permutations=9, resamples=9)
    assert found.mmd2 == pytest.approx(naive(a, b, clusters, clusters, 2.0), abs=1e-12)
    assert (found.n, found.m, found.clusters) == (17, 17, len(set(clusters)))


@pytest.mark.parametrize("seed", range(5))
def test_unpaired_statistic_is_the_naive_double_loop(seed: int) -> None:
    r = rng(seed, 1)
    a, b = r.standard_normal((17, 5)), r.standard_normal((23, 5)) + 0.4
    of_a, of_b = r.integers(0, 7, 17), r.integers(10, 18, 23)
    found = two_sample(a, b, of_a, of_b, bandwidth=1.5, permutations=9, resamples=9)
    assert found.mmd2 == pytest.approx(naive(a, b, of_a, of_b, 1.5), abs=1e-12)


def test_one_image_a_cluster_is_torchmetrics_unbiased_statistic() -> None:
    r = rng(2)
    a, b = r.standard_normal((40, 6)), r.standard_normal((40, 6)) + 0.3
    h = 2.2
    kernels = [torch.from_numpy(rbf_kernel(x, y, gamma=1 / (2 * h * h))) for x, y in ((a, a), (a, b), (b, b))]
    theirs = float(maximum_mean_discrepancy(*kernels))
    found = two_sample(a, b, np.arange(40), np.arange(40, 80), bandwidth=h, permutations=9, resamples=9)
    assert found.mmd2 == pytest.approx(theirs, abs=1e-12)
    assert np.abs(gaussian_kernel(a, b, h) - kernels[1].numpy()).max() < 1e-12


def test_bandwidth_is_the_median_distance_between_clusters() -> None:
    r = rng(3)
    x, clusters = r.standard_normal((20, 3)), np.repeat(np.arange(10), 2)
    distances = [
        np.linalg.norm(x[i] - x[j]) for i in range(20) for j in range(20) if clusters[i] != clusters[j]
    ]
    assert median_bandwidth(x, clusters) == pytest.approx(np.median(distances))


def test_the_same_images_are_no_distance_apart() -> None:
    a = rng(4).standard_normal((30, 4))
    found = paired_two_sample(a, a.copy(), np.arange(30), bandwidth=2.0)
    assert found.mmd2 == pytest.approx(0, abs=1e-14) and found.p == 1.0
    assert abs(found.low) < 1e-12 and abs(found.high) < 1e-12


def test_a_shift_is_found_and_a_larger_one_is_farther() -> None:
    a = rng(5).standard_normal((60, 4))
    near, far = (paired_two_sample(a, a + shift, np.arange(60), bandwidth=2.0) for shift in (0.3, 1.0))
    assert near.p == far.p == 1 / 1000
    assert 0 < near.low < near.mmd2 < near.high < far.low


def test_p_is_uniform_where_nothing_differs() -> None:
    """400 tables each; the share below alpha must be within 3.3 standard errors of alpha."""
    paired, unpaired = [], []
    for seed in range(400):
        r = rng(seed, 6)
        clusters = np.repeat(np.arange(12), 2)
        common = r.standard_normal((24, 4)) + r.standard_normal((12, 4))[clusters]
        a, b = (common + 0.3 * r.standard_normal((24, 4)) for _ in range(2))
        options: dict[str, Any] = {"permutations": 99, "resamples": 2, "seed_parts": (seed,)}
        paired.append(paired_two_sample(a, b, clusters, bandwidth=3.0, **options).p)
        c = r.standard_normal((24, 4)) + r.standard_normal((12, 4))[clusters]
        d = r.standard_normal((20, 4)) + r.standard_normal((10, 4))[clusters[:20]]
        unpaired.append(two_sample(c, d, clusters, clusters[:20] + 50, bandwidth=3.0, **options).p)
    for p in (np.array(paired), np.array(unpaired)):
        for alpha in (0.05, 0.2, 0.5):
            assert abs((p <= alpha).mean() - alpha) < 3.3 * np.sqrt(alpha * (1 - alpha) / 400)


def test_interval_covers_the_closed_form_between_gaussians() -> None:
    """E k(x, y) of unit normals in d dimensions, delta apart: (1 + 2/h^2)^(-d/2) exp(-delta^2 / (2 (h^2 + 2)))."""
    d, h, shift, size = 8, 4.0, 0.5, 60
    same = (1 + 2 / h**2) ** (-d / 2)
    truth = 2 * same - 2 * same * np.exp(-(shift**2) * d / (2 * (h**2 + 2)))
    found = []
    for seed in range(150):
        r = rng(seed, 7)
        a, b = r.standard_normal((size, d)), r.standard_normal((size, d)) + shift
        found.append(
            two_sample(
                a,
                b,
                np.arange(size),
                np.arange(size) + 99,
                bandwidth=h,
                permutations=1,
                resamples=300,
                seed_parts=(seed,),
            )
        )
    values = np.array([f.mmd2 for f in found])
    assert abs(values.mean() - truth) < 3.5 * values.std() / np.sqrt(150), "unbiased"
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.89


def test_order_of_images_does_not_matter_and_seeds_do() -> None:
    r = rng(8)
    a, clusters = r.standard_normal((30, 3)), np.repeat(np.arange(15), 2)
    b = a + 0.4 * r.standard_normal((30, 3))
    order = r.permutation(30)
    first = paired_two_sample(a, b, clusters, bandwidth=2.0, seed_parts=("x",))
    again = paired_two_sample(a[order], b[order], clusters[order], bandwidth=2.0, seed_parts=("x",))
    for name in ("mmd2", "low", "high", "p"):
        assert getattr(first, name) == pytest.approx(getattr(again, name), abs=1e-12)
    other = paired_two_sample(a, b, clusters, bandwidth=2.0, seed_parts=("y",))
    assert other.mmd2 == first.mmd2 and other.low != first.low


def test_global_random_state_is_not_touched() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1]
    a = rng(9).standard_normal((6, 2))
    paired_two_sample(a, a + 1, np.arange(6), bandwidth=1.0)
    assert np.array_equal(before, np.random.get_state()[1])


GOOD = np.arange(12.0).reshape(6, 2)
BAD = GOOD.copy()
BAD[2, 1] = np.nan
SIX = np.arange(6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired_two_sample(GOOD, GOOD[:5], SIX, bandwidth=1.0), "n clusters"),
        (lambda: paired_two_sample(GOOD, GOOD[:, :1], SIX, bandwidth=1.0), "one shape"),
        (lambda: paired_two_sample(BAD, GOOD, SIX, bandwidth=1.0), "not finite"),
        (lambda: paired_two_sample(GOOD, GOOD, SIX * 0, bandwidth=1.0), "needs two at least"),
        (lambda: paired_two_sample(GOOD[:0], GOOD[:0], SIX[:0], bandwidth=1.0), "0 clusters"),
        (lambda: two_sample(GOOD, GOOD, SIX, SIX, bandwidth=1.0), "in both samples"),
        (lambda: two_sample(GOOD, GOOD[:, :1], SIX, SIX + 9, bandwidth=1.0), "one width"),
        (lambda: two_sample(GOOD, GOOD, SIX, SIX + 9, bandwidth=0.0), "bandwidth must be"),
        (lambda: median_bandwidth(np.ones((6, 2)), SIX), "no bandwidth"),
    ],
)
def test_bad_input_is_one_clear_line(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
