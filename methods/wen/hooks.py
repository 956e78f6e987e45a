"""The embeddings' descent, when a batch starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.hooks import Batch, SamplerHooks
from lethebench.magnitude import FirstStep, descend, magnitudes

if TYPE_CHECKING:
    from lethebench.methods.wen import Wen


@dataclass(frozen=True)
class WenHooks(SamplerHooks):
    """Lowers each image's magnitude to ``limit`` by its token embeddings."""

    method: Wen
    limit: float

    def start(self, batch: Batch) -> Batch:
        """The batch with other token embeddings where the magnitude is above the limit."""
        first = FirstStep(batch)
        begin = 0 if batch.model.family == "flux" else 1

        def ask(rows: Sequence[int], embeds: Tensor) -> tuple[Tensor, Tensor]:
            held = torch.cat([embeds[:, :begin].detach(), embeds[:, begin:]], dim=1)
            found = magnitudes(first.difference(rows=rows, embeds=held))
            return found, found

        adamw = partial(torch.optim.AdamW, lr=self.method.lr, weight_decay=self.method.weight_decay)
        embeds = descend(batch.conditioning.embeds, ask, self.limit, self.method.iterations, adamw)
        return replace(batch, conditioning=batch.conditioning.with_embeds(embeds))
