"""Gaussian noise on the prompt embeddings (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import Conditioning, ImageKey, SamplerHooks
from lethebench.method import Artefact, Family, Method, setting
from lethebench.methods._inserted_words import CITATION, LICENCE
from lethebench.registry import METHODS
from lethebench.seeding import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lethebench.zoo import Model


@dataclass(frozen=True)
class EmbeddingNoiseHooks(SamplerHooks):
    """Adds ``scale`` times unit normal noise to what the denoiser sees of the prompt, drawn once an image."""

    scale: float

    def conditioning(self, conditioning: Conditioning, keys: tuple[ImageKey, ...]) -> Conditioning:
        """The noisy conditioning: conditional embeddings first, then the unconditional ones."""
        draws = [generator("embedding-noise", k.suite, k.prompt.id, k.index) for k in keys]
        found = noisy(conditioning, self.scale, draws)
        if conditioning.negative is not None:
            found = replace(found, negative=noisy(conditioning.negative, self.scale, draws))
        return found


def noisy(conditioning: Conditioning, scale: float, draws: Sequence[torch.Generator]) -> Conditioning:
    """The conditioning with ``scale`` times unit normal noise on token and pooled embeddings.

    ``draws`` holds one generator a row; ``negative`` stays as it is.
    """
    embeds, pooled = conditioning.embeds, conditioning.pooled
    embeds = embeds + scale * _normal_like(embeds, draws)
    if pooled is not None:
        pooled = pooled + scale * _normal_like(pooled, draws)
    return replace(conditioning, embeds=embeds, pooled=pooled)


def _normal_like(tensor: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """Unit normal noise like ``tensor`` ``[B, ...]``, each image's from its own generator."""
    import torch

    return torch.stack([torch.randn(tensor.shape[1:], generator=g) for g in draws]).to(tensor)


@METHODS.register
@dataclass(frozen=True)
class EmbeddingNoise(Method):
    """Adds Gaussian noise to the prompt's embeddings, conditional and unconditional.

    "Gaussian noise at inference" of Somepalli et al. 2023 (``--rand_noise_lam`` of ``sd_mitigation.py`` in
    somepago/DCR, which adds it to the concatenation of both, padding included). Pooled embeddings, which
    Stable Diffusion 1.x and 2.x have not, get noise of the same scale (ours). The scale is absolute, as
    theirs: CLIP's last hidden state has a standard deviation of about 1 an element.
    """

    scale: float = setting(0.1, "standard deviation of the noise (released code: 0.1)")

    name = "embedding-noise"
    summary = "Gaussian noise on the prompt's embeddings."
    family = Family.SAMPLING
    strengths: ClassVar = {"weak": {"scale": 0.1}, "medium": {"scale": 1.0}, "strong": {"scale": 2.0}}
    citation = CITATION
    licence = LICENCE
    off: ClassVar = {"scale": 0.0}

    def __post_init__(self) -> None:
        """Refuse a negative scale."""
        if self.scale < 0:
            raise ValueError(f"scale must be 0 or more, not {self.scale}")

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the embeddings, after hooks of earlier methods."""
        yield EmbeddingNoiseHooks(self.scale)
