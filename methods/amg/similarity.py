"""How like the predicted clean image is to its nearest reference: the sigma_t of AMG, with its gradient."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lethebench.errors import UserError
from lethebench.sampler import to_latents, to_pixels
from lethebench.store import digest, known_sha256

if TYPE_CHECKING:
    from lethebench.metrics.sscd import Preset
    from lethebench.zoo import Model

DESCRIPTORS = ("copy-mini", "sscd", "latents", "pixels")
PIXELS = 32
"""Side of the images that ``pixels`` compares: CIFAR-10's, on which the paper takes the distance."""
_DECODED = 2**20
"""Pixels decoded at once: 256 images of 64 pixels a side, or one of 1024. With gradients a quarter of it."""


# --- descriptors ----------------------------------------------------------------------------------


class Describer(ABC):
    """Turns images or latents into vectors ``[B, d]``, differentiably, in the type of its input.

    ``cosine`` says whether the vectors are of unit length and compared by dot product (else by distance);
    ``weights`` is the SHA-256 of what was learnt.
    """

    name: str
    weights: str = ""
    cosine: bool = True

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = model.device

    @abstractmethod
    def images(self, images: Tensor) -> Tensor:
        """Vectors of images ``[B, 3, height, width]`` in [-1, 1]."""

    def latents(self, latents: Tensor) -> Tensor:
        """Vectors of clean latents ``[B, channels, height, width]``: of their decoded images."""
        return self.images(to_pixels(self.model, latents))


class CopyMini(Describer):
    """The built-in copy descriptor."""

    name = "copy-mini"

    def __init__(self, model: Model) -> None:
        from lethebench import judges
        from lethebench.judges.base import SUMS, WEIGHTS, shipped_folder

        super().__init__(model)
        self._net = judges.load("copy-mini", device=str(model.device)).net
        sums = shipped_folder("copy-mini") / SUMS
        self.weights = str(json.loads(sums.read_text(encoding="utf-8"))[WEIGHTS])

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors of the images at the judge's 64 pixels a side."""
        from lethebench.judges.nets import SIDE

        found: Tensor = self._net(resized(images, (SIDE, SIDE)))
        return found


class SSCD(Describer):
    """A published TorchScript file, preprocessed on tensors as a preset of the metric ``sscd`` says.

    References and predicted images go through the same steps (the released code gives the network references
    in [0, 1] and predicted images in [-1, 1]).
    """

    def __init__(self, model: Model, path: Path, preset: str) -> None:
        from lethebench.metrics.sscd import PRESETS

        super().__init__(model)
        self._preset: Preset = PRESETS[preset]
        self.name = f"sscd:{preset}"
        self._net = _torchscript(path, model.device)
        self.weights = known_sha256(path)

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors."""
        preset, pixels = self._preset, images / 2 + 0.5
        size = preset.resize
        if isinstance(size, int):
            height, width = images.shape[-2:]
            short = min(height, width)
            size = (height * size // short, width * size // short)
        pixels = resized(pixels, size)
        if preset.crop is not None:
            top, left = (round((side - preset.crop) / 2) for side in pixels.shape[-2:])
            pixels = pixels[..., top : top + preset.crop, left : left + preset.crop]
        if preset.normalize is not None:
            mean, deviation = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in preset.normalize)
            pixels = (pixels - mean) / deviation
        return F.normalize(self._net(pixels), dim=1)


class Latents(Describer):
    """The latents themselves: no decoding, but references are encoded at the model's own size ``size``."""

    name = "latents"
    cosine = False

    def __init__(self, model: Model, size: tuple[int, int] | None) -> None:
        super().__init__(model)
        self._size = size
        sums = model.weights_sha256()
        self.weights = digest({name: value for name, value in sums.items() if name.startswith("vae")})

    def images(self, images: Tensor) -> Tensor:
        """The mean of the encoder's distribution, flattened, in the latents' scale."""
        images = images if self._size is None else resized(images, self._size)
        return to_latents(self.model, images).flatten(1)

    def latents(self, latents: Tensor) -> Tensor:
        """The latents, flattened."""
        return latents.flatten(1)


