"""segmenter-mini: the foreground's mask, trained on the planted world's true coverage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from lethebench.judges.base import Floats, Images, Judge
from lethebench.judges.nets import SIDE, SegmenterNet


class Segmenter(Judge):
    """Foreground segmentation, the stand-in for BiRefNet or SAM on planted pictures."""

    name: ClassVar[str] = "segmenter-mini"

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> nn.Module:
        """A :class:`SegmenterNet` of the configured widths."""
        return SegmenterNet(config["widths"])

    def masks(self, images: Images, batch_size: int = 64) -> Floats:
        """The probability that each pixel is foreground: float32 ``[n, 64, 64]`` in [0, 1]."""
        return self._over(images, batch_size, (SIDE, SIDE), lambda batch: torch.sigmoid(self.net(batch)))
