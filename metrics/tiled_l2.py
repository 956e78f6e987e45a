"""Carlini's tiled l2 distance: to a prompt's own references, and between the images of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import (
    HARD_NEGATIVE,
    PLANTED_KINDS,
    Floats,
    Images,
    asks_for_copy,
    check_shard,
    reference_of,
    same_size,
    spread,
)
from lethebench.metrics._detectors import scores_of
from lethebench.metrics.noise_magnitude import auc
from lethebench.prompts import Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

GRID = 4
"""Tiles a side."""
SIDE = 32
"""Side of the pictures that are kept for the distances between a prompt's images."""
_PICTURE = "tiled_l2_picture"
_MEASURES = {
    "pair_mean": "pair_mean",
    "pair_min": "pair_min",
    "clique": "clique",
    "auc_pair_mean": "pair_mean",
    "auc_pair_min": "pair_min",
}
"""Set-valued scores, and the column of :func:`prompt_table` that each reads."""


def tiled_l2(a: NDArray[Any], b: NDArray[Any], grid: int = GRID) -> Floats:
    """The greatest of the tiles' distances, ``[n]``, 0 to 1.

    Images ``[n, h, w, c]`` in 0 to 255 (one side may have n = 1). A tile's distance is the root of its mean
    squared difference over pixels and channels in 0 to 1. Sides that don't divide by ``grid`` give tiles that
    differ by a pixel. Raises ValueError for fewer pixels a side than tiles.
    """
    _, height, width, _ = a.shape
    if min(height, width) < grid:
        raise ValueError(f"tiled-l2: {height} x {width} pixels don't make {grid} x {grid} tiles")
    squared = np.square((a.astype(np.float64) - b) / 255).mean(axis=3)
    tops, lefts = (np.arange(grid) * side // grid for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(squared, tops, axis=1), lefts, axis=2)
    sizes = np.outer(np.diff([*tops, height]), np.diff([*lefts, width]))
    return np.asarray(np.sqrt((sums / sizes).max(axis=(1, 2))))


def pairwise(images: NDArray[Any], grid: int = GRID) -> Floats:
    """Tiled l2 of every two of ``[n, h, w, c]``: ``[n, n]``, 0 on the diagonal."""
    return np.stack([tiled_l2(images, image[None], grid) for image in images])


def largest_clique(distances: NDArray[Any], edge: float) -> int:
    """Size of the largest set of images of which every two are within ``edge``; ``distances`` ``[n, n]``.

    >>> largest_clique(np.array([[0, 0.05, 0.3], [0.05, 0, 0.2], [0.3, 0.2, 0]]), 0.1)
    2
    """
    import networkx  # type: ignore[import-untyped]

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(distances)))
    graph.add_edges_from(np.argwhere(np.triu(distances <= edge, 1)).tolist())
    return int(networkx.max_weight_clique(graph, weight=None)[1]) if len(distances) else 0


def small_pictures(images: Images) -> NDArray[np.uint8]:
    """Images reduced to 32 x 32 pixels by area means, flat: uint8 ``[n, 3072]``."""
    from PIL import Image

    made = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return np.array([np.asarray(picture).ravel() for picture in made], np.uint8).reshape(-1, SIDE * SIDE * 3)


def prompt_table(table: pd.DataFrame, edge: float) -> pd.DataFrame:
    """A line a prompt of which the per-image ``table`` has at least two images.

    ``pair_mean`` and ``pair_min`` are over its pairs of images, ``clique`` counts the images of the largest
    clique, ``images`` all; ``cluster``, ``role`` and ``kind`` are the prompt's. For every two images within
    ``edge`` of one another the clique has an edge.
    """
    import pandas as pd

    columns = ["prompt_id", "cluster", "role", "kind", "images", "pair_mean", "pair_min", "clique"]
    return pd.DataFrame(_prompts(table, edge), columns=columns)


def _prompts(table: pd.DataFrame, edge: float) -> Iterator[tuple[Any, ...]]:
    # A resample renames the clusters it draws, so one prompt may stand in it twice.
    for (cluster, prompt), group in table.groupby(["cluster", "prompt_id"], sort=True):
        if len(group) > 1:
            pictures = (np.asarray(p, np.uint8).tobytes() for p in group.sort_values("index")[_PICTURE])
            found = _of_prompt(tuple(pictures), edge)
            yield prompt, cluster, group["role"].iloc[0], group["kind"].iloc[0], len(group), *found


@lru_cache(maxsize=2048)
def _of_prompt(pictures: tuple[bytes, ...], edge: float) -> tuple[float, float, int]:
    """Kept in memory: a bootstrap asks for the same prompts again and again."""
    images = np.stack([np.frombuffer(p, np.uint8).reshape(SIDE, SIDE, 3) for p in pictures])
    distances = pairwise(images)
    pairs = distances[np.triu_indices(len(images), 1)]
    return float(pairs.mean()), float(pairs.min()), largest_clique(distances, edge)


