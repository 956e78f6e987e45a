"""Random changes of pictures for the judges' training: a generator's marks on a scene, and a copyist's.

Every function takes float32 ``[n, 3, h, w]`` in [-1, 1] and a generator, and changes each picture by
its own draw. All strengths are ours; :func:`generated_look` is meant to cover the softness, colour
drift and compression marks of a small diffusion model and its autoencoder.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def uniform(n: int, low: float, high: float, g: Generator) -> Tensor:
    """``[n, 1, 1, 1]``, uniform in [low, high)."""
    return torch.rand(n, 1, 1, 1, generator=g) * (high - low) + low


def chance(n: int, probability: float, g: Generator) -> Tensor:
    """``[n, 1, 1, 1]`` of 0 or 1."""
    return (torch.rand(n, 1, 1, 1, generator=g) < probability).float()


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """A separable Gaussian blur, reflecting at the border."""
    radius = max(1, math.ceil(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(x.shape[1], 1, 1, -1)
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    across = F.conv2d(padded, kernel, groups=x.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=x.shape[1])


def soften(x: Tensor, g: Generator, most: float = 1.0) -> Tensor:
    """Blur (up to about one pixel) or halve and double the size, by a random share up to ``most``."""
    halved = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    soft = torch.lerp(gaussian_blur(x, 1.1), halved, chance(len(x), 0.4, g))
    share = uniform(len(x), 0.0, most, g) * chance(len(x), 0.7, g)
    return torch.lerp(x, soft, share)


def blur(x: Tensor, g: Generator, low: float = 0.5, high: float = 2.0, probability: float = 0.5) -> Tensor:
    """Gaussian blur of one sigma a quarter of the batch, for some of the pictures."""
    parts = []
    for part in x.chunk(4):
        sigma = float(torch.rand((), generator=g)) * (high - low) + low
        parts.append(torch.lerp(part, gaussian_blur(part, sigma), chance(len(part), probability, g)))
    return torch.cat(parts)


def drift(x: Tensor, g: Generator, strength: float = 1.0) -> Tensor:
    """Small changes of contrast, brightness and channels, and a smooth stain of colour."""
    n = len(x)
    gain = 1 + strength * 0.1 * (torch.rand(n, 3, 1, 1, generator=g) * 2 - 1)
    offset = strength * 0.08 * (torch.rand(n, 3, 1, 1, generator=g) * 2 - 1)
    stain = torch.randn(n, 3, 8, 8, generator=g) * uniform(n, 0.0, 0.12 * strength, g)
    smooth = F.interpolate(stain, size=x.shape[2:], mode="bilinear", align_corners=False)
    return x * gain + offset + smooth


def noise(x: Tensor, g: Generator, most: float = 0.1) -> Tensor:
    """White noise of a random strength up to ``most``, for half of the pictures."""
    strength = uniform(len(x), 0.0, most, g) * chance(len(x), 0.5, g)
    return x + strength * torch.randn(x.shape, generator=g)


@lru_cache(maxsize=1)
def _dct() -> Tensor:
    """The orthonormal 8-point DCT-II, ``[8, 8]``."""
    k = torch.arange(8, dtype=torch.float32)
    basis = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 16) * 0.5
    basis[0] /= math.sqrt(2)
    return basis


def jpeg_like(x: Tensor, g: Generator, probability: float = 0.3) -> Tensor:
    """Round 8x8 DCT coefficients as JPEG does: coarser for finer detail, one table for all channels."""
    n, c, h, w = x.shape
    basis = _dct().to(x.device)
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
    coefficients = basis @ blocks @ basis.T
    k = torch.arange(8, dtype=torch.float32, device=x.device)
    table = 0.12 + 0.06 * (k[:, None] + k[None])
    step = table * uniform(n, 0.3, 2.0, g).view(n, 1, 1, 1, 1, 1)
    rounded = basis.T @ (torch.round(coefficients / step) * step) @ basis
    decoded = rounded.permute(0, 1, 2, 4, 3, 5).reshape(n, c, h, w)
    return torch.lerp(x, decoded, chance(n, probability, g))


def shift_grid(n: int, g: Generator, shift: float = 0.06, zoom: float = 0.08, flip: float = 0.0) -> Tensor:
    """Sampling grids ``[n, 64, 64, 2]`` of small shifts and zooms (shares of the side)."""
    scale = 1 + zoom * (torch.rand(n, generator=g) * 2 - 1)
    sides = torch.where(torch.rand(n, generator=g) < flip, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * sides, scale
    theta[:, :, 2] = 2 * shift * (torch.rand(n, 2, generator=g) * 2 - 1)
    return F.affine_grid(theta, [n, 1, 64, 64], align_corners=False)


def warped(grid: Tensor, g: Generator, most: float) -> Tensor:
    """The grid with each picture's points moved smoothly, by up to ``most`` pixels (standard deviation)."""
    n = len(grid)
    moves = torch.randn(n, 2, 9, 9, generator=g) * uniform(n, 0.0, most, g)
    smooth = F.interpolate(moves, size=grid.shape[1:3], mode="bicubic", align_corners=False)
    return grid + smooth.permute(0, 2, 3, 1) * (2 / grid.shape[1])


