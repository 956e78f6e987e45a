"""The pieces of a denoising loss, for every family of models.

Latents are float32 ``[B, ...]`` as the denoiser takes them (packed for FLUX), timesteps ``[B]`` or a scalar:
integers in 0 to T - 1 for models that predict epsilon or v, reals in 0 to 1000 (1000 is pure noise) for flow
matching. Gradients flow wherever they are switched on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.hooks import Conditioning, ImageKey
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain, encode_prompts
from lethebench.sampler._families import adapter_for

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

FLOW = ("sd3", "flux")
"""Families that are trained by flow matching."""


def encode(model: Model, texts: Sequence[str], settings: SamplerSettings) -> Conditioning:
    """The conditioning of B texts; ``negative`` holds the empty prompt's where guidance is on."""
    return encode_prompts(model, texts, settings)


def draw_latents(
    model: Model,
    texts: Sequence[str],
    settings: SamplerSettings,
    draws: torch.Generator,
    batch_size: int = 16,
) -> Tensor:
    """Final latents that the model draws for texts, ``[len(texts), ...]``, without gradients.

    Each text has noise of its own, whatever the batch. ``settings`` must name a scheduler that a
    :class:`Chain` takes (``fitting_settings`` sees to it). The latents are not decoded: no round trip through
    the VAE.
    """
    suite = f"draw-{int(torch.randint(2**62, (1,), generator=draws))}"
    keys = [ImageKey(suite, Prompt(str(i), t, Role.NEUTRAL, cluster=""), 0) for i, t in enumerate(texts)]
    found = []
    with torch.no_grad():
        for start in range(0, len(keys), batch_size):
            part = keys[start : start + batch_size]
            chain = Chain(model, encode(model, [k.prompt.text for k in part], settings), settings, part)
            found.append(chain.run(chain.initial()))
    return torch.cat(found)


def random_timesteps(model: Model, count: int, draws: torch.Generator) -> Tensor:
    """Timesteps ``[count]``, uniform over the training range (for flow matching over its noise levels)."""
    if model.family in FLOW:
        return (torch.rand(count, generator=draws) * 1000).to(model.device)
    total = int(model.pipe.scheduler.config.num_train_timesteps)
    return torch.randint(total, (count,), generator=draws).to(model.device)


def noised(model: Model, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The forward process at ``timesteps`` (``[B]`` or a scalar), like ``latents``.

    ``sqrt(a_t) x + sqrt(1 - a_t) noise``, or ``(1 - t/1000) x + t/1000 noise`` for flow matching.
    """
    signal, spread = _levels(model, latents, timesteps)
    return signal * latents + spread * noise


def training_target(model: Model, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model is trained to predict: noise, velocity (v), or ``noise - latents`` (flow matching)."""
    if model.family in FLOW:
        return noise - latents
    if model.pipe.scheduler.config.get("prediction_type", "epsilon") == "v_prediction":
        signal, spread = _levels(model, latents, timesteps)
        return signal * noise - spread * latents
    return noise


def prediction(
    model: Model, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, settings: SamplerSettings
) -> Tensor:
    """The denoiser's raw prediction without guidance, float32 like ``latents``; ``negative`` is not used."""
    return adapter_for(model, settings).predict(latents, timesteps.to(latents.device), conditioning)


def _levels(model: Model, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    times = timesteps.to(latents.device).reshape(-1)
    shape = (-1, *(1 for _ in latents.shape[1:]))
    if model.family in FLOW:
        level = times.to(latents.dtype) / 1000
        return (1 - level).view(shape), level.view(shape)
    kept = model.pipe.scheduler.alphas_cumprod.to(latents)[times.long()]
    return kept.sqrt().view(shape), (1 - kept).sqrt().view(shape)
