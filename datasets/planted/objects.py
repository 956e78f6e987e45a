"""The ten objects, their colours and their patterns."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

from ._draw import CANVAS, COLOURS, INK, Colour, Frame, Pen, Point, Stack, darker, lighter, mix

PATTERNS = ("plain", "striped", "dotted", "checked")
"""The patterns of objects."""

# cos and sin of 72-degree steps from the top, written out so that no libm is involved.
_FIVE = ((0.0, -1.0), (0.9511, -0.3090), (0.5878, 0.8090), (-0.5878, 0.8090), (-0.9511, -0.3090))
_FIVE_BETWEEN = ((0.5878, -0.8090), (0.9511, 0.3090), (0.0, 1.0), (-0.9511, 0.3090), (-0.5878, -0.8090))


def star_points(u: float, v: float, outer: float, inner: float) -> list[Point]:
    """The corners of a five-pointed star."""
    points: list[Point] = []
    for (a, b), (c, d) in zip(_FIVE, _FIVE_BETWEEN, strict=True):
        points += [(u + outer * a, v + outer * b), (u + inner * c, v + inner * d)]
    return points


def second_tone(colour: str) -> Colour:
    """The tone that a colour's patterns are drawn in."""
    tones: dict[str, Colour] = {"white": (112, 124, 152), "yellow": (178, 118, 10)}
    return tones.get(colour, lighter(COLOURS[colour], 0.74))


def pattern_fill(frame: Frame, colour: str, pattern: str) -> Image.Image:
    """A canvas filled with the pattern, RGB; the pattern is fixed to the frame's centre."""
    image = Image.new("RGB", (CANVAS, CANVAS), COLOURS[colour])
    if pattern == "plain":
        return image
    draw, tone = ImageDraw.Draw(image), second_tone(colour)
    reach = frame.size // 2 + 32
    left, top = frame.x - reach, frame.y - reach
    if pattern == "striped":
        for x in range(left - 2 * reach, left + 2 * reach, 32):
            draw.polygon(
                [
                    (x, top),
                    (x + 15, top),
                    (x + 15 + 2 * reach, top + 2 * reach),
                    (x + 2 * reach, top + 2 * reach),
                ],
                fill=tone,
            )
    elif pattern == "dotted":
        for row, y in enumerate(range(top, top + 2 * reach, 26)):
            for x in range(left + (row % 2) * 16, left + 2 * reach, 32):
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=tone)
    else:
        for row, y in enumerate(range(top, top + 2 * reach, 16)):
            for x in range(left + (row % 2) * 16, left + 2 * reach, 32):
                draw.rectangle((x, y, x + 15, y + 15), fill=tone)
    return image


class _Sketch:
    """What an object's painter fills in: behind, the patterned body, and details on top."""

    def __init__(self, frame: Frame, colour: str) -> None:
        self.base = COLOURS[colour]
        self.colour = colour
        self.back = Pen(frame)
        self.body = Pen(frame, "L")
        self.top = Pen(frame)


def _ball(sketch: _Sketch) -> None:
    sketch.body.circle(0, 0, 46, 255)
    sketch.top.ellipse(-17, -20, 11, 8, lighter(sketch.base, 0.85))


def _star(sketch: _Sketch) -> None:
    sketch.body.polygon(star_points(0, 4, 52, 25), 255)


def _heart(sketch: _Sketch) -> None:
    for side in (-1, 1):
        sketch.body.circle(side * 22, -18, 25, 255)
    sketch.body.polygon([(-45, -7), (0, 46), (45, -7), (30, -22), (-30, -22)], 255)


def _house(sketch: _Sketch) -> None:
    trim = darker(sketch.base, 0.6)
    sketch.back.box(18, -46, 31, -14, trim)
    sketch.body.polygon([(-48, -4), (0, -48), (48, -4)], 255)
    sketch.body.box(-37, -8, 37, 46, 255)
    sketch.top.box(-46, -6, 46, 1, trim)
    sketch.top.box(-22, 16, -4, 46, trim)
    sketch.top.box(9, 13, 27, 30, (255, 240, 170))


def _fish(sketch: _Sketch) -> None:
    sketch.body.ellipse(-9, 0, 38, 25, 255)
    sketch.body.polygon([(18, 0), (48, -27), (42, 0), (48, 27)], 255)
    sketch.back.polygon([(-22, -18), (10, -40), (18, -14)], darker(sketch.base, 0.3))
    sketch.back.polygon([(-12, 18), (12, 36), (10, 14)], darker(sketch.base, 0.3))
    sketch.top.circle(-30, -6, 8, (255, 255, 255))
    sketch.top.circle(-31, -5, 5, INK)


