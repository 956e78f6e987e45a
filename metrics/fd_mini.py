"""Frechet distance between generated neutral images and fresh renderings of the same captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard, check_vectors, remembered, spread
from lethebench.metrics._world import can_render, fresh_picture
from lethebench.prompts import Prompt, Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
RENDERINGS = 4
"""Fresh renderings of each caption in the reference set."""


def frechet_distance(mean_a: Floats, cov_a: Floats, mean_b: Floats, cov_b: Floats) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017 for its use).

    |ma - mb|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The last trace is taken from the symmetric
    A^(1/2) B A^(1/2), whose eigenvalues are those of A B: exact for singular covariances too, where a general
    matrix square root needs an offset.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ cov_b @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    shift = mean_a - mean_b
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_of_features(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The distance of two sets of features ``[n, d]`` and ``[m, d]``; NaN with fewer than two of either."""
    if len(a) < 2 or len(b) < 2:
        return float("nan")
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return frechet_distance(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))


@METRICS.register
class FDMini(Metric):
    """FID's protocol on the penultimate features of clip-mini (64 dimensions): not comparable with FID.

    The reference set is four fresh renderings of each neutral caption, outside the training set, so that
    captions are matched and what differs is how they are drawn. No resizing anywhere. The distance grows as
    N falls (N is the record's): compare rows of one suite only. Each image carries its own caption's
    reference features, so that the bootstrap resamples captions on both sides.

    NaN for prompt sets that can't render fresh scenes.
    """

    name: ClassVar[str] = "fd-mini"
    summary: ClassVar[str] = "Frechet distance of neutral images to fresh renderings of the same captions."
    source: ClassVar[str] = "Heusel et al. 2017 (protocol); features clip-mini (ours)"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = (
        Score(
            "fd_mini",
            "fd_mini_features",
            "lower",
            "squared distance",
            (0.0, np.inf),
            roles=frozenset({Role.NEUTRAL}),
            help="Frechet distance of images on neutral prompts to fresh renderings of their captions.",
            judge="clip-mini",
        ),
    )
    set_valued: ClassVar[frozenset[str]] = frozenset({"fd_mini"})
    reads: ClassVar[frozenset[str] | None] = frozenset({"fd_mini_reference"})

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``fd_mini_features`` ``[n, d]``, ``fd_mini_reference`` ``[n, 4 d]``; NaN but on neutral prompts."""
        check_shard(self.name, shard)
        usable = can_render(shard.prompt_set)
        at = [i for i, prompt in enumerate(shard.prompts) if usable and prompt.role is Role.NEUTRAL]
        made = self._features(shard.images[at]) if at else np.zeros((0, 1))
        rendered = self._rendered(shard, [shard.prompts[i] for i in at])
        return {
            "fd_mini_features": spread(made, at, len(shard)),
            "fd_mini_reference": spread(rendered, at, len(shard)),
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """The distance over the table's images and their captions' reference features."""
        made = np.stack([np.asarray(v, dtype=np.float64) for v in table["fd_mini_features"]])
        rendered = np.stack([np.asarray(v, dtype=np.float64) for v in table["fd_mini_reference"]])
        return frechet_of_features(made, rendered.reshape(-1, made.shape[1]))

    def facts(self) -> dict[str, Any]:
        """Features, reference set and resizer."""
        return {
            "features": "clip-mini, penultimate, 64",
            "reference": f"{RENDERINGS} fresh renderings of each caption",
            "resizer": "none",
            "covariance": "n - 1",
        }

    def _features(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        if self.judge is None:
            from lethebench import judges

            found = judges.load("clip-mini").features(images)
        else:
            found = self.judge.features(images)
        check_vectors(self.name, "features", found, len(images))
        return np.asarray(found)

    def _rendered(self, shard: Shard, prompts: list[Prompt]) -> NDArray[Any]:
        """Reference features of each prompt, ``[n, 4 d]``; each caption is rendered once a process."""
        known: dict[str, NDArray[Any]] = remembered(shard.prompt_set, ("fd-mini", id(self.judge)), dict)
        new = list({p.id: p for p in prompts if p.id not in known}.values())
        if new:
            keys = [(p, f"fd-mini/{p.id}/{k}") for p in new for k in range(RENDERINGS)]
            images = np.stack([fresh_picture(shard.prompt_set, p, key).image for p, key in keys])
            features = self._features(images)
            known.update(zip([p.id for p in new], features.reshape(len(new), -1), strict=True))
        return np.stack([known[p.id] for p in prompts]) if prompts else np.zeros((0, RENDERINGS))
