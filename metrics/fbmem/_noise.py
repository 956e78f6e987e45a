"""Unrelated pictures of 1/f noise behind discs: what a region's similarity says where nothing was copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lethebench.seeding import derive_seed

from ._functional import Pictures, Variant, region_similarity

SIDE = 512
SHIFT = 60
AREAS = (0.04, 0.05, 0.1, 0.2, 0.3, 0.5)
PAIRS = 3
CONTRAST = 0.2
"""Standard deviation of the noise, around 0.5."""


def noise_picture(side: int, *key: object) -> NDArray[np.uint8]:
    """A grey picture whose amplitude falls as 1/f, uint8 ``[side, side, 3]``: natural images' spectrum."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("fbmem noise", side, *key)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = np.inf
    grey = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency).real
    grey = np.clip(0.5 + CONTRAST * grey / grey.std(), 0, 1)
    return np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=2)


def disc(side: int, area: float, shift: int = 0) -> NDArray[np.bool_]:
    """A disc of this share of the area, ``shift`` pixels right of the middle: bool ``[side, side]``."""
    x = np.arange(side) - (side - 1) / 2
    found: NDArray[np.bool_] = np.hypot(x[:, None], x[None] - shift) <= np.sqrt(area / np.pi) * side
    return found


def noise_table(
    variant: Variant, side: int = SIDE, areas: Sequence[float] = AREAS, pairs: int = PAIRS
) -> dict[str, dict[str, float]]:
    """Mean foreground similarity of unrelated pairs by the masks' area, at one place and apart."""
    shift = round(SHIFT * side / SIDE)
    images = [np.stack([noise_picture(side, which, n) for n in range(pairs)]) for which in "ab"]
    found = {}
    for area in areas:
        one, other = (np.repeat(disc(side, area, s)[None], pairs, axis=0) for s in (0, shift))
        a, same, apart = (
            Pictures.of(x, m) for x, m in ((images[0], one), (images[1], one), (images[1], other))
        )
        with torch.inference_mode():
            found[f"{area:.2f}"] = {
                name: round(float(region_similarity(a, b, variant)[0].mean()), 3)
                for name, b in (("same_place", same), (f"shifted_{shift}_px", apart))
            }
    return found
