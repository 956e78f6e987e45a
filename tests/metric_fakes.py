"""A small planted world, shards of its pictures, and judges that know the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from lethebench.datasets.planted import CATEGORIES, OBJECTS, Picture, PlantedWorld, WorldConfig, render
from lethebench.hooks import ImageKey
from lethebench.metric import Shard
from lethebench.metrics._world import fresh_scene
from lethebench.prompts import Prompt
from lethebench.work import columns_frame, known_frame


@cache
def small_world() -> PlantedWorld:
    return PlantedWorld(
        WorldConfig(
            neutral_images=40,
            neutral_prompts=12,
            fit_prompts=8,
            figure_images=4,
            probes_per_noun=1,
            verbatim_pairs=((4, 3), (64, 4)),
            foreground_pairs=((8, 3),),
            background_pairs=((8, 3),),
            one_to_many_pairs=((8, 1),),
            redundant_pairs=((8, 1),),
            hard_negatives=6,
            characters_per_category=2,
            concept_images=4,
            concept_prompts=1,
        )
    )


def trained(kind: str) -> list[Prompt]:
    """The first prompt of each trained item of a kind."""
    found = {p.cluster: p for p in reversed(list(small_world())) if p.kind == kind and p.trained}
    return list(found.values())[::-1]


def picture(scene: Any) -> Picture:
    made = render(scene)
    TrueMasks.known[made.image.tobytes()] = made.mask
    return made


def fresh(prompt: Prompt, key: str = "test") -> Picture:
    return picture(fresh_scene(small_world(), prompt, f"{key}/{prompt.id}"))


def scene_of(prompt: Prompt, number: int = 0) -> Picture:
    item = small_world().item_of(prompt.id)
    assert item is not None
    return picture(item.scenes[number])


def shard(pairs: Sequence[tuple[Prompt, Any]], **extra: Any) -> Shard:
    """Pairs of prompt and picture (or image)."""
    images = [p.image if isinstance(p, Picture) else p for _, p in pairs]
    stacked = np.stack(images) if images else np.zeros((0, 64, 64, 3), np.uint8)
    prompts = tuple(p for p, _ in pairs)
    return Shard(stacked, prompts, tuple(range(len(pairs))), small_world(), **extra)


class TrueMasks:
    """segmenter-mini's interface, with the true masks of pictures made here and of the world's references."""

    known: dict[bytes, np.ndarray] = {}

    def masks(self, images: np.ndarray) -> np.ndarray:
        world = small_world()
        if not any(k.startswith(b"world") for k in self.known):
            for name in sorted({r for p in world for r in p.references}):
                made = world.reference(name)
                assert made.mask is not None
                self.known[made.image.tobytes()] = made.mask
            self.known[b"world"] = np.zeros(0)
        none = np.zeros((64, 64), np.uint8)
        return np.stack([self.known.get(i.tobytes(), none) for i in images]).astype(np.float32) / 255


class Thumbnails:
    """copy-mini's and clip-mini's interfaces, by colours on a coarse grid."""

    def describe(self, images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(len(images), -1) - 128.0
        return (flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)).astype(np.float32)

    def images(self, images: np.ndarray) -> np.ndarray:
        return self.describe(images)[:, :16]

    def features(self, images: np.ndarray) -> np.ndarray:
        return self.describe(images)[:, ::24]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([np.random.default_rng(sum(t.encode())).standard_normal(16) for t in texts])


@dataclass
class Told:
    """recogniser-mini's answers."""

    options: dict[str, tuple[str, ...]]
    labels: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]


class Knows:
    """recogniser-mini's interface: answers what it was told about each image."""

    def __init__(self, *told: tuple[Any, dict[str, str]]) -> None:
        self.told = {made.image.tobytes(): attributes for made, attributes in told}

    def answer(self, images: np.ndarray) -> Told:
        world = small_world()
        shown = [self.told.get(i.tobytes(), {}) for i in images]
        options = {
            "object": (*OBJECTS, "character", "figure", "none"),
            "colour": (*sorted({p.attributes["colour"] for p in world if "colour" in p.attributes}), "none"),
            "background": tuple(
                sorted({p.attributes["background"] for p in world if "background" in p.attributes})
            ),
            "category": (*CATEGORIES, "none"),
            "character": (*(c.name for c in world.characters), "none"),
            "protected": ("no", "yes"),
        }
        labels = {name: np.array([s.get(name, "none") for s in shown]) for name in options}
        labels["protected"] = np.array(["yes" if "character" in s else "no" for s in shown])
        probabilities = {
            name: np.array([[0.9 if o == x else 0.1 / len(of) for o in of] for x in labels[name]]).reshape(
                -1, len(of)
            )
            for name, of in options.items()
        }
        return Told(options, labels, probabilities)


def table(of: Shard, columns: Mapping[str, Any]) -> pd.DataFrame:
    """A metric's columns of a shard as the runner's per-image table."""
    keys = [ImageKey("made@1", prompt, index) for prompt, index in zip(of.prompts, of.indices, strict=True)]
    return pd.concat([known_frame(keys), columns_frame(columns, len(of), "made")], axis=1)
