"""Agreement and corrected shares, against independent implementations."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
import statsmodels.api as sm
from statsmodels.stats.proportion import proportion_confint

from lethebench.metrics.vqa.agreement import nominal_alpha
from lethebench.metrics.vqa.prevalence import Confusion, effective_number, lang_reiczigel, rogan_gladen

MANY = 10**12
"""So many known cases that nothing is uncertain about an error rate."""


@pytest.mark.parametrize("seed", range(20))
def test_alpha_equals_krippendorff(seed: int) -> None:
    rng = np.random.default_rng(seed)
    judges, images = int(rng.integers(2, 6)), int(rng.integers(5, 200))
    truth = rng.random(images) < rng.uniform(0.1, 0.9)
    wrong = rng.random((judges, images)) < rng.uniform(0, 0.5)
    ratings = np.where(truth ^ wrong, 1.0, 0.0)
    ratings[rng.random(ratings.shape) < rng.uniform(0, 0.4)] = np.nan
    expected = krippendorff.alpha(reliability_data=ratings, level_of_measurement="nominal")
    assert nominal_alpha(ratings) == pytest.approx(expected, abs=1e-12)


def test_alpha_where_there_is_nothing_to_agree_on() -> None:
    none = np.full((2, 3), np.nan)
    for ratings in (none, np.ones((2, 3)), np.array([[1.0, np.nan], [np.nan, 0.0]]), np.zeros((2, 0))):
        assert np.isnan(nominal_alpha(ratings))
    assert nominal_alpha(np.array([[1.0, 0, 1], [1, 0, 1]])) == 1


def errors(se: float, sp: float, count: int = MANY) -> Confusion:
    return Confusion(
        round(se * count), count - round(se * count), count - round(sp * count), round(sp * count)
    )


def test_rogan_gladen_undoes_what_errors_do() -> None:
    for se, sp in ((0.9, 0.8), (0.7, 0.6), (1.0, 1.0), (0.55, 0.5)):
        for truth in (0.0, 0.1, 0.5, 1.0):
            seen = truth * se + (1 - truth) * (1 - sp)
            assert rogan_gladen(seen, errors(se, sp)) == pytest.approx(truth, abs=1e-9)
    assert rogan_gladen(0.05, errors(0.9, 0.9)) == 0  # fewer yes than false yes alone would give
    assert rogan_gladen(0.99, errors(0.9, 0.9)) == 1


def test_no_better_than_a_coin_can_not_be_corrected() -> None:
    for judge in (Confusion(5, 5, 5, 5), Confusion(2, 8, 8, 2), Confusion(9, 1, 9, 1), Confusion(0, 0, 0, 9)):
        assert not judge.correctable
        assert np.isnan(rogan_gladen(0.3, judge))
        assert np.isnan(lang_reiczigel(0.3, 100, judge)).all()
        assert judge.facts()["correctable"] == "no: sensitivity + specificity is not above 1"


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [10, 75, 2000])
def test_with_known_errors_the_interval_is_agresti_and_coulls(share: float, count: int) -> None:
    yes = round(share * count)
    low, high = proportion_confint(yes, count, method="agresti_coull")
    ours = lang_reiczigel(yes / count, count, errors(1, 1))
    assert ours == pytest.approx((max(low, 0), min(high, 1)), abs=1e-6)
    se, sp = 0.85, 0.7
    shifted = [min(1, max(0, (limit + sp - 1) / (se + sp - 1))) for limit in (low, high)]
    assert lang_reiczigel(yes / count, count, errors(se, sp)) == pytest.approx(shifted, abs=1e-6)


@pytest.mark.parametrize(("truth", "se", "sp"), [(0.05, 0.95, 0.9), (0.3, 0.85, 0.8), (0.8, 0.7, 0.95)])
def test_the_interval_covers_the_truth(truth: float, se: float, sp: float) -> None:
    """95 % of 1,500 simulated studies of 200 images, 80 positives and 120 negatives: 93 to 99.5 % do."""
    rng = np.random.default_rng(7)
    studies = 1500
    yes = rng.binomial(200, truth * se + (1 - truth) * (1 - sp), studies)
    tp, tn = rng.binomial(80, se, studies), rng.binomial(120, sp, studies)
    limits = np.array(
        [
            lang_reiczigel(y / 200, 200, Confusion(int(a), int(80 - a), int(120 - b), int(b)))
            for y, a, b in zip(yes, tp, tn, strict=True)
        ]
    )
    covered = ((limits[:, 0] <= truth) & (truth <= limits[:, 1])).mean()
    assert 0.93 <= covered <= 0.995


def test_the_interval_is_near_a_parametric_bootstrap() -> None:
    """Of images, positives and negatives together; and wider than with the errors taken as known."""
    share, count, judge = 0.4, 400, Confusion(85, 15, 10, 140)
    rng = np.random.default_rng(1)
    seen = rng.binomial(count, share, 40_000) / count
    se = rng.beta(judge.tp + 1, judge.fn + 1, 40_000)
    sp = rng.beta(judge.tn + 1, judge.fp + 1, 40_000)
    drawn = np.percentile((seen + sp - 1) / (se + sp - 1), [2.5, 97.5])
    ours = np.array(lang_reiczigel(share, count, judge))
    np.testing.assert_allclose(ours, drawn, atol=0.012)
    known = np.array(lang_reiczigel(share, count, errors(judge.sensitivity, judge.specificity)))
    assert np.diff(ours) > 1.1 * np.diff(known)


@pytest.mark.parametrize("seed", range(5))
def test_effective_number_is_that_of_cluster_robust_variance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, 30, 200)
    share = rng.uniform(0, 1, 30)
    values = (rng.random(200) < share[clusters]).astype(float)
    robust = sm.OLS(values, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    p = values.mean()
    expected = min(200, p * (1 - p) / robust.cov_params()[0, 0])
    assert effective_number(values, clusters) == pytest.approx(expected, rel=1e-9)


def test_effective_number_at_its_ends() -> None:
    alike = np.repeat([1.0, 0, 1, 0, 1], 4)  # whole clusters answer alike
    assert effective_number(alike, np.repeat(np.arange(5), 4)) == pytest.approx(4)
    assert effective_number(np.ones(8), np.repeat(["a", "b"], 4)) == 2
    assert effective_number(np.array([1.0, 0]), np.array(["a", "a"])) == 0
    spread = np.tile([0.0, 1], 10)
    assert effective_number(spread, np.repeat(np.arange(10), 2)) == 20
