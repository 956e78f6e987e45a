"""SSIM and multi-scale SSIM between all generated and all reference pictures. Torch, on the pictures' device.

Sources: Wang et al. (2004) for SSIM, Wang, Simoncelli and Bovik (2003) for its scales; windows, borders and
constants are those of torchmetrics' ``MultiScaleStructuralSimilarityIndexMeasure(data_range=1)``: an 11-pixel
Gaussian of sigma 1.5, c1 = 0.01^2, c2 = 0.03^2; contrast over the windows that lie inside the picture; at the
last scale windows at the border too, where the picture is mirrored; 2x2 means between scales. With local
means m, variances v and covariance cov,

    contrast = (2 cov + c2) / (v_x + v_y + c2)      luminance = (2 m_x m_y + c1) / (m_x^2 + m_y^2 + c1)
    MS-SSIM  = prod_s relu(mean contrast_s)^beta_s * relu(mean(contrast * luminance)_last)^beta_last

**Cost.** m and v belong to one picture: they are made once for each scale (:func:`moments`), and a pair costs
one blur, of x y, and seven passes over the picture. Torchmetrics blurs five pictures a pair with an 11 x 11
window. Here the blur is separable, and each direction a product with a band matrix in tiles of 16 windows (26
pixels). A blur of 3 x 256 x 256 so took 0.29 ms on one core with AVX-512; shifted sums 0.38, depthwise 1-d
convolutions 0.41 to 1.0, products with the whole band 1.8.

**Precision.** cov and v don't change when a constant is taken from a picture, so each channel is centred on
its mean first: E[xy] - m_x m_y would otherwise lose the digits that c2 = 0.0009 needs on bright flat areas.
Largest errors seen against the same formulas in float64: 1e-6 on whole pictures, flat ones included; 6e-5 on
pictures of two flat halves with a flat fill. Torchmetrics in float32 is itself off by up to 1.5e-3 on bright
flat areas (the released fill of 1 makes them), so that there the two differ by its error, not by this one.
Where the mean of a scale is within rounding of 0 (unrelated pictures), its small power is ill-conditioned:
there no float32 result is sure to 1e-4, and relu may fall on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

REACH, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2
MEMORY = 2**30
"""Bytes that a call may use beside its inputs and its result, by default."""
_TILE = 16
_BLOCK = {"cpu": 2**18}
"""Numbers in one operation: few enough for a CPU's cache, many on other devices."""
_OTHER_BLOCK = 2**22
_WORKING = 16
"""Arrays of a block's size that live at one time while moments are made, or pairs compared, at most."""

Pixels = NDArray[Any] | Tensor


@dataclass(frozen=True)
class Similarity:
    """SSIM at ``len(betas)`` scales. ``normalize`` as in torchmetrics: ``"relu"``, or None for plain SSIM.

    Several scales need ``"relu"``: a power of a negative mean isn't a number.
    """

    betas: tuple[float, ...]
    normalize: Literal["relu"] | None = "relu"

    def __post_init__(self) -> None:
        if not self.betas or min(self.betas) <= 0:
            raise ValueError(f"betas must be positive numbers, one a scale; got {self.betas}")
        if self.normalize not in {"relu", None} or (len(self.betas) > 1 and self.normalize is None):
            raise ValueError(f"normalize must be 'relu' (or None with one scale); got {self.normalize!r}")

    @property
    def least_side(self) -> int:
        """The smallest height and width that torchmetrics takes with these scales."""
        scales = len(self.betas)
        return int(max(2**scales, (2 * REACH + 1) * max(1, scales - 1) ** 2))


MS_SSIM = Similarity((0.0448, 0.2856, 0.3001, 0.2363, 0.1333))
"""The published five scales: 176 pixels at least."""
MS_SSIM_3 = Similarity((1 / 3, 1 / 3, 1 / 3))
"""NeMo's three equal scales (``ms-ssim-3``): 44 pixels at least."""
SSIM = Similarity((1.0,), normalize=None)
"""One scale, in -1 to 1: torchmetrics' ``StructuralSimilarityIndexMeasure(data_range=1)``."""


