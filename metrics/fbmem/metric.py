"""FB-Mem (re-implementation): images labelled VM, FM, BM or NM against the memorized training images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import RunError, UserError
from lethebench.method import setting
from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import (
    CALIBRATE,
    HARD_NEGATIVE,
    asks_for_copy,
    calibration_summary,
    calibration_version,
    check_shard,
    one_hot,
    read_calibration,
    reference_of,
    remembered,
    same_size,
    spread,
    texts,
    trigger_references,
)
from lethebench.prompts import PromptSet, Reference, Role
from lethebench.registry import METRICS

from . import _labels, segmenters
from ._constants import (
    AS_RELEASED_TAU,
    BUILT_IN_SIDE,
    FIVE_SCALES,
    FIVE_SCALES_SIDE,
    KEEP,
    MASK_THRESHOLD,
    MIN_AREA,
    THREE_SCALES,
    THREE_SCALES_SIDE,
    betas,
)

if TYPE_CHECKING:
    import pandas as pd

    from ._functional import Pictures

FOLDER = Path(__file__).parent
UNRELATED = FOLDER / "unrelated.json"
"""What both variants say of unrelated pictures, by mask area; written with the calibration."""
_RANGES = {
    "keep": (2, 10**6, "a whole number from 2"),
    "resolution": (THREE_SCALES_SIDE, 4096, f"pixels from {THREE_SCALES_SIDE} to 4096"),
    "tau_foreground": (0, 1, "from 0 to 1"),
    "tau_background": (0, 1, "from 0 to 1"),
}
_MEANINGS = (
    ("vm", "memorized in foreground and background"),
    ("fm", "memorized in the foreground only"),
    ("bm", "memorized in the background only"),
    ("nm", "not memorized"),
    ("memorized", "memorized in foreground, background or both"),
)


def _scores(prefix: str) -> tuple[Score, ...]:
    """Every score; ``prefix`` begins their names and columns."""
    on_triggers = tuple(
        Score(
            f"{prefix}.{name}",
            f"{prefix}_{name}",
            _direction(name),
            "share",
            (0.0, 1.0),
            roles=frozenset({Role.TRIGGER}),
            help=f"Share of trigger images {meaning}.",
        )
        for name, meaning in _MEANINGS
    )
    matches = tuple(
        Score(
            f"{prefix}.{name}",
            f"{prefix}_best",
            direction,
            "images",
            (0.0, np.inf),
            roles=frozenset({Role.TRIGGER}),
            kinds=frozenset({"one-to-many"}),
            help=f"Training images matched by a one-to-many cluster's {which}, mean over clusters.",
        )
        for name, direction, which in _matches()
    )
    return (
        *on_triggers,
        Score(
            f"{prefix}.risk",
            f"{prefix}_risk",
            "lower",
            "risk",
            (0.0, 2.0),
            roles=frozenset({Role.TRIGGER}),
            help="Mean risk of trigger images: VM 2, FM 1.5, BM 0.5, NM 0. Base's less the method's is the"
            " paper's mitigation score.",
        ),
        *matches,
        Score(
            f"{prefix}.control",
            f"{prefix}_memorized",
            "none",
            "share",
            (0.0, 1.0),
            roles=frozenset({Role.CONTROL}),
            trained=False,
            help="Share of images of never-memorized twins that are called memorized: the floor.",
        ),
        Score(
            f"{prefix}.hard_negative",
            f"{prefix}_memorized",
            "none",
            "share",
            (0.0, 1.0),
            roles=frozenset({Role.CONTROL}),
            kinds=frozenset({HARD_NEGATIVE}),
            help="Share of images of rare-name captions seen once that are called memorized.",
        ),
    )


def _direction(name: str) -> Direction:
    return "higher" if name == "nm" else "lower"


def _matches() -> tuple[tuple[str, Direction, str], ...]:
    """One-to-many scores: with a floor (memorized images only), and without as in the released code."""
    return (
        ("distinct_matches", "lower", "memorized images"),
        ("distinct_matches_all", "none", "images, memorized or not (as the released code counts)"),
    )


@METRICS.register
@dataclass(frozen=True)
class FBMem(Metric):
    """FB-Mem, variant ``masked``: see :mod:`lethebench.metrics.fbmem._functional` for the similarity.

    For each image of a prompt that may reproduce single images (one with references, not about a concept):

    1. Candidates are the references of all triggers of the set, and the prompt's own references.
    2. Foregrounds come from the segmenter for the image *and* for the references, as in the released code
       (which uses BiRefNet for both); ``true_masks`` takes the references' true masks instead.
    3. Foreground similarity F and background similarity B to each candidate; the best match has the highest
       mean of the two (the released code's rule).
    4. Label by the best match: VM where F and B both reach their thresholds, else BM, FM or NM.

    Where the two foregrounds together cover less than 3 % or more than 97 % of the area, F and B are both the
    whole pictures' similarity (FB-Mem's adaptive rule; symmetric here, unlike in the released code), and
    both are held to the higher threshold: the image is VM or NM.

    Thresholds are calibrated on the planted world so that at most 0.5 % of pictures that show what a planted
    caption asks for, but were never memorized, are called memorized; ``calibration.json`` holds
    them with the recipe. They hold for its segmenter and 64 pixels; for others set ``tau_foreground`` and
    ``tau_background`` (from the columns ``fbmem_foreground`` and ``fbmem_background`` of images that you know
    aren't memorized). The released code's 0.8 for both belongs to another similarity.

    Images and references must be of one size, unless ``resolution`` resizes them (the released code: 512).
    A program may pass an object with :meth:`segmenters.Segmenter.masks` in place of a segmenter's name.

    Named a re-implementation because the paper's Algorithm 1 could not be read.
    """

    name: ClassVar[str] = "fbmem"
    summary: ClassVar[str] = "FB-Mem (re-implementation): verbatim, foreground and background memorization."
    version: ClassVar[str] = calibration_version(FOLDER, "1")
    source: ClassVar[str] = (
        "Di et al., arXiv 2508.12148, after its released code; regions by masked ms-ssim (ours)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references"})
    scores: ClassVar[tuple[Score, ...]] = _scores("fbmem")
    set_valued: ClassVar[frozenset[str]] = frozenset({"fbmem.distinct_matches", "fbmem.distinct_matches_all"})
    reads: ClassVar[frozenset[str] | None] = frozenset({"fbmem_memorized"})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "fbmem_own": "high",
        "fbmem_risk": "high",
    }
    prefix: ClassVar[str] = "fbmem"
    variant: ClassVar[Literal["masked", "as-released"]] = "masked"

    segmenter: str | segmenters.Segmenter = setting(  # noqa: RUF009 (a field)
        "segmenter-mini", "what finds foregrounds: segmenter-mini, birefnet, sam or given"
    )
    segmenter_weights: str = setting("", "the segmenter's file (segmenter-mini: none)", place=True)
    segmenter_device: str = setting("cpu", "where birefnet and sam run, as torch names it")
    true_masks: bool = setting(False, "take the references' true masks instead of the segmenter's")
    keep: int | None = setting(KEEP, "references that a coarse comparison keeps for the exact one; null: all")
    resolution: int | None = setting(
        None, "side in pixels that images and references are resized to; null: as is"
    )
    tau_foreground: float | None = setting(None, "foreground threshold; null: this variant's own")
    tau_background: float | None = setting(None, "background threshold; null: this variant's own")

    def check(self) -> None:
        """Raise UserError for a setting out of range, or a segmenter that can't run here."""
        for name in ("keep", "resolution", "tau_foreground", "tau_background"):
            value, (low, high, told) = getattr(self, name), _RANGES[name]
            kinds = (int, float) if name.startswith("tau") else (int,)
            wrong = isinstance(value, bool) or not isinstance(value, kinds)
            if value is not None and (wrong or not low <= value <= high):
                raise UserError(f"metric '{self.name}': {name} must be {told}, or null; got {value!r}")
        if not isinstance(self.true_masks, bool):
            raise UserError(
                f"metric '{self.name}': true_masks must be true or false; got {self.true_masks!r}"
            )
        if not isinstance(self.segmenter_weights, str):
            raise UserError(
                f"metric '{self.name}': segmenter_weights must be a path; got {self.segmenter_weights!r}"
            )
        if not isinstance(self.segmenter, str) and not hasattr(self.segmenter, "masks"):
            raise UserError(f"metric '{self.name}': segmenter must be a name; got {self.segmenter!r}")
        if isinstance(self.segmenter, str):
            segmenters.check_segmenter(self.segmenter, self.segmenter_weights, self.segmenter_device)
            if self.segmenter == "segmenter-mini" and self.resolution not in (None, BUILT_IN_SIDE):
                raise UserError(
                    f"metric '{self.name}': segmenter-mini reads {BUILT_IN_SIDE} pixels a side, not"
                    f" {self.resolution}: set segmenter to birefnet, sam or given, or leave resolution out"
                )

    def weights(self) -> Mapping[str, Path]:
        """The segmenter's file."""
        if not isinstance(self.segmenter, str):
            return {}
        return segmenters.segmenter_files(self.segmenter, self.segmenter_weights)

    def all_scores(self) -> tuple[Score, ...]:
        """The scores, with the segmenter as their judge."""
        return tuple(replace(score, judge=self._segmenter_name) for score in self.scores)

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """Columns of label, similarities, best and own reference; see the class."""
        check_shard(self.name, shard)
        count = len(shard)
        at = [i for i, prompt in enumerate(shard.prompts) if asks_for_copy(prompt)]
        found = self._matches(shard, at) if at else []
        labels = texts([self._label(f, b) for _, f, b, _, _ in found], at, count)
        names = ("foreground", "background", "own", "mask_area")
        values = spread(np.array([match[1:] for match in found]).reshape(-1, 4), at, count)
        return {
            f"{self.prefix}_label": labels,
            f"{self.prefix}_best": texts([match[0] for match in found], at, count),
            **{f"{self.prefix}_{name}": values[:, i] for i, name in enumerate(names)},
            **one_hot(self.prefix, labels),
            f"{self.prefix}_risk": _labels.risks(labels),
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """Distinct matches by cluster; the mean for all other scores."""
        if score.name not in self.set_valued:
            return super().aggregate(score, table)
        counted = table[score.column] != ""
        if score.name == f"{self.prefix}.distinct_matches":
            counted &= table[f"{self.prefix}_memorized"] == 1
        return _labels.distinct_matches(table["cluster"], table[score.column], counted)

    def compare(self, table: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
        """The paper's mitigation score, and how the labels changed: see :func:`_labels.change`."""
        before, after = _labels.paired_labels(self.name, f"{self.prefix}_label", table, base)
        return _labels.change(before, after) if before else {}

    def facts(self) -> dict[str, Any]:
        """Variant, similarity, segmenter, thresholds and how they were calibrated."""
        return {
            "variant": self.variant,
            "similarity": "ms-ssim, kernel 11, sigma 1.5, data range 1, RGB",
            "scales": self._scales(),
            "whole_pictures": f"where foregrounds cover less than {MIN_AREA} or more than {1 - MIN_AREA}",
            "foregrounds": self._segmenter_name + (", references' true masks" if self.true_masks else ""),
            "segmenter_device": self.segmenter_device,
            "resolution": self.resolution,
            "thresholds": dict(zip(("foreground", "background"), self.thresholds, strict=True)),
            "thresholds_from": {
                name: self._thresholds_from() if getattr(self, f"tau_{name}") is None else "settings"
                for name in ("foreground", "background")
            },
            "candidates": "references of all triggers, and the prompt's own",
            "prefilter": self.keep,
            "risk": dict(_labels.RISK),
            "calibration": self._calibration(),
            "unrelated_pictures": read_unrelated().get(self.variant, {}),
        }

    def _scales(self) -> dict[str, list[float]]:
        """The betas of each scale, by the pictures' shorter side in pixels."""
        if self.resolution is not None:
            return {str(self.resolution): list(betas(self.resolution, self.resolution))}
        return {
            f"{THREE_SCALES_SIDE} to {FIVE_SCALES_SIDE - 1}": list(THREE_SCALES),
            f"{FIVE_SCALES_SIDE} or more": list(FIVE_SCALES),
        }

    @property
    def thresholds(self) -> tuple[float, float]:
        """Tau of the foreground and of the background."""
        given, own = (self.tau_foreground, self.tau_background), self._own_thresholds()
        foreground, background = (o if g is None else g for g, o in zip(given, own, strict=True))
        return float(foreground), float(background)

    def _own_thresholds(self) -> tuple[float, float]:
        tau = read_calibration(FOLDER)["tau"]
        return tau["foreground"], tau["background"]

    def _thresholds_from(self) -> str:
        told = f"calibration with segmenter-mini at {BUILT_IN_SIDE} pixels"
        at_home = self.segmenter == "segmenter-mini" and not self.true_masks
        return told if at_home else f"{told}: not calibrated for these foregrounds"

    def _calibration(self) -> Mapping[str, Any]:
        return calibration_summary(FOLDER)

    @property
    def _segmenter_name(self) -> str:
        own = self.segmenter
        return own if isinstance(own, str) else str(getattr(own, "name", type(own).__name__))

    def _label(self, foreground: float, background: float) -> str:
        names = {(True, True): "VM", (False, True): "BM", (True, False): "FM", (False, False): "NM"}
        of_foreground, of_background = self.thresholds
        if isclose(foreground, background, abs_tol=1e-5):  # whole pictures were compared
            of_foreground = of_background = max(self.thresholds)
        return names[foreground >= of_foreground, background >= of_background]

    def _matches(self, shard: Shard, at: Sequence[int]) -> list[tuple[str, float, float, float, float]]:
        """Best reference, F, B, mean similarity to the best own reference, and foreground share."""
        import torch

        from ._functional import against_all, against_every, best_match

        trained = trigger_references(shard.prompt_set)
        own = {r for i in at for r in shard.prompts[i].references}
        ids = sorted(own | set(trained))
        references = self._library(shard, ids)
        place = {name: number for number, name in enumerate(ids)}
        pictures = self._pictures([shard.images[i] for i in at])
        in_trained = torch.tensor([name in set(trained) for name in ids])
        every = None
        if self.variant == "as-released" and self.keep is None:
            every = against_every(pictures, references)
        found = []
        with torch.inference_mode():
            for row, i in enumerate(at):
                mine = torch.zeros(len(ids), dtype=torch.bool)
                mine[[place[r] for r in shard.prompts[i].references]] = True
                picture, among = pictures[slice(row, row + 1)], in_trained | mine
                if every is None:
                    f, b = against_all(
                        picture, references, self.variant, keep=self.keep, always=mine, among=among
                    )
                else:
                    f, b = (torch.where(among, of_all[row], torch.nan) for of_all in every)
                best, to_own = best_match(f, b), float(((f + b) / 2)[mine].max())
                area = float(picture.masks.mean())
                found.append((ids[best], float(f[best]), float(b[best]), to_own, area))
        return found

    def _library(self, shard: Shard, ids: Sequence[str]) -> Pictures:
        """The references with their foregrounds; each is segmented once a process."""
        import torch

        from ._functional import Pictures

        prompts: PromptSet = shard.prompt_set
        key = ("fbmem", self.segmenter, self.segmenter_weights, self.true_masks, self.resolution)
        known: dict[str, Pictures] = remembered(prompts, key, dict)
        new = [reference_of(prompts, name) for name in ids if name not in known]
        if self.resolution is None:
            for reference in new:
                same_size(self.name, shard.images, reference)
        if new:
            pictures = self._pictures([r.image for r in new], [self._own_mask(r) for r in new])
            known.update({r.id: pictures[slice(i, i + 1)] for i, r in enumerate(new)})
        kept = [known[name] for name in ids]
        return Pictures(torch.cat([p.pixels for p in kept]), torch.cat([p.masks for p in kept]))

    def _own_mask(self, reference: Reference) -> NDArray[np.float32] | None:
        """The reference's true mask ``[h, w]`` in 0 to 1, or None where the segmenter must find it."""
        if self.true_masks and reference.mask is None:
            raise ValueError(f"{self.name}: reference {reference.id} has no true mask")
        if reference.mask is None or not (self.true_masks or self.segmenter == "given"):
            return None
        return np.asarray(reference.mask, dtype=np.float32) / np.float32(255)

    def _pictures(
        self,
        images: Sequence[NDArray[np.uint8]],
        masks: Sequence[NDArray[np.float32] | None] = (),
    ) -> Pictures:
        """Images with their foregrounds, at the metric's resolution; ``masks`` are those that are known.

        Given masks are found by the image as it was drawn, all others on the image as it is compared.
        """
        from ._functional import Pictures

        found = list(masks) or [None] * len(images)
        if self.segmenter == "given":
            found = [
                self._segmenter().masks(image[None])[0] if mask is None else mask
                for image, mask in zip(images, found, strict=True)
            ]
        if self.resolution is not None:
            size = (self.resolution, self.resolution)
            images = [segmenters.resize_image(image, *size) for image in images]
            found = [None if mask is None else segmenters.resize_mask(mask, *size) for mask in found]
        pixels = np.stack(images)
        lacking = [i for i, mask in enumerate(found) if mask is None]
        if lacking:
            for i, mask in zip(lacking, self._segmenter().masks(pixels[lacking]), strict=True):
                found[i] = mask
        return Pictures.of(pixels, np.stack([np.asarray(mask) for mask in found]) >= MASK_THRESHOLD)

    def _segmenter(self) -> Any:
        if isinstance(self.segmenter, str):
            return segmenters.load_segmenter(self.segmenter, self.segmenter_weights, self.segmenter_device)
        return self.segmenter


@lru_cache(maxsize=1)
def read_unrelated() -> dict[str, Any]:
    """``unrelated.json``, by variant. Raises RunError where it can't be read."""
    try:
        found: dict[str, Any] = json.loads(UNRELATED.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{UNRELATED} can't be read: restore it, or make it by `{CALIBRATE} fbmem`") from error
    return found


@METRICS.register
@dataclass(frozen=True)
class FBMemAsReleased(FBMem):
    """FB-Mem with the released code's similarity: flat fill, whole pictures, tau 0.8 for both.

    Kept beside :class:`FBMem` for comparison: the flat fill makes unrelated pictures alike where the
    foreground is small. From 176 pixels a side it has the released code's five scales, below that three. RGB
    where the released code compares RGBA; data range 1 where it takes each pair's own; the adaptive rule asks
    both pictures' masks where it asks for near-white and near-black pixels of one.
    """

    name: ClassVar[str] = "fbmem-as-released"
    summary: ClassVar[str] = "FB-Mem with the released code's flat fill and thresholds, for comparison."
    version: ClassVar[str] = "1"
    source: ClassVar[str] = "Di et al., arXiv 2508.12148, its released code"
    scores: ClassVar[tuple[Score, ...]] = _scores("fbmem_as_released")
    set_valued: ClassVar[frozenset[str]] = frozenset(
        {"fbmem_as_released.distinct_matches", "fbmem_as_released.distinct_matches_all"}
    )
    reads: ClassVar[frozenset[str] | None] = frozenset({"fbmem_as_released_memorized"})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "fbmem_as_released_own": "high",
        "fbmem_as_released_risk": "high",
    }
    prefix: ClassVar[str] = "fbmem_as_released"
    variant: ClassVar[Literal["masked", "as-released"]] = "as-released"

    keep: int | None = setting(None, "references that a coarse comparison keeps for the exact one; null: all")

    def _own_thresholds(self) -> tuple[float, float]:
        return AS_RELEASED_TAU, AS_RELEASED_TAU

    def _thresholds_from(self) -> str:
        return "released code"

    def _calibration(self) -> Mapping[str, Any]:
        return {}
