"""Latents on the way from noise to an image, at random steps of a sampled chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from lethebench.hooks import ImageKey
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain
from lethebench.unlearning import encode

if TYPE_CHECKING:
    from lethebench.hooks import Conditioning
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

Item = TypeVar("Item")


class Point(NamedTuple):
    """Latents ``[B, ...]`` as the denoiser takes them, and the timestep ``[B]`` of each."""

    latents: Tensor
    timesteps: Tensor


def sampling_settings(sampler: SamplerSettings, family: str, steps: int, guidance: float) -> SamplerSettings:
    """The suite's sampler, with DDIM (or the flow-matching Euler method) and the chain's own values."""
    scheduler = "ddim" if family in ("sd", "sdxl") else "flow-euler"
    return sampler.model_copy(
        update={"scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": guidance}
    )


def random_steps(total: int, count: int, rows: int, draws: torch.Generator) -> Tensor:
    """``[rows, count]`` distinct steps 0 to ``total - 1`` a row, in random order."""
    order = [torch.randperm(total, generator=draws)[:count] for _ in range(rows)]
    return torch.stack(order)


@torch.no_grad()
def sample_points(
    model: Model,
    conditioning: Conditioning,
    settings: SamplerSettings,
    steps: Tensor,
    seed: int,
) -> list[Point]:
    """The inputs of the given steps of B chains: ``steps`` is ``[B, n]``, the result n points of B.

    Step 0's input is pure noise. The noise of row i depends on ``seed`` and i alone.
    """
    keys = [
        ImageKey(f"esd-{seed}", Prompt(str(i), "", Role.NEUTRAL, cluster=""), 0) for i in range(len(steps))
    ]
    chain = Chain(model, conditioning, settings, keys)
    latents, last = chain.initial(), int(steps.max())
    steps = steps.to(latents.device)
    found = [torch.empty_like(latents) for _ in range(steps.shape[1])]
    for index in range(last + 1):
        for place, kept in enumerate(found):
            rows = steps[:, place] == index
            kept[rows] = latents[rows]
        if index < last:
            latents = chain.step(index, latents)
    return [Point(x, chain.timesteps[steps[:, n]]) for n, x in enumerate(found)]


def unconditional(model: Model, rows: int, settings: SamplerSettings) -> Conditioning:
    """What guidance takes for "no text", for ``rows`` images: the empty prompt where there is no guidance."""
    empty = encode(model, [""] * rows, settings)
    return replace(empty, negative=None) if empty.negative is None else empty.negative


def rounds(items: Sequence[Item], size: int, draws: torch.Generator) -> Iterator[list[Item]]:
    """Batches without end: every item once in random order, then again."""
    pending: list[int] = []
    while True:
        while len(pending) < size:
            pending += torch.randperm(len(items), generator=draws).tolist()
        yield [items[i] for i in pending[:size]]
        del pending[:size]
