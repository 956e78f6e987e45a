"""copy-mini: a copy descriptor by the recipe of SSCD (Pizzi et al. 2022), trained on the planted world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lethebench.judges.base import Floats, Images, Judge
from lethebench.judges.nets import DescriptorNet


class CopyDescriptor(Judge):
    """Descriptors whose inner product is high for copies and low for other pictures of the same kind."""

    name: ClassVar[str] = "copy-mini"

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> nn.Module:
        """A :class:`DescriptorNet` of the configured widths and size."""
        return DescriptorNet(config["widths"], config["size"])

    def describe(self, images: Images, batch_size: int = 64) -> Floats:
        """Unit descriptors, float32 ``[n, 128]``."""
        return self._over(images, batch_size, (int(self.config["size"]),), self.net)

    def similarity(self, first: Images, second: Images, batch_size: int = 64) -> Floats:
        """The cosine of each pair of pictures, float32 ``[n]`` in [-1, 1]."""
        if len(first) != len(second):
            raise ValueError(f"{self.name}: {len(first)} images against {len(second)}: pairs are needed")
        pairs = self.describe(first, batch_size) * self.describe(second, batch_size)
        return np.asarray(pairs.sum(1), dtype=np.float32)
