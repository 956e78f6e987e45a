"""Detection statistics against scikit-learn, numpy and naive resampling."""

import numpy as np
import pytest
from sklearn.metrics import auc as trapezoids
from sklearn.metrics import roc_auc_score, roc_curve

from lethebench.detection import CONVENTIONS, detection, roc
from lethebench.metrics.noise_magnitude import auc


def drawn(seed: int, n: int, decimals: int = 9):
    """Values with ties (few decimals: many), and truth that raises them."""
    rng = np.random.default_rng(seed)
    memorized = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + 1.5 * memorized, decimals), memorized


def expected(values, memorized):
    """Every measure, by the lines that the papers' notebooks have, on scikit-learn's whole curve."""
    fpr, tpr, _ = roc_curve(memorized, values, drop_intermediate=False)
    return {
        "auc": roc_auc_score(memorized, values),
        "accuracy": np.max(1 - (fpr + (1 - tpr)) / 2),
        "last-below": tpr[np.where(fpr < 0.01)[0][-1]],
        "closest": tpr[np.argmin(np.abs(fpr - 0.01))],
        "interpolated": np.interp(0.01, fpr, tpr),
    }


def values_of(found):
    return {
        "auc": found.auc.value,
        "accuracy": found.accuracy.value,
        **{name: e.value for name, e in found.tpr.items()},
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "decimals"), [(40, 9), (130, 9), (900, 9), (900, 1), (300, 0)])
def test_measures_equal_sklearn(seed, n, decimals):
    values, memorized = drawn(seed, n, decimals)
    found = detection(values, memorized, np.arange(n), resamples=0)
    assert values_of(found) == pytest.approx(expected(values, memorized), abs=1e-12)
    assert found.auc.value == pytest.approx(auc(memorized, values), abs=1e-12)
    low = detection(-values, memorized, np.arange(n), end="low", resamples=0)
    assert values_of(low) == pytest.approx(values_of(found), abs=1e-12)


def test_weights_count_images_several_times():
    values, memorized = drawn(7, 60, 1)
    weights = np.random.default_rng(8).integers(0, 4, (5, 60))
    fpr, tpr = roc(values, memorized, weights.astype(float))
    for row, counts in enumerate(weights):
        repeated = np.repeat(memorized, counts), np.repeat(values, counts)
        assert trapezoids(fpr[row], tpr[row]) == pytest.approx(roc_auc_score(*repeated), abs=1e-12)


def test_interval_is_the_percentile_bootstrap_over_clusters():
    """A loop that draws clusters of each class and asks scikit-learn has the same spread."""
    values, memorized = drawn(3, 80)
    clusters = np.repeat(np.arange(40), 2)
    memorized = memorized[clusters * 2]
    values = values + 1.5 * memorized
    found = detection(values, memorized, clusters, resamples=4000)
    rng, by_class = np.random.default_rng(0), [np.unique(clusters[memorized == m]) for m in (True, False)]
    loop = []
    for _ in range(300):
        rows = [r for m in by_class for c in rng.choice(m, len(m)) for r in np.flatnonzero(clusters == c)]
        loop.append(roc_auc_score(memorized[rows], values[rows]))
    low, high = np.percentile(loop, [2.5, 97.5])
    assert found.auc.low == pytest.approx(low, abs=0.03) and found.auc.high == pytest.approx(high, abs=0.03)
    assert found.auc.low < found.auc.value < found.auc.high


def test_images_of_one_cluster_do_not_narrow_the_interval():
    values, memorized = drawn(5, 100)
    single = detection(values, memorized, np.arange(100))
    tenfold = detection(*(np.repeat(x, 10) for x in (values, memorized, np.arange(100))))
    assert (
        tenfold.auc == single.auc and tenfold.clusters == 100 and tenfold.negatives == 10 * single.negatives
    )


def test_the_same_input_gives_the_same_record():
    values, memorized = drawn(6, 150)
    clusters = np.array([f"c{i // 3}" for i in range(150)])
    first = detection(values, memorized, clusters, seed_parts=("x",))
    assert detection(values, memorized, clusters, seed_parts=("x",)) == first
    order = np.random.default_rng(0).permutation(150)
    again = detection(values[order], memorized[order], clusters[order], seed_parts=("x",))
    assert again.auc == first.auc and again.tpr == first.tpr
    assert detection(values, memorized, clusters, seed_parts=("y",)).auc.low != first.auc.low


def test_hard_negatives_are_judged_apart():
    rng = np.random.default_rng(1)
    memorized, hard = np.arange(300) < 100, np.arange(300) >= 200
    values = rng.normal(size=300) + 3 * memorized + 2.5 * hard
    found = detection(values, memorized, np.arange(300), hard=hard, resamples=200)
    assert found.hard is not None and found.hard.hard is None
    assert (found.positives, found.negatives, found.hard.negatives) == (100, 100, 100)
    assert found.auc.value == pytest.approx(roc_auc_score(memorized[:200], values[:200]), abs=1e-12)
    rows = memorized | hard
    assert found.hard.auc.value == pytest.approx(roc_auc_score(memorized[rows], values[rows]), abs=1e-12)
    assert found.auc.value > 0.95 and found.hard.auc.value < 0.8
    assert detection(values, memorized, np.arange(300), resamples=0).hard is None


def test_few_negatives_are_told():
    values, memorized = drawn(2, 60)
    assert memorized.sum() > 5
    found = detection(values, memorized, np.arange(60), resamples=0)
    assert found.note.startswith(f"{found.negatives} negatives: 1 % of them is less than one")
    best = values[~memorized].max()
    assert found.tpr["last-below"].value == np.mean(values[memorized] > best)
    assert found.tpr["closest"].value == 0.0
    enough = detection(np.arange(200.0), np.arange(200) >= 100, np.arange(200), resamples=0)
    assert enough.note == "" and set(enough.tpr) == set(CONVENTIONS)


def test_missing_values_and_single_classes():
    found = detection([1.0, np.nan, 2.0, 0.0], np.array([True, True, False, False]), list("abcd"))
    assert (found.positives, found.negatives, found.missing, found.clusters) == (1, 2, 1, 3)
    assert found.auc.value == 0.5 and found.auc.low is None
    for truth in ([True, True], [False, False]):
        alone = detection([1.0, 2.0], np.array(truth), ["a", "b"])
        assert set(values_of(alone).values()) == {None}
    assert detection([], np.zeros(0, bool), []).auc.value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memorized": np.array([1, 0])}, r"memorized must be bool \[2\], as the values; got int64 \[2\]"),
        ({"memorized": np.array([True])}, r"memorized must be bool \[2\]"),
        ({"hard": np.array([True])}, r"hard must be bool \[2\]"),
        ({"clusters": ["a"]}, r"values and clusters must be \[n\]"),
        ({"end": "up"}, "end='up' must be 'high' or 'low'"),
    ],
)
def test_wrong_input_is_one_clear_error(change, message):
    given = {"values": np.array([1.0, 2.0]), "memorized": np.array([True, False]), "clusters": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        detection(**{**given, **change})