def crop_grid(n: int, g: Generator, least: float, flip: float) -> Tensor:
    """Grids of random crops: ``least`` to all of the area, aspect 3/4 to 4/3, perhaps mirrored."""
    area = least + (1 - least) * torch.rand(n, generator=g)
    aspect = torch.exp((torch.rand(n, generator=g) * 2 - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    sides = torch.where(torch.rand(n, generator=g) < flip, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * sides, height
    theta[:, 0, 2] = (1 - width) * (torch.rand(n, generator=g) * 2 - 1)
    theta[:, 1, 2] = (1 - height) * (torch.rand(n, generator=g) * 2 - 1)
    return F.affine_grid(theta, [n, 1, 64, 64], align_corners=False)


def resample(x: Tensor, grid: Tensor) -> Tensor:
    """Pictures (or masks) read along the grid, reflecting at the border."""
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter(x: Tensor, g: Generator, strength: float = 0.4) -> Tensor:
    """Brightness, contrast, saturation and channel gains, each by up to ``strength``; grey for 5 %."""
    n = len(x)
    x = x * uniform(n, 1 - strength, 1 + strength, g) + uniform(n, -0.8 * strength, 0.8 * strength, g)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = middle + (x - middle) * uniform(n, 1 - strength, 1 + strength, g)
    grey = x.mean(1, keepdim=True)
    saturation = uniform(n, 1 - 1.5 * strength, 1 + strength, g) * (1 - chance(n, 0.05, g))
    x = grey + (x - grey) * saturation
    return x * (1 + 0.3 * strength * (torch.rand(n, 3, 1, 1, generator=g) * 2 - 1))


def generated_look(x: Tensor, g: Generator, strength: float = 1.0) -> Tensor:
    """Softness, colour drift, noise and compression, as generated pictures have them."""
    x = jpeg_like(drift(soften(x, g, strength), g, strength), g)
    return noise(x, g, 0.1 * strength).clamp(-1, 1)


def copied(
    x: Tensor, g: Generator, *, least: float = 0.5, flip: float = 0.25, strength: float = 0.4
) -> Tensor:
    """A view for copy detection: crop, colour, blur, compression, noise (SSCD's families of transforms)."""
    n = len(x)
    cropped = torch.lerp(x, resample(x, crop_grid(n, g, least, flip)), chance(n, 0.8, g))
    coloured = torch.lerp(cropped, jitter(cropped, g, strength), chance(n, 0.8, g)).clamp(-1, 1)
    return noise(jpeg_like(blur(coloured, g), g), g).clamp(-1, 1)
