"""The denoising loop: every image of every model family and method is drawn here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethebench.hooks import Batch, Conditioning, ImageKey, Prediction, Recorder, SamplerHooks, Step
from lethebench.sampler._families import Adapter, adapter_for, join
from lethebench.sampler._pixels import decode
from lethebench.sampler._schedulers import (
    at_step,
    clean_latents,
    noise_levels,
    prepared_scheduler,
    step_arguments,
)
from lethebench.seeding import generator

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Samples:
    """Images and what is known of how they came about, in the order of the keys.

    ``images``: uint8 ``[n, height, width, 3]``. ``latents``: float32 ``[n, channels, height, width]``,
    the final latents in the VAE's layout, before its scaling factor is undone. ``noise_norm``: float32
    ``[n, steps]``, the l2 norm of conditional minus unconditional prediction at each step (the
    magnitude of Wen et al. 2024 for a model that predicts epsilon); NaN without classifier-free guidance.
    ``recorded``: what recorders saw of each image, by name, ``[n, ...]``.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    noise_norm: NDArray[np.float32]
    recorded: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def sample(
    model: Model,
    keys: Sequence[ImageKey],
    settings: SamplerSettings,
    hooks: Sequence[SamplerHooks] = (),
    *,
    recorders: Sequence[Recorder] = (),
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Samples:
    """Draw the images of ``keys``, ``batch_size`` at a time; hooks are called in their order.

    ``advance`` is told the number of images that each batch finished. Runs without gradients, under
    ``torch.no_grad`` (inference mode was no faster), so that a hook may open ``torch.enable_grad``.
    ``recorders`` watch; what they take is in the samples.
    Neither the global random state nor the pipeline's scheduler is touched. Raises UserError for
    settings that don't fit the model, ValueError without keys.
    """
    if not keys or batch_size < 1:
        raise ValueError(f"nothing to draw: {len(keys)} keys in batches of {batch_size}")
    adapter = adapter_for(model, settings)
    batches = []
    for start in range(0, len(keys), batch_size):
        batch = tuple(keys[start : start + batch_size])
        with torch.no_grad():
            batches.append(_draw(adapter, batch, tuple(hooks), tuple(recorders)))
        if advance is not None:
            advance(len(batch))
    images, latents, norms, seen = zip(*batches, strict=True)
    if len({frozenset(part) for part in seen}) > 1:
        raise ValueError("a recorder took other names in another batch")
    recorded = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}
    return Samples(np.concatenate(images), np.concatenate(latents), np.concatenate(norms), recorded)


def initial_latents(model: Model, keys: Sequence[ImageKey], settings: SamplerSettings) -> Tensor:
    """Unit normal latents of ``keys``, float32 on the CPU, as the denoiser takes them.

    ``[n, channels, height, width]``; for FLUX packed, ``[n, tokens, 4 * channels]``. Each image's
    are drawn from its key alone: batch, order, device, type, method and setting don't matter.
    """
    return _noise(adapter_for(model, settings), keys)


def prepare(model: Model, keys: Sequence[ImageKey], settings: SamplerSettings) -> Batch:
    """The batch of ``keys`` as a hook's ``start`` sees it before the first step, without any hook."""
    with torch.no_grad():
        return _prepared(adapter_for(model, settings), tuple(keys), ())


def unconditional(batch: Batch) -> Conditioning:
    """What stands for no prompt in a batch (the empty prompt; zeros for SDXL), with or without guidance."""
    if batch.conditioning.negative is not None:
        return batch.conditioning.negative
    return adapter_for(batch.model, batch.settings).unconditional(len(batch.keys))


