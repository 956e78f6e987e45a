"""Statistics against independent implementations, by simulation, and on hand-made tables."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from lethebench import stats
from lethebench.metric import Metric, Score, Shard
from lethebench.prompts import Role
from lethebench.row import Difference, ScoreRecord

MEAN = Score("m", "m", "lower", "share", (0.0, 1.0))
FREE = Score("m", "m", "lower", "x", (-np.inf, np.inf))


class Mean(Metric):
    name, summary = "mean", "a mean"
    scores = (MEAN,)

    def measure(self, shard: Shard) -> dict[str, Any]:
        return {}


class Deviation(Mean):
    """Set-valued: the standard deviation, which grows with the number of different images."""

    name = "deviation"
    set_valued = frozenset({"m"})
    reads = frozenset[str]()

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        return float(np.std(table[score.column].to_numpy(dtype=float)))


def frame(values: Any, clusters: Any = None, **columns: Any) -> pd.DataFrame:
    values = np.asarray(values, dtype=float)
    n = len(values)
    known = {
        "prompt_id": [f"p{i}" for i in range(n)],
        "index": 0,
        "role": "trigger",
        "kind": "verbatim",
        "cluster": [f"c{i}" for i in range(n)] if clusters is None else clusters,
        "category": pd.Series([None] * n, dtype="string"),
        "duplicates": pd.Series([None] * n, dtype="Int64"),
        "trained": pd.Series([True] * n, dtype="boolean"),
        "m": values,
    }
    return pd.DataFrame({**known, **columns})


# --- selection ------------------------------------------------------------------------------------


def test_select_by_role_kind_and_training() -> None:
    table = frame(
        range(5),
        role=["trigger", "control", "control", "neutral", "control"],
        kind=["verbatim", "verbatim", "hard-negative", "neutral", "concept"],
        trained=pd.Series([True, False, True, None, False], dtype="boolean"),
    )

    def chosen(**how: Any) -> list[float]:
        return stats.select(Score("m", "m", "none", "", (0, 1), **how), table)["m"].tolist()

    assert chosen() == [0, 1, 2, 3, 4]
    assert chosen(roles=frozenset({Role.CONTROL})) == [1, 2, 4]
    assert chosen(roles=frozenset({Role.CONTROL}), kinds=frozenset({"verbatim"})) == [1]
    assert chosen(trained=False) == [1, 4]
    assert chosen(trained=True) == [0, 2]


def test_table_survives_parquet(tmp_path: Any) -> None:
    table = frame(
        [0, 1, np.nan, 1],
        name=["a", "", "b", "c"],
        v=[np.ones(2), np.full(2, np.nan), np.ones(2), np.ones(2)],
    )
    table.to_parquet(tmp_path / "t.parquet")
    again = pd.read_parquet(tmp_path / "t.parquet")
    for column, kept in (("m", [0, 1, 3]), ("name", [0, 2, 3]), ("v", [0, 2, 3])):
        score = Score("m", column, "none", "", (0, 1))
        assert [len(stats.valued(score, t)) for t in (table, again)] == [3, 3]
        assert stats.valued(score, again).index.tolist() == kept


# --- intervals ------------------------------------------------------------------------------------


def test_one_image_a_cluster_equals_scipys_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=57)
    record = stats.summarise(
        Mean(), FREE, frame(values, [f"c{i:03d}" for i in range(57)]), resamples=999, seed_parts=("s",)
    )
    expected = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=999,
        method="percentile",
        rng=stats.rng("s", "bootstrap"),
        vectorized=True,
    ).confidence_interval
    assert record.value == pytest.approx(values.mean(), abs=1e-12)
    assert (record.low, record.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (record.n, record.clusters) == (57, 57)


def test_clusters_are_resampled_whole() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 20)
    clusters = np.repeat([f"c{i:02d}" for i in range(20)], sizes)
    values = rng.normal(size=len(clusters)) + np.repeat(rng.normal(size=20), sizes)
    sums, counts = stats.cluster_sums(values, clusters)
    indices = rng.integers(0, 20, (50, 20))
    expected = [np.concatenate([values[clusters == f"c{i:02d}"] for i in draw]).mean() for draw in indices]
    np.testing.assert_allclose(stats.bootstrap_means(sums, counts, indices), expected, atol=1e-12)


def test_intervals_cover_the_truth_and_images_as_units_would_not() -> None:
    rng = np.random.default_rng(1)
    covered, naive, runs = 0, 0, 200
    for run in range(runs):
        means = rng.normal(size=40)
        values = (means[:, None] + 0.3 * rng.normal(size=(40, 4))).ravel()
        by_cluster = frame(values, np.repeat([f"c{i}" for i in range(40)], 4))
        for table, which in ((by_cluster, "cluster"), (frame(values), "image")):
            record = stats.summarise(Mean(), FREE, table, resamples=300, seed_parts=(run,))
            assert record.low is not None and record.high is not None
            inside = record.low <= 0 <= record.high
            covered += inside and which == "cluster"
            naive += inside and which == "image"
    assert 0.90 <= covered / runs <= 0.985
    assert naive / runs < 0.80


def test_a_share_of_none_or_all_has_the_exact_interval() -> None:
    for value, trials in ((0.0, 5), (1.0, 36), (0.0, 200)):
        low, high = stats.exact_share_interval(value, trials)
        expected = proportion_confint(int(value * trials), trials, method="beta")
        assert (low, high) == pytest.approx(expected, abs=1e-12)
    record = stats.summarise(Mean(), MEAN, frame([0.0] * 12, ["a", "b", "c"] * 4))
    assert (record.low, record.high) == pytest.approx(proportion_confint(0, 3, method="beta"))


def test_set_valued_interval_holds_the_value_and_covers() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for run in range(40):
        record = stats.summarise(
            Deviation(), FREE, frame(rng.normal(size=60)), resamples=200, seed_parts=(run,)
        )
        assert record.low <= record.value <= record.high  # type: ignore[operator]
        covered += record.low <= 1 <= record.high  # type: ignore[operator]
    assert covered >= 34


def test_no_images_one_cluster_and_nan() -> None:
    empty = stats.summarise(Mean(), MEAN, frame([]))
    assert (empty.value, empty.low, empty.high, empty.n, empty.clusters) == (None, None, None, 0, 0)
    one = stats.summarise(Mean(), MEAN, frame([0.2, 0.4], ["a", "a"]), frame([0.2, 0.4], ["a", "a"]))
    assert one.value == pytest.approx(0.3)
    assert (one.low, one.high, one.base_difference) == (None, None, None)
    some = stats.summarise(Mean(), MEAN, frame([0.2, np.nan, 0.4]))
    assert (some.value, some.n) == (pytest.approx(0.3), 2)
    assert stats.summarise(Deviation(), MEAN, frame([])).value is None


def test_records_are_json_and_reproducible_in_any_order() -> None:
    rng = np.random.default_rng(3)
    table, base = (frame(rng.random(40), [f"c{i}" for i in range(10)] * 4) for _ in range(2))
    score = Score("m", "m", "lower", "x", (0.0, np.inf))
    for metric in (Mean(), Deviation()):
        first = stats.summarise(metric, score, table, base, seed_parts=("s", 1))
        again = stats.summarise(
            metric, score, table.sample(frac=1, random_state=0), base, seed_parts=("s", 1)
        )
        other = stats.summarise(metric, score, table, base, seed_parts=("s", 2))
        assert first.bounds is None
        assert ScoreRecord.model_validate_json(first.model_dump_json()) == first
        assert first.base_difference is not None and again.base_difference is not None
        for ours, theirs in ((first, again), (first.base_difference, again.base_difference)):
            kept = {"value", "low", "high", "p"}
            assert ours.model_dump(include=kept) == pytest.approx(theirs.model_dump(include=kept), abs=1e-12)
        assert first.low != other.low


# --- differences ----------------------------------------------------------------------------------


def test_difference_is_paired_and_on_the_same_resamples() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(size=80)
    table, base_table = frame(base - 0.1), frame(base)
    record = stats.summarise(
        Mean(), FREE, table, base_table.sample(frac=1, random_state=1), seed_parts=("s",)
    )
    difference = record.base_difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert 0 < difference.p < 1e-9
    ours, theirs = (stats.summarise(Mean(), FREE, t, seed_parts=("s",)) for t in (table, base_table))
    assert ours.low == pytest.approx(theirs.low - 0.1)  # type: ignore[operator]


def test_difference_is_over_the_images_that_both_have() -> None:
    table, base = frame([1.0, 2, np.nan, 4]), frame([0.0, np.nan, 0, 1]).iloc[[0, 1, 3]]
    record = stats.summarise(Mean(), FREE, table, base)
    assert record.value == pytest.approx(7 / 3)
    assert record.base_difference is not None
    assert record.base_difference.value == pytest.approx(((1 - 0) + (4 - 1)) / 2)


def test_p_value_equals_exact_enumeration_and_scipy() -> None:
    rng = np.random.default_rng(5)
    for n in (2, 5, 9, 12):
        sums = rng.normal(0.4, 1, n)
        totals = [abs(np.dot(s, sums)) for s in product((-1, 1), repeat=n)]
        exact = np.mean([t >= abs(sums.sum()) - 1e-12 for t in totals])
        assert stats.sign_flip_p(sums) == pytest.approx(exact, abs=1e-12)
        theirs = scipy.stats.permutation_test(
            (sums,),
            lambda x, axis: np.abs(np.sum(x, axis=axis)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=np.inf,
            vectorized=True,
        )
        assert stats.sign_flip_p(sums) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_drawn_p_value_is_near_the_exact_one_and_never_zero() -> None:
    sums = np.random.default_rng(6).normal(0.5, 1, 14)
    signs = 1 - 2 * (np.arange(2**14)[:, None] >> np.arange(14) & 1)
    exact = np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12)
    assert stats.sign_flip_p(sums, seed_parts=("s",)) == pytest.approx(exact, abs=0.01)
    assert stats.sign_flip_p(np.full(100, 0.5)) == stats.flip_bound(np.full(100, 0.5)) > 0
    assert stats.sign_flip_p(np.zeros(5)) == 1


def test_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(7)
    p = np.array([stats.sign_flip_p(rng.normal(size=10)) for _ in range(2000)])
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("counts", [True, False])
def test_many_rows_can_still_be_told_apart(counts: bool) -> None:
    rng = np.random.default_rng(0)
    noise = rng.binomial(4, 0.1, (60, 80)) if counts else rng.normal(0, 0.3, (60, 80))
    rows = {f"r{i:02}": noise[i] + (0.0 if i < 30 else 2.0) for i in range(60)}
    p = stats.pair_p_values(rows)
    assert len(p) == 60 * 59 / 2
    places = stats.tie_groups({n: float(r.sum()) for n, r in rows.items()}, p, "lower")
    assert max(g.rank for n, g in places.items() if n < "r30") < 31
    assert min(g.rank for n, g in places.items() if n >= "r30") == 31


def test_exact_p_is_that_of_every_flip_tried() -> None:
    for seed in range(30):
        sums = np.random.default_rng(seed).integers(-3, 5, 11)
        assert stats.whole_flip_p(sums) == pytest.approx(stats.sign_flip_p(0.7 * sums))
    sums = np.random.default_rng(1).integers(-3, 4, 80)
    assert stats.whole_flip_p(sums) == pytest.approx(stats.sign_flip_p(0.7 * sums), abs=0.02)


def test_the_bound_of_p_is_one() -> None:
    for seed in range(30):
        sums = np.random.default_rng(seed).normal(0.6, 1.0, 10)
        assert stats.sign_flip_p(sums) <= stats.flip_bound(sums)


def test_set_valued_difference_swaps_whole_clusters() -> None:
    rng = np.random.default_rng(8)
    values, clusters = rng.normal(size=60), np.repeat([f"c{i:02d}" for i in range(20)], 3)
    wide, narrow = frame(3 * values, clusters), frame(values, clusters)
    found = stats.compare(Deviation(), FREE, wide, narrow, seed_parts=("s",))
    assert found is not None and found.low is not None
    assert found.value == pytest.approx(2 * values.std())
    assert found.p == pytest.approx(1 / 201)
    assert found.low > 0
    same = stats.compare(Deviation(), FREE, narrow, narrow, seed_parts=("s",))
    assert same == Difference(value=0, low=0, high=0, p=1)


# --- slices ---------------------------------------------------------------------------------------


def test_slices_by_role_kind_dose_and_category() -> None:
    table = frame(
        [0, 1, 0, 1, 1, 1],
        role=["trigger"] * 4 + ["concept"] * 2,
        kind=["verbatim", "verbatim", "foreground", "foreground", "concept", "concept"],
        duplicates=pd.Series([1, 64, 8, 8, None, None], dtype="Int64"),
        category=pd.Series([None] * 4 + ["comic", "anime"], dtype="string"),
    )
    found = {tuple(sorted(s.where.items())): (s.value, s.n) for s in stats.slices(Mean(), MEAN, table)}
    assert found == {
        (("role", "concept"),): (1, 2),
        (("role", "trigger"),): (0.5, 4),
        (("kind", "concept"),): (1, 2),
        (("kind", "foreground"),): (0.5, 2),
        (("kind", "verbatim"),): (0.5, 2),
        (("category", "anime"),): (1, 1),
        (("category", "comic"),): (1, 1),
        (("duplicates", 1), ("kind", "verbatim")): (0, 1),
        (("duplicates", 64), ("kind", "verbatim")): (1, 1),
    }
    assert stats.slices(Deviation(), MEAN, table) == []


# --- several rows ---------------------------------------------------------------------------------


def test_holm_equals_statsmodels() -> None:
    rng = np.random.default_rng(9)
    for n in (1, 2, 7, 30):
        p = rng.random(n) ** 3
        p[: n // 3] = p[0]
        np.testing.assert_allclose(stats.holm(p.tolist()), multipletests(p, method="holm")[1], atol=1e-12)


def test_tie_groups_follow_the_definition() -> None:
    values = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    p = {
        ("a", "b"): 0.9,
        ("a", "c"): 0.001,
        ("a", "d"): 0.001,
        ("b", "c"): 0.9,
        ("d", "b"): 0.001,
        ("c", "d"): 0.9,
    }
    ranks = stats.tie_groups(values, p, "lower")
    assert {n: (r.rank, r.size) for n, r in ranks.items()} == {
        "a": (1, 2),
        "b": (1, 2),
        "c": (3, 2),
        "d": (3, 2),
    }
    backwards = stats.tie_groups(dict(reversed(values.items())), dict(reversed(p.items())), "lower")
    assert backwards == ranks
    assert stats.tie_groups(values, {}, "higher")["a"].size == 4
    assert stats.tie_groups({}, {}, "lower") == {}


def test_rank_of_rows() -> None:
    rng = np.random.default_rng(10)
    noise = rng.normal(size=(4, 60))
    tables = {
        "best": frame(noise[0]),
        "tied": frame(noise[0] + 0.001 * noise[1]),
        "worse": frame(noise[0] + 1),
        "none": frame(np.full(60, np.nan)),
    }
    ranks = stats.rank(Mean(), FREE, tables)
    assert {n: r.rank for n, r in ranks.items()} == {"best": 1, "tied": 1, "worse": 3}
    with pytest.raises(ValueError, match="can't be ranked by"):
        stats.rank(Mean(), Score("m", "m", "none", "", (0, 1)), tables)


# --- curves ---------------------------------------------------------------------------------------


def test_curves_on_hand_made_points() -> None:
    losses, found = [0.3, 0.1, -0.05, 0.2], [0.9, 0.4, 0.1, 0.2]
    assert stats.suppression_at(losses, found, 0.0) == pytest.approx(0.1)
    assert stats.suppression_at(losses, found, 0.05) == pytest.approx(0.25)
    assert stats.suppression_at(losses, found, 0.2) == pytest.approx(0.4)
    assert stats.suppression_at(losses, found, 5) == pytest.approx(0.9)
    fine = np.linspace(0, 0.3, 30_001)
    mean = np.mean([stats.suppression_at(losses, found, x) for x in fine[::30]])
    assert stats.area_under_curve(losses, found, 0.3) == pytest.approx(mean, abs=1e-3)
    assert stats.area_under_curve([], [], 0.1) == 0
    assert stats.area_under_curve([0.0], [1.0], 0.1) == 1
    with pytest.raises(ValueError, match="must be positive"):
        stats.area_under_curve([], [], 0)
    with pytest.raises(ValueError, match="one of each a setting"):
        stats.suppression_at([0.1], [], 0.1)


def test_suppression_and_loss_are_shares_of_base() -> None:
    assert stats.suppression(0.1, 0.5) == pytest.approx(0.8)
    assert stats.adherence_loss(0.8, 0.8) == 0
    assert stats.suppression(0.1, 0.0) == 0


def test_pareto_front_equals_brute_force() -> None:
    points = [tuple(p) for p in np.random.default_rng(11).integers(0, 6, (40, 2)).tolist()]
    found = stats.pareto_front(points, ("lower", "higher"))
    for point, kept in zip(points, found, strict=True):
        beaten = any(
            (q[0] <= point[0] and q[1] >= point[1]) and (q[0] < point[0] or q[1] > point[1]) for q in points
        )
        assert kept == (not beaten)
    assert stats.pareto_front([], ("lower", "lower")) == []


# --- guards ---------------------------------------------------------------------------------------


def record(value: float | None, p: float | None = None) -> ScoreRecord:
    difference = None if p is None else Difference(value=0, low=0, high=0, p=p)
    return ScoreRecord(
        value=value,
        low=None,
        high=None,
        n=1,
        clusters=1,
        unit="",
        direction="higher",
        metric="x",
        base_difference=difference,
    )


def test_guards_flag_a_broken_row_only() -> None:
    base = {
        "clip_mini.trigger_score": record(0.8),
        "fidelity_mini.diversity": record(0.3),
        "fidelity_mini.broken": record(0.0),
    }
    sound = {"clip_mini.trigger_score": record(0.7, 0.001), "fidelity_mini.diversity": record(0.29, 0.001)}
    blank = {
        "clip_mini.trigger_score": record(0.1, 0.001),
        "fidelity_mini.diversity": record(0.0, 0.005),
        "fidelity_mini.broken": record(1.0, 0.001),
    }
    assert stats.guards(sound, base) == []
    assert len(stats.guards(blank, base)) == 3
    assert all(text.startswith("may win by breaking the model: ") for text in stats.guards(blank, base))
    assert stats.guards({"clip_mini.trigger_score": record(0.1, 0.4)}, base) == []
    assert stats.guards({"clip_mini.trigger_score": record(None)}, base) == []
    assert stats.guards({}, {}) == []
