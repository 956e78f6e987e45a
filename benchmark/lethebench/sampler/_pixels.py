"""Between latents and pixels: the autoencoder with its scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lethebench.zoo import Model

_DECODED_PIXELS = 2**20
"""Pixels that the VAE decodes at once: 256 images of 64 pixels a side, or one of 1024."""


def decode(model: Model, latents: Tensor) -> Tensor:
    """Images uint8 ``[B, height, width, 3]`` of final latents ``[B, channels, height, width]``."""
    pixels = latents.shape[-1] * latents.shape[-2] * int(model.pipe.vae_scale_factor) ** 2
    parts = latents.float().split(max(1, _DECODED_PIXELS // pixels))
    images = torch.cat([to_pixels(model, part) for part in parts])
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pixels(model: Model, latents: Tensor) -> Tensor:
    """Images ``[B, 3, height, width]``, about [-1, 1], of latents ``[B, channels, h, w]``; differentiable."""
    std, mean = _statistics(model, latents)
    z = latents * std / model.pipe.vae.config.scaling_factor + mean
    images: Tensor = model.pipe.vae.decode(z, return_dict=False)[0]
    return images


def to_latents(model: Model, pixels: Tensor) -> Tensor:
    """The inverse of :func:`to_pixels`: the mean of the encoder's distribution; differentiable."""
    z: Tensor = model.pipe.vae.encode(pixels).latent_dist.mean
    std, mean = _statistics(model, z)
    found: Tensor = (z - mean) * model.pipe.vae.config.scaling_factor / std
    return found


def _statistics(model: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of the autoencoder's latents, ``[1, channels or 1, 1, 1]``; 1 and its shift
    where it doesn't say.
    """
    config = model.pipe.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        mean, std = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    shape = (1, -1, 1, 1)
    return like.new_tensor(std).view(shape), like.new_tensor(mean).view(shape)