def guided_prediction(
    adapter: Adapter, latents: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Prediction:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale * (conditional - unconditional).

    ``latents`` are scaled as the scheduler asks. Both predictions come from one batch of 2B, the
    unconditional half first, unless a hook changed the number of tokens of one of them.
    """
    negative = conditioning.negative
    if negative is None:
        conditional = adapter.predict(latents, timestep, conditioning)
        return Prediction(conditional, None, conditional)
    if negative.embeds.shape == conditioning.embeds.shape:
        both = adapter.predict(torch.cat([latents, latents]), timestep, join(negative, conditioning))
        unconditional, conditional = both.chunk(2)
    else:
        unconditional = adapter.predict(latents, timestep, negative)
        conditional = adapter.predict(latents, timestep, conditioning)
    combined = unconditional + adapter.settings.guidance_scale * (conditional - unconditional)
    return Prediction(combined, unconditional, conditional)


def _noise(adapter: Adapter, keys: Sequence[ImageKey]) -> Tensor:
    shape = adapter.latent_shape
    drawn = [torch.randn(shape, generator=generator("noise", k.suite, k.prompt.id, k.index)) for k in keys]
    return adapter.pack(torch.stack(drawn))


def _draw(
    adapter: Adapter,
    keys: tuple[ImageKey, ...],
    hooks: tuple[SamplerHooks, ...],
    recorders: tuple[Recorder, ...],
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """One batch: images, latents and norms as numpy arrays, and what was recorded."""
    batch = _prepared(adapter, keys, hooks)
    for hook in hooks:
        changed = hook.start(batch)
        batch = replace(batch, noise=changed.noise, conditioning=changed.conditioning)
    latents, norms, seen = _denoise(adapter, batch, hooks, recorders)
    latents = adapter.unpack(latents)
    images = decode(adapter.model, latents)
    for hook in hooks:
        images = hook.images(images, keys)
    recorded = {name: value.cpu().numpy() for name, value in seen.items()}
    return images.cpu().numpy(), latents.cpu().numpy(), norms.cpu().numpy(), recorded


def _prepared(adapter: Adapter, keys: tuple[ImageKey, ...], hooks: tuple[SamplerHooks, ...]) -> Batch:
    """The batch as hooks see it before the first step."""
    texts, conditioning = _conditioning(adapter, keys, hooks)
    noise = _noise(adapter, keys).to(adapter.model.device)
    for hook in hooks:
        noise = hook.initial_noise(noise, keys)
    scheduler = prepared_scheduler(adapter)
    return Batch(
        adapter.model,
        adapter.settings,
        keys,
        texts,
        conditioning,
        noise,
        scheduler.timesteps.to(noise.device),
        partial(guided_prediction, adapter),
        partial(_scaled_at, scheduler),
        partial(noise_levels, scheduler),
        partial(clean_latents, scheduler),
        float(getattr(scheduler, "init_noise_sigma", 1.0)),
    )


def _conditioning(
    adapter: Adapter, keys: tuple[ImageKey, ...], hooks: tuple[SamplerHooks, ...]
) -> tuple[tuple[str, ...], Conditioning]:
    texts = [k.prompt.text for k in keys]
    for hook in hooks:
        texts = hook.texts(texts, keys)
    conditioning = adapter.encode(texts)
    for hook in hooks:
        conditioning = hook.conditioning(conditioning, keys)
    return tuple(texts), conditioning


def _denoise(
    adapter: Adapter, batch: Batch, hooks: tuple[SamplerHooks, ...], recorders: tuple[Recorder, ...]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """From unit normal latents to final ones, both ``[B, ...]`` float32; norms ``[B, steps]``; records."""
    keys, conditioning, timesteps = batch.keys, batch.conditioning, batch.timesteps
    scheduler = prepared_scheduler(adapter)
    arguments = step_arguments(scheduler, keys)
    total = len(timesteps)
    norms = batch.noise.new_full((len(keys), total), torch.nan)
    latents = batch.noise * batch.init_noise_sigma
    with ExitStack() as watching:
        for recorder in recorders:
            watching.enter_context(recorder.watch(batch))
        for index, time in enumerate(scheduler.timesteps):
            scaled = _scaled(scheduler, latents, time)
            step = Step(
                index,
                total,
                timesteps[index],
                latents,
                keys,
                conditioning,
                adapter.settings.guidance_scale,
                batch,
            )
            predicted = guided_prediction(adapter, scaled, timesteps[index], conditioning)
            combined, unconditional, conditional = predicted
            if unconditional is not None:
                norms[:, index] = (conditional - unconditional).flatten(1).norm(dim=1)
            for recorder in recorders:
                recorder.step(step, predicted)
            for hook in hooks:
                combined = hook.guidance(combined, unconditional, conditional, step)
            latents = scheduler.step(combined, time, latents, **arguments, return_dict=False)[0]
            for hook in hooks:
                latents = hook.step_end(latents, step)
    for hook in hooks:
        latents = hook.finish(latents, batch)
    seen: dict[str, Tensor] = {}
    for recorder in recorders:
        taken = recorder.take(batch)
        for name, value in taken.items():
            if len(value) != len(keys):
                raise ValueError(f"recorded '{name}' has {len(value)} values for {len(keys)} images")
        twice = sorted(seen.keys() & taken.keys())
        if twice:
            raise ValueError(f"two recorders record '{twice[0]}': give one of them another name")
        seen |= taken
    return latents, norms, seen


def _scaled(scheduler: Any, latents: Tensor, time: Tensor) -> Tensor:
    """The latents as the scheduler wants the denoiser to see them."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    found: Tensor = scheduler.scale_model_input(latents, time)
    return found


def _scaled_at(scheduler: Any, latents: Tensor, time: Tensor) -> Tensor:
    """The same at any time of a prepared scheduler's schedule; the scheduler is left as it was."""
    index = int((scheduler.timesteps.to(torch.float64) - float(time)).abs().argmin())
    return _scaled(at_step(scheduler, index), latents, time)
