"""FB-Mem's arithmetic: multi-scale SSIM over a region, best matches. Torch, no judges, no files.

Sources: Di et al., "Demystifying Foreground-Background Memorization in Diffusion Models" (arXiv 2508.12148)
and its released code, as the research note reports them; torchmetrics'
``MultiScaleStructuralSimilarityIndexMeasure`` for the similarity; NeMo (arXiv 2406.02366) for the three
equal scales.

**Similarity** (MS-SSIM). At scale s, local means, variances and covariance come from an 11-pixel Gaussian
window (sigma 1.5), over windows that lie inside the picture; with c1 = 0.01^2, c2 = 0.03^2 for pixels in
0 to 1,

    contrast_s = (2 cov + c2) / (var_x + var_y + c2)      luminance = (2 mx my + c1) / (mx^2 + my^2 + c1)
    similarity = relu(contrast_1)^beta_1 * relu(contrast_2)^beta_2 ... relu((contrast * luminance)_S)^beta_S

each term a mean over windows and colour channels; the next scale halves the picture; as in torchmetrics the
last scale has windows at the border too, where the picture is mirrored. The published metric has five scales
(torchmetrics' betas), which need 176 pixels a side; smaller pictures get three (:func:`betas`).
With a region everywhere 1 it equals torchmetrics' at the same betas.

**Region.** The released code paints what is not in the region in one flat colour and compares whole
pictures. The paint is alike in both and scores 1, so unrelated pictures with a small foreground look the
same (0.92 at 10 % of the area). The ``masked`` variant, ours, looks at the region only: every local moment
is a weighted one whose weights are the window times the region, each window counts by how much region it
holds, and the next scale pools the region's pixels alone. Nothing outside the region, and no paint, enters.
The foreground's region is the union of the two pictures' foregrounds (so a different outline counts as
different); the background's is what neither foreground covers, less a rim of one pixel in which the two
blend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ._constants import C1, C2, KEEP, KERNEL, MIN_AREA, SIGMA, betas

SMALL = 16
CHUNK_PIXELS = 2**23
"""Pixels of pairs that are compared at once: bounds the memory (about 150 bytes a pixel)."""
_EMPTY = 1e-12

Variant = Literal["masked", "as-released"]


@lru_cache(maxsize=32)
def _band(size: int, mirrored: bool, device: str) -> Tensor:
    """The windows along one side, float32: row i of ``[size - 10, size]`` is the Gaussian centred on i + 5.

    ``mirrored`` gives windows at the border too, ``[size, size]``, in which the side is mirrored at its ends.
    """
    reach = (KERNEL - 1) // 2
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    gauss = torch.exp(-((steps / SIGMA) ** 2) / 2)
    gauss = gauss / gauss.sum()
    band = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for step, share in zip(steps.int().tolist(), gauss, strict=True):
            at = abs(row + step)
            band[row, at if at < size else 2 * (size - 1) - at] += share
    kept = band if mirrored else band[reach : size - reach]
    return kept.float().contiguous().to(device)


def blur(x: Tensor, mirrored: bool = False) -> Tensor:
    """Gaussian means over windows inside the picture: ``[..., h, w]`` to ``[..., h - 10, w - 10]``.

    ``mirrored`` keeps the size: windows at the border see the picture mirrored.
    """
    rows, columns = (_band(side, mirrored, str(x.device)) for side in x.shape[-2:])
    return rows @ (x @ columns.mT)


def scale_terms(x: Tensor, y: Tensor, weight: Tensor, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Mean contrast and mean contrast times luminance of one scale, each ``[n]``.

    ``x`` and ``y`` are ``[n, c, h, w]`` in 0 to 1, ``weight`` ``[n, 1, h, w]`` in 0 to 1 is the region. A
    region that no window reaches has nothing to differ in: both are 1.
    """
    channels = x.shape[1]
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1) * weight
    blurred = blur(torch.cat([moments, weight], dim=1), mirrored)
    mass = blurred[:, -1:]
    mx, my, xx, yy, xy = (blurred[:, :-1] / mass.clamp(min=_EMPTY)).split(channels, dim=1)
    var = (xx - mx * mx).clamp(min=0) + (yy - my * my).clamp(min=0)
    contrast = (2 * (xy - mx * my) + C2) / (var + C2)
    luminance = (2 * mx * my + C1) / (mx * mx + my * my + C1)
    total = channels * mass.sum(dim=(1, 2, 3))
    both = torch.stack([contrast, contrast * luminance]) * mass
    means = both.sum(dim=(2, 3, 4)) / total.clamp(min=_EMPTY)
    means = torch.where(total > 1e-6, means, 1.0)
    return means[0], means[1]


