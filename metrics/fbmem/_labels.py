"""What FB-Mem's labels add up to: risk, transitions from base to a method, matched training images.

Source: the released code of Di et al. (arXiv 2508.12148), ``archive/check_score.py`` and
``archive/see_res.py``, as the research note reports them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.prompts import Role

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("VM", "FM", "BM", "NM")
RISK = {"VM": 2.0, "FM": 1.5, "BM": 0.5, "NM": 0.0}
"""Weights read from the released code's 4 x 4 table. One of its entries contradicts them: a change from BM to
FM counts -0.5 there, -1 here."""


def risks(labels: NDArray[np.object_]) -> NDArray[np.float64]:
    """The risk of each label, NaN where there is none ("")."""
    return np.array([RISK.get(label, np.nan) for label in labels], dtype=np.float64)


def change(base: Sequence[str], method: Sequence[str]) -> dict[str, Any]:
    """How paired images changed their labels, ``base[i]`` to ``method[i]``.

    ``mitigation`` is the mean of risk(base) - risk(method): higher is better, and no more than ``base_risk``.
    The released code sums it over its images and doesn't divide. ``transitions`` counts images,
    ``{base's label: {method's label: count}}``.

    >>> change(["VM", "BM"], ["NM", "FM"])["mitigation"]
    0.5
    """
    pairs = list(zip(base, method, strict=True))
    before, after = (float(np.mean([RISK[pair[side]] for pair in pairs])) for side in (0, 1))
    return {
        "images": len(pairs),
        "base_risk": before,
        "risk": after,
        "mitigation": before - after,
        "weights": dict(RISK),
        "transitions": {b: {m: pairs.count((b, m)) for m in LABELS} for b in LABELS},
    }


def paired_labels(
    metric: str, column: str, table: pd.DataFrame, base: pd.DataFrame
) -> tuple[list[str], list[str]]:
    """The labels of base's trigger images and of the same images of the method, in base's order.

    Images are paired by ``prompt_id`` and ``index``; those without a label ("") in both don't count. Raises
    UserError where an image is twice in a table, or labelled in only one of them.
    """
    before, after = _labels(metric, column, base), _labels(metric, column, table)
    lacking = sorted(before.keys() ^ after.keys())
    if lacking:
        (prompt, index), where = lacking[0], "base" if lacking[0] in after else "the method's images"
        raise UserError(
            f"{metric}: {len(lacking)} trigger images have no counterpart, first image {index} of prompt"
            f" {prompt}, which {where} lacks: score both on the same prompts and images"
        )
    return list(before.values()), [after[image] for image in before]


def _labels(metric: str, column: str, table: pd.DataFrame) -> dict[tuple[str, int], str]:
    """Trigger images that have a label: ``{(prompt_id, index): label}``."""
    rows = table[(table["role"] == Role.TRIGGER) & table[column].isin(LABELS)]
    images = list(zip(rows["prompt_id"], rows["index"].astype(int), strict=True))
    found = dict(zip(images, rows[column], strict=True))
    if len(found) < len(images):
        (prompt, index) = next(image for image in images if images.count(image) > 1)
        raise UserError(f"{metric}: image {index} of prompt {prompt} is twice in a table of results")
    return found


def distinct_matches(clusters: Iterable[Hashable], best: Iterable[str], counted: Iterable[bool]) -> float:
    """Different best matches of a cluster's counted images, mean over all clusters.

    >>> distinct_matches(["a", "a", "a", "b"], ["1", "2", "2", "3"], [True, True, True, False])
    1.0
    """
    rows = list(zip(clusters, best, counted, strict=True))
    matches = {(cluster, name) for cluster, name, kept in rows if kept}
    return len(matches) / len({cluster for cluster, _, _ in rows})
