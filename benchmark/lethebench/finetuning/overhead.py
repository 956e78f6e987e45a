"""What a method costs a step of a training, and the memory that it holds: beside plain LoRA, by turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lethebench.finetuning.hooks import Captioned, TrainingHooks
from lethebench.finetuning.trainer import Run, prepared, repeated

if TYPE_CHECKING:
    from lethebench.finetuning.settings import LoraSettings
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

TURNS = 3
"""How often the method is measured, at most: once for each 100 steps of the training."""

STEPS = 2
"""Steps a turn of the method and of plain LoRA: so 4 % of the training, or 4 steps where it is short."""

_IN_STEPS = ("captions", "embeddings", "keep", "gradients", "stepped")


class Overhead(NamedTuple):
    """``relative``: a step's time relative to plain LoRA's. ``held_bytes``: of the hooks' tensors."""

    relative: float
    held_bytes: int


def overhead(
    model: Model,
    examples: Sequence[Captioned],
    settings: LoraSettings,
    *,
    sampler: SamplerSettings,
    seed: int | str,
    hooks: Callable[[], TrainingHooks],
) -> Overhead:
    """Measure hooks, made anew, in a few steps from a LoRA's start, by turns with plain LoRA.

    Both train on the same few images, and the fastest step of each counts, so that what else the machine does
    falls out. What recurs only every n steps (``TrainingHooks.every``) counts by its n-th part; what is done
    once, before the first step, does not count. Hooks that do nothing in a step are not measured: 1.0 and 0
    bytes. Activations of a second pass are not among the bytes. The model is left as it was.
    """
    own = hooks()
    if all(getattr(type(own), name) is getattr(TrainingHooks, name) for name in _IN_STEPS):
        return Overhead(1.0, 0)
    chosen = repeated(own.examples(list(examples)))
    few = chosen[:: max(1, len(chosen) // (STEPS * settings.images_a_step))]
    turns = min(TURNS, max(1, settings.steps // 100))
    settings = replace(settings, schedule="constant", warmup=0)  # steps beyond the last are timed, too
    seconds: list[tuple[float, float]] = []
    with prepared(model, settings, sampler, seed) as training:
        plain, method = Run(training, few, TrainingHooks()), Run(training, few, own)
        for turn in range(turns):
            plain.state.step = method.state.step = turn * own.every
            seconds += [(_step(plain), _step(method)) for _ in range(STEPS)]
    usual = min(other for _, other in seconds)
    recurring = min(other for _, other in seconds[::STEPS]) if own.every > 1 else usual
    relative = (usual + (recurring - usual) / own.every) / min(one for one, _ in seconds)
    return Overhead(relative, held_bytes(own))


def _step(run: Run) -> float:
    """Seconds of the run's next step."""
    _wait(run.training.model)
    began = time.perf_counter()
    run.step()
    _wait(run.training.model)
    return time.perf_counter() - began


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def held_bytes(hooks: TrainingHooks) -> int:
    """Bytes of the tensors in the hooks' attributes (and in lists and mappings there), each storage once."""
    storages: dict[int, int] = {}

    def see(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            see(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for one in value:
                see(one)

    see(vars(hooks))
    return sum(storages.values())
