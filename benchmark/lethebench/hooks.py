"""The sampler's extension points: where a method that acts while sampling is written against.

A method returns a subclass of :class:`SamplerHooks` from ``apply`` and overrides what it needs. The sampler
calls ``texts``, ``conditioning``, ``initial_noise``, ``start``, then at each step ``guidance`` and
``step_end``, then ``finish`` and ``images``; hooks of composed methods in the order of composition. All
tensors are on the model's device; ``B`` is the number of images in the batch. Everything here is per batch:
an image's result must not depend on which other images share the batch. What a hook remembers from step to
step it begins anew in ``start``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.prompts import Prompt
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


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


class Prediction(NamedTuple):
    """Guided, unconditional (None without guidance) and conditional prediction, float32 ``[B, ...]``."""

    combined: Tensor
    unconditional: Tensor | None
    conditional: Tensor


@dataclass(frozen=True)
class Batch:
    """The batch that is being drawn, as hooks and recorders see it.

    ``texts`` are the prompts as they were encoded, with a method's changes. ``noise`` are the initial
    latents (unit normal, ``[B, ...]`` as the denoiser takes them);
    ``timesteps`` the scheduler's, ``[steps]``. ``predict(latents, timestep, conditioning)`` asks the
    denoiser, with the method under test in place; its latents must be scaled as the scheduler asks, which
    ``scale(latents, timestep)`` does. The first step's latents are ``init_noise_sigma * noise``.
    ``levels(timestep)`` is (a, s) of x_t = a x_0 + s e at a time of the schedule, and
    ``clean(latents, timestep, prediction)`` is the clean image (as latents) that a prediction at ``latents``
    (as the scheduler holds them, not scaled) stands for: of Tweedie's formula for a noise prediction, at any
    timestep of the schedule. ``predict`` and ``clean`` are differentiable; the sampler runs under
    ``torch.no_grad``, so a hook opens ``torch.enable_grad`` where it wants gradients.
    """

    model: Model
    settings: SamplerSettings
    keys: tuple[ImageKey, ...]
    texts: tuple[str, ...]
    conditioning: Conditioning
    noise: Tensor
    timesteps: Tensor
    predict: Callable[[Tensor, Tensor, Conditioning], Prediction]
    scale: Callable[[Tensor, Tensor], Tensor]
    levels: Callable[[Tensor], tuple[float, float]]
    clean: Callable[[Tensor, Tensor, Tensor], Tensor]
    init_noise_sigma: float


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
    batch: Batch


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

    def start(self, batch: Batch) -> Batch:
        """Change noise and conditioning together, when both are known.

        Here a hook may ask the denoiser (``batch.predict``) before the first step. It returns
        ``dataclasses.replace(batch, noise=..., conditioning=...)``; only these two count.
        """
        return batch

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        """Change the guided prediction; ``combined`` is what classifier-free guidance gave."""
        return combined

    def step_end(self, latents: Tensor, step: Step) -> Tensor:
        """Change the latents after the scheduler's step."""
        return latents

    def finish(self, latents: Tensor, batch: Batch) -> Tensor:
        """Change the final latents, ``[B, ...]`` as the denoiser takes them, before they are decoded."""
        return latents

    def images(self, images: Tensor, keys: tuple[ImageKey, ...]) -> Tensor:
        """Change the decoded images, uint8 ``[B, height, width, 3]``."""
        return images


class Recorder:
    """Watches the sampling for a metric, and must not change it (``lethe check`` compares the images).

    The sampler opens :meth:`watch` around the denoising of a batch, calls :meth:`step` after each
    prediction, and after the context closed asks :meth:`take` for what was seen of each image.
    """

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        """Put in place what is needed to see more than the predictions (module hooks, say)."""
        yield

    def step(self, step: Step, predicted: Prediction) -> None:
        """See the denoiser's own predictions of a step, before any hook changed them."""

    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        """What was recorded, by name, each ``[B, ...]``; forgets it. May ask ``batch.predict``."""
        return {}
