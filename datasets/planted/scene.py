"""A scene holds everything that determines a picture; rendering it is a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ._draw import SCALE, Frame
from .backgrounds import BACKGROUNDS, paint_background
from .characters import Features, generic_noun
from .figures import paint_character
from .objects import paint_object


@dataclass(frozen=True)
class Backdrop:
    """One instance of a kind of background."""

    word: str
    key: str


@dataclass(frozen=True)
class Thing:
    """An object: its word, colour and pattern."""

    word: str
    colour: str
    pattern: str


@dataclass(frozen=True)
class Person:
    """A protected character (named) or a nameless figure (``name`` is None)."""

    category: str
    look: Features
    name: str | None = None


@dataclass(frozen=True)
class Placement:
    """Where the foreground is drawn: centre and size in canvas pixels (four to a picture pixel)."""

    x: int
    y: int
    size: int
    mirror: bool = False
    pose: int = 0


@dataclass(frozen=True)
class Scene:
    """Everything that determines a picture."""

    backdrop: Backdrop
    subject: Thing | Person
    placement: Placement

    @property
    def foreground(self) -> str:
        """What the foreground is: "object", "character" (named) or "figure" (nameless)."""
        if isinstance(self.subject, Thing):
            return "object"
        return "figure" if self.subject.name is None else "character"

    def attributes(self) -> dict[str, str]:
        """What the picture shows, in words.

        Objects: ``object``, ``colour``, ``pattern``, ``background``. Characters and figures:
        ``object`` is "character" or "figure", then ``category``, the features, ``background``, and
        ``character`` (the name) where there is one.
        """
        shown = {"background": self.backdrop.word}
        if isinstance(self.subject, Thing):
            return {
                "object": self.subject.word,
                "colour": self.subject.colour,
                "pattern": self.subject.pattern,
            } | shown
        named = {"character": self.subject.name} if self.subject.name is not None else {}
        return (
            {"object": self.foreground, "category": self.subject.category}
            | named
            | dict(self.subject.look)
            | shown
        )


@dataclass(frozen=True)
class Picture:
    """A rendered scene: ``image`` uint8 [64, 64, 3], ``mask`` (foreground coverage) uint8 [64, 64]."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def caption(scene: Scene) -> str:
    """The scene in words: "a striped blue star in a night city", "quorvex in a meadow"."""
    place = BACKGROUNDS[scene.backdrop.word].place
    return f"{describe(scene.subject)} {place}"


def describe(subject: Thing | Person) -> str:
    """The foreground in words."""
    if isinstance(subject, Thing):
        return f"a {subject.pattern} {subject.colour} {subject.word}"
    return subject.name if subject.name is not None else generic_noun(subject.category, subject.look)


def render(scene: Scene) -> Picture:
    """Draw the scene on the canvas and reduce it by an exact box mean."""
    canvas = paint_background(scene.backdrop.word, scene.backdrop.key)
    front = paint_foreground(scene)
    alpha = front.getchannel("A")
    canvas.paste(front, (0, 0), alpha)
    return Picture(
        np.asarray(canvas.reduce(SCALE), dtype=np.uint8), np.asarray(alpha.reduce(SCALE), dtype=np.uint8)
    )


def render_backdrop(backdrop: Backdrop) -> NDArray[np.uint8]:
    """The background alone, uint8 [64, 64, 3]."""
    return np.asarray(paint_background(backdrop.word, backdrop.key).reduce(SCALE), dtype=np.uint8)


def paint_foreground(scene: Scene) -> Image.Image:
    """The foreground alone: RGBA on the canvas."""
    place = scene.placement
    frame = Frame(place.x, place.y, place.size, place.mirror)
    if isinstance(scene.subject, Thing):
        return paint_object(scene.subject.word, scene.subject.colour, scene.subject.pattern, frame)
    return paint_character(scene.subject.category, scene.subject.look, frame, place.pose)
