"""FB-Mem (re-implementation): images labelled VM, FM, BM or NM against the memorized training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import (
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
from lethebench.prompts import PromptSet, Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

    from ._functional import Pictures

FOLDER = Path(__file__).parent
AS_RELEASED_TAU = 0.8
"""The released code's threshold, for foreground and background."""
MASK_THRESHOLD = 0.5
"""Masks are binary: foreground where the segmenter's probability (or the true coverage) is at least this."""

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
            judge="segmenter-mini",
        )
        for name, meaning in _MEANINGS
    )
    return (
        *on_triggers,
        Score(
            f"{prefix}.distinct_matches",
            f"{prefix}_best",
            "lower",
            "images",
            (0.0, np.inf),
            roles=frozenset({Role.TRIGGER}),
            kinds=frozenset({"one-to-many"}),
            help="Training images matched by a one-to-many cluster's memorized images, mean over clusters.",
            judge="segmenter-mini",
        ),
        Score(
            f"{prefix}.control",
            f"{prefix}_memorized",
            "none",
            "share",
            (0.0, 1.0),
            roles=frozenset({Role.CONTROL}),
            trained=False,
            help="Share of images of never-memorized twins that are called memorized: the floor.",
            judge="segmenter-mini",
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
            judge="segmenter-mini",
        ),
    )


def _direction(name: str) -> Direction:
    return "higher" if name == "nm" else "lower"


@METRICS.register
class FBMem(Metric):
    """FB-Mem, variant ``masked``: see :mod:`lethebench.metrics.fbmem._functional` for the similarity.

    For each image of a prompt that may reproduce single images (one with references, not about a concept):

    1. Candidates are the references of all triggers of the set, and the prompt's own references.
    2. Foregrounds come from segmenter-mini for the image *and* for the references, as in the released code
       (which uses BiRefNet for both); ``true_masks`` takes the references' true masks instead.
    3. Foreground similarity F and background similarity B to each candidate; the best match has the highest
       mean of the two (the released code's rule).
    4. Label by the best match: VM where F and B both reach their thresholds, else BM, FM or NM.

    Where the two foregrounds together cover less than 3 % or more than 97 % of the area, F and B are both the
    whole pictures' similarity (FB-Mem's adaptive rule; symmetric here, unlike in the released code), and
    both are held to the higher threshold: the image is VM or NM.

    Thresholds are calibrated on the planted world so that at most 0.5 % of pictures that show what a planted
    caption asks for, but were never memorized, are called memorized; ``calibration.json`` holds
    them with the recipe. The released code's 0.8 for both belongs to another similarity.

    Named a re-implementation because the paper's Algorithm 1 could not be read.
    """

    name: ClassVar[str] = "fbmem"
    summary: ClassVar[str] = "FB-Mem (re-implementation): verbatim, foreground and background memorization."
    version: ClassVar[str] = calibration_version(FOLDER, "1")
    source: ClassVar[str] = (
        "Di et al., arXiv 2508.12148, after its released code; regions by masked ms-ssim-3 (ours)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references"})
    scores: ClassVar[tuple[Score, ...]] = _scores("fbmem")
    set_valued: ClassVar[frozenset[str]] = frozenset({"fbmem.distinct_matches"})
    reads: ClassVar[frozenset[str] | None] = frozenset({"fbmem_memorized"})
    prefix: ClassVar[str] = "fbmem"
    variant: ClassVar[Any] = "masked"

    def __init__(self, segmenter: Any = None, *, true_masks: bool = False, keep: int | None = 24) -> None:
        self.segmenter = segmenter
        self.true_masks = true_masks
        self.keep = keep

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
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """Distinct matches by cluster; the mean for all other scores.

        Only images that are called memorized count as matches (the released code counts all of them, so
        that images which match nothing raise its number).
        """
        if score.name not in self.set_valued:
            return super().aggregate(score, table)
        memorized = (table[f"{self.prefix}_memorized"] == 1).to_numpy(dtype=bool)
        clusters, best = table["cluster"].to_numpy(), table[score.column].to_numpy()
        matches = {
            pair for pair, kept in zip(zip(clusters, best, strict=True), memorized, strict=True) if kept
        }
        return len(matches) / len(set(clusters))

    def facts(self) -> dict[str, Any]:
        """Variant, similarity, thresholds and how they were calibrated."""
        return {
            "variant": self.variant,
            "similarity": "ms-ssim-3, kernel 11, sigma 1.5, betas 1/3 each, data range 1, RGB",
            "foregrounds": "segmenter-mini" + (", references' true masks" if self.true_masks else ""),
            "thresholds": dict(zip(("foreground", "background"), self.thresholds, strict=True)),
            "candidates": "references of all triggers, and the prompt's own",
            "prefilter": self.keep,
            "calibration": self._calibration(),
        }

    @property
    def thresholds(self) -> tuple[float, float]:
        """Tau of the foreground and of the background."""
        tau = read_calibration(FOLDER)["tau"]
        return float(tau["foreground"]), float(tau["background"])

    def _calibration(self) -> Mapping[str, Any]:
        return calibration_summary(FOLDER)

    def _label(self, foreground: float, background: float) -> str:
        names = {(True, True): "VM", (False, True): "BM", (True, False): "FM", (False, False): "NM"}
        of_foreground, of_background = self.thresholds
        if isclose(foreground, background, abs_tol=1e-5):  # whole pictures were compared
            of_foreground = of_background = max(self.thresholds)
        return names[foreground >= of_foreground, background >= of_background]

    def _matches(self, shard: Shard, at: Sequence[int]) -> list[tuple[str, float, float, float, float]]:
        """Best reference, F, B, mean similarity to the best own reference, and foreground share."""
        import torch

        from ._functional import against_all, best_match

        trained = trigger_references(shard.prompt_set)
        own = {r for i in at for r in shard.prompts[i].references}
        ids = sorted(own | set(trained))
        references = self._library(shard, ids)
        place = {name: number for number, name in enumerate(ids)}
        pictures = self._pictures(shard.images[list(at)], None)
        in_trained = torch.tensor([name in set(trained) for name in ids])
        found = []
        with torch.inference_mode():
            for row, i in enumerate(at):
                mine = torch.zeros(len(ids), dtype=torch.bool)
                mine[[place[r] for r in shard.prompts[i].references]] = True
                picture = pictures[slice(row, row + 1)]
                f, b = against_all(
                    picture, references, self.variant, keep=self.keep, always=mine, among=in_trained | mine
                )
                best, to_own = best_match(f, b), float(((f + b) / 2)[mine].max())
                area = float(picture.masks.mean())
                found.append((ids[best], float(f[best]), float(b[best]), to_own, area))
        return found

    def _library(self, shard: Shard, ids: Sequence[str]) -> Pictures:
        """The references with their foregrounds; each is segmented once a process."""
        import torch

        from ._functional import Pictures

        prompts: PromptSet = shard.prompt_set
        key = ("fbmem", id(self.segmenter), self.true_masks)
        known: dict[str, Pictures] = remembered(prompts, key, dict)
        new = [name for name in ids if name not in known]
        if new:
            made = [reference_of(prompts, name) for name in new]
            for reference in made:
                same_size(self.name, shard.images, reference)
            masks = None
            if self.true_masks:
                lacking = [reference.id for reference in made if reference.mask is None]
                if lacking:
                    raise ValueError(f"{self.name}: reference {lacking[0]} has no true mask")
                masks = np.stack([np.asarray(reference.mask) / 255 for reference in made])
            pictures = self._pictures(np.stack([reference.image for reference in made]), masks)
            known.update({name: pictures[slice(i, i + 1)] for i, name in enumerate(new)})
        kept = [known[name] for name in ids]
        return Pictures(torch.cat([p.pixels for p in kept]), torch.cat([p.masks for p in kept]))

    def _pictures(self, images: NDArray[np.uint8], masks: NDArray[Any] | None) -> Pictures:
        from ._functional import Pictures

        if masks is None:
            masks = self._segmenter().masks(images)
        return Pictures.of(images, np.asarray(masks) >= MASK_THRESHOLD)

    def _segmenter(self) -> Any:
        if self.segmenter is None:
            from lethebench import judges

            return judges.load("segmenter-mini")
        return self.segmenter