@dataclass(frozen=True)
class View:
    """Pictures as they are compared: whole, or by masks with a flat fill.

    ``images`` uint8 ``[n, height, width, 3]``, or float ``[n, channels, height, width]`` in 0 to 1; numpy or
    torch. ``masks`` ``[n, height, width]`` in 0 to 1: a picture becomes ``x m + fill (1 - m)`` (FB-Mem as
    released: foreground with fill 0; background with the mask's complement and fill 1).

    Raises ValueError for other shapes, types or ranges, and for NaN.
    """

    images: Pixels
    masks: Pixels | None = None
    fill: float = 0.0

    def __post_init__(self) -> None:
        images = self.images
        shape = list(getattr(images, "shape", ()))
        dtype = str(getattr(images, "dtype", type(images).__name__))
        bytes_, floats = "uint8" in dtype and shape[3:] == [3], "float" in dtype
        if len(shape) != 4 or not (bytes_ or floats):
            raise ValueError(
                "images must be uint8 [n, height, width, 3] or float [n, channels, height, width]; "
                f"got {dtype} {shape}"
            )
        if floats:
            _check_range("images", images)
        if not 0 <= self.fill <= 1:
            raise ValueError(f"fill must lie in 0 to 1; got {self.fill}")
        if self.masks is not None:
            height, width = self.shape[2:]
            if list(self.masks.shape) != [len(images), height, width]:
                raise ValueError(
                    f"masks must be [n, height, width] = {[len(images), height, width]}; "
                    f"got {list(self.masks.shape)}"
                )
            _check_range("masks", self.masks)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number, channels, height, width."""
        a, b, c, d = self.images.shape
        return (a, d, b, c) if "uint8" in str(self.images.dtype) else (a, b, c, d)

    @property
    def device(self) -> torch.device:
        """Where the pictures are compared."""
        return self.images.device if isinstance(self.images, Tensor) else torch.device("cpu")

    def pixels(self, at: slice | NDArray[np.intp]) -> Tensor:
        """These pictures as they are compared, float32 ``[k, channels, height, width]``."""
        found = _part(self.images, at)
        x = found.permute(0, 3, 1, 2) / 255 if found.dtype == torch.uint8 else found.float()
        if self.masks is not None:
            mask = _part(self.masks, at).to(x.device, torch.float32)[:, None]
            x = x * mask + self.fill * (1 - mask)
        return x.contiguous()

    def subset(self, at: NDArray[np.intp]) -> View:
        """These pictures only."""
        masks = None if self.masks is None else _part(self.masks, at)
        return View(_part(self.images, at), masks, self.fill)


def _part(of: Pixels, at: slice | NDArray[np.intp]) -> Tensor:
    if isinstance(of, Tensor):
        return of[at if isinstance(at, slice) else torch.from_numpy(at).to(of.device)]
    return torch.from_numpy(np.array(of[at]))


def _check_range(what: str, of: Pixels) -> None:
    for start in range(0, len(of), 64):
        part = of[start : start + 64]
        low, high = float(part.min()), float(part.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{what} must be numbers in 0 to 1; got {low:g} to {high:g}")


# --- windows --------------------------------------------------------------------------------------


class Side(NamedTuple):
    """How the windows along a side are tiled: ``tiles`` times ``tile``, of which ``windows`` are real."""

    tile: int
    tiles: int
    windows: int

    @property
    def padded(self) -> int:
        """Pixels along the side, with those that only windows past the last see."""
        return self.tile * self.tiles + 2 * REACH

    @staticmethod
    def of(pixels: int) -> Side:
        """For a side of so many pixels, the mirrored border included."""
        windows = pixels - 2 * REACH
        tile = windows if windows <= 2 * _TILE else _TILE
        return Side(tile, -(-windows // tile), windows)


@lru_cache(maxsize=64)
def _band(tile: int, device: torch.device) -> Tensor:
    """Row i of ``[tile, tile + 10]`` is the Gaussian window over pixels i to i + 10."""
    gauss = torch.exp(-((torch.arange(-REACH, REACH + 1, dtype=torch.float64) / SIGMA) ** 2) / 2)
    band = torch.zeros(tile, tile + 2 * REACH, dtype=torch.float64)
    for row in range(tile):
        band[row, row : row + len(gauss)] = gauss / gauss.sum()
    return band.float().to(device)


def _blur(x: Tensor, rows: Side, columns: Side) -> Tensor:
    """Gaussian means of ``[..., rows.padded, columns.padded]``, contiguous, over all tiled windows."""
    planes = x.view(-1, rows.padded, columns.padded)
    tall, wide = _band(rows.tile, x.device), _band(columns.tile, x.device).mT
    down = torch.matmul(tall, planes.unfold(1, tall.shape[1], rows.tile).mT).view(-1, columns.padded)
    out = x.new_empty(len(down), columns.tiles, columns.tile)
    across = down.unfold(1, len(wide), columns.tile).movedim(1, 0)
    torch.bmm(across, wide.expand(columns.tiles, -1, -1), out=out.movedim(1, 0))
    return out.view(*x.shape[:-2], rows.tile * rows.tiles, columns.tile * columns.tiles)


def _laid_out(x: Tensor, mirrored: bool) -> tuple[Tensor, Side, Side]:
    """Pictures ``[n, c, h, w]`` with a mirrored border if wanted, padded by zeros to whole tiles."""
    if mirrored:
        x = F.pad(x, (REACH,) * 4, mode="reflect")
    rows, columns = Side.of(x.shape[-2]), Side.of(x.shape[-1])
    return F.pad(x, (0, columns.padded - x.shape[-1], 0, rows.padded - x.shape[-2])), rows, columns


def blur(x: Tensor, mirrored: bool = False) -> Tensor:
    """Gaussian means over windows inside the picture: float32 ``[n, c, h, w]`` to ``[n, c, h - 10, w - 10]``.

    ``mirrored`` keeps the size: windows at the border see the picture mirrored.
    """
    laid, rows, columns = _laid_out(x, mirrored)
    return _blur(laid, rows, columns)[..., : rows.windows, : columns.windows]


# --- one picture ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """What a scale of n pictures brings to each of their pairs, float32 ``[n, c, height, width]``, tiled.

    ``pixels`` and ``means`` are centred on the channel's mean. ``spread`` is v / 2 + c2 / 4, and infinite for
    windows past the last, which so count nothing. ``level`` are the means, not centred, and ``power`` is
    level^2 / 2 + c1 / 4: for the last scale's luminance. ``windows`` are the real ones, over all channels.
    """

    rows: Side
    columns: Side
    pixels: Tensor
    means: Tensor
    spread: Tensor
    level: Tensor | None
    power: Tensor | None

    @property
    def windows(self) -> int:
        """Real windows of a picture, over all channels."""
        return self.means.shape[1] * self.rows.windows * self.columns.windows


def _shapes(size: tuple[int, int, int], scales: int) -> list[tuple[Side, Side]]:
    _, height, width = size
    sides = [(height >> s, width >> s) for s in range(scales)]
    border = [0] * (scales - 1) + [2 * REACH]
    return [(Side.of(h + b), Side.of(w + b)) for (h, w), b in zip(sides, border, strict=True)]


def _numbers(size: tuple[int, int, int], scales: int) -> int:
    """Numbers that the moments of one picture ``(channels, height, width)`` hold."""
    total = 0
    for s, (rows, columns) in enumerate(_shapes(size, scales)):
        tiled = rows.tile * rows.tiles * columns.tile * columns.tiles
        total += rows.padded * columns.padded + (4 if s == scales - 1 else 2) * tiled
    return size[0] * total


def _empty(count: int, size: tuple[int, int, int], scales: int, device: torch.device) -> tuple[Scale, ...]:
    found = []
    for s, (rows, columns) in enumerate(_shapes(size, scales)):
        tiled = (count, size[0], rows.tile * rows.tiles, columns.tile * columns.tiles)
        arrays = [torch.empty(tiled, device=device) for _ in range(4 if s == scales - 1 else 2)]
        pixels = torch.empty(count, size[0], rows.padded, columns.padded, device=device)
        level, power = arrays[2:] or (None, None)
        found.append(Scale(rows, columns, pixels, arrays[0], arrays[1], level, power))
    return tuple(found)


def moments(view: View, at: slice | NDArray[np.intp], scales: int, block: int) -> tuple[Scale, ...]:
    """The scales of these pictures, finest first; at most ``block`` numbers at a time, or one picture."""
    size = view.shape[1:]
    chosen = np.arange(len(view))[at]
    found = _empty(len(chosen), size, scales, view.device)
    step = max(1, block // _picture(size, scales))
    for start in range(0, len(chosen), step):
        to = slice(start, start + step)
        x = view.pixels(chosen[to])
        for scale in found:
            _fill(scale, to, x)
            if scale is not found[-1]:
                x = F.avg_pool2d(x, 2)
    return found


def _fill(scale: Scale, to: slice, x: Tensor) -> None:
    """Write the moments of pictures ``x`` ``[k, c, h, w]`` of this scale."""
    centre = x.mean(dim=(2, 3), keepdim=True)
    laid, rows, columns = _laid_out(x - centre, mirrored=scale.level is not None)
    means = _blur(laid, rows, columns)
    spread = (_blur(laid * laid, rows, columns) - means * means).clamp_(min=0).div_(2).add_(C2 / 4)
    spread[..., rows.windows :, :] = torch.inf
    spread[..., columns.windows :] = torch.inf
    scale.pixels[to], scale.means[to], scale.spread[to] = laid, means, spread
    if scale.level is not None and scale.power is not None:
        level = means + centre
        scale.level[to], scale.power[to] = level, level * level / 2 + C1 / 4


# --- pairs ----------------------------------------------------------------------------------------


def compare(x: Scale, row: int, y: Scale, columns: slice | Tensor) -> Tensor:
    """Mean contrast of one picture with some, ``[k]``; at the last scale mean contrast times luminance."""
    value = _blur(y.pixels[columns] * x.pixels[row], y.rows, y.columns)
    value.addcmul_(y.means[columns], x.means[row], value=-1).add_(C2 / 2)
    value.div_(y.spread[columns] + x.spread[row])
    if x.level is not None and y.level is not None and x.power is not None and y.power is not None:
        value.mul_((y.level[columns] * x.level[row]).add_(C1 / 2)).div_(y.power[columns] + x.power[row])
    return value.sum(dim=(1, 2, 3)) / y.windows


def row_factors(
    x: tuple[Scale, ...],
    row: int,
    y: tuple[Scale, ...],
    at: Tensor | None,
    block: int,
    similarity: Similarity,
    scales: slice = slice(None),
) -> Tensor:
    """The product of some scales' factors for one picture and those ``at`` (None: all), ``[k]``."""
    count = len(y[0].pixels) if at is None else len(at)
    product = torch.ones(count, device=y[0].pixels.device)
    for of_x, of_y, beta in zip(x[scales], y[scales], similarity.betas[scales], strict=True):
        step = max(1, block // of_y.pixels[0].numel())
        parts = chunks(count, step) if at is None else (_run(part) for part in at.split(step))
        means = torch.cat([compare(of_x, row, of_y, part) for part in parts])
        product *= means.relu() ** beta if similarity.normalize == "relu" else means**beta
    return product


def _run(at: Tensor) -> slice | Tensor:
    """One number as a slice, which copies nothing."""
    return slice(int(at[0]), int(at[0]) + 1) if len(at) == 1 else at


@dataclass(frozen=True)
class Plan:
    """How many pictures' moments are held at a time, of either side, and numbers an operation."""

    rows: int
    columns: int
    block: int


def _picture(size: tuple[int, int, int], scales: int) -> int:
    rows, columns = _shapes(size, scales)[0]
    return size[0] * rows.padded * columns.padded


def plan(x: View, y: View, similarity: Similarity, memory: int, views: int = 1) -> Plan:
    """Checks the two sides, and divides ``memory`` bytes between them. Raises ValueError."""
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"both sides must be of one size; got {list(x.shape[1:])} and {list(y.shape[1:])}")
    if x.device != y.device:
        raise ValueError(f"both sides must be on one device; got {x.device} and {y.device}")
    size = x.shape[1:]
    if min(size[1:]) < similarity.least_side:
        raise ValueError(
            f"{len(similarity.betas)} scales need {similarity.least_side} pixels a side; "
            f"got {size[1]} x {size[2]}"
        )
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            "float32 products are set to a lower precision: torch.set_float32_matmul_precision('highest')"
        )
    scales = len(similarity.betas)
    each, picture = 4 * views * _numbers(size, scales), _picture(size, scales)
    block = max(picture, min(_BLOCK.get(x.device.type, _OTHER_BLOCK), memory // (16 * _WORKING)))
    held = (memory - 4 * _WORKING * block) // each
    if held < 2:
        need = 4 * _WORKING * picture + 2 * each
        raise ValueError(f"pictures of {list(size)} need a memory limit of {need} bytes; got {memory}")
    rows = min(len(x), max(1, held * 3 // 4))
    return Plan(rows, min(len(y), held - rows), block)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` that cover ``count``."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + size, count))


@torch.no_grad()
def all_pairs(
    x: View | Pixels, y: View | Pixels, similarity: Similarity = MS_SSIM, *, memory: int = MEMORY
) -> Tensor:
    """The similarity of each of n pictures to each of m, float32 ``[n, m]``.

    ``memory`` bounds the bytes used beside inputs and result; it doesn't change a value. Where the moments of
    all pictures don't fit, those of ``y`` are made again for each part of ``x`` that fits. The allocator's
    own slack comes on top: 5 % of 1 GiB at 500 x 500 pictures of 256 pixels on a CPU.

    Raises ValueError for pictures that aren't of one size or device, are too small for the scales, or don't
    fit into ``memory``.
    """
    x, y = as_view(x), as_view(y)
    parts = plan(x, y, similarity, memory)
    scales = len(similarity.betas)
    found = torch.empty(len(x), len(y), device=x.device)
    for rows in chunks(len(x), parts.rows):
        of_x = moments(x, rows, scales, parts.block)
        for columns in chunks(len(y), parts.columns):
            of_y = moments(y, columns, scales, parts.block)
            for row in range(len(of_x[0].pixels)):
                found[rows.start + row, columns] = row_factors(of_x, row, of_y, None, parts.block, similarity)
            del of_y  # before the next are made
        del of_x
    return found


def as_view(pictures: View | Pixels) -> View:
    """A view of whole pictures, unless it is a view already."""
    return pictures if isinstance(pictures, View) else View(pictures)
