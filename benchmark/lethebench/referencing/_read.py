"""Reading any image file as the pixels that are compared."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Files that count as images."""
MAX_PIXELS = 2**27
"""The largest image that is read: 134 million pixels, 0.4 GB in memory."""


class UnreadableImage(ValueError):
    """A file that can't be read as an image: says why, without naming it."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """The file's image, uint8 ``[height, width, 3]`` in RGB.

    What a viewer shows, by fixed rules (ours): turned upright as EXIF says; the first frame of several;
    transparent pixels on white; 16-bit grey scaled to 8 bits (16-bit colour keeps its high byte); CMYK by
    Pillow's formula, colour profiles left aside. Raises UnreadableImage for what is no image, is cut short,
    has floating-point or 32-bit pixels, or more than :data:`MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an image's size and metadata: checked here
            with Image.open(path) as file:
                width, height = file.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(f"{width} x {height} pixels: more than {MAX_PIXELS} are not read")
                return np.asarray(_rgb(ImageOps.exif_transpose(file)), dtype=np.uint8)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels are not read") from error
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError) as error:
        raise UnreadableImage(_first_line(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise UnreadableImage(f"{kind} pixels are not read: save it with 8 or 16 bits")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB")
    return image.convert("RGB")


def _first_line(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image that Pillow can identify"
    told = str(error).strip().splitlines()
    return told[0] if told else type(error).__name__
