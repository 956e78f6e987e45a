"""Schedulers: always a fresh one, made from the pipeline's own configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
