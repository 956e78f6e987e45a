"""The noise's descent, or its adjustment, when a batch starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.hooks import Batch, SamplerHooks, Step
from lethebench.magnitude import FirstStep, descend, magnitudes, unit_vectors

if TYPE_CHECKING:
    from lethebench.methods.han import Han

LENGTH = 128.0
"""Of unit normal noise of 4 x 64 x 64, which the paper's ``rho`` is for."""


@dataclass(frozen=True)
class PerSample(SamplerHooks):
    """Lowers each image's magnitude to ``limit`` by its initial noise."""

    method: Han
    limit: float

    def start(self, batch: Batch) -> Batch:
        """The batch with other noise where the magnitude is above the limit."""
        first = FirstStep(batch)

        def ask(rows: Sequence[int], noise: Tensor) -> tuple[Tensor, Tensor]:
            found = magnitudes(first.difference(noise, rows))
            return found, found

        adamw = partial(torch.optim.AdamW, lr=self.method.lr, weight_decay=self.method.weight_decay)
        return replace(batch, noise=descend(batch.noise, ask, self.limit, self.method.iterations, adamw))


class BatchWise(SamplerHooks):
    """Adjusts every image's noise, then holds guidance back (algorithm 1)."""

    def __init__(self, method: Han) -> None:
        self.method = method
        self._first: FirstStep | None = None

    def start(self, batch: Batch) -> Batch:
        """The batch with adjusted noise."""
        self._first = first = FirstStep(batch)
        noise = batch.noise
        rho = self.method.rho * math.sqrt(noise[0].numel()) / LENGTH
        for _ in range(self.method.adjustments):
            here = first.difference(noise)
            there = first.difference(noise + rho * unit_vectors(here))
            noise = noise - self.method.gamma * (there - here)
        return replace(batch, noise=noise)

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        """The unconditional prediction while the timestep is above ``tau``, then what guidance gave."""
        if float(step.timestep) <= self.method.tau:
            return combined
        if unconditional is not None:
            return unconditional
        assert self._first is not None, "the sampler calls start before the first step"
        empty = self._first.empty
        latents = step.batch.scale(step.latents, step.timestep)
        return step.batch.predict(latents, step.timestep, empty).conditional
