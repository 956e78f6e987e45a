"""Distance ratios to training pictures: Gu's one-third rule, and Carlini's ratio to several neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import (
    HARD_NEGATIVE,
    Floats,
    Images,
    check_shard,
    reference_of,
    remembered,
    texts,
)
from lethebench.metrics._detectors import require_count, scores_of
from lethebench.prompts import PromptSet, Role
from lethebench.registry import METRICS

RULE = 1 / 3
ALPHA = 0.5
_BLOCK = 512
_TRIGGERS = frozenset({Role.TRIGGER})


def distances(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> Floats:
    """Root mean square difference in 0 to 1 of flat pictures ``[n, d]`` and ``[m, d]``: ``[n, m]``.

    Every product is a sum of whole numbers below 2^53, so that the result is exact whatever the blocks.
    """
    found = np.empty((len(x), len(y)))
    left = x.astype(np.float64)
    own = (left * left).sum(axis=1)
    for start in range(0, len(y), _BLOCK):
        right = y[start : start + _BLOCK].astype(np.float64)
        cross = own[:, None] + (right * right).sum(axis=1) - 2 * left @ right.T
        found[:, start : start + _BLOCK] = np.sqrt(cross / max(1, x.shape[1])) / 255
    return found


def gap_ratio(found: Floats) -> Floats:
    """Distance to the nearest over distance to the second nearest, ``[n]`` in 0 to 1, of ``[n, m]``.

    NaN with fewer than two references; 1 where both are 0.
    """
    if found.shape[1] < 2:
        return np.full(len(found), np.nan)
    first, second = np.partition(found, 1, axis=1)[:, :2].T
    return np.where(second > 0, first / np.where(second > 0, second, 1), 1.0)


def neighbour_ratio(found: Floats, means: Floats, alpha: float = ALPHA) -> Floats:
    """Distance to the nearest over ``alpha`` times a mean distance, ``[n]``.

    ``means`` is ``[n, m]`` or ``[n, 1]``: for each image the mean that goes with each reference.
    """
    nearest = found.argmin(axis=1)[:, None]
    mean = np.take_along_axis(np.broadcast_to(means, found.shape), nearest, axis=1)[:, 0]
    least = np.take_along_axis(found, nearest, axis=1)[:, 0]
    return np.where(mean > 0, least / np.where(mean > 0, alpha * mean, 1), np.nan)


def nearest_mean(found: Floats, count: int) -> Floats:
    """Mean of the ``count`` least of each row, ``[n]`` of ``[n, m]``; NaN with fewer than ``count``."""
    if found.shape[1] < count:
        return np.full(len(found), np.nan)
    return np.asarray(np.partition(found, count - 1, axis=1)[:, :count].mean(axis=1))


@dataclass(frozen=True)
class Pool:
    """De-duplicated reference pictures: ids, uint8 ``[m, h, w, 3]``, distances of every two ``[m, m]``."""

    ids: tuple[str, ...]
    images: Images
    between: Floats

    @property
    def flat(self) -> NDArray[np.uint8]:
        """The pictures as ``[m, d]``."""
        return self.images.reshape(len(self.images), -1)


def deduplicated(ids: tuple[str, ...], images: Images, within: float) -> Pool:
    """The pool without near-duplicates: in the given order, a picture is left out that is at most ``within``
    from one that stays.
    """
    between = distances(*(images.reshape(len(images), -1),) * 2)
    kept: list[int] = []
    for row in range(len(images)):
        if not kept or between[row, kept].min() > within:
            kept.append(row)
    return Pool(tuple(ids[i] for i in kept), images[kept], between[np.ix_(kept, kept)])


def reference_pool(prompt_set: PromptSet, neutral: int, within: float) -> Pool:
    """The reference: training pictures that prompts name, then the first ``neutral`` neutral ones.

    The former are the references of triggers, and of all prompts whose items are known to be trained (the
    planted world's characters and hard negatives), by id; held-out twins were never trained and aren't in it.
    The latter only a prompt set with ``training_examples`` has: the planted world.
    """
    named = sorted({r for p in prompt_set if p.role is Role.TRIGGER or p.trained for r in p.references})
    ids, images = list(named), [reference_of(prompt_set, name).image for name in named]
    if neutral and hasattr(prompt_set, "training_examples"):
        from lethebench.datasets.planted import render

        scenes = [e.scene for e in prompt_set.training_examples() if e.kind == "neutral"][:neutral]
        ids += [f"neutral-training/{number}" for number in range(len(scenes))]
        images += [render(scene).image for scene in scenes]
    for name, image in zip(ids, images, strict=True):
        if image.shape != images[0].shape:
            shapes = f"{list(image.shape)}, {ids[0]} is {list(images[0].shape)}"
            raise ValueError(f"gap-ratio: references must be of one size; {name} is {shapes}")
    stacked = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
    return deduplicated(tuple(ids), stacked, within)


@METRICS.register
@dataclass(frozen=True)
class GapRatio(Metric):
    """How much nearer the nearest training picture is than others, in pixel l2.

    - ``gap_ratio``: distance to the nearest over distance to the second nearest picture of the reference
      (Gu et al.); ``gap_ratio_copied`` is 1 below one third, their rule, else 0.
    - ``gap_ratio_neighbours``: distance to the nearest over 0.5 times the mean distance of k = 50 nearest
      (Carlini et al. 2023). Whose neighbours is a setting, since implementations differ: the generated
      image's (AMG's equation 8 and SolidMark's code) or the nearest training picture's (LeakPro). NaN with
      fewer than k other pictures in the reference.
    - ``gap_ratio_nearest``: the nearest picture's id.

    Low says memorized. The reference is not the prompt's own: all training pictures that the prompt set's
    trained prompts name, and for the planted world some of its neutral training pictures
    (:func:`reference_pool`). It is a part of the training set, so that the second nearest, hence the ratio,
    depends on its size: the published rule takes the whole set. Near-duplicates make two nearest pictures of
    one and break the rule, so the reference is de-duplicated first: of pictures within ``dedup`` of one
    another (root mean square, 0 to 1; its default is planted-truth's bound of a near-copy) one stays.
    """

    neutral: int = setting(1000, "neutral training pictures in the reference (planted world only)")
    dedup: float = setting(0.08, "reference pictures within this distance count as one")
    k: int = setting(50, "neighbours of Carlini's ratio")
    neighbours: str = setting("generated", "whose neighbours: 'generated' (AMG) or 'reference' (LeakPro)")

    name: ClassVar[str] = "gap-ratio"
    summary: ClassVar[str] = (
        "Distance to the nearest training picture against others (Gu's third; Carlini, AMG)."
    )
    source: ClassVar[str] = (
        "Gu et al. 2023, mem_ratio.py of sail-sg/DiffMemorize; Carlini et al., USENIX Security 2023; "
        "Chen et al., CVPR 2024, eq. 8"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references"})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "gap_ratio": "low",
        "gap_ratio_neighbours": "low",
    }
    scores: ClassVar[tuple[Score, ...]] = (
        *scores_of(
            "gap_ratio_copied",
            "gap_ratio.rate",
            "Share of images copied by the one-third rule",
            "share",
            (0.0, 1.0),
            "lower",
        ),
        Score(
            "gap_ratio.rate_hard_negative",
            "gap_ratio_copied",
            "none",
            "share",
            (0.0, 1.0),
            roles=frozenset({Role.CONTROL}),
            kinds=frozenset({HARD_NEGATIVE}),
            help="Share of images of rare-name captions seen once that are copied by the one-third rule.",
        ),
        *scores_of(
            "gap_ratio",
            "gap_ratio.ratio",
            "Nearest over second nearest distance",
            "ratio",
            (0.0, 1.0),
            "higher",
        ),
        *scores_of(
            "gap_ratio_neighbours",
            "gap_ratio.neighbours",
            "Nearest distance over half the mean of k neighbours",
            "ratio",
            (0.0, np.inf),
            "higher",
        ),
    )

    def __post_init__(self) -> None:
        require_count("neutral", self.neutral, 0)
        require_count("k", self.k, 1)
        if not isinstance(self.dedup, (int, float)) or not 0 <= self.dedup <= 1:
            raise ValueError(f"dedup={self.dedup!r} must be a distance from 0 to 1")
        if self.neighbours not in ("generated", "reference"):
            raise ValueError(f"neighbours={self.neighbours!r} must be 'generated' or 'reference'")

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``gap_ratio``, ``_copied`` (0 or 1), ``_neighbours`` and ``_nearest`` (id)."""
        check_shard(self.name, shard)
        count = len(shard)
        pool = self._pool(shard.prompt_set)
        if not count or not pool.ids:
            none = np.full(count, np.nan)
            names = texts([], [], count)
            return self._columns(none, none, names)
        if shard.images.shape[1:] != pool.images.shape[1:]:
            ours, theirs = list(shard.images.shape[1:]), list(pool.images.shape[1:])
            raise ValueError(f"gap-ratio: references are {theirs}, the images are {ours}")
        found = distances(shard.images.reshape(count, -1), pool.flat)
        names = texts([pool.ids[i] for i in found.argmin(axis=1)], range(count), count)
        return self._columns(gap_ratio(found), neighbour_ratio(found, self._means(found, pool)), names)

    def _pool(self, prompt_set: PromptSet) -> Pool:
        key = ("gap-ratio", self.neutral, self.dedup)
        return remembered(prompt_set, key, lambda: reference_pool(prompt_set, self.neutral, self.dedup))

    def _means(self, found: Floats, pool: Pool) -> Floats:
        if self.neighbours == "generated":
            return nearest_mean(found, self.k)[:, None]
        others = pool.between + np.diag(np.full(len(pool.ids), np.inf))
        if len(pool.ids) <= self.k:
            return np.full((1, len(pool.ids)), np.nan)
        return nearest_mean(others, self.k)[None]

    def _columns(self, ratio: Floats, neighbours: Floats, names: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {
            "gap_ratio": ratio,
            "gap_ratio_copied": np.where(np.isnan(ratio), np.nan, ratio < RULE),
            "gap_ratio_neighbours": neighbours,
            "gap_ratio_nearest": names,
        }

    def facts(self) -> dict[str, Any]:
        """The rule, the reference, and whose neighbours."""
        return {
            "rule": "1/3",
            "reference": f"trained prompts' references; in a planted world {self.neutral} neutral ones too",
            "dedup": self.dedup,
            "k": self.k,
            "alpha": ALPHA,
            "neighbours": self.neighbours,
        }
