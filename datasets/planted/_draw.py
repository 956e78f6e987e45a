"""Seeded draws, colours and the pens that everything in the world is drawn with.

A picture is drawn with integer coordinates on a canvas of :data:`CANVAS` pixels and reduced by an
exact box mean to :data:`SIZE`, so that it is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import TypeVar

from PIL import Image, ImageDraw

SIZE = 64
"""Side of a picture in pixels."""
SCALE = 4
"""Canvas pixels per picture pixel, along each side."""
CANVAS = SIZE * SCALE
"""Side of the canvas in pixels."""

Colour = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")

INK: Colour = (34, 28, 48)
"""The outline's colour."""
OUTLINE = 5
"""The outline's width in canvas pixels."""

COLOURS: dict[str, Colour] = {
    "red": (224, 48, 46),
    "orange": (246, 134, 32),
    "yellow": (252, 214, 48),
    "green": (50, 168, 74),
    "blue": (48, 104, 226),
    "purple": (138, 70, 194),
    "pink": (246, 138, 190),
    "white": (246, 246, 244),
}
"""The named colours of objects and figures."""


class Draw:
    """A stream of seeded choices, fixed by its key alone.

    Only :meth:`random.Random.random` is used: its stream for a given integer seed is the one that
    Python guarantees to keep.
    """

    def __init__(self, *key: object) -> None:
        digest = sha256("/".join(str(part) for part in key).encode()).digest()
        self._random = Random(int.from_bytes(digest, "big"))

    def unit(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int(self.unit() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.unit() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, each equally likely."""
        return options[int(self.unit() * len(options))]

    def shuffled(self, options: Iterable[T]) -> list[T]:
        """The options in a random order."""
        keyed = [(self.unit(), index, option) for index, option in enumerate(options)]
        return [option for _, _, option in sorted(keyed, key=lambda entry: entry[:2])]

    def tint(self, colour: Colour, amount: int) -> Colour:
        """The colour with every channel moved by up to ``amount``."""
        red, green, blue = (clip(channel + self.integer(-amount, amount)) for channel in colour)
        return red, green, blue


def clip(value: float) -> int:
    """The nearest integer in 0 to 255."""
    return max(0, min(255, round(value)))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour that lies ``share`` (0 to 1) of the way from the first to the second."""
    red, green, blue = (clip(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def lighter(colour: Colour, share: float) -> Colour:
    """The colour mixed with white."""
    return mix(colour, (255, 255, 255), share)


def darker(colour: Colour, share: float) -> Colour:
    """The colour mixed with a dark violet, which reads better than black."""
    return mix(colour, (28, 16, 52), share)


@dataclass(frozen=True)
class Frame:
    """Where a foreground lies on the canvas: centre, size (canvas pixels), and whether mirrored.

    Foregrounds are drawn in units from -50 to 50 in both directions, with y down.
    """

    x: int
    y: int
    size: int
    mirror: bool = False

    def at(self, u: float, v: float) -> tuple[int, int]:
        """The canvas pixel of a point in units."""
        side = -u if self.mirror else u
        return self.x + round(side * self.size / 100), self.y + round(v * self.size / 100)

    def length(self, units: float) -> int:
        """A length in canvas pixels."""
        return round(units * self.size / 100)


class Pen:
    """Draws shapes given in a frame's units on one layer."""

    def __init__(self, frame: Frame, mode: str = "RGBA") -> None:
        self.frame = frame
        self.image = Image.new(mode, (CANVAS, CANVAS))
        self._draw = ImageDraw.Draw(self.image)

    def ellipse(self, u: float, v: float, ru: float, rv: float, fill: Colour | int) -> None:
        """An ellipse with that centre and those radii."""
        x, y = self.frame.at(u, v)
        rx, ry = self.frame.length(ru), self.frame.length(rv)
        self._draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def circle(self, u: float, v: float, radius: float, fill: Colour | int) -> None:
        """A disc."""
        self.ellipse(u, v, radius, radius, fill)

    def polygon(self, points: Iterable[Point], fill: Colour | int) -> None:
        """A filled polygon."""
        self._draw.polygon([self.frame.at(u, v) for u, v in points], fill=fill)

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: Colour | int, radius: float = 0
    ) -> None:
        """A rectangle, its corners rounded by ``radius``."""
        (x0, y0), (x1, y1) = self.frame.at(left, top), self.frame.at(right, bottom)
        corners = (min(x0, x1), y0, max(x0, x1), y1)
        self._draw.rounded_rectangle(corners, radius=self.frame.length(radius), fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour | int) -> None:
        """A thick line with round ends and joints."""
        pixels = [self.frame.at(u, v) for u, v in points]
        thickness = self.frame.length(width)
        self._draw.line(pixels, fill=fill, width=thickness)
        for x, y in pixels:
            half = thickness // 2
            self._draw.ellipse((x - half, y - half, x + half, y + half), fill=fill)

    def clear(self, left: float, top: float, right: float, bottom: float) -> None:
        """Erase a rectangle (to cut a shape straight)."""
        (x0, y0), (x1, y1) = self.frame.at(left, top), self.frame.at(right, bottom)
        self._draw.rectangle((min(x0, x1), y0, max(x0, x1), y1), fill=0)

    def shade(self, depth: float = 9, strength: int = 62) -> None:
        """Darken the layer's lower edge (and the right one), as if lit from above on the left."""
        alpha = self.image.getchannel("A")
        step = self.frame.length(depth)
        rest = Image.new("L", alpha.size)
        rest.paste(alpha, (-step // 2, -step))
        crescent = Image.composite(
            Image.new("L", alpha.size), alpha.point([0] * 128 + [strength] * 128), rest
        )
        self.image.paste((*INK, 255), (0, 0), crescent)


class Stack:
    """Outlined layers, one above the other, that make a foreground."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._done = Image.new("RGBA", (CANVAS, CANVAS))

    def add(self, pen: Pen, outline: int = OUTLINE, ink: Colour = INK) -> None:
        """Lay the pen's layer on top, with a dark outline round it."""
        alpha = pen.image.getchannel("A")
        if outline:
            self._done.paste((*ink, 255), (0, 0), dilate(alpha, outline))
        self._done.paste(pen.image, (0, 0), alpha)

    def finish(self) -> Image.Image:
        """The foreground, RGBA; its alpha is 0 or 255."""
        return self._done


def dilate(mask: Image.Image, radius: int) -> Image.Image:
    """The mask (0 or 255) grown by about ``radius`` pixels on every side."""
    box = mask.getbbox()
    grown = Image.new("L", mask.size)
    if box is None:
        return grown
    part = mask.crop(box)
    diagonal = round(radius * 0.7)
    offsets = [(radius, 0), (-radius, 0), (0, radius), (0, -radius)]
    offsets += [(a * diagonal, b * diagonal) for a in (-1, 1) for b in (-1, 1)]
    for dx, dy in offsets:
        grown.paste(255, (box[0] + dx, box[1] + dy), part)
    grown.paste(255, box[:2], part)
    return grown