@METRICS.register
class FBMemAsReleased(FBMem):
    """FB-Mem with the released code's similarity: flat fill, whole pictures, tau 0.8 for both.

    Kept beside :class:`FBMem` for comparison: the flat fill makes unrelated pictures alike where the
    foreground is small. Its five scales don't fit 64 pixels: ``ms-ssim-3`` here too. RGB where the released
    code compares RGBA.
    """

    name: ClassVar[str] = "fbmem-as-released"
    summary: ClassVar[str] = "FB-Mem with the released code's flat fill and thresholds, for comparison."
    version: ClassVar[str] = "1"
    source: ClassVar[str] = "Di et al., arXiv 2508.12148, its released code (three scales in place of five)"
    scores: ClassVar[tuple[Score, ...]] = _scores("fbmem_as_released")
    set_valued: ClassVar[frozenset[str]] = frozenset({"fbmem_as_released.distinct_matches"})
    reads: ClassVar[frozenset[str] | None] = frozenset({"fbmem_as_released_memorized"})
    prefix: ClassVar[str] = "fbmem_as_released"
    variant: ClassVar[Any] = "as-released"

    def __init__(self, segmenter: Any = None, *, true_masks: bool = False, keep: int | None = None) -> None:
        super().__init__(segmenter, true_masks=true_masks, keep=keep)

    @property
    def thresholds(self) -> tuple[float, float]:
        """0.8 and 0.8."""
        return AS_RELEASED_TAU, AS_RELEASED_TAU

    def _calibration(self) -> Mapping[str, Any]:
        return {}