def _set_score(name: str, unit: str, bounds: tuple[float, float], help: str, direction: Any) -> Score:
    return Score(
        f"tiled_l2.{name}", _PICTURE, direction, unit, bounds, roles=frozenset({Role.TRIGGER}), help=help
    )


def _auc_score(which: str) -> Score:
    return Score(
        f"tiled_l2.auc_pair_{which}",
        _PICTURE,
        "none",
        "AUC",
        (0.0, 1.0),
        roles=frozenset({Role.TRIGGER, Role.CONTROL}),
        kinds=PLANTED_KINDS | {HARD_NEGATIVE},
        help=f"AUC of a small {which} distance between a prompt's images: trigger prompts against controls.",
    )


@METRICS.register
@dataclass(frozen=True)
class TiledL2(Metric):
    """Carlini et al. (USENIX Security 2023): l2 distance, the greatest over a 4 x 4 grid of tiles.

    Tiles keep a common flat background from making pictures alike. Root mean square in 0 to 1; low says
    memorized.

    - ``tiled_l2``: to the nearest own reference; NaN for prompts without references to copy.
    - Between the images of one prompt (needs no reference; at least two images a prompt, else no score):
      mean and least distance of two, mean over prompts, and the images of the largest clique of near-equal
      ones. Carlini et al. flag 10 of 500, and Jeon et al. use the distances themselves for n = 4 to 16. The
      AUC over prompts is of triggers against controls (twins and hard negatives).

    The paper publishes no threshold for the cliques' edges: 0.1 is the default of LeakPro. Distances between
    a prompt's images are taken on pictures of 32 x 32 pixels (area means, ours), which the table keeps, so
    that neither batch nor shard decides which images meet: they are a little smaller than at full size.
    """

    edge: float = setting(0.1, "two images of a prompt within this distance are joined in a clique")

    name: ClassVar[str] = "tiled-l2"
    summary: ClassVar[str] = (
        "Tiled l2 to own training images and between a prompt's images; cliques (Carlini)."
    )
    source: ClassVar[str] = (
        "Carlini et al., USENIX Security 2023; Jeon et al., ICML 2025, App. D.1; edges: aidotse/LeakPro"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references"})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {"tiled_l2": "low"}
    scores: ClassVar[tuple[Score, ...]] = (
        *scores_of(
            "tiled_l2",
            "tiled_l2.reference",
            "Tiled l2 to the nearest own training image",
            "rms",
            (0.0, 1.0),
            "higher",
        ),
        _set_score(
            "pair_mean",
            "rms",
            (0.0, 1.0),
            "Tiled l2 of two images of a trigger prompt: mean over pairs, then prompts.",
            "higher",
        ),
        _set_score(
            "pair_min",
            "rms",
            (0.0, 1.0),
            "Tiled l2 of the two most alike images of a trigger prompt, mean over prompts.",
            "higher",
        ),
        _set_score(
            "clique",
            "images",
            (1.0, np.inf),
            "Images of a trigger prompt in its largest clique of near-equal ones, mean over prompts.",
            "lower",
        ),
        _auc_score("mean"),
        _auc_score("min"),
    )
    set_valued: ClassVar[frozenset[str]] = frozenset(f"tiled_l2.{name}" for name in _MEASURES)
    reads: ClassVar[frozenset[str] | None] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.edge, (int, float)) or not 0 <= self.edge <= 1:
            raise ValueError(f"edge={self.edge!r} must be a distance from 0 to 1")

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``tiled_l2``, and ``tiled_l2_picture`` (uint8 ``[n, 3072]``) for the set-valued scores."""
        check_shard(self.name, shard)
        at = [i for i, prompt in enumerate(shard.prompts) if asks_for_copy(prompt)]
        nearest = [self._nearest(shard, i) for i in at]
        return {"tiled_l2": spread(nearest, at, len(shard)), _PICTURE: small_pictures(shard.images)}

    def _nearest(self, shard: Shard, row: int) -> float:
        found = [reference_of(shard.prompt_set, name) for name in shard.prompts[row].references]
        for reference in found:
            same_size(self.name, shard.images, reference)
        return float(tiled_l2(np.stack([r.image for r in found]), shard.images[row][None]).min())

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """Over prompts with several images; the mean over images for all other scores."""
        if score.name not in self.set_valued:
            return super().aggregate(score, table)
        prompts = prompt_table(table, float(self.edge))
        values = prompts[_MEASURES[score.name.removeprefix("tiled_l2.")]].to_numpy(dtype=float)
        if score.unit == "AUC":
            return auc((prompts["role"] == str(Role.TRIGGER)).to_numpy(dtype=bool), -values)
        return float(values.mean()) if len(values) else float("nan")

    def facts(self) -> dict[str, Any]:
        """Tiles, the edge, and the size of the pictures that are compared within a prompt."""
        return {"grid": [GRID, GRID], "edge": self.edge, "pairs_at": [SIDE, SIDE]}
