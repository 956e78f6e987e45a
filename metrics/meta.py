"""Metrics measured against the planted truth: what each of them sees, and how often it is wrong.

A *detector* is a per-image column that should tell memorized images from others, and the end of it (high or
low) that says memorized (:func:`lethebench.metric.detectors`). Here it is held against what was really
copied, which only a planted world knows (the columns of ``planted-truth``), or, for prompts about a concept,
against which characters were in the training set. ``lethe metrics`` prints what these functions find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lethebench.metrics._common import HARD_NEGATIVE

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.detection import Estimate

Mask = NDArray[np.bool_]

LABELS = ("VM", "FM", "BM", "NM")
KINDS = ("verbatim", "foreground", "background", "one-to-many", "redundant-trigger")
"""Planted kinds in the order of the tables."""
RESAMPLES = 1000
TPR = "last-below"
"""The convention of the true-positive rate at 1 % false positives: see :mod:`lethebench.detection`."""

CONVENTIONS = {
    "near_copy": "Positive: near copies of an own training image (pixel RMS below 0.08). Negative: every "
    "other image of a prompt that may reproduce single images, and images of neutral prompts.",
    "memorized": "Positive: foreground, background or both copied. Negative: neither, and neutral prompts.",
    "clean": "Near copies against images of never-memorized twins and of neutral prompts.",
    "twins": "Near copies against images of never-memorized twins.",
    "neutral": "Near copies against images of neutral prompts.",
    "hard_negatives": "Near copies against images of rare-name captions that were seen once.",
    "kind": "Within one kind of planted item: images with a copied region against the others.",
    "duplicates": "Verbatim items with that many copies: images with a copied region against images of all "
    "verbatim twins.",
    "concept": "Prompts for trained against prompts for held-out characters: a character has no pixel truth, "
    "so what counts is whether it was in the training set, not what the image shows.",
    "interval": "95 % percentile bootstrap over prompt clusters; a value of exactly 0 or 1 has no bootstrap "
    "spread and takes Clopper and Pearson's interval with the clusters of the rarer class as trials.",
    "accuracy": "The greatest mean of true-positive and true-negative rate over all thresholds (Wen).",
    "tpr": "True-positive rate at the last threshold with under 1 % false positives (last-below, Wen).",
}
"""What each comparison is, for records and pages. All of them are ours."""


# --- comparisons ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two sets of images that a detector should tell apart: masks ``[n]`` over the rows of a table."""

    name: str
    positive: Mask
    negative: Mask
    group: str = ""
    """The kind, or the number of copies, where the comparison is of one of them."""


class _Rows(NamedTuple):
    """Masks over a table's rows."""

    near: Mask
    memorized: Mask
    known: Mask
    twin: Mask
    neutral: Mask
    hard: Mask


def _rows(table: pd.DataFrame) -> _Rows:
    kind, label = table["kind"].to_numpy(), table["truth_label"].fillna("").to_numpy()
    known = np.isin(label.astype(str), LABELS)
    held_out = table["trained"].eq(False).fillna(False).to_numpy(dtype=bool)
    role = table["role"].to_numpy()
    return _Rows(
        near=known & (table["truth_near_copy"] == 1).to_numpy(dtype=bool),
        memorized=known & (label != "NM"),
        known=known,
        twin=known & (role == "control") & held_out,
        neutral=role == "neutral",
        hard=known & (kind == HARD_NEGATIVE),
    )


def comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Every comparison that :data:`CONVENTIONS` names, over a per-image table.

    The table has the columns of ``planted-truth``. A comparison with no images on one side is there too: it
    has no AUC, and its counts say why.
    """
    rows = _rows(table)
    return [*_pixel_comparisons(table, rows), *_by_duplicates(table, rows), _concepts(table)]


def _pixel_comparisons(table: pd.DataFrame, rows: _Rows) -> list[Comparison]:
    kind, pool = table["kind"].to_numpy(), rows.known | rows.neutral
    against = {
        "near_copy": pool,
        "clean": rows.twin | rows.neutral,
        "twins": rows.twin,
        "neutral": rows.neutral,
        "hard_negatives": rows.hard,
    }
    found = [Comparison(name, rows.near, negative & ~rows.near) for name, negative in against.items()]
    found.insert(1, Comparison("memorized", rows.memorized, pool & ~rows.memorized))
    for name in KINDS:
        of_kind = rows.known & (kind == name)
        found.append(Comparison("kind", of_kind & rows.memorized, of_kind & ~rows.memorized, name))
    return found


def _by_duplicates(table: pd.DataFrame, rows: _Rows) -> list[Comparison]:
    verbatim = (table["kind"] == "verbatim").to_numpy(dtype=bool)
    trigger = verbatim & (table["role"] == "trigger").to_numpy(dtype=bool)
    copies = table["duplicates"]
    return [
        Comparison(
            "duplicates",
            trigger & rows.memorized & copies.eq(count).fillna(False).to_numpy(dtype=bool),
            verbatim & rows.twin & ~rows.memorized,
            str(int(count)),
        )
        for count in sorted(copies[trigger].dropna().unique())
    ]


def _concepts(table: pd.DataFrame) -> Comparison:
    concept = (table["kind"] == "concept").to_numpy(dtype=bool)
    trained = table["trained"].fillna(False).to_numpy(dtype=bool)
    return Comparison("concept", concept & trained, concept & ~trained)


# --- figures --------------------------------------------------------------------------------------


def detector_record(
    values: NDArray[Any],
    end: str,
    comparison: Comparison,
    clusters: NDArray[Any],
    *,
    seed_parts: Sequence[object] = (),
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """One detector in one comparison: AUC, accuracy and TPR at 1 % FPR with intervals, and the counts.

    ``values`` ``[n]`` with NaN where the metric doesn't apply, ``clusters`` ``[n]``. Images without a value
    count nowhere. A figure is None where a side is empty, an interval where a side has one cluster only.
    """
    from lethebench.detection import detection

    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    kept = (comparison.positive | comparison.negative) & ~np.isnan(values)
    positive, clusters = comparison.positive[kept], clusters[kept]
    found = detection(
        values[kept],
        positive,
        clusters,
        end="low" if end == "low" else "high",
        resamples=resamples,
        seed_parts=(*seed_parts, comparison.name, comparison.group),
    )
    trials = len(set(clusters[positive])), len(set(clusters[~positive]))
    return {
        "auc": _estimate(found.auc, min(trials)),
        "accuracy": _estimate(found.accuracy, min(trials)),
        "tpr": _estimate(found.tpr[TPR], trials[0]),
        "tpr_by_convention": {name: found.tpr[name].value for name in found.tpr},
        "positives": found.positives,
        "negatives": found.negatives,
    }


def _estimate(found: Estimate, trials: int) -> dict[str, float | None]:
    from lethebench.stats import exact_share_interval

    value, low, high = (None if x is None else round(x, 12) for x in (found.value, found.low, found.high))
    if value in (0.0, 1.0) and low is not None:
        low, high = exact_share_interval(value, trials)
    return {"value": value, "low": low, "high": high}


def against(
    table: pd.DataFrame,
    columns: Mapping[str, str],
    *,
    seed_parts: Sequence[object] = (),
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, Any]]:
    """Every detector column (name to end) in every comparison of a per-image table.

    ``{column: {comparison: record}}``; the comparisons ``kind`` and ``duplicates`` hold a record for each
    kind and number of copies.
    """
    clusters = table["cluster"].to_numpy()
    found: dict[str, dict[str, Any]] = {column: {} for column in columns}
    for comparison in comparisons(table):
        for column, end in columns.items():
            record = detector_record(
                table[column].to_numpy(dtype=float),
                end,
                comparison,
                clusters,
                seed_parts=seed_parts,
                resamples=resamples,
            )
            if comparison.group:
                found[column].setdefault(comparison.name, {})[comparison.group] = record
            else:
                found[column][comparison.name] = record
    return found


# --- labels ---------------------------------------------------------------------------------------


def confusion(truth: Any, labels: Any) -> dict[str, dict[str, int]]:
    """Counts of ``labels`` by ``truth``, both texts of one length: ``{truth: {label: count}}``."""
    truth, labels = np.asarray(truth, dtype=object), np.asarray(labels, dtype=object)
    return {t: {x: int(((truth == t) & (labels == x)).sum()) for x in LABELS} for t in LABELS}


def label_record(truth: Any, labels: Any) -> dict[str, Any] | None:
    """A column of labels against the true ones, where both are VM, FM, BM or NM; None where none are.

    The counts, the share on the diagonal, and the sensitivity and false-positive rate of "memorized at all".
    """
    truth, labels = (np.asarray(x, dtype=object) for x in (truth, labels))
    both = np.isin(truth.astype(str), LABELS) & np.isin(labels.astype(str), LABELS)
    if not both.any():
        return None
    truth, labels = truth[both], labels[both]
    copied, called = truth != "NM", labels != "NM"
    return {
        "confusion": confusion(truth, labels),
        "accuracy": _share(truth == labels),
        "memorized": {
            "sensitivity": _share(called[copied]),
            "false_positive_rate": _share(called[~copied]),
        },
    }


def _share(hits: Any) -> float | None:
    return float(np.mean(hits)) if len(hits) else None


# --- the model card -------------------------------------------------------------------------------

DETECTORS = {
    "fbmem": "fbmem_own",
    "copy-mini": "copy_mini_similarity",
    "noise-magnitude": "noise_magnitude_mean",
    "noise-magnitude, first step": "noise_magnitude_first",
}
"""Columns that the card of a model shows; all of them should be high on copies."""


def against_truth(table: pd.DataFrame) -> dict[str, Any]:
    """What a model's card says of FB-Mem, copy similarity and noise magnitude: counts and AUCs, no intervals.

    ``table`` is a per-image table with the columns of ``planted-truth`` and of the metrics (those that lack
    are left out). Only images with a truth count, neutral prompts don't.
    """
    known = table[_rows(table).known]
    found: dict[str, Any] = {"images": len(known)}
    if "fbmem_label" in known:
        found |= label_record(known["truth_label"], known["fbmem_label"].fillna("")) or {}
    by_name = {c.group or c.name: c for c in _pixel_comparisons(known, _rows(known))}
    names = {"near_copy": "near_copy", "memorized": "memorized"}
    names |= {"against_twins": "twins", "against_hard_negatives": "hard_negatives"}
    kinds = [kind for kind in KINDS if kind in set(known["kind"])]
    found["auc"] = {
        name: {
            **{said: _auc(known[column], by_name[comparison]) for said, comparison in names.items()},
            "by_kind": {kind: _auc(known[column], by_name[kind]) for kind in kinds},
        }
        for name, column in DETECTORS.items()
        if column in known
    }
    return found


def _auc(values: pd.Series[Any], comparison: Comparison) -> float | None:
    record = detector_record(
        values.to_numpy(dtype=float), "high", comparison, np.arange(len(values)), resamples=0
    )
    found: float | None = record["auc"]["value"]
    return found
