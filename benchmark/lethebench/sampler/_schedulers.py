"""Schedulers: always a fresh one, made from the pipeline's own configuration."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.seeding import generator

if TYPE_CHECKING:
    from lethebench.sampler._families import Adapter

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
ONE_STEP = frozenset(CLASSES.values())
"""Schedulers whose step depends on the latents and the prediction alone, not on earlier steps."""


def prepared_scheduler(adapter: Adapter) -> Any:
    """A fresh scheduler with its timesteps set, on the CPU. Raises UserError where it doesn't fit.

    Its arrays stay on the CPU whatever the model's device: they are read as scalars, so a step needs
    no synchronisation with the device.
    """
    scheduler = _make(adapter)
    try:
        scheduler.set_timesteps(**adapter.timestep_arguments(scheduler), device="cpu")
    except (TypeError, ValueError) as error:
        steps = adapter.settings.num_inference_steps
        raise UserError(f"{type(scheduler).__name__} can't be set to {steps} steps: {error}") from error
    if adapter.begin_index and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def _make(adapter: Adapter) -> Any:
    own = adapter.pipe.scheduler
    name = adapter.settings.scheduler
    if name == "model":
        return type(own).from_config(own.config)
    if (name == "flow-euler") != adapter.flow:
        fitting = "flow-euler or model" if adapter.flow else "ddim, euler or model"
        raise UserError(
            f"scheduler '{name}' doesn't fit {adapter.model.name} ({adapter.model.family}): use {fitting}"
        )
    import diffusers

    # DDIM clips the predicted image to [-1, 1] unless told otherwise, which would spoil latents.
    defaults = {"clip_sample": False} if name == "ddim" and "clip_sample" not in own.config else {}
    return getattr(diffusers, CLASSES[name]).from_config(own.config, **defaults)


def noise_levels(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """(a, s) of x_t = a x_0 + s e at a time of the schedule: the shares of image and noise.

    a^2 + s^2 = 1 for models that predict noise or velocity, a + s = 1 in flow matching. Euler's latents are
    x_t / a.
    """
    if _is_flow(scheduler) or _is_scaled(scheduler):
        index = int((scheduler.timesteps.to(torch.float64) - float(timestep)).abs().argmin())
        sigma = float(scheduler.sigmas[index])
        if _is_flow(scheduler):
            return 1 - sigma, sigma
        signal = 1 / math.sqrt(sigma**2 + 1)
        return signal, sigma * signal
    product = float(scheduler.alphas_cumprod[int(float(timestep))])
    return math.sqrt(product), math.sqrt(1 - product)


def clean_latents(scheduler: Any, latents: Tensor, timestep: Tensor, prediction: Tensor) -> Tensor:
    """The clean latents that ``prediction`` at ``latents`` (not scaled) stands for.

    (x_t - s e) / a of a noise prediction, a x_t - s v of a velocity (Salimans and Ho 2022), x_t - s v in flow
    matching, with (a, s) of :func:`noise_levels`. Raises UserError for other kinds of prediction.
    """
    signal, noise = noise_levels(scheduler, timestep)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if _is_flow(scheduler):
        return latents - noise * prediction
    if _is_scaled(scheduler):
        latents = latents * signal
    if kind == "epsilon":
        return (latents - noise * prediction) / signal
    if kind == "v_prediction":
        return signal * latents - noise * prediction
    if kind == "sample":
        return prediction
    raise UserError(
        f"{type(scheduler).__name__} predicts '{kind}': Lethe knows epsilon, v_prediction and sample"
    )


def _is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__


def _is_scaled(scheduler: Any) -> bool:
    """Whether the scheduler holds x_t / a (Euler and its kin)."""
    return hasattr(scheduler, "sigmas") and float(scheduler.init_noise_sigma) != 1.0


def require_one_step(scheduler: Any) -> None:
    """Raise UserError for a scheduler that remembers earlier steps or draws noise."""
    name = type(scheduler).__name__
    if name not in ONE_STEP or scheduler.config.get("stochastic_sampling"):
        raise UserError(
            f"{name} can't be differentiated step by step: its step is no function of the latents alone; "
            f"set the sampler's scheduler to {', '.join(CLASSES)}"
        )


def at_step(scheduler: Any, index: int) -> Any:
    """A prepared one-step scheduler that stands at step ``index``; the original is left as it was."""
    found = copy.copy(scheduler)
    if hasattr(found, "set_begin_index"):
        found.set_begin_index(index)
    return found


def step_arguments(scheduler: Any, keys: Sequence[ImageKey]) -> dict[str, Any]:
    """Extra arguments of the scheduler's ``step``: one generator an image, where it may draw noise.

    So noise drawn while sampling, like the initial noise, depends on the image's key alone.
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": [generator("step", k.suite, k.prompt.id, k.index) for k in keys]}