class Pixels(Describer):
    """The image's pixels at 32 x 32."""

    name = "pixels"
    cosine = False

    def images(self, images: Tensor) -> Tensor:
        """Pixels in [-1, 1], flattened."""
        return resized(images, (PIXELS, PIXELS)).flatten(1)


def make_describer(
    name: str, model: Model, *, sscd: str = "", preset: str = "amg-224", size: tuple[int, int] | None = None
) -> Describer:
    """The descriptor of that name; ``size`` (height, width) is what ``latents`` encodes references at."""
    if name == "copy-mini":
        return CopyMini(model)
    if name == "sscd":
        return SSCD(model, Path(sscd).expanduser(), preset)
    return Latents(model, size) if name == "latents" else Pixels(model)


def _torchscript(path: Path, device: torch.device) -> Any:
    """The file's network. Unlike the metric's it is loaded so that gradients flow through it."""
    if not path.is_file():
        raise UserError(
            f"method 'amg': there is no file {path}: name SSCD's TorchScript file as setting sscd"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"method 'amg': {path} is no TorchScript file: {first}") from error
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at (height, width), bilinear with antialiasing; as they are where they are of that size."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


# --- the autoencoder ------------------------------------------------------------------------------


# --- similarity -----------------------------------------------------------------------------------


def cosine(vectors: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """The highest dot product with a reference (paper, Eq. 9), and whose it is.

    ``[B, d]`` and ``[n, d]``, of unit length, to ``[B]`` in [-1, 1] and ``[B]``.
    """
    best = (vectors @ references.T).max(dim=1)
    return best.values, best.indices


def normalised_distance(
    vectors: Tensor, references: Tensor, alpha: float = 0.5, neighbours: int = 50
) -> tuple[Tensor, Tensor]:
    """Minus nL2 (paper, Eq. 8): -d_1 / (alpha * mean of d_1 ... d_k), and the nearest reference.

    d_i are the L2 distances to the k nearest references, the nearest included; k is ``neighbours``, or all
    there are. ``[B, d]`` and ``[n, d]`` to ``[B]`` in [-1 / alpha, 0] and ``[B]``.
    """
    distances = torch.cdist(vectors, references, compute_mode="donot_use_mm_for_euclid_dist")
    near = distances.topk(min(neighbours, len(references)), dim=1, largest=False)
    return -near.values[:, 0] / (alpha * near.values.mean(dim=1)), near.indices[:, 0]


@dataclass(frozen=True)
class Similarity:
    """sigma_t of clean latents ``[B, ...]`` as the denoiser takes them; ``unpack`` gives the VAE's layout."""

    describer: Describer
    references: Tensor
    unpack: Callable[[Tensor], Tensor]
    alpha: float = 0.5
    neighbours: int = 50

    def __call__(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, nearest reference), each ``[B]``; differentiable."""
        parts = [self._of(part) for part in clean.split(self._at_once(clean, _DECODED))]
        return torch.cat([sigma for sigma, _ in parts]), torch.cat([nearest for _, nearest in parts])

    def gradient(self, clean: Tensor) -> Tensor:
        """The gradient of each image's sigma with respect to its clean latents, shaped like them."""
        found = []
        for part in clean.split(self._at_once(clean, _DECODED // 4)):
            with torch.enable_grad():
                free = part.detach().requires_grad_()
                found += torch.autograd.grad(self._of(free)[0].sum(), free)
        return torch.cat(found)

    def _of(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.describer.latents(self.unpack(clean))
        references = self.references.to(vectors)
        if self.describer.cosine:
            return cosine(vectors, references)
        return normalised_distance(vectors, references, self.alpha, self.neighbours)

    def _at_once(self, clean: Tensor, pixels: int) -> int:
        height, width = self.unpack(clean[:1]).shape[-2:]
        return max(1, pixels // (height * width * int(self.describer.model.pipe.vae_scale_factor) ** 2))
