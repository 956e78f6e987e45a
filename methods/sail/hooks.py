"""Sharpness at the first step, and the noise's descent when a batch starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.hooks import Batch, SamplerHooks
from lethebench.magnitude import FirstStep, descend, magnitudes, unit_vectors

if TYPE_CHECKING:
    from lethebench.methods.sail import SAIL


def sharpness(difference: Callable[[Tensor], Tensor], noise: Tensor, objective: str, delta: float) -> Tensor:
    """The sharpness of each image's noise ``[B, ...]`` by an objective of :class:`SAIL`: ``[B]``.

    ``difference`` gives conditional minus unconditional prediction at a noise. Differentiable. Zero where the
    text makes no difference.
    """
    here = difference(noise)
    along = unit_vectors(here)
    if objective == "released":
        return magnitudes(difference(noise + delta * along))
    return magnitudes(here) * magnitudes(difference(noise - delta * along) - here) / delta


@dataclass(frozen=True)
class SAILHooks(SamplerHooks):
    """Lowers each image's sharpness to ``limit`` by its initial noise."""

    method: SAIL
    limit: float

    def start(self, batch: Batch) -> Batch:
        """The batch with other noise where the sharpness is above the limit."""
        first, method = FirstStep(batch), self.method

        def ask(rows: Sequence[int], noise: Tensor) -> tuple[Tensor, Tensor]:
            difference = partial(first.difference, rows=rows)
            value, size = sharpness(difference, noise, method.objective, method.delta), magnitudes(noise)
            if method.objective == "released":
                return value, value + method.alpha * size
            return value, value**2 + method.alpha * size**2

        adam = partial(torch.optim.Adam, lr=method.lr)
        return replace(batch, noise=descend(batch.noise, ask, self.limit, method.iterations, adam))
