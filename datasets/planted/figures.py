"""How characters and nameless figures are drawn, category by category."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from PIL import Image

from ._draw import COLOURS, INK, Colour, Frame, Pen, Stack, darker, lighter, mix
from .characters import Features
from .objects import star_points

_TINTS: dict[str, Colour] = COLOURS | {"black": (60, 58, 78), "teal": (36, 172, 168)}
_SKINS: dict[str, Colour] = {
    "pale": (255, 224, 200),
    "tan": (232, 178, 130),
    "brown": (170, 110, 72),
    "dark": (112, 70, 50),
}
_HAIRS: dict[str, Colour] = {
    "black": (46, 40, 56),
    "brown": (128, 76, 44),
    "blond": (248, 210, 110),
    "ginger": (222, 102, 40),
    "silver": (206, 208, 220),
}
_EYES: dict[str, Colour] = {
    "blue": (52, 120, 236),
    "green": (40, 164, 84),
    "red": (214, 50, 60),
    "amber": (226, 150, 30),
}


def paint_character(category: str, look: Features, frame: Frame, pose: int) -> Image.Image:
    """The figure in its frame, in one of three poses: RGBA on the canvas, alpha 0 or 255."""
    stack = Stack(frame)
    _PAINTERS[category](stack, dict(look), pose)
    return stack.finish()


# --- comic -----------------------------------------------------------------------------------


def _emblem(pen: Pen, shape: str, v: float, fill: Colour) -> None:
    if shape == "star":
        pen.polygon(star_points(0, v, 12, 5.5), fill)
    elif shape == "bolt":
        pen.polygon([(3, v - 12), (-9, v + 3), (-1, v + 3), (-4, v + 13), (9, v - 3), (1, v - 3)], fill)
    elif shape == "diamond":
        pen.polygon([(0, v - 11), (10, v), (0, v + 11), (-10, v)], fill)
    else:
        pen.circle(0, v, 10, fill)


def _comic_head(stack: Stack, features: Mapping[str, str], suit: Colour, cape: Colour) -> None:
    skin = _SKINS["pale"]
    pen = Pen(stack.frame)
    gear = features["headgear"]
    if gear == "cowl":
        pen.polygon([(-21, -30), (-20, -52), (-7, -42)], suit)
        pen.polygon([(21, -30), (20, -52), (7, -42)], suit)
        pen.circle(0, -27, 22, suit)
        pen.ellipse(0, -17, 14, 10, skin)
    elif gear == "mask":
        pen.circle(0, -27, 22, (92, 56, 38))
        pen.ellipse(0, -22, 20, 17, skin)
        pen.box(-21, -32, 21, -21, cape, radius=5)
    elif gear == "helmet":
        pen.circle(0, -27, 22, skin)
        pen.ellipse(0, -31, 23, 19, cape)
        pen.box(-15, -28, 15, -12, skin, radius=5)
        pen.polygon([(-4, -58), (5, -58), (5, -30), (-4, -30)], suit)
    else:
        pen.polygon([(0, -58), (25, -26), (20, -6), (-20, -6), (-25, -26)], suit)
        pen.ellipse(0, -24, 16, 15, darker(skin, 0.82))
    pen.shade(6)
    eye = (255, 250, 200) if gear == "hood" else (255, 255, 255)
    height = -25 if gear in ("hood", "helmet") else -27
    for side in (-9, 9):
        if gear == "helmet":
            pen.circle(side, height + 4, 4, INK)
        else:
            pen.ellipse(side, height, 6, 4, eye)
    stack.add(pen)


def _comic(stack: Stack, features: Mapping[str, str], pose: int) -> None:
    suit, cape = _TINTS[features["suit"]], _TINTS[features["cape"]]
    back = Pen(stack.frame)
    sway = (-8, 10, 0)[pose]
    back.polygon([(-16, -8), (16, -8), (36 + sway, 40), (sway, 34), (-36 + sway, 40)], cape)
    back.shade(8, 90)
    stack.add(back)
    body = Pen(stack.frame)
    for side in (-1, 1):
        body.box(min(side * 2, side * 14), 18, max(side * 2, side * 14), 50, suit, radius=4)
        body.box(min(side * 2, side * 15), 38, max(side * 2, side * 15), 50, cape, radius=4)
    left = ((-17, -2), (-30, 10), (-16, 20)) if pose != 1 else ((-17, -2), (-32, -14), (-36, -32))
    right = ((17, -2), (30, 10), (16, 20)) if pose != 2 else ((17, -2), (28, 10), (30, 24))
    for arm in (left, right):
        body.line(arm, 11, suit)
        body.line(arm[2:], 13, cape)
    body.polygon([(-20, -8), (20, -8), (14, 26), (-14, 26)], suit)
    body.shade(6)
    body.box(-14, 21, 14, 27, cape)
    light = features["suit"] in ("yellow", "white")
    _emblem(body, features["emblem"], 6, (70, 40, 90) if light else (255, 240, 130))
    if features["emblem"] == "ring":
        body.circle(0, 6, 5, suit)
    stack.add(body)
    _comic_head(stack, features, suit, cape)


# --- anime -----------------------------------------------------------------------------------


def _anime_back_hair(pen: Pen, style: str, hair: Colour) -> None:
    if style == "spiky":
        tips = (
            (-46, -34),
            (-44, -4),
            (-36, 20),
            (36, 20),
            (44, -4),
            (46, -34),
            (22, -52),
            (-22, -52),
            (0, -56),
        )
        for u, v in tips:
            pen.polygon([(u, v), (-v * 0.35 - 4, u * 0.35 - 18), (v * 0.35 + 4, -u * 0.35 - 18)], hair)
        pen.ellipse(0, -14, 33, 30, hair)
    elif style == "twintails":
        pen.ellipse(0, -16, 32, 30, hair)
        for side in (-1, 1):
            pen.polygon(
                [(side * 26, -38), (side * 50, -26), (side * 48, 36), (side * 38, 46), (side * 32, 10)], hair
            )
    elif style == "long":
        pen.ellipse(0, -16, 34, 31, hair)
        pen.box(-34, -16, 34, 46, hair, radius=10)
    elif style == "bob":
        pen.ellipse(0, -12, 38, 34, hair)
        pen.box(-38, -14, 38, 20, hair, radius=12)
    else:
        pen.ellipse(0, -16, 33, 30, hair)
        pen.polygon([(14, -40), (44, -46), (50, -8), (40, 30), (34, -10), (24, -26)], hair)


def _anime_accessory(stack: Stack, accessory: str, hair: Colour) -> None:
    pen = Pen(stack.frame)
    if accessory == "bow":
        for side in (-1, 1):
            pen.polygon([(0, -44), (side * 19, -56), (side * 19, -34)], (236, 60, 90))
        pen.circle(0, -45, 5, (180, 30, 64))
    elif accessory == "headphones":
        pen.line(
            [(-33, -12), (-30, -32), (-16, -46), (0, -50), (16, -46), (30, -32), (33, -12)], 6, (70, 74, 92)
        )
        for side in (-33, 33):
            pen.ellipse(side, -8, 8, 13, (250, 200, 60))
    elif accessory == "cat ears":
        for side in (-1, 1):
            pen.polygon([(side * 10, -40), (side * 26, -60), (side * 32, -28)], hair)
            pen.polygon([(side * 16, -40), (side * 25, -52), (side * 28, -34)], (255, 170, 180))
    else:
        pen.ellipse(0, -54, 22, 8, (255, 226, 90))
        hole = Pen(stack.frame, "L")
        hole.ellipse(0, -54, 14, 3, 255)
        pen.image.paste((0, 0, 0, 0), (0, 0), hole.image)
    stack.add(pen)


def _anime(stack: Stack, features: Mapping[str, str], pose: int) -> None:
    hair, outfit = _TINTS[features["hair"]], _TINTS[features["outfit"]]
    skin: Colour = (255, 226, 204)
    back = Pen(stack.frame)
    _anime_back_hair(back, features["style"], darker(hair, 0.12))
    back.shade(7)
    stack.add(back)
    body = Pen(stack.frame)
    body.polygon([(-13, 14), (13, 14), (26, 54), (-26, 54)], outfit)
    hands = ((-26, 40), (28, 22), (26, 40))[pose]
    body.line([(-13, 20), (-26, 38)], 9, outfit)
    body.line([(13, 20), hands], 9, outfit)
    body.shade(6)
    body.polygon(
        [(-10, 14), (10, 14), (0, 30)],
        lighter(outfit, 0.75) if features["outfit"] != "white" else (70, 90, 170),
    )
    stack.add(body)
    head = Pen(stack.frame)
    head.ellipse(0, -12, 28, 27, skin)
    head.polygon([(-20, 4), (20, 4), (0, 20)], skin)
    stack.add(head)
    face = Pen(stack.frame)
    iris = _EYES[features["eyes"]]
    for side in (-1, 1):
        face.ellipse(side * 13, -3, 9, 12, INK)
        face.ellipse(side * 13, -1, 7, 10, iris)
        face.ellipse(side * 13, 0, 3, 5, darker(iris, 0.6))
        face.circle(side * 13 - 3, -7, 4, (255, 255, 255))
        face.ellipse(side * 20, 9, 4, 3, (255, 170, 160))
    face.ellipse(0, 12, 4, 2.5, (200, 70, 80))
    stack.add(face, outline=0)
    fringe = Pen(stack.frame)
    fringe.polygon(
        [
            (-31, -6),
            (-31, -24),
            (-20, -40),
            (0, -45),
            (20, -40),
            (31, -24),
            (31, -6),
            (24, -20),
            (16, -12),
            (7, -24),
            (-2, -13),
            (-11, -24),
            (-20, -12),
            (-25, -20),
        ],
        hair,
    )
    fringe.polygon([(-16, -33), (2, -38), (4, -34), (-14, -28)], lighter(hair, 0.5))
    stack.add(fringe)
    _anime_accessory(stack, features["accessory"], hair)


# --- movie -----------------------------------------------------------------------------------


def _movie_crown(stack: Stack, crown: str, accent: Colour, top: float, half: float) -> None:
    pen = Pen(stack.frame)
    if crown == "antenna":
        pen.box(-3, top - 16, 3, top + 8, (150, 152, 166))
        pen.circle(0, top - 14, 8, accent)
    elif crown == "horns":
        for side in (-1, 1):
            pen.polygon(
                [(side * half * 0.35, top + 8), (side * (half + 8), top - 18), (side * half, top + 14)],
                accent,
            )
    else:
        pen.polygon(
            [(-7, top + 6), (-half * 0.7, top - 13), (0, top - 8), (half * 0.5, top - 18), (9, top + 6)],
            accent,
        )
        pen.polygon([(-9, top + 8), (0, top - 20), (9, top + 8)], accent)
    stack.add(pen)


def _movie_eyes(pen: Pen, eyes: str, v: float, accent: Colour) -> None:
    white: Colour = (255, 255, 255)
    if eyes == "one":
        pen.circle(0, v, 12, INK)
        pen.circle(0, v, 10, white)
        pen.circle(1, v, 5, INK)
    elif eyes == "two":
        for side in (-11, 11):
            pen.circle(side, v, 9, INK)
            pen.circle(side, v, 7.5, white)
            pen.circle(side + 1, v, 4, INK)
    else:
        pen.box(-20, v - 7, 20, v + 7, INK, radius=5)
        pen.box(
            -16,
            v - 3,
            16,
            v + 3,
            lighter(accent, 0.35) if accent != _TINTS["black"] else (120, 240, 240),
            radius=2,
        )


def _robot(stack: Stack, body: Colour, accent: Colour, features: Mapping[str, str], pose: int) -> None:
    _movie_crown(stack, features["crown"], accent, -42, 24)
    torso = Pen(stack.frame)
    for side in (-1, 1):
        torso.box(min(side * 5, side * 18), 32, max(side * 5, side * 18), 50, darker(body, 0.4), radius=4)
        hand = 26 if pose != (side + 1) // 2 + 1 else -16
        torso.line([(side * 22, 6), (side * 36, hand)], 10, darker(body, 0.25))
        torso.circle(side * 37, hand, 7, accent)
    torso.box(-24, -4, 24, 38, body, radius=6)
    torso.shade(7)
    torso.box(-13, 6, 13, 26, accent, radius=3)
    torso.box(-9, 10, 9, 15, lighter(accent, 0.5))
    stack.add(torso)
    head = Pen(stack.frame)
    head.box(-28, -42, 28, -4, body, radius=8)
    head.shade(6)
    _movie_eyes(head, features["eyes"], -25, accent)
    head.box(-12, -12, 12, -8, INK)
    stack.add(head)


def _monster(stack: Stack, body: Colour, accent: Colour, features: Mapping[str, str], pose: int) -> None:
    _movie_crown(stack, features["crown"], accent, -40, 24)
    blob = Pen(stack.frame)
    for side in (-1, 1):
        hand = 12 if pose != (side + 1) // 2 + 1 else -22
        blob.line([(side * 28, 4), (side * 44, hand)], 12, body)
        blob.ellipse(side * 16, 46, 14, 7, body)
    blob.ellipse(0, 8, 36, 38, body)
    blob.ellipse(0, -14, 30, 28, body)
    blob.shade(9)
    blob.ellipse(0, 26, 22, 17, accent)
    _movie_eyes(blob, features["eyes"], -20, accent)
    blob.box(-18, -5, 18, 6, INK, radius=5)
    for u in (-12, -1, 10):
        blob.polygon([(u - 4, -5), (u + 5, -5), (u, 2)], (255, 255, 255))
    stack.add(blob)


def _alien(stack: Stack, body: Colour, accent: Colour, features: Mapping[str, str], pose: int) -> None:
    _movie_crown(stack, features["crown"], accent, -40, 22)
    suit = Pen(stack.frame)
    for side in (-1, 1):
        hand = 30 if pose != (side + 1) // 2 + 1 else -2
        suit.line([(side * 10, 14), (side * 26, hand)], 8, body)
        suit.box(min(side * 2, side * 11), 34, max(side * 2, side * 11), 50, body, radius=3)
    suit.polygon([(-13, 6), (13, 6), (17, 40), (-17, 40)], accent)
    suit.shade(6)
    stack.add(suit)
    head = Pen(stack.frame)
    head.ellipse(0, -24, 38, 22, body)
    head.polygon([(-32, -14), (32, -14), (10, 12), (-10, 12)], body)
    head.shade(6)
    _movie_eyes(head, features["eyes"], -18, accent)
    head.box(-7, 2, 7, 6, INK, radius=2)
    stack.add(head)


def _knight(stack: Stack, body: Colour, accent: Colour, features: Mapping[str, str], pose: int) -> None:
    _movie_crown(stack, features["crown"], accent, -42, 22)
    sword = Pen(stack.frame)
    tip = ((46, -38), (34, -44), (48, -8))[pose]
    sword.line([(32, 18), tip], 8, lighter(accent, 0.35))
    stack.add(sword)
    cloak = Pen(stack.frame)
    cloak.polygon([(-18, -6), (18, -6), (36, 50), (-36, 50)], darker(body, 0.35))
    cloak.polygon([(-10, -6), (10, -6), (18, 50), (-18, 50)], body)
    for side in (-1, 1):
        cloak.ellipse(side * 25, 4, 13, 11, body)
        cloak.circle(side * 31, 20, 7, accent)
    cloak.shade(7)
    cloak.box(-16, 20, 16, 27, accent)
    stack.add(cloak)
    helm = Pen(stack.frame)
    helm.circle(0, -20, 25, body)
    helm.polygon([(-25, -22), (25, -22), (17, 8), (-17, 8)], body)
    helm.shade(6)
    _movie_eyes(helm, features["eyes"], -18, accent)
    for u in (-8, 0, 8):
        helm.box(u - 2, -3, u + 2, 6, INK)
    stack.add(helm)


def _movie(stack: Stack, features: Mapping[str, str], pose: int) -> None:
    painter = {"robot": _robot, "monster": _monster, "alien": _alien, "knight": _knight}[features["species"]]
    painter(stack, _TINTS[features["body"]], _TINTS[features["accent"]], features, pose)


# --- celebrity -------------------------------------------------------------------------------


def _back_hair(pen: Pen, style: str, hair: Colour) -> None:
    if style == "long":
        pen.box(-31, -36, 31, 30, hair, radius=16)
    elif style == "afro":
        pen.ellipse(0, -24, 41, 33, hair)
    elif style == "bun":
        pen.circle(0, -48, 13, hair)
        pen.ellipse(0, -18, 26, 26, hair)


def _front_hair(pen: Pen, style: str, hair: Colour) -> None:
    if style == "mohawk":
        pen.polygon([(-9, -28), (-10, -58), (10, -58), (9, -28)], hair)
    elif style == "long":
        pen.polygon(
            [
                (-26, 2),
                (-28, -24),
                (-14, -42),
                (14, -42),
                (28, -24),
                (26, 2),
                (18, -22),
                (2, -30),
                (-18, -22),
            ],
            hair,
        )
    elif style == "afro":
        pen.polygon([(-26, -14), (-22, -42), (22, -42), (26, -14), (14, -26), (-14, -26)], hair)
    elif style != "bald":
        pen.polygon(
            [(-25, -10), (-26, -28), (-12, -42), (12, -42), (26, -28), (25, -10), (19, -24), (-8, -28)], hair
        )


def _celebrity_accessory(stack: Stack, accessory: str, hair: Colour) -> None:
    pen = Pen(stack.frame)
    if accessory == "sunglasses":
        for side in (-1, 1):
            pen.box(min(side * 2, side * 21), -20, max(side * 2, side * 21), -7, INK, radius=5)
            pen.box(side * 12 - 5, -18, side * 12 + 1, -14, (130, 140, 170))
        pen.box(-22, -19, 22, -15, INK)
    elif accessory == "hat":
        pen.box(-40, -36, 40, -27, (222, 190, 130), radius=4)
        pen.box(-23, -56, 23, -30, (222, 190, 130), radius=8)
        pen.box(-23, -40, 23, -34, (130, 60, 50))
    elif accessory == "beard":
        pen.polygon([(-23, -8), (-18, 2), (18, 2), (23, -8), (20, 14), (8, 24), (-8, 24), (-20, 14)], hair)
        pen.box(-7, 5, 7, 10, (180, 70, 70), radius=2)
    elif accessory == "moustache":
        pen.polygon([(0, -1), (14, 1), (20, 9), (6, 8), (0, 6), (-6, 8), (-20, 9), (-14, 1)], hair)
    else:
        for u, v in ((-16, 26), (-9, 33), (0, 36), (9, 33), (16, 26)):
            pen.circle(u, v, 5.5, (255, 214, 70))
    if accessory in ("beard", "moustache"):
        stack.add(pen, outline=2)
    else:
        stack.add(pen, outline=3)


def _celebrity(stack: Stack, features: Mapping[str, str], pose: int) -> None:
    skin, hair = _SKINS[features["skin"]], _HAIRS[features["hair"]]
    outfit = _TINTS[features["outfit"]]
    back = Pen(stack.frame)
    _back_hair(back, features["hairstyle"], darker(hair, 0.1))
    stack.add(back)
    bust = Pen(stack.frame)
    bust.ellipse(0, 48, 42, 30, outfit)
    bust.clear(-60, 51, 60, 90)
    bust.shade(7)
    bust.polygon([(-17, 21), (17, 21), (0, 44)], darker(skin, 0.1))
    bust.box(-10, 8, 10, 30, darker(skin, 0.1), radius=4)
    stack.add(bust)
    head = Pen(stack.frame)
    for side in (-24, 24):
        head.circle(side, -10, 6, skin)
    head.ellipse(0, -12, 24, 28, skin)
    head.shade(6, 40)
    look = (-2, 2, 0)[pose]
    for side in (-10, 10):
        head.circle(side + look, -12, 4, INK)
        head.box(side - 6, -22, side + 6, -18.5, darker(hair, 0.35))
    head.polygon([(-2 + look, -6), (4 + look, 1), (-3 + look, 1)], darker(skin, 0.2))
    head.box(-8, 6, 8, 10, (190, 70, 76), radius=2)
    stack.add(head)
    front = Pen(stack.frame)
    _front_hair(front, features["hairstyle"], hair)
    if features["hairstyle"] not in ("bald", "mohawk"):
        front.polygon([(-14, -35), (6, -38), (8, -34), (-12, -30)], mix(hair, (255, 255, 255), 0.25))
    stack.add(front)
    _celebrity_accessory(stack, features["accessory"], hair)


_PAINTERS: dict[str, Callable[[Stack, Mapping[str, str], int], None]] = {
    "comic": _comic,
    "anime": _anime,
    "movie": _movie,
    "celebrity": _celebrity,
}
