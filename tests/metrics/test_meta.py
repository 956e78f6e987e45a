"""Detectors against planted truth: the curves equal scikit-learn's, and each comparison is what it says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from lethebench.metrics import meta


def tpr_by_sklearn(positive, values) -> float:
    false, true, _ = roc_curve(positive, values, drop_intermediate=False)
    return float(true[false < 0.01][-1])


def table(n: int = 400) -> pd.DataFrame:
    """Random images of every role with a truth, five to a cluster."""
    rng = np.random.default_rng(1)
    roles = np.array(["trigger", "twin", "hard", "neutral", "concept", "held-out", "probe"])[np.arange(n) % 7]
    kinds = np.array(meta.KINDS)[np.arange(n) % 5]
    kind = np.where(np.isin(roles, ["trigger", "twin"]), kinds, roles)
    kind[roles == "hard"] = "hard-negative"
    kind[np.isin(roles, ["concept", "held-out"])] = "concept"
    label = np.where(roles == "trigger", np.array(["VM", "FM", "BM", "NM"])[rng.integers(0, 4, n)], "")
    label = np.where(np.isin(roles, ["twin", "hard"]), "NM", label).astype(object)
    trained = [True if r in ("trigger", "hard", "concept") else None if r in ("neutral", "probe") else False for r in roles]  # fmt: skip
    return pd.DataFrame(
        {
            "role": [{"twin": "control", "hard": "control", "held-out": "control"}.get(r, r) for r in roles],
            "kind": kind,
            "cluster": [f"{r}{i // 35}" for i, r in enumerate(roles)],
            "duplicates": pd.Series(
                np.where(np.isin(roles, ["trigger", "twin"]), rng.choice([8, 128], n), None), dtype="Int64"
            ),
            "trained": pd.Series(trained, dtype="boolean"),
            "truth_label": label,
            "truth_near_copy": np.where(label == "", np.nan, label == "VM"),
            "score": rng.normal(size=n) + (label == "VM"),
        }
    )


def test_each_comparison_is_the_images_it_names() -> None:
    frame = table()
    by = {(c.name, c.group): c for c in meta.comparisons(frame)}
    role, kind, label = (frame[c].to_numpy() for c in ("role", "kind", "truth_label"))
    held_out = frame["trained"].eq(False).fillna(False).to_numpy(dtype=bool)
    twin, hard = (role == "control") & held_out & (kind != "concept"), kind == "hard-negative"
    expected = {
        ("near_copy", ""): (label == "VM", ((label != "") & (label != "VM")) | (role == "neutral")),
        ("memorized", ""): (np.isin(label, ["VM", "FM", "BM"]), (label == "NM") | (role == "neutral")),
        ("clean", ""): (label == "VM", twin | (role == "neutral")),
        ("twins", ""): (label == "VM", twin),
        ("neutral", ""): (label == "VM", role == "neutral"),
        ("hard_negatives", ""): (label == "VM", hard),
        ("kind", "background"): (
            (kind == "background") & np.isin(label, ["VM", "FM", "BM"]),
            (kind == "background") & (label == "NM"),
        ),
        ("concept", ""): (role == "concept", (role == "control") & (kind == "concept")),
    }
    for key, (positive, negative) in expected.items():
        np.testing.assert_array_equal(by[key].positive, positive, err_msg=str(key))
        np.testing.assert_array_equal(by[key].negative, negative, err_msg=str(key))
    eight = by["duplicates", "8"]
    assert set(frame["duplicates"][eight.positive]) == {8}
    assert set(frame["kind"][eight.positive | eight.negative]) == {"verbatim"}
    np.testing.assert_array_equal(eight.negative, by["duplicates", "128"].negative)
    assert (eight.negative == (twin & (kind == "verbatim"))).all()
    probe = role == "probe"
    assert not any(((c.positive | c.negative) & probe).any() for c in by.values())


@pytest.mark.parametrize("end", ["high", "low"])
def test_a_record_is_the_auc_of_the_images_with_a_value(end: str) -> None:
    frame = table()
    frame.loc[::3, "score"] = np.nan
    sign = 1 if end == "high" else -1
    frame["score"] *= sign
    found = meta.against(frame, {"score": end}, resamples=200)["score"]
    (comparison,) = [c for c in meta.comparisons(frame) if c.name == "near_copy"]
    kept = (comparison.positive | comparison.negative) & frame["score"].notna().to_numpy()
    truth, values = comparison.positive[kept], sign * frame["score"].to_numpy()[kept]
    record = found["near_copy"]
    assert record["auc"]["value"] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    assert record["tpr"]["value"] == pytest.approx(tpr_by_sklearn(truth, values), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    assert record["accuracy"]["value"] == pytest.approx((1 - (fpr + 1 - tpr) / 2).max(), abs=1e-12)
    assert record["tpr_by_convention"]["last-below"] == pytest.approx(record["tpr"]["value"], abs=1e-12)
    assert (record["positives"], record["negatives"]) == (truth.sum(), (~truth).sum())
    assert record["auc"]["low"] < record["auc"]["value"] < record["auc"]["high"]
    assert set(found["kind"]) == set(meta.KINDS) and set(found["duplicates"]) == {"8", "128"}


def test_the_interval_resamples_clusters_not_images() -> None:
    """Ten copies of each image in its own cluster must not narrow the interval."""
    rng = np.random.default_rng(2)
    positive = np.arange(80) < 40
    values = rng.normal(size=80) + positive
    clusters = np.arange(80).astype(str)

    def width(times: int) -> float:
        comparison = meta.Comparison("x", np.repeat(positive, times), ~np.repeat(positive, times))
        found = meta.detector_record(
            np.repeat(values, times), "high", comparison, np.repeat(clusters, times)
        )["auc"]
        return float(found["high"] - found["low"])

    assert width(10) == pytest.approx(width(1), rel=1e-9)
    comparison = meta.Comparison("x", positive, ~positive)
    drawn = []
    for _ in range(400):
        at = rng.integers(0, 80, 80)
        drawn.append(roc_auc_score(positive[at], values[at]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    ours = meta.detector_record(values, "high", comparison, clusters, resamples=2000)["auc"]
    assert ours["low"] == pytest.approx(low, abs=0.02) and ours["high"] == pytest.approx(high, abs=0.02)


def test_what_has_no_figure_is_none() -> None:
    nothing = meta.Comparison("x", np.zeros(4, bool), np.ones(4, bool))
    record = meta.detector_record(np.arange(4.0), "high", nothing, np.arange(4))
    assert record["auc"] == {"value": None, "low": None, "high": None}
    assert (record["positives"], record["negatives"]) == (0, 4)
    one = meta.Comparison("x", np.array([1, 1, 0, 0], bool), np.array([0, 0, 1, 1], bool))
    record = meta.detector_record(np.arange(4.0), "low", one, np.array(["a", "a", "b", "c"]))
    assert record["auc"] == {"value": 1.0, "low": None, "high": None}


def test_a_perfect_detector_has_an_honest_interval() -> None:
    comparison = meta.Comparison("x", np.arange(40) < 10, np.arange(40) >= 10)
    record = meta.detector_record(-np.arange(40.0), "high", comparison, np.arange(40))
    assert record["auc"]["value"] == record["auc"]["high"] == 1
    assert record["auc"]["low"] == pytest.approx(0.025 ** (1 / 10))


def test_labels_are_counted_where_both_are_known() -> None:
    truth = np.array(["VM", "FM", "NM", "NM", "", "BM"], dtype=object)
    labels = np.array(["VM", "NM", "BM", "NM", "VM", ""], dtype=object)
    record = meta.label_record(truth, labels)
    assert record is not None
    assert record["confusion"]["FM"] == {"VM": 0, "FM": 0, "BM": 0, "NM": 1}
    assert sum(sum(r.values()) for r in record["confusion"].values()) == 4
    assert record["accuracy"] == 0.5
    assert record["memorized"] == {"sensitivity": 0.5, "false_positive_rate": 0.5}
    assert meta.label_record(truth, np.full(6, "")) is None
