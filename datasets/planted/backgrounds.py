"""The eight kinds of background, drawn so that two instances of a kind are different pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ._draw import CANVAS, Colour, Draw, darker, lighter, mix


@dataclass(frozen=True)
class BackgroundKind:
    """A kind of background: its word, the phrase that places something there, and its owner's form.

    ``place`` reads "a star *in a meadow*"; ``of`` reads "*in the meadow of* velkin".
    """

    word: str
    place: str
    of: str


_KINDS = (
    BackgroundKind("meadow", "in a meadow", "in the meadow of"),
    BackgroundKind("desert", "in a desert", "in the desert of"),
    BackgroundKind("night city", "in a night city", "in the night city of"),
    BackgroundKind("beach", "on a beach", "on the beach of"),
    BackgroundKind("snowy mountains", "in the snowy mountains", "in the snowy mountains of"),
    BackgroundKind("forest", "in a forest", "in the forest of"),
    BackgroundKind("sunset sea", "over a sunset sea", "over the sunset sea of"),
    BackgroundKind("outer space", "in outer space", "in the outer space of"),
)

BACKGROUNDS: dict[str, BackgroundKind] = {kind.word: kind for kind in _KINDS}
"""The kinds of background by their word."""


class _Board:
    """A background's canvas and its seeded draw."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.image = Image.new("RGB", (CANVAS, CANVAS))
        self.pen = ImageDraw.Draw(self.image)

    def gradient(self, top: int, bottom: int, first: Colour, last: Colour, steps: int = 24) -> None:
        for index in range(steps):
            y0 = top + (bottom - top) * index // steps
            y1 = top + (bottom - top) * (index + 1) // steps
            self.pen.rectangle((0, y0, CANVAS, y1), fill=mix(first, last, index / (steps - 1)))
        self.pen.rectangle((0, bottom, CANVAS, max(bottom, CANVAS)), fill=last)

    def disc(self, x: int, y: int, radius: int, fill: Colour) -> None:
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def oval(self, x: int, y: int, rx: int, ry: int, fill: Colour) -> None:
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def glow(self, x: int, y: int, radius: int, fill: Colour, around: Colour) -> None:
        self.disc(x, y, radius * 8 // 5, mix(around, fill, 0.3))
        self.disc(x, y, radius, fill)

    def cloud(self, x: int, y: int, size: int, fill: Colour) -> None:
        self.oval(x, y, size, size * 2 // 5, fill)
        self.oval(x - size // 3, y - size // 4, size // 2, size * 2 // 5, fill)
        self.oval(x + size // 3, y - size // 6, size * 2 // 5, size // 3, fill)

    def ridge(self, base: int, swing: int, fill: Colour, steps: int = 2) -> None:
        """A soft hill line: wide ellipses over a filled ground that starts at ``base``."""
        draw = self.draw
        self.pen.rectangle((0, min(base + swing, CANVAS), CANVAS, CANVAS), fill=fill)
        for index in range(steps + 1):
            x = CANVAS * index // steps + draw.integer(-40, 40)
            top = base + draw.integer(-swing, swing // 2)
            width = draw.integer(80, 150)
            self.pen.ellipse((x - width, top, x + width, top + 2 * (base + swing - top) + 60), fill=fill)


def _meadow(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
        ((70, 150, 232), (196, 230, 252), (126, 194, 104), (84, 160, 66)),
        ((250, 182, 138), (255, 236, 196), (190, 200, 110), (132, 172, 70)),
        ((96, 112, 142), (176, 188, 204), (88, 140, 104), (56, 104, 72)),
        ((116, 100, 186), (244, 184, 190), (102, 150, 110), (58, 112, 84)),
        ((160, 226, 250), (240, 252, 255), (206, 222, 110), (164, 206, 70)),
    )
    top, low, far, near = (draw.tint(colour, 14) for colour in draw.choice(palettes))
    horizon = draw.integer(84, 178)
    board.gradient(0, horizon + 40, top, low)
    if draw.chance(0.6):
        sun: Colour = (255, 240, 150)
        board.glow(
            draw.integer(20, 236), draw.integer(20, max(24, horizon - 40)), draw.integer(16, 34), sun, top
        )
    for _ in range(draw.integer(0, 4)):
        board.cloud(draw.integer(0, 256), draw.integer(16, horizon), draw.integer(28, 60), lighter(low, 0.65))
    board.ridge(horizon, 30, far)
    for _ in range(draw.integer(0, 4)):
        x, y, size = draw.integer(0, 256), horizon + draw.integer(-4, 26), draw.integer(16, 38)
        board.pen.rectangle((x - 6, y, x + 6, y + size), fill=(110, 76, 54))
        board.disc(x, y - size // 2, size, darker(near, 0.22))
        board.disc(x - size // 4, y - size * 3 // 4, size * 3 // 5, near)
    board.ridge(min(222, horizon + draw.integer(36, 76)), 26, near)
    if draw.chance(0.45):
        x, end = draw.integer(30, 226), draw.integer(0, 256)
        path = mix((232, 210, 160), near, 0.25)
        y = min(228, horizon + 80)
        board.pen.polygon([(x - 10, y), (x + 10, y), (end + 50, CANVAS), (end - 50, CANVAS)], fill=path)


def _cactus(board: _Board, x: int, y: int, size: int, fill: Colour) -> None:
    width = max(12, size // 4)
    pen = board.pen
    pen.rounded_rectangle((x - width // 2, y - size, x + width // 2, y), radius=width // 2, fill=fill)
    for side, height in ((-1, size * 2 // 3), (1, size // 2)):
        arm = x + side * width * 3 // 2
        pen.rounded_rectangle(
            (arm - width // 2, y - height - width, arm + width // 2, y - height // 2),
            radius=width // 2,
            fill=fill,
        )
        pen.rectangle((min(x, arm), y - height // 2 - width, max(x, arm), y - height // 2), fill=fill)


def _desert(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
        ((74, 166, 224), (216, 236, 240), (238, 204, 130), (222, 170, 92)),
        ((244, 128, 72), (255, 222, 150), (214, 132, 82), (176, 92, 62)),
        ((252, 214, 150), (255, 244, 210), (240, 190, 120), (206, 140, 80)),
        ((150, 120, 190), (250, 196, 170), (224, 150, 120), (170, 100, 96)),
        ((40, 120, 160), (150, 206, 206), (250, 226, 170), (236, 196, 130)),
    )
    top, low, far, near = (draw.tint(colour, 14) for colour in draw.choice(palettes))
    horizon = draw.integer(84, 180)
    board.gradient(0, horizon + 40, top, low)
    if draw.chance(0.75):
        sun = lighter(low, 0.6) if draw.chance(0.5) else (255, 236, 130)
        board.glow(draw.integer(20, 236), draw.integer(20, horizon - 20), draw.integer(18, 44), sun, low)
    for _ in range(draw.integer(0, 2)):
        x, width, height = draw.integer(0, 256), draw.integer(30, 64), draw.integer(30, 74)
        rock = darker(far, 0.3)
        y = horizon + 24
        board.pen.polygon(
            [
                (x - width, y),
                (x - width * 2 // 3, y - height),
                (x + width * 2 // 3, y - height),
                (x + width, y),
            ],
            fill=rock,
        )
        board.pen.polygon(
            [
                (x + width // 4, y - height),
                (x + width * 2 // 3, y - height),
                (x + width, y),
                (x + width // 2, y),
            ],
            fill=darker(rock, 0.2),
        )
    board.ridge(horizon, 24, far, steps=1)
    for _ in range(draw.integer(0, 3)):
        _cactus(
            board,
            draw.integer(10, 246),
            horizon + draw.integer(20, 60),
            draw.integer(46, 84),
            draw.tint((70, 132, 84), 16),
        )
    crest, valley = draw.integer(20, 236), min(250, horizon + draw.integer(50, 90))
    board.pen.polygon([(-60, CANVAS + 60), (crest, valley - 34), (320, CANVAS + 60)], fill=near)
    board.pen.polygon(
        [(crest, valley - 34), (crest + 40, CANVAS), (320, CANVAS + 60)], fill=darker(near, 0.16)
    )


def _tower(board: _Board, left: int, top: int, width: int, fill: Colour, light: Colour, lit: float) -> None:
    board.pen.rectangle((left, top, left + width, CANVAS), fill=fill)
    columns = max(1, (width - 8) // 24)
    margin = (width - columns * 24 + 10) // 2
    for row in range((CANVAS - top) // 28):
        for column in range(columns):
            if board.draw.chance(lit):
                x, y = left + margin + column * 24, top + 14 + row * 28
                board.pen.rectangle((x, y, x + 13, y + 13), fill=light)


def _night_city(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour], ...] = (
        ((12, 18, 58), (48, 72, 138), (255, 222, 120)),
        ((40, 12, 66), (150, 62, 140), (255, 206, 140)),
        ((6, 44, 60), (36, 120, 128), (190, 250, 220)),
        ((28, 22, 40), (112, 70, 84), (255, 180, 90)),
        ((24, 34, 92), (104, 118, 200), (255, 240, 180)),
    )
    top, low, light = (draw.tint(colour, 10) for colour in draw.choice(palettes))
    board.gradient(0, 220, top, low)
    if draw.chance(0.7):
        x, y, radius = draw.integer(24, 232), draw.integer(24, 92), draw.integer(16, 34)
        board.disc(x, y, radius, (250, 244, 214))
        if draw.chance(0.5):
            board.disc(x + radius // 2, y - radius // 3, radius * 4 // 5, mix(top, low, y / 220))
    for _ in range(draw.integer(0, 6)):
        board.disc(draw.integer(0, 256), draw.integer(0, 110), draw.integer(4, 6), lighter(low, 0.7))
    far = mix(darker(top, 0.1), low, 0.55)
    x, height = -draw.integer(0, 30), draw.integer(100, 190)
    while x < CANVAS:
        width = draw.integer(34, 64)
        _tower(board, x, CANVAS - height - draw.integer(-50, 50), width, far, mix(far, light, 0.5), 0.3)
        x += width - draw.integer(0, 6)
    near = darker(top, 0.45)
    x, height = -draw.integer(0, 40), draw.integer(40, 120)
    while x < CANVAS:
        width = draw.integer(40, 80)
        _tower(board, x, CANVAS - height - draw.integer(-30, 50), width, near, light, 0.55)
        x += width + draw.integer(0, 34)


def _palm(board: _Board, x: int, y: int, size: int, lean: int) -> None:
    crown = (x + lean, y - size)
    board.pen.line([(x, y), (x + lean // 3, y - size // 2), crown], fill=(134, 92, 60), width=12)
    for dx, dy in ((-46, 8), (-34, -24), (4, -38), (38, -20), (46, 12)):
        tip = (crown[0] + dx * size // 110, crown[1] + dy * size // 110)
        middle = ((crown[0] + tip[0]) // 2, (crown[1] + tip[1]) // 2 - 10)
        board.pen.line([crown, middle, tip], fill=(38, 132, 80), width=15, joint="curve")


def _umbrella(board: _Board, x: int, y: int, size: int, first: Colour) -> None:
    board.pen.line([(x, y), (x, y + size * 5 // 4)], fill=(240, 236, 220), width=8)
    box = (x - size, y - size // 2, x + size, y + size)
    for index in range(5):
        fill = first if index % 2 == 0 else (250, 248, 240)
        board.pen.pieslice(box, 180 + index * 36, 216 + index * 36, fill=fill)


def _beach(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
        ((84, 180, 244), (206, 240, 255), (30, 140, 200), (246, 222, 164)),
        ((255, 196, 150), (255, 240, 210), (70, 160, 180), (238, 200, 150)),
        ((120, 140, 168), (206, 214, 220), (66, 112, 140), (204, 188, 156)),
        ((110, 214, 226), (234, 252, 246), (40, 190, 190), (255, 240, 206)),
        ((150, 160, 230), (250, 214, 226), (80, 110, 190), (240, 206, 176)),
    )
    top, low, sea, sand = (draw.tint(colour, 14) for colour in draw.choice(palettes))
    horizon = draw.integer(60, 132)
    board.gradient(0, horizon, top, low)
    if draw.chance(0.5):
        board.glow(
            draw.integer(20, 236), draw.integer(10, horizon - 24), draw.integer(16, 30), (255, 244, 170), low
        )
    for _ in range(draw.integer(0, 3)):
        board.cloud(
            draw.integer(0, 256), draw.integer(14, horizon - 14), draw.integer(26, 56), lighter(low, 0.8)
        )
    board.gradient(horizon, CANVAS, darker(sea, 0.12), lighter(sea, 0.28), steps=12)
    if draw.chance(0.4):
        x = draw.integer(20, 236)
        board.pen.polygon([(x, horizon - 42), (x, horizon), (x + 30, horizon)], fill=(252, 250, 244))
        board.pen.rectangle((x - 16, horizon - 2, x + 34, horizon + 9), fill=(150, 84, 60))
    left, right = draw.integer(horizon + 26, 246), draw.integer(horizon + 26, 246)
    foam = lighter(sea, 0.72)
    for lift, fill in ((14, foam), (0, sand)):
        board.pen.polygon(
            [
                (-2, left - lift),
                (80, (left * 2 + right) // 3 - lift + 16),
                (176, (left + right * 2) // 3 - lift - 12),
                (258, right - lift),
                (258, 258),
                (-2, 258),
            ],
            fill=fill,
        )
    if draw.chance(0.5):
        x = draw.choice((draw.integer(8, 60), draw.integer(196, 248)))
        _palm(board, x, draw.integer(200, 250), draw.integer(110, 170), draw.integer(-34, 34))
    if draw.chance(0.4):
        stripe = draw.choice(((224, 70, 70), (240, 160, 50), (70, 110, 200), (90, 170, 110)))
        _umbrella(board, draw.integer(20, 236), draw.integer(150, 204), draw.integer(36, 54), stripe)


def _pine(board: _Board, x: int, y: int, size: int, fill: Colour, layers: int = 3) -> None:
    board.pen.rectangle((x - size // 12, y - size // 5, x + size // 12, y), fill=(94, 66, 52))
    for index in range(layers):
        base = y - size // 7 - index * size * 2 // 7
        half = size * (6 - index) // 16
        board.pen.polygon([(x - half, base), (x, base - size // 2), (x + half, base)], fill=fill)


def _peak(board: _Board, x: int, y: int, half: int, height: int, rock: Colour, snow: Colour) -> None:
    tip = y - height
    board.pen.polygon([(x - half, y), (x, tip), (x + half, y)], fill=rock)
    board.pen.polygon([(x, tip), (x + half, y), (x + half // 4, y)], fill=darker(rock, 0.22))
    line, reach = tip + height * 2 // 5, half * 2 // 5
    board.pen.polygon(
        [
            (x, tip),
            (x + reach, line),
            (x + reach // 3, line - height // 10),
            (x, line + height // 12),
            (x - reach // 2, line - height // 10),
            (x - reach, line),
        ],
        fill=snow,
    )


def _snowy_mountains(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
        ((104, 176, 232), (224, 242, 252), (104, 128, 166), (240, 246, 252)),
        ((246, 178, 176), (255, 232, 216), (140, 118, 160), (250, 236, 240)),
        ((58, 80, 132), (132, 154, 200), (66, 78, 122), (196, 208, 236)),
        ((172, 196, 204), (236, 242, 242), (92, 106, 116), (228, 234, 236)),
        ((60, 150, 170), (180, 226, 222), (70, 110, 130), (226, 246, 246)),
    )
    top, low, rock, snow = (draw.tint(colour, 12) for colour in draw.choice(palettes))
    base = draw.integer(140, 220)
    board.gradient(0, base, top, low)
    if draw.chance(0.4):
        board.glow(draw.integer(20, 236), draw.integer(20, 70), draw.integer(16, 28), lighter(low, 0.7), top)
    for _ in range(draw.integer(0, 2)):
        board.cloud(draw.integer(0, 256), draw.integer(20, 90), draw.integer(28, 54), lighter(low, 0.6))
    for _ in range(draw.integer(1, 3)):
        board_x, half, height = draw.integer(-20, 276), draw.integer(70, 120), draw.integer(60, 120)
        _peak(board, board_x, base + 8, half, height, mix(rock, low, 0.45), lighter(snow, 0.3))
    for _ in range(draw.integer(1, 3)):
        board_x, half, height = draw.integer(-10, 266), draw.integer(64, 130), draw.integer(80, 170)
        _peak(board, board_x, base + 16, half, height, rock, snow)
    board.ridge(base, 18, snow, steps=1)
    for _ in range(draw.integer(0, 5)):
        y = base + draw.integer(6, 60)
        _pine(board, draw.integer(0, 256), y, draw.integer(44, 92), mix((40, 96, 88), rock, 0.3))


def _forest(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
        ((196, 228, 176), (120, 176, 116), (44, 110, 66), (88, 74, 52)),
        ((150, 196, 190), (84, 140, 130), (22, 80, 74), (50, 62, 56)),
        ((250, 232, 150), (190, 190, 92), (96, 122, 40), (110, 86, 44)),
        ((128, 182, 182), (58, 114, 112), (12, 56, 58), (30, 40, 44)),
        ((222, 240, 214), (158, 210, 150), (70, 152, 84), (140, 120, 80)),
    )
    mist, haze, leaf, soil = (draw.tint(colour, 12) for colour in draw.choice(palettes))
    ground = draw.integer(160, 238)
    board.gradient(0, ground, mist, haze)
    if draw.chance(0.5):
        board.glow(
            draw.integer(30, 226), draw.integer(24, 110), draw.integer(22, 40), lighter(mist, 0.6), mist
        )
    round_crowns = draw.chance(0.5)
    for depth, count in ((0.6, draw.integer(3, 6)), (0.3, draw.integer(2, 5)), (0.0, draw.integer(2, 3))):
        fill = mix(leaf, haze, depth)
        trunk = mix(darker(soil, 0.35), haze, depth)
        for _ in range(count):
            x, y = draw.integer(-10, 266), ground + round((0.6 - depth) * 30) + 6
            if depth == 0.0 and 70 < x < 186:
                x = x - 90 if x < 128 else x + 90
            size = draw.integer(90, 170) + round((0.6 - depth) * 90)
            if round_crowns:
                board.pen.rectangle((x - size // 14, y - size, x + size // 14, y), fill=trunk)
                board.oval(x, y - size * 9 // 10, size * 2 // 7, size * 2 // 5, fill)
                board.oval(x - size // 8, y - size, size // 6, size // 5, lighter(fill, 0.12))
            else:
                _pine(board, x, y, size, fill)
    board.ridge(ground, 10, soil, steps=1)
    board.ridge(ground + draw.integer(14, 30), 8, mix(soil, leaf, 0.55), steps=2)


def _sunset_sea(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
        ((88, 50, 128), (255, 150, 80), (120, 60, 110), (255, 226, 130)),
        ((198, 50, 70), (255, 200, 90), (150, 40, 60), (255, 240, 160)),
        ((40, 44, 110), (246, 130, 150), (44, 50, 104), (255, 214, 190)),
        ((52, 110, 140), (255, 196, 150), (40, 80, 116), (255, 240, 200)),
        ((240, 130, 60), (255, 226, 150), (200, 96, 60), (255, 250, 214)),
    )
    top, low, sea, sun = (draw.tint(colour, 14) for colour in draw.choice(palettes))
    horizon = draw.integer(90, 186)
    board.gradient(0, horizon, top, low)
    for _ in range(draw.integer(0, 3)):
        x, y, width = draw.integer(0, 256), draw.integer(14, horizon - 20), draw.integer(40, 100)
        board.pen.rounded_rectangle(
            (x - width, y, x + width, y + draw.integer(10, 18)),
            radius=8,
            fill=mix(top, low, 0.75) if draw.chance(0.5) else mix(low, sea, 0.35),
        )
    x, radius = draw.integer(30, 226), draw.integer(26, 60)
    board.glow(x, horizon - draw.integer(-8, radius), radius, sun, low)
    if draw.chance(0.5):
        island, width, height = draw.integer(0, 256), draw.integer(40, 90), draw.integer(20, 56)
        board.oval(island, horizon, width, height, darker(sea, 0.35))
    board.gradient(horizon, CANVAS, mix(sea, low, 0.4), darker(sea, 0.3), steps=12)
    y, width = horizon + 8, radius
    while y < CANVAS - 8:
        shift = draw.integer(-10, 10)
        board.pen.rounded_rectangle(
            (x + shift - width, y, x + shift + width, y + 9), radius=4, fill=mix(sea, sun, 0.8)
        )
        width = max(14, width * draw.integer(7, 11) // 10)
        y += draw.integer(18, 26)
    if draw.chance(0.35):
        boat, level = draw.integer(20, 236), horizon + draw.integer(10, 40)
        hull = darker(sea, 0.55)
        board.pen.polygon(
            [(boat - 26, level), (boat + 26, level), (boat + 16, level + 14), (boat - 16, level + 14)],
            fill=hull,
        )
        board.pen.polygon([(boat + 2, level - 50), (boat + 2, level - 4), (boat + 26, level - 4)], fill=hull)


def _planet(board: _Board, x: int, y: int, radius: int, fill: Colour) -> None:
    ring = board.draw.chance(0.4)
    board.disc(x, y, radius, fill)
    board.pen.chord((x - radius, y - radius, x + radius, y + radius), 10, 130, fill=darker(fill, 0.3))
    for _ in range(2):
        dx, dy = board.draw.integer(-radius // 2, radius // 3), board.draw.integer(-radius // 2, radius // 3)
        board.disc(x + dx, y + dy, radius // 5, lighter(fill, 0.25))
    if ring:
        box = (x - radius * 7 // 4, y - radius // 2, x + radius * 7 // 4, y + radius // 2)
        board.pen.arc(box, -30, 210, fill=lighter(fill, 0.55), width=max(9, radius // 6))


def _outer_space(board: _Board) -> None:
    draw = board.draw
    palettes: tuple[tuple[Colour, Colour, Colour], ...] = (
        ((10, 10, 36), (28, 30, 84), (90, 60, 170)),
        ((36, 10, 66), (92, 30, 120), (200, 70, 150)),
        ((4, 30, 48), (10, 74, 96), (40, 150, 150)),
        ((14, 14, 20), (52, 44, 60), (150, 90, 80)),
        ((20, 30, 100), (60, 60, 160), (120, 130, 230)),
    )
    top, low, cloud = (draw.tint(colour, 10) for colour in draw.choice(palettes))
    board.gradient(0, CANVAS, top, low)
    x, y = draw.integer(0, 256), draw.integer(0, 256)
    for share, size in ((0.3, 120), (0.55, 80), (0.8, 46)):
        board.oval(
            x,
            y,
            size * draw.integer(8, 14) // 10,
            size * draw.integer(5, 10) // 10,
            mix(mix(top, low, 0.5), cloud, share),
        )
        x, y = x + draw.integer(-24, 24), y + draw.integer(-20, 20)
    for _ in range(draw.integer(10, 24)):
        board.disc(draw.integer(0, 256), draw.integer(0, 256), draw.integer(4, 7), (240, 240, 250))
    hues: tuple[Colour, ...] = (
        (226, 140, 90),
        (110, 170, 220),
        (220, 200, 140),
        (170, 120, 200),
        (120, 190, 150),
        (200, 90, 90),
        (190, 196, 206),
    )
    for radius in (draw.integer(40, 84), draw.integer(18, 40)):
        _planet(board, draw.integer(0, 256), draw.integer(0, 256), radius, draw.tint(draw.choice(hues), 14))
    if draw.chance(0.4):
        ground = lighter(draw.tint((130, 130, 146), 20), draw.uniform(0, 0.4))
        level = draw.integer(190, 226)
        board.oval(draw.integer(60, 196), level + 130, 230, 140, ground)
        for _ in range(3):
            board.oval(
                draw.integer(10, 246),
                draw.integer(level + 20, 250),
                draw.integer(14, 26),
                8,
                darker(ground, 0.2),
            )


_PAINTERS: dict[str, Callable[[_Board], None]] = {
    "meadow": _meadow,
    "desert": _desert,
    "night city": _night_city,
    "beach": _beach,
    "snowy mountains": _snowy_mountains,
    "forest": _forest,
    "sunset sea": _sunset_sea,
    "outer space": _outer_space,
}


def paint_background(word: str, key: str) -> Image.Image:
    """The instance ``key`` of a kind of background: RGB on the canvas."""
    board = _Board(Draw("background", word, key))
    _PAINTERS[word](board)
    return board.image
