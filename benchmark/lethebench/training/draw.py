"""Draws a model's images for its card, by the suite's own sampler and paired noise."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lethebench.hooks import ImageKey
from lethebench.progress import progress
from lethebench.prompts import Prompt

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

SUITE = "planted@1"
"""The suite whose noise is drawn: image k of a prompt is the one that the suite draws."""


@dataclass(frozen=True)
class Draws:
    """Images uint8 [n, 64, 64, 3], the prompt of each, and the seconds that drawing took.

    ``noise_norm`` float32 [n, steps] is the sampler's: the magnitude of the text-conditional noise.
    """

    prompts: tuple[Prompt, ...]
    images: NDArray[np.uint8]
    seconds: float
    noise_norm: NDArray[np.float32]

    def where(self, which: Callable[[Prompt], bool]) -> Iterator[tuple[Prompt, NDArray[np.uint8]]]:
        """The images whose prompt is chosen."""
        return ((p, image) for p, image in zip(self.prompts, self.images, strict=True) if which(p))


def draw_all(
    model: Model, wanted: Sequence[tuple[Prompt, int]], settings: SamplerSettings, batch: int = 32
) -> Draws:
    """Image k of each prompt."""
    from lethebench.sampler import sample

    keys = [ImageKey(SUITE, prompt, index) for prompt, index in wanted]
    began = time.monotonic()
    with progress("draw", total=len(keys)) as bar:
        drawn = sample(model, keys, settings, batch_size=batch, advance=bar.advance)
    seconds = time.monotonic() - began
    return Draws(tuple(prompt for prompt, _ in wanted), drawn.images, seconds, drawn.noise_norm)


def kept_draws(
    path: Path, model: Model, wanted: Sequence[tuple[Prompt, int]], settings: SamplerSettings
) -> Draws:
    """The images of :func:`draw_all`, read from ``path`` (.npz) if this model drew the same there before."""
    from lethebench.zoo._files import folder_sha256

    what = {
        "weights": folder_sha256(model.folder) if model.folder else {},
        "settings": settings.model_dump(),
        "dtype": str(model.dtype),
        "wanted": [(prompt.id, prompt.text, index) for prompt, index in wanted],
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key and "noise_norm" in kept:
                prompts = tuple(p for p, _ in wanted)
                return Draws(prompts, kept["images"], float(kept["seconds"]), kept["noise_norm"])
    draws = draw_all(model, wanted, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, key=key, images=draws.images, seconds=draws.seconds, noise_norm=draws.noise_norm)
    return draws