def halve(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next scale: 2x2 means of the region's pixels, and how much region each mean holds."""
    pooled = F.avg_pool2d(torch.cat([x * weight, y * weight, weight], dim=1), 2)
    mass = pooled[:, -1:]
    first, second = (pooled[:, :-1] / mass.clamp(min=_EMPTY)).split(x.shape[1], dim=1)
    return first, second, mass


def ms_ssim(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Multi-scale SSIM of pairs over a region, ``[n]`` in 0 to 1 (module docstring).

    ``x`` and ``y`` ``[n, c, h, w]`` in 0 to 1; ``weight`` ``[n, 1, h, w]`` in 0 to 1, everywhere 1 by
    default.
    """
    if weight is None:
        weight = torch.ones_like(x[:, :1])
    return scale_terms(x, y, weight)[0].relu() ** betas(*x.shape[-2:])[0] * _coarse(x, y, weight)


def _coarse(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The factors of all scales but the first: no less than the whole product, at a fifth of its cost."""
    exponents = betas(*x.shape[-2:])
    product = torch.ones(len(x), device=x.device)
    for scale, beta in enumerate(exponents[1:], 2):
        x, y, weight = halve(x, y, weight)
        last = scale == len(exponents)
        contrast, ssim = scale_terms(x, y, weight, mirrored=last)
        product = product * (ssim if last else contrast).relu() ** beta
    return product


@dataclass(frozen=True)
class Pictures:
    """Pictures with their foregrounds.

    ``pixels`` float32 ``[n, 3, h, w]`` in 0 to 1, ``masks`` float32 ``[n, 1, h, w]``, 0 or 1.
    """

    pixels: Tensor
    masks: Tensor

    @staticmethod
    def of(images: NDArray[np.uint8], masks: NDArray[np.bool_]) -> Pictures:
        """From images uint8 ``[n, h, w, 3]`` and foregrounds bool ``[n, h, w]``."""
        if masks.shape != images.shape[:3]:
            raise ValueError(f"fbmem: masks {list(masks.shape)} don't fit images {list(images.shape)}")
        pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
        return Pictures(pixels.contiguous(), torch.from_numpy(masks.astype(np.float32))[:, None])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, at: Tensor | slice) -> Pictures:
        return Pictures(self.pixels[at], self.masks[at])

    def repeated(self, count: int) -> Pictures:
        """The one picture ``count`` times, without copies."""
        return Pictures(*(t.expand(count, -1, -1, -1) for t in (self.pixels, self.masks)))

    @cached_property
    def small_pixels(self) -> Tensor:
        """The pixels at :data:`SMALL` a side."""
        return F.adaptive_avg_pool2d(self.pixels, SMALL)

    @cached_property
    def small_masks(self) -> Tensor:
        """The masks at :data:`SMALL` a side."""
        return F.adaptive_avg_pool2d(self.masks, SMALL)


def comparable(masks: Tensor) -> Tensor:
    """Whether foregrounds ``[n, 1, h, w]`` cover between 3 % and 97 % of the picture, bool ``[n]``.

    FB-Mem's adaptive rule: where they don't, the whole pictures are compared in place of both regions. The
    released code asks it of the generated picture alone. Here it is the same on either side: for
    ``as-released`` both pictures' foregrounds must do, for ``masked`` their union, which is the region
    (a picture that copied a background and lost its foreground is compared by region, and is BM).
    """
    area = masks.mean(dim=(1, 2, 3))
    return (area >= MIN_AREA) & (area <= 1 - MIN_AREA)


def regions(a: Tensor, b: Tensor) -> Tensor:
    """Foreground and background regions of pairs, ``[2, n, 1, h, w]``, from foregrounds ``[n, 1, h, w]``."""
    union = torch.maximum(a, b)
    background = 1 - F.max_pool2d(union, 3, stride=1, padding=1)
    apart = comparable(union) & (background.mean(dim=(1, 2, 3)) >= MIN_AREA)
    return torch.where(apart[None, :, None, None, None], torch.stack([union, background]), 1.0)


def filled(pictures: Pictures, apart: Tensor) -> Tensor:
    """The released code's pictures, ``[2, n, 3, h, w]``: background black, then foreground white.

    Where ``apart``, bool ``[n]``, is False, both are the whole picture.
    """
    x, mask = pictures.pixels, pictures.masks
    both = torch.stack([x * mask, x * (1 - mask) + mask])
    return torch.where(apart[None, :, None, None, None], both, x)


def pair_inputs(a: Pictures, b: Pictures, variant: Variant) -> tuple[Tensor, Tensor, Tensor]:
    """What is compared for each pair, all foregrounds first, then all backgrounds.

    ``x`` and ``y`` ``[2 n, 3, h, w]``, weights ``[2 n, 1, h, w]``.
    """
    if variant == "as-released":
        apart = comparable(a.masks) & comparable(b.masks)
        x, y = filled(a, apart).flatten(0, 1), filled(b, apart).flatten(0, 1)
        return x, y, torch.ones_like(x[:, :1])
    weight = regions(a.masks, b.masks).flatten(0, 1)
    return a.pixels.repeat(2, 1, 1, 1), b.pixels.repeat(2, 1, 1, 1), weight


def region_similarity(a: Pictures, b: Pictures, variant: Variant = "masked") -> tuple[Tensor, Tensor]:
    """Foreground and background similarity of pairs, each ``[n]``: ``a[i]`` with ``b[i]``."""
    both = ms_ssim(*pair_inputs(a, b, variant))
    return both[: len(a)], both[len(a) :]


def against_all(
    picture: Pictures,
    references: Pictures,
    variant: Variant = "masked",
    *,
    keep: int | None = KEEP,
    always: Tensor | None = None,
    among: Tensor | None = None,
    block: int = 8,
) -> tuple[Tensor, Tensor]:
    """Foreground and background similarity of one picture to each reference, ``[references]`` each.

    Exact for the best match and for the references ``always``; NaN for references that were ruled out, and
    for those that aren't ``among`` the candidates (both bool ``[references]``). Two steps rule out. First
    the ``keep`` references nearest by :func:`distances` are kept (None: all; the calibration states the
    recall of this step). Of them, a similarity is a product of factors of at most 1, so that its coarse
    scales bound it: references are compared at full size in order of their bound, ``block`` at a time,
    until the best mean of both similarities is no less than every bound left. Nothing is lost by this
    second step.
    """
    found = torch.full((2, len(references)), torch.nan, device=picture.pixels.device)
    must = torch.zeros(len(references), dtype=torch.bool) if always is None else always
    allowed = torch.ones_like(must) if among is None else among | must
    kept = _nearest(picture, references, keep, must, allowed)
    if not len(kept):
        return found[0], found[1]
    height, width = picture.pixels.shape[-2:]
    chunk = max(1, CHUNK_PIXELS // (2 * height * width))
    coarse = torch.cat(
        [
            _coarse(*_inputs_of_one(picture, references[part], variant)).view(2, -1)
            for part in kept.split(chunk)
        ],
        dim=1,
    )
    bound = torch.where(must[kept], torch.inf, coarse.mean(dim=0))
    order = torch.argsort(bound, descending=True, stable=True)
    best = -1.0
    for taken in order.split(min(block, chunk)):
        if float(bound[taken[0]]) < best:
            break
        contrast = scale_terms(*_inputs_of_one(picture, references[kept[taken]], variant))[0]
        fine = contrast.relu().view(2, -1) ** betas(height, width)[0] * coarse[:, taken]
        found[:, kept[taken]] = fine
        best = max(best, float(fine.mean(dim=0).max()))
    return found[0], found[1]


def _inputs_of_one(
    picture: Pictures, references: Pictures, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`pair_inputs` of one picture with each reference."""
    return pair_inputs(picture.repeated(len(references)), references, variant)


def against_every(pictures: Pictures, references: Pictures) -> tuple[Tensor, Tensor]:
    """Foreground and background similarity ``as-released`` of all pictures to all references, ``[n, m]``.

    By the all-pairs engine: what is filled depends on one picture only, so its local means and variances are
    made once. (The region of ``masked`` is the pair's, so every pair has its own moments.)
    """
    from lethebench.pairs.msssim import Similarity, View, all_pairs

    similarity = Similarity(betas(*pictures.pixels.shape[-2:]))
    a, b = pictures, references
    front = all_pairs(View(a.pixels, a.masks[:, 0], 0.0), View(b.pixels, b.masks[:, 0], 0.0), similarity)
    back = all_pairs(
        View(a.pixels, 1 - a.masks[:, 0], 1.0), View(b.pixels, 1 - b.masks[:, 0], 1.0), similarity
    )
    apart = comparable(pictures.masks)[:, None] & comparable(references.masks)[None]
    if not apart.all():
        whole = all_pairs(View(a.pixels), View(b.pixels), similarity)
        front, back = torch.where(apart, front, whole), torch.where(apart, back, whole)
    return front, back


def _nearest(
    picture: Pictures, references: Pictures, keep: int | None, must: Tensor, allowed: Tensor
) -> Tensor:
    """The numbers of the references that are compared: the ``keep`` nearest, and those that ``must`` be."""
    if keep is None or keep >= int(allowed.sum()):
        return torch.nonzero(allowed)[:, 0]
    chosen = must.clone()
    for distance in distances(picture, references):
        order = torch.argsort(torch.where(allowed, distance, torch.inf), stable=True)
        chosen[order[: keep // 2]] = True
    return torch.nonzero(chosen)[:, 0]


def distances(picture: Pictures, references: Pictures) -> tuple[Tensor, Tensor]:
    """Mean squared difference of one picture to each reference, over foreground and over background.

    On pictures of :data:`SMALL` pixels a side, with the union of the foregrounds as region: cheap, and not
    part of any score.
    """
    region = torch.maximum(picture.small_masks, references.small_masks)
    squared = (picture.small_pixels - references.small_pixels).square().mean(dim=1, keepdim=True)
    inside, outside = (
        (squared * r).sum(dim=(1, 2, 3)) / r.sum(dim=(1, 2, 3)).clamp(min=1e-6) for r in (region, 1 - region)
    )
    return inside, outside


def best_match(foreground: Tensor, background: Tensor) -> int:
    """The reference with the highest mean of both similarities (the first of equals)."""
    return int(torch.nan_to_num((foreground + background) / 2, nan=-1.0).argmax())