def _car(sketch: _Sketch) -> None:
    sketch.body.box(-48, -6, 48, 24, 255, radius=10)
    sketch.body.polygon([(-30, -4), (-18, -32), (20, -32), (34, -4)], 255)
    glass: Colour = (190, 226, 244)
    sketch.top.polygon([(-21, -7), (-13, -25), (-3, -25), (-3, -7)], glass)
    sketch.top.polygon([(5, -7), (5, -25), (15, -25), (24, -7)], glass)
    for side in (-26, 26):
        sketch.top.circle(side, 24, 14, INK)
        sketch.top.circle(side, 24, 6, (214, 214, 220))


def _flower(sketch: _Sketch) -> None:
    leaf: Colour = (46, 138, 62)
    sketch.back.box(-4, 0, 4, 50, leaf)
    sketch.back.ellipse(-15, 38, 13, 7, leaf)
    sketch.back.ellipse(15, 31, 13, 7, leaf)
    for a, b in _FIVE:
        sketch.body.circle(23 * a, -17 + 23 * b, 16, 255)
    sketch.body.circle(0, -17, 14, 255)
    centre: Colour = (134, 84, 40) if sketch.colour in ("yellow", "orange") else (255, 214, 60)
    sketch.top.circle(0, -17, 11, centre)


def _mushroom(sketch: _Sketch) -> None:
    sketch.back.box(-16, -6, 16, 46, (244, 226, 196), radius=10)
    sketch.back.box(4, 6, 15, 42, (222, 196, 160), radius=6)
    sketch.body.ellipse(0, 6, 47, 50, 255)
    sketch.body.clear(-50, 7, 50, 60)


def _rocket(sketch: _Sketch) -> None:
    sketch.back.polygon([(-10, 26), (10, 26), (0, 50)], (255, 170, 40))
    fin = darker(sketch.base, 0.5)
    for side in (-1, 1):
        sketch.back.polygon([(side * 14, 0), (side * 38, 24), (side * 38, 40), (side * 14, 28)], fin)
    sketch.body.polygon(
        [(0, -50), (16, -32), (23, -10), (23, 14), (16, 32), (-16, 32), (-23, 14), (-23, -10), (-16, -32)],
        255,
    )
    sketch.top.circle(0, -10, 11, fin)
    sketch.top.circle(0, -10, 7, (190, 230, 250))


def _cup(sketch: _Sketch) -> None:
    sketch.back.line([(20, -14), (36, -15), (44, 0), (36, 17), (18, 21)], 9, sketch.base)
    sketch.body.polygon([(-38, -32), (28, -32), (22, 40), (-32, 40)], 255)
    sketch.top.ellipse(-5, -32, 33, 10, mix((110, 66, 40), INK, 0.15))


_PAINTERS: dict[str, Callable[[_Sketch], None]] = {
    "ball": _ball,
    "star": _star,
    "heart": _heart,
    "house": _house,
    "fish": _fish,
    "car": _car,
    "flower": _flower,
    "mushroom": _mushroom,
    "rocket": _rocket,
    "cup": _cup,
}

OBJECTS = tuple(_PAINTERS)
"""The words of the objects."""


COVERAGE: dict[str, float] = {
    "ball": 0.78,
    "star": 0.51,
    "heart": 0.64,
    "house": 0.74,
    "fish": 0.51,
    "car": 0.55,
    "flower": 0.63,
    "mushroom": 0.61,
    "rocket": 0.53,
    "cup": 0.65,
}
"""The share of its frame's square that each object covers (measured)."""


def paint_object(word: str, colour: str, pattern: str, frame: Frame) -> Image.Image:
    """The object in its frame: RGBA on the canvas, alpha 0 or 255."""
    sketch = _Sketch(frame, colour)
    _PAINTERS[word](sketch)
    body = Pen(frame)
    body.image.paste(pattern_fill(frame, colour, pattern), (0, 0), sketch.body.image)
    body.shade()
    stack = Stack(frame)
    stack.add(sketch.back)
    stack.add(body)
    stack.add(sketch.top, outline=3 if word in ("house", "cup", "flower") else 0)
    return stack.finish()
