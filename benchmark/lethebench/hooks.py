"""The sampler's extension points: where a method that acts while sampling is written against.

A method returns a subclass of :class:`SamplerHooks` from ``apply`` and overrides what it needs.
Hooks of composed methods are called in the order of composition. All tensors are on the model's
device; ``B`` is the number of images in the batch. Everything here is per batch: an image's result
must not depend on which other images share the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.prompts import Prompt


@dataclass(frozen=True)
class ImageKey:
    """Which image: number ``index`` of ``prompt`` in ``suite`` (``name@version``). Fixes its noise."""

    suite: str
    prompt: Prompt
    index: int


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on, for B images.

    ``embeds`` is ``[B, tokens, width]``, the token embeddings; ``pooled`` is ``[B, width]`` or None.
    ``extra`` holds further keyword arguments of the denoiser (``added_cond_kwargs`` of SDXL,
    ``txt_ids`` / ``img_ids`` / ``guidance`` of FLUX). ``negative`` is the unconditional counterpart,
    None where the model samples without classifier-free guidance.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    negative: Conditioning | None = None

    def with_embeds(self, embeds: Tensor) -> Conditioning:
        """The same conditioning with other token embeddings."""
        return replace(self, embeds=embeds)


@dataclass(frozen=True)
class Step:
    """One denoising step as the hooks see it.

    ``latents`` is the input of the step, ``[B, ...]`` as the denoiser takes it (packed for FLUX).
    """

    index: int
    total: int
    timestep: Tensor
    latents: Tensor
    keys: tuple[ImageKey, ...]
    conditioning: Conditioning
    guidance_scale: float


class SamplerHooks:
    """Does nothing: override what the method needs."""

    def texts(self, texts: list[str], keys: tuple[ImageKey, ...]) -> list[str]:
        """Change the prompts' text before it is encoded."""
        return texts

    def conditioning(self, conditioning: Conditioning, keys: tuple[ImageKey, ...]) -> Conditioning:
        """Change the encoded prompt, once, before the first step."""
        return conditioning

    def initial_noise(self, latents: Tensor, keys: tuple[ImageKey, ...]) -> Tensor:
        """Change the initial latents (unit normal, before the scheduler's scaling)."""
        return latents

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        """Change the guided prediction; ``combined`` is what classifier-free guidance gave."""
        return combined

    def step_end(self, latents: Tensor, step: Step) -> Tensor:
        """Change the latents after the scheduler's step."""
        return latents

    def images(self, images: Tensor, keys: tuple[ImageKey, ...]) -> Tensor:
        """Change the decoded images, uint8 ``[B, height, width, 3]``."""
        return images
