"""Adversarial prompt embeddings: the arithmetic of ``dori``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethebench.attack.base import Subject
from lethebench.hooks import Conditioning
from lethebench.prompts import Prompt
from lethebench.sampler import image_size, pack_latents, to_latents
from lethebench.unlearning import autocast, encode, noised, prediction, random_timesteps, training_target

if TYPE_CHECKING:
    from lethebench.attack.dori import Dori
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


def adversarial(subject: Subject, asked: Sequence[Prompt], how: Dori) -> tuple[Tensor, Tensor]:
    """What to add to each prompt's token embeddings, ``[n, tokens, width]``, and losses ``[steps, n]``.

    ``argmin_y E_{t, noise} mean (target - prediction(x_t, t, y))^2`` for the latents x of each prompt's
    reference, by Adam from y = the prompt's embedding (Finding DoRI, arXiv 2507.16880). The prompts share
    batches only: each has its own embedding, and noises and timesteps drawn for it alone. Pooled embeddings
    stay the prompt's (ours: the paper attacks a model without).
    """
    model, settings = subject.model, subject.sampler
    with torch.no_grad():
        clean = image_latents(model, [subject.reference(p) for p in asked], settings)
        rows = [p.text for p in asked for _ in range(how.batch_size)]
        conditioning = encode(model, rows, settings)
    draws = [subject.generator("dori", p.id) for p in asked]
    offsets = torch.zeros_like(conditioning.embeds[:: how.batch_size], dtype=torch.float32)
    offsets.requires_grad_()
    optimiser = torch.optim.Adam([offsets], lr=how.lr)
    dtype = getattr(torch, how.dtype)
    curve = []
    for _ in range(how.steps):
        with torch.enable_grad(), autocast(model.device, dtype):
            losses = denoising_losses(model, settings, clean, conditioning, offsets, draws, how.batch_size)
            gradient = torch.autograd.grad(losses.sum(), offsets)[0]
        offsets.grad = gradient
        optimiser.step()
        curve.append(losses.detach().cpu())
    return offsets.detach(), torch.stack(curve) if curve else torch.zeros(0, len(asked))


def denoising_losses(
    model: Model,
    settings: SamplerSettings,
    clean: Tensor,
    conditioning: Conditioning,
    offsets: Tensor,
    draws: Sequence[torch.Generator],
    repeats: int,
) -> Tensor:
    """The mean squared error of denoising each of ``clean``, ``[n]``, over ``repeats`` noises and times.

    ``clean`` is ``[n, ...]`` as the denoiser takes it, ``offsets`` ``[n, tokens, width]``;
    ``conditioning`` is for n * repeats rows. Each row of ``clean`` draws from its own generator: times, then
    noises.
    """
    times = torch.cat([random_timesteps(model, repeats, one) for one in draws])
    noise = torch.cat([torch.randn((repeats, *clean.shape[1:]), generator=one) for one in draws])
    latents, noise = clean.repeat_interleave(repeats, 0), noise.to(clean)
    embeds = conditioning.embeds + offsets.repeat_interleave(repeats, 0)
    predicted = prediction(
        model, noised(model, latents, noise, times), times, conditioning.with_embeds(embeds), settings
    )
    errors = (predicted - training_target(model, latents, noise, times)).square()
    return errors.reshape(len(clean), -1).mean(1)


def image_latents(model: Model, images: Sequence[NDArray[np.uint8]], settings: SamplerSettings) -> Tensor:
    """The latents of images as the denoiser takes them, ``[n, ...]`` float32: the mean of the VAE's encoder.

    The inverse of :func:`lethebench.sampler.decode`. Images of another size than the model draws are resized.
    """
    from lethebench.metrics.fbmem.segmenters import resize_image

    pixels = np.stack([resize_image(image, *image_size(model, settings)) for image in images])
    x = torch.from_numpy(pixels).to(model.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pack_latents(model, to_latents(model, x), settings)
