"""Fresh renderings of the planted world: what a model that memorized nothing might draw for a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lethebench.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    from lethebench.datasets.planted import Picture, Scene

OBJECT_WORDS = ("object", "colour", "pattern")


def can_render(prompt_set: PromptSet) -> bool:
    """Whether the set can draw fresh scenes: whether it is a planted world."""
    return hasattr(prompt_set, "random_scene")


def fresh_scene(world: Any, prompt: Prompt, key: str) -> Scene:
    """A new scene with the prompt's attributes, all else drawn by ``key`` as in neutral training pictures.

    ``world`` is a PlantedWorld, ``prompt`` one that asks for an object, a background or both.
    """
    from lethebench.datasets.planted import Thing
    from lethebench.datasets.planted.items import SCENE_SIZES

    attempt = 0
    while True:
        scene: Scene = world.random_scene(f"metrics/{key}/{attempt}")
        if scene.placement.size <= SCENE_SIZES[1]:
            break
        attempt += 1
    subject, asked = scene.subject, prompt.attributes
    assert isinstance(subject, Thing)
    subject = replace(subject, **{_FIELDS[w]: asked[w] for w in OBJECT_WORDS if w in asked})
    backdrop = replace(scene.backdrop, word=asked.get("background", scene.backdrop.word))
    return replace(scene, subject=subject, backdrop=backdrop)


_FIELDS = {"object": "word", "colour": "colour", "pattern": "pattern"}


def fresh_picture(world: Any, prompt: Prompt, key: str) -> Picture:
    """:func:`fresh_scene`, rendered: image uint8 ``[64, 64, 3]`` and coverage uint8 ``[64, 64]``."""
    from lethebench.datasets.planted import render

    return render(fresh_scene(world, prompt, key))
