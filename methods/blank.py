"""Control: a grey image for every prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Family, Method
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.zoo import Model

MID_GREY = 128


class GreyImages(SamplerHooks):
    """Replaces every image."""

    def images(self, images: Tensor, keys: tuple[ImageKey, ...]) -> Tensor:
        """Mid-grey images of the same size, uint8 ``[B, height, width, 3]``."""
        return images.new_full(images.shape, MID_GREY)


@METHODS.register
@dataclass(frozen=True)
class Blank(Method):
    """Suppresses everything: shows which scores reward a model for drawing nothing."""

    name = "blank"
    summary = "A mid-grey image for every prompt."
    family = Family.SAMPLING
    control = True
    generates = False

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Replace the images."""
        yield GreyImages()
