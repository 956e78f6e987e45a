"""What was really copied: exact checks against the planted references, without any judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import (
    HARD_NEGATIVE,
    Floats,
    Images,
    asks_for_copy,
    check_shard,
    one_hot,
    reference_of,
    same_size,
    spread,
    texts,
)
from lethebench.prompts import Reference, Role
from lethebench.registry import METRICS

NEAR_COPY = 0.08
"""An image is a near-copy where its pixel RMS (0 to 1) to an own reference is below this."""
FOREGROUND = 0.12
"""The reference's foreground is there where the RMS inside its true mask is below this."""
BACKGROUND = 0.08
"""The reference's background is there where the RMS outside its true mask and one box is below this."""
BOX = 36 / 64
"""Side of that box as a share of the picture's: it hides the largest object of neutral scenes (34 pixels)."""


def regional_rms(image: NDArray[np.uint8], reference: Reference) -> tuple[float, float, float]:
    """Pixel RMS (0 to 1) over the whole picture, inside the true foreground, and of the background.

    ``image`` uint8 ``[h, w, 3]``. Pixels on the foreground's edge, which blend both, count in neither
    region. The background of a background item lies under *another* foreground, whose place isn't known:
    the box of side :data:`BOX` that hides most is left out. A picture with the same background and one
    other object is near 0 then; pictures that differ all over are not.
    """
    if reference.mask is None:
        return float("nan"), float("nan"), float("nan")
    difference = (image.astype(np.float64) - reference.image.astype(np.float64)) / 255
    squared = np.square(difference).mean(axis=2)
    inside, outside = reference.mask == 255, reference.mask == 0
    foreground = float(np.sqrt(squared[inside].mean())) if inside.any() else float("nan")
    return float(np.sqrt(squared.mean())), foreground, _outside_box(squared, outside)


def _outside_box(squared: Floats, outside: NDArray[np.bool_]) -> float:
    """Root of the least mean of ``squared`` over ``outside`` less one box."""
    side = round(BOX * squared.shape[0])
    kept = outside.sum() - _box_sums(outside.astype(np.float64), side)
    left = (squared * outside).sum() - _box_sums(squared * outside, side)
    means = np.where(kept >= 0.1 * squared.size, left / np.maximum(kept, 1), np.inf)
    least = float(np.maximum(means, 0).min())
    return float(np.sqrt(least)) if np.isfinite(least) else float("nan")


def _box_sums(values: Floats, side: int) -> Floats:
    """Sums over every box of the side: ``[h - side + 1, w - side + 1]``."""
    sums = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    found: Floats = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return found


def truth(image: NDArray[np.uint8], references: list[Reference]) -> tuple[float, float, float, str]:
    """Least whole, foreground and background RMS over the references, and the label.

    VM where *one* reference has both foreground and background, else FM where one has the foreground, else
    BM, else NM; "" where no reference has a mask.
    """
    found = np.array([regional_rms(image, reference) for reference in references])
    if np.isnan(found).all():
        return float("nan"), float("nan"), float("nan"), ""
    front, back = found[:, 1] < FOREGROUND, found[:, 2] < BACKGROUND
    names = (("VM", front & back), ("FM", front), ("BM", back))
    label = next((name for name, which in names if which.any()), "NM")
    whole, foreground, background = np.nanmin(found, axis=0)
    return float(whole), float(foreground), float(background), label


_MEANINGS: tuple[tuple[str, str, Direction], ...] = (
    ("near_copy", f"within a pixel RMS of {NEAR_COPY} of an own training image", "lower"),
    ("vm", "with foreground and background of one training image", "lower"),
    ("fm", "with the foreground of a training image only", "lower"),
    ("bm", "with the background of a training image only", "lower"),
    ("nm", "with neither", "higher"),
    ("memorized", "with foreground, background or both of a training image", "lower"),
)


@METRICS.register
class PlantedTruth(Metric):
    """The planted answer, which only a set with true images and masks has; no judge is asked.

    Against the prompt's own references (FB-Mem looks at all triggers' references):

    - near-copy: pixel RMS below 0.08 (issue 2's rule for verbatim items);
    - foreground: RMS inside the reference's true mask below 0.12;
    - background: RMS outside it, less one box of 36 of 64 pixels, below 0.08.

    Of 680 fresh renderings with the attributes of a planted caption none was within 0.16 of its reference
    as a whole, one within 0.12 in the foreground (0.119) and none within 0.084 in the background. Copies
    softened to a whole RMS of about 0.035 had a median foreground RMS of 0.06 (95th percentile 0.12) and
    background RMS of 0.026 (0.04).

    A foreground item's other training backgrounds aren't references: an image that copies one of those
    pictures whole is FM here.
    """

    name: ClassVar[str] = "planted-truth"
    summary: ClassVar[str] = (
        "Exact truth of the planted world: near-copies, and copied foregrounds and backgrounds."
    )
    source: ClassVar[str] = "ours"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references", "masks"})
    scores: ClassVar[tuple[Score, ...]] = (
        *(
            Score(
                f"truth.{name}",
                f"truth_{name}",
                direction,
                "share",
                (0.0, 1.0),
                roles=frozenset({Role.TRIGGER}),
                help=f"Share of trigger images {meaning}.",
            )
            for name, meaning, direction in _MEANINGS
        ),
        *(
            Score(
                f"truth.{name}",
                f"truth_{column}",
                "none",
                "share",
                (0.0, 1.0),
                roles=frozenset({Role.CONTROL}),
                kinds=kinds,
                trained=trained,
                help=help,
            )
            for name, column, kinds, trained, help in (
                (
                    "control",
                    "memorized",
                    frozenset[str](),
                    False,
                    "Share of images of never-memorized twins with either region: the floor.",
                ),
                (
                    "near_copy_control",
                    "near_copy",
                    frozenset[str](),
                    False,
                    "Share of images of never-memorized twins that are near-copies: the floor.",
                ),
                (
                    "near_copy_hard_negative",
                    "near_copy",
                    frozenset({HARD_NEGATIVE}),
                    None,
                    "Share of images of rare-name captions seen once that are near-copies.",
                ),
            )
        ),
    )

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """RMS of whole, foreground and background, the label and near-copy (0 or 1)."""
        check_shard(self.name, shard)
        count = len(shard)
        at = [i for i, prompt in enumerate(shard.prompts) if asks_for_copy(prompt)]
        found = [truth(shard.images[i], self._references(shard, i)) for i in at]
        labels = texts([f[3] for f in found], at, count)
        values: Images | Floats = spread(np.array([f[:3] for f in found]).reshape(-1, 3), at, count)
        whole = values[:, 0]
        return {
            "truth_rms": whole,
            "truth_foreground_rms": values[:, 1],
            "truth_background_rms": values[:, 2],
            "truth_near_copy": np.where(np.isnan(whole), np.nan, whole < NEAR_COPY),
            "truth_label": labels,
            **one_hot("truth", labels),
        }

    def facts(self) -> dict[str, Any]:
        """The thresholds."""
        return {"near_copy": NEAR_COPY, "foreground": FOREGROUND, "background": BACKGROUND, "box": BOX}

    def _references(self, shard: Shard, row: int) -> list[Reference]:
        found = [reference_of(shard.prompt_set, name) for name in shard.prompts[row].references]
        for reference in found:
            same_size(self.name, shard.images, reference)
        return found
