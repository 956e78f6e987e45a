"""Pictures whose features are known, as an adversary may gather them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lethebench.datasets.planted import FEATURES, PlantedWorld, Scene, render
from lethebench.prompts import PromptSet


@dataclass(frozen=True)
class Labelled:
    """A picture, uint8 ``[height, width, 3]``, and the true answer to a question about it ("hood")."""

    image: NDArray[np.uint8]
    value: str


def can_label(prompts: PromptSet, question: str) -> bool:
    """Whether there are labelled pictures for a question ("comic.headgear") of the set's."""
    category, _, feature = question.partition(".")
    return hasattr(prompts, "labelled_pictures") or feature in FEATURES.get(category, {})


def labelled_pictures(prompts: PromptSet, question: str, count: int) -> tuple[Labelled, ...]:
    """``count`` pictures with the question's answer, the same for everyone who asks.

    The set's own, where it has a method ``labelled_pictures(question, count)`` that gives ``(image, answer)``
    one by one; else nameless figures of the planted world, which are in no training set.
    """
    own = getattr(prompts, "labelled_pictures", None)
    if own is not None:
        return tuple(Labelled(image, value) for image, value in own(question, count))
    return _figures(question, count)


@lru_cache(maxsize=8)
def _figures(question: str, count: int) -> tuple[Labelled, ...]:
    category, _, feature = question.partition(".")
    scenes = (scene for scene in _scenes() if scene.attributes()["category"] == category)
    return tuple(
        Labelled(render(scene).image, scene.attributes()[feature])
        for scene, _ in zip(scenes, range(count), strict=False)
    )


def _scenes() -> Iterator[Scene]:
    """Scenes of nameless figures, without end."""
    world, number = PlantedWorld(), 0
    while True:
        yield world.random_scene(f"linear-probe/{number}", kind="figure")
        number += 1
