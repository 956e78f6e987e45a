"""Batches of neutral prompts with their noise, and what the base model makes of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain, encode_prompts
from lethebench.seeding import derive_seed

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


@dataclass
class Batch:
    """Some prompts' chain, its initial latents, and the base model's final latents (None until asked for)."""

    chain: Chain
    start: Tensor
    final: Tensor | None = None


class NeutralBatches:
    """Fixed batches of neutral prompts, drawn once; each prompt keeps its noise.

    (EcoDiff starts every prompt from the same noise; ours differ from prompt to prompt.) The base
    model's final latents are computed once a batch, by the chain that the masks are fitted on.
    """

    def __init__(
        self,
        model: Model,
        texts: Sequence[str],
        settings: SamplerSettings,
        batch_size: int,
        draws: torch.Generator,
    ) -> None:
        self.model, self.settings = model, settings
        seed = int(torch.randint(2**62, (1,), generator=draws))
        self._groups = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        self._seed, self._draws = seed, draws
        self._made: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def order(self, steps: int) -> Iterator[int]:
        """The batch of each of ``steps`` optimiser steps: every one once in random order, then again."""
        pending: list[int] = []
        for _ in range(steps):
            if not pending:
                pending = torch.randperm(len(self), generator=self._draws).tolist()
            yield pending.pop()

    def chain(self, number: int) -> Batch:
        """The batch of that number, its text encoded when first asked for."""
        if number not in self._made:
            with torch.no_grad():
                conditioning = encode_prompts(self.model, self._groups[number], self.settings)
                chain = Chain(self.model, conditioning, self.settings, self._keys(number))
                self._made[number] = Batch(chain, chain.initial())
        return self._made[number]

    def final(self, number: int) -> Tensor:
        """The base model's final latents of a batch. Call it while no mask is on the model."""
        batch = self.chain(number)
        if batch.final is None:
            with torch.no_grad():
                batch.final = batch.chain.run(batch.start)
        return batch.final

    def _keys(self, number: int) -> list[ImageKey]:
        suite = f"neutral-{derive_seed(self._seed, number)}"
        found = []
        for place, text in enumerate(self._groups[number]):
            found.append(ImageKey(suite, Prompt(str(place), text, Role.NEUTRAL, cluster=""), 0))
        return found


def fitting_settings(
    sampler: SamplerSettings, family: str, steps: int, guidance: float | None
) -> SamplerSettings:
    """The suite's sampler with the chain's own number of steps and guidance.

    A chain that is learnt through must not remember earlier steps, so a UNet's own scheduler gives way
    to DDIM.
    """
    changes: dict[str, object] = {"num_inference_steps": steps}
    if guidance is not None:
        changes["guidance_scale"] = guidance
    if sampler.scheduler == "model" and family in ("sd", "sdxl"):
        changes["scheduler"] = "ddim"
    return sampler.model_copy(update=changes)


def working_model(model: Model, dtype: torch.dtype, *, own: bool = False) -> Model:
    """The model with its denoiser in ``dtype``: itself where that is so already, else with a converted copy.

    With ``own`` the denoiser is a copy in any case, so that its weights may be trained.
    """
    if model.dtype == dtype and not own:
        return model
    # Module.to itself: a diffusers model's own warns of float32 modules that it doesn't have.
    denoiser = nn.Module.to(copy.deepcopy(model.denoiser), dtype=dtype)
    if model.device.type == "cpu":
        denoiser = nn.Module.to(denoiser, memory_format=torch.channels_last)
    pipe = copy.copy(model.pipe)
    pipe.register_modules(**{"unet" if getattr(pipe, "unet", None) is not None else "transformer": denoiser})
    return replace(model, pipe=pipe, dtype=dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``, off where it is float32 or wider."""
    smaller = dtype.itemsize < 4
    return torch.autocast(device.type, dtype=dtype if smaller else torch.bfloat16, enabled=smaller)


def chosen_prompts(texts: Sequence[str], count: int, draws: torch.Generator) -> list[str]:
    """At most ``count`` of the texts, at random without replacement. Raises UserError where none is."""
    if not texts:
        raise UserError("the prompt set has no neutral prompts to fit on (training_prompts)")
    return [texts[i] for i in torch.randperm(len(texts), generator=draws)[:count].tolist()]
