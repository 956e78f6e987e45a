"""Copy similarity: the cosine of copy-mini descriptors to the prompt's own references."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import (
    HARD_NEGATIVE,
    asks_for_copy,
    calibration_summary,
    calibration_version,
    check_shard,
    check_vectors,
    read_calibration,
    reference_vectors,
    spread,
    texts,
    trigger_references,
)
from lethebench.prompts import Role
from lethebench.referencing import Descriptor
from lethebench.registry import METRICS

FOLDER = Path(__file__).parent
JUDGE = "copy-mini"
SIDE = 64
"""Height and width in pixels of what the judge looks at."""
_TRIGGERS = frozenset({Role.TRIGGER})
_CONTROLS = frozenset({Role.CONTROL})


def best_cosine(descriptors: NDArray[Any], references: NDArray[Any]) -> tuple[float, int]:
    """The highest cosine of one unit descriptor ``[d]`` to references ``[r, d]``, and whose it is."""
    cosines = references @ descriptors
    best = int(cosines.argmax())
    return min(1.0, max(-1.0, float(cosines[best]))), best


def _resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image at the judge's size, without regard to its aspect."""
    from PIL import Image

    if image.shape[:2] == (SIDE, SIDE):
        return image
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


@METRICS.register
class CopyMini(Metric):
    """SSCD's protocol (Wen et al. 2024: the maximum over a prompt's references), by the built-in judge.

    Per image: the highest cosine to an own reference, whether it reaches the calibrated threshold, and the
    nearest of all trigger references. Never comparable with SSCD's numbers: another descriptor, another
    scale.
    """

    name: ClassVar[str] = "copy-mini"
    summary: ClassVar[str] = "Similarity to the prompt's own training images by the built-in copy descriptor."
    version: ClassVar[str] = calibration_version(FOLDER, "1")
    source: ClassVar[str] = "protocol of Wen et al. 2024 and Pizzi et al. 2022; descriptor copy-mini (ours)"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references"})
    scores: ClassVar[tuple[Score, ...]] = (
        Score(
            "copy_mini.similarity",
            "copy_mini_similarity",
            "lower",
            "cosine",
            (-1.0, 1.0),
            roles=_TRIGGERS,
            help="Cosine to the nearest own training image, mean over trigger images.",
            judge=JUDGE,
        ),
        Score(
            "copy_mini.rate",
            "copy_mini_copy",
            "lower",
            "share",
            (0.0, 1.0),
            roles=_TRIGGERS,
            help="Share of trigger images whose cosine to an own training image reaches the threshold.",
            judge=JUDGE,
        ),
        Score(
            "copy_mini.similarity_control",
            "copy_mini_similarity",
            "none",
            "cosine",
            (-1.0, 1.0),
            roles=_CONTROLS,
            trained=False,
            help="The same similarity on never-memorized twins: the floor.",
            judge=JUDGE,
        ),
        Score(
            "copy_mini.control",
            "copy_mini_copy",
            "none",
            "share",
            (0.0, 1.0),
            roles=_CONTROLS,
            trained=False,
            help="Share of images of never-memorized twins that are called copies: the floor.",
            judge=JUDGE,
        ),
        Score(
            "copy_mini.hard_negative",
            "copy_mini_copy",
            "none",
            "share",
            (0.0, 1.0),
            roles=_CONTROLS,
            kinds=frozenset({HARD_NEGATIVE}),
            help="Share of images of rare-name captions seen once that are called copies.",
            judge=JUDGE,
        ),
    )

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def descriptor(self) -> Descriptor:
        """The built-in judge with its weights' SHA-256, or the object that was given in its place."""
        if self.judge is not None:
            return Descriptor(f"copy-mini by {type(self.judge).__name__} {id(self.judge)}", "")
        from lethebench.judges.base import SUMS, WEIGHTS, shipped_folder

        sums = json.loads((shipped_folder(JUDGE) / SUMS).read_text(encoding="utf-8"))
        return Descriptor(JUDGE, str(sums[WEIGHTS]), "64 x 64 pixels, bilinear where resized (ours)")

    def describe(self, images: Iterable[NDArray[np.uint8]]) -> NDArray[Any]:
        """The judge's descriptors of unit length, of images of any sizes: resized to its 64 x 64 pixels."""
        return self._describe(np.stack([_resized(image) for image in images]))

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``copy_mini_similarity``, ``_copy`` (0 or 1), ``_nearest`` (id) and ``_nearest_similarity``."""
        check_shard(self.name, shard)
        count = len(shard)
        at = [i for i, prompt in enumerate(shard.prompts) if asks_for_copy(prompt)]
        own, nearest, names = [], [], []
        if at:
            described = self._describe(shard.images[at])
            trained = trigger_references(shard.prompt_set)
            needed = sorted({r for i in at for r in shard.prompts[i].references} | set(trained))
            library = reference_vectors(shard.prompt_set, needed, self.descriptor(), self.describe)
            known = np.stack([library[name] for name in trained]) if trained else None
            for row, i in zip(described, at, strict=True):
                own.append(best_cosine(row, np.stack([library[r] for r in shard.prompts[i].references]))[0])
                value, best = best_cosine(row, known) if known is not None else (np.nan, -1)
                nearest.append(value)
                names.append(trained[best] if known is not None else "")
        similarity = spread(own, at, count)
        return {
            "copy_mini_similarity": similarity,
            "copy_mini_copy": np.where(
                np.isnan(similarity), np.nan, similarity >= self.threshold if at else 0.0
            ),
            "copy_mini_nearest": texts(names, at, count),
            "copy_mini_nearest_similarity": spread(nearest, at, count),
        }

    @property
    def threshold(self) -> float:
        """The calibrated cosine from which an image is called a copy."""
        return float(read_calibration(FOLDER)["threshold"])

    def facts(self) -> dict[str, Any]:
        """Judge, threshold and how it was calibrated."""
        return {"judge": JUDGE, "threshold": self.threshold, "calibration": calibration_summary(FOLDER)}

    def _describe(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        if self.judge is None:
            from lethebench import judges

            found = judges.load("copy-mini").describe(images)
        else:
            found = self.judge.describe(images)
        check_vectors(self.name, "descriptors", found, len(images))
        return np.asarray(found)
