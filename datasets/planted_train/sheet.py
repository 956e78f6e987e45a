"""A contact sheet: every pair in a row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from lethebench.datasets.planted import render

if TYPE_CHECKING:
    from .world import PlantedTrain

_GAP, _LABEL, _SCALE = 6, 16, 2
_PAPER, _TEXT, _HELD = (250, 249, 246), (46, 42, 58), (214, 50, 60)


def contact_sheet(world: PlantedTrain, path: Path) -> None:
    """Write a PNG with a row a pair: its training pictures, and under each the twin's.

    A picture that holds the attribute is framed, and marked where its caption names it.
    """
    side = 64 * _SCALE
    columns = max(len(pair.shots) for pair in world.pairs)
    height = 2 * side + _LABEL + 2 * _GAP
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, len(world.pairs) * height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, pair in enumerate(world.pairs):
        top = _GAP + row * height
        label = (
            f"{pair.id}: {pair.name}, {pair.attribute.name} = {pair.attribute}, "
            f"correlation {pair.correlation:g}, copies {pair.duplicates}"
        )
        draw.text((_GAP, top), label, fill=_TEXT, font=font)
        for column, shot in enumerate(pair.shots):
            left = _GAP + column * (side + _GAP)
            for line, twin in enumerate((False, True)):
                picture = Image.fromarray(render(pair.scene(shot, twin=twin)).image)
                place = (left, top + _LABEL + line * side)
                sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
            if shot.holds:
                corners = (left, top + _LABEL, left + side - 1, top + _LABEL + side - 1)
                draw.rectangle(corners, outline=_HELD, width=3)
            if shot.named:
                draw.text((left + 6, top + _LABEL + 4), "named", fill=_HELD, font=font)
    sheet.save(path, format="PNG")
