"""Metrics measured against the planted truth: what each of them sees, and how often it is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lethebench.metrics.noise_magnitude import auc

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("VM", "FM", "BM", "NM")
DETECTORS = {
    "fbmem": ("fbmem_own", 1),
    "copy-mini": ("copy_mini_similarity", 1),
    "noise-magnitude": ("noise_magnitude_mean", 1),
    "noise-magnitude, first step": ("noise_magnitude_first", 1),
}
"""Columns that should be high on copies, and their sign."""


def against_truth(table: pd.DataFrame) -> dict[str, Any]:
    """How FB-Mem, copy similarity and noise magnitude agree with what was really copied.

    ``table`` is a row's per-image table with the columns of ``planted-truth`` and of the metrics to be judged
    (those that lack are left out). Only images with a truth (prompts that may reproduce single images) count.

    ``confusion`` has FB-Mem's label counts by truth label, ``accuracy`` the share on the diagonal,
    ``memorized`` the sensitivity and false-positive rate of "memorized at all". ``auc`` has, for each
    detector, the AUC for near-copies (``near_copy``) and for any memorized region (``memorized``) against
    all other images, against the never-memorized twins only (``against_twins``) and against the hard
    negatives only (``against_hard_negatives``), both for near-copies, and by kind of item.
    """
    known = table[table["truth_label"].fillna("").isin(LABELS).to_numpy(dtype=bool)]
    found: dict[str, Any] = {"images": len(known)}
    if "fbmem_label" in known:
        found |= _labels(known[known["fbmem_label"].fillna("").isin(LABELS).to_numpy(dtype=bool)])
    found["auc"] = {
        name: _aucs(known, column, sign) for name, (column, sign) in DETECTORS.items() if column in known
    }
    return found


def confusion(truth: Any, labels: Any) -> dict[str, dict[str, int]]:
    """Counts of ``labels`` by ``truth``, both texts of one length: ``{truth: {label: count}}``."""
    truth, labels = np.asarray(truth, dtype=object), np.asarray(labels, dtype=object)
    return {t: {x: int(((truth == t) & (labels == x)).sum()) for x in LABELS} for t in LABELS}


def _labels(known: pd.DataFrame) -> dict[str, Any]:
    truth, labels = (known[name].to_numpy(dtype=object) for name in ("truth_label", "fbmem_label"))
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


def _aucs(known: pd.DataFrame, column: str, sign: int) -> dict[str, Any]:
    values = sign * known[column].to_numpy(dtype=float)
    copied = (known["truth_near_copy"] == 1).to_numpy(dtype=bool)
    memorized = (known["truth_label"] != "NM").to_numpy(dtype=bool)
    held_out = known["trained"].eq(False).fillna(False).to_numpy(dtype=bool)
    twins = (known["role"] == "control").to_numpy(dtype=bool) & held_out
    hard = (known["kind"] == "hard-negative").to_numpy(dtype=bool)
    return {
        "near_copy": _auc(copied, values),
        "memorized": _auc(memorized, values),
        "against_twins": _auc(copied[copied | twins], values[copied | twins]),
        "against_hard_negatives": _auc(copied[copied | hard], values[copied | hard]),
        "by_kind": {
            str(kind): _auc(memorized[rows], values[rows])
            for kind in sorted(known["kind"].unique())
            if (rows := (known["kind"] == kind).to_numpy(dtype=bool)).any()
        },
    }


def _auc(positive: Any, values: Any) -> float | None:
    found = auc(positive, values)
    return None if np.isnan(found) else found
