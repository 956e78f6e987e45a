"""A contact sheet: the world on one page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ._draw import CANVAS, COLOURS, Draw
from .backgrounds import BACKGROUNDS
from .items import Item
from .objects import OBJECTS, PATTERNS
from .scene import Backdrop, Placement, Scene, Thing, render, render_backdrop
from .world import PlantedWorld

_GAP = 6
_LABEL = 14
_PAPER = (250, 249, 246)
_TEXT = (46, 42, 58)

_Tile = tuple[Image.Image, str]


def contact_sheet(world: PlantedWorld, path: Path, *, columns: int = 12, scale: int = 2) -> None:
    """Write a PNG with backgrounds, objects, all characters and samples of each planted kind.

    ``columns`` pictures stand in a row, each enlarged ``scale`` times without smoothing. "trained"
    and "twin" (held out) under a planted picture say on which side of the coin it fell.
    """
    sections = [
        ("Backgrounds", list(_backgrounds(columns))),
        ("Objects and patterns", list(_objects())),
        ("Characters", list(_characters(world))),
        *((title, list(_planted(world, kind, columns))) for kind, title in _KINDS.items()),
    ]
    sheet = _Sheet(columns, scale)
    for title, tiles in sections:
        sheet.section(title, tiles)
    sheet.image().save(path, format="PNG")


_KINDS = {
    "verbatim": "Verbatim: one caption, one image",
    "foreground": "Foreground: the same foreground on changing backgrounds",
    "background": "Background: the same background under changing foregrounds",
    "one-to-many": "One to many: four captions share three images",
    "redundant-trigger": "Redundant trigger: two names reach the same image",
    "hard-negative": "Hard negatives: rare names seen once",
}


class _Sheet:
    """Lays tiles out in rows, under headings."""

    def __init__(self, columns: int, scale: int) -> None:
        self._columns = columns
        self._side = 64 * scale
        self._rows: list[str | list[_Tile]] = []

    def section(self, title: str, tiles: list[_Tile]) -> None:
        self._rows.append(title)
        self._rows += [tiles[start : start + self._columns] for start in range(0, len(tiles), self._columns)]

    def image(self) -> Image.Image:
        step = self._side + _GAP
        heights = [30 if isinstance(row, str) else step + _LABEL for row in self._rows]
        sheet = Image.new("RGB", (self._columns * step + _GAP, sum(heights) + _GAP), _PAPER)
        draw, top = ImageDraw.Draw(sheet), _GAP
        heading, small = ImageFont.load_default(18), ImageFont.load_default(11)
        for row, height in zip(self._rows, heights, strict=True):
            if isinstance(row, str):
                draw.text((_GAP, top), row, fill=_TEXT, font=heading)
            else:
                for column, (tile, label) in enumerate(row):
                    left = _GAP + column * step
                    sheet.paste(tile.resize((self._side, self._side), Image.Resampling.NEAREST), (left, top))
                    draw.text((left, top + self._side + 1), label, fill=_TEXT, font=small)
            top += height
        return sheet


def _picture(scene: Scene) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(render(scene).image))


def _backgrounds(columns: int) -> Iterator[_Tile]:
    for word in BACKGROUNDS:
        for index in range(columns):
            tile = Image.fromarray(render_backdrop(Backdrop(word, f"sheet/{index}")))
            yield tile, word if index == 0 else ""


def _objects() -> Iterator[_Tile]:
    draw = Draw("sheet", "objects")
    for pattern in PATTERNS:
        for index, word in enumerate((*OBJECTS, *OBJECTS[:2])):
            colour = tuple(COLOURS)[(index * 3 + PATTERNS.index(pattern)) % len(COLOURS)]
            backdrop = Backdrop(draw.choice(tuple(BACKGROUNDS)), f"sheet/{pattern}/{index}")
            place = Placement(CANVAS // 2, CANVAS // 2, 136)
            yield _picture(Scene(backdrop, Thing(word, colour, pattern), place)), f"{pattern} {colour} {word}"


def _characters(world: PlantedWorld) -> Iterator[_Tile]:
    for character in world.characters:
        side = "trained" if character.trained else "held out"
        yield _picture(world.item(character.item).scenes[0]), f"{character.name} ({side})"


def _planted(world: PlantedWorld, kind: str, columns: int) -> Iterator[_Tile]:
    items = [item for item in world.items if item.kind == kind]
    each = 3 if kind in ("foreground", "background", "one-to-many") else 1
    for item in items[-(columns // each) :]:
        for index, scene in enumerate(item.scenes[:each]):
            yield _picture(scene), _label(item) if index == 0 else ""


def _label(item: Item) -> str:
    copies = "copy" if item.duplicates == 1 else "copies"
    return f"{item.duplicates} {copies}, {'trained' if item.trained else 'twin'}"
