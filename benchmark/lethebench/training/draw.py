"""Draws a model's images for its card, by the suite's own sampler and paired noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    """Images uint8 [n, 64, 64, 3], the prompt of each, and the seconds that drawing took."""

    prompts: tuple[Prompt, ...]
    images: NDArray[np.uint8]
    seconds: float

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
        images = sample(model, keys, settings, batch_size=batch, advance=bar.advance).images
    return Draws(tuple(prompt for prompt, _ in wanted), images, time.monotonic() - began)
