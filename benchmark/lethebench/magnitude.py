"""The text-conditional magnitude of the first denoising step, and its descent image by image.

The magnitude of an image is the l2 norm of conditional minus unconditional prediction over its latent, as
``Samples.noise_norm`` has it (Wen et al. 2024 for a model that predicts noise; otherwise of the raw
prediction: of velocities, the difference of the noise that they stand for is close to zero at the first step,
in flow matching exactly). It grows with the size of the latent and differs from model to model, so that
methods count it in medians of neutral prompts on the model at hand (:func:`calibrated`, :func:`limit`).

- :class:`FirstStep` asks the denoiser; :func:`magnitudes` is the norm, :func:`unit_vectors` the direction;
- :func:`descend` moves each image's own variable down its own loss until its own value is low enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.hooks import Batch, ImageKey
from lethebench.method import Artefact
from lethebench.prompts import Prompt, Role
from lethebench.sampler import prepare, rows_of, unconditional
from lethebench.unlearning import chosen_prompts

if TYPE_CHECKING:
    from lethebench.method import Task

UNITS = ("neutral", "absolute")
"""What a target counts in: medians of neutral prompts (ours), or the value itself (the papers)."""


class FirstStep:
    """The first denoising step of a batch, asked for any noise and token embeddings.

    Where the sampler has no guidance, the empty prompt's prediction is asked for all the same.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch, self.time = batch, batch.timesteps[0]
        self.empty = unconditional(batch)
        self.conditioning = replace(batch.conditioning, negative=self.empty)

    def difference(
        self, noise: Tensor | None = None, rows: Sequence[int] | None = None, embeds: Tensor | None = None
    ) -> Tensor:
        """Conditional minus unconditional prediction of images ``rows`` (none: all), ``[R, ...]``.

        ``noise`` (unit normal, ``[R, ...]``) and ``embeds`` (``[R, tokens, width]``) take the place of the
        batch's own. Differentiable in both.
        """
        index = list(range(len(self.batch.keys)) if rows is None else rows)
        conditioning = rows_of(self.conditioning, index)
        if embeds is not None:
            conditioning = conditioning.with_embeds(embeds)
        noise = self.batch.noise[index] if noise is None else noise
        latents = self.batch.scale(noise * self.batch.init_noise_sigma, self.time)
        predicted = self.batch.predict(latents, self.time, conditioning)
        if predicted.unconditional is None:
            raise ValueError("the prediction has no unconditional half")
        return predicted.conditional - predicted.unconditional


def magnitudes(difference: Tensor) -> Tensor:
    """The l2 norm of each image's ``[B, ...]``: ``[B]``."""
    found: Tensor = difference.flatten(1).norm(dim=1)
    return found


def unit_vectors(difference: Tensor) -> Tensor:
    """Each image's ``[B, ...]`` brought to norm 1; 0 where it is 0."""
    size = magnitudes(difference)
    kept = size.clamp(min=torch.finfo(size.dtype).tiny)
    return difference / kept.reshape(-1, *[1] * (difference.ndim - 1))


# --- descent --------------------------------------------------------------------------------------

Ask = Callable[[Sequence[int], Tensor], tuple[Tensor, Tensor]]
"""Of images ``rows`` and their variables ``[R, ...]``: what is to reach the limit, and the loss, ``[R]``."""


def descend(
    variable: Tensor,
    ask: Ask,
    limit: float,
    iterations: int,
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Tensor:
    """Each image's variable ``[B, ...]`` after at most ``iterations`` optimiser steps down its own loss.

    An image stops as soon as its value is at or below ``limit``, before a step is taken; from then on nothing
    of it moves, weight decay included. One that is there already comes back bit for bit. Every image has a
    parameter of its own (in float32, or float64 where the variable is), so the others of the batch have no
    part in its path. Only those still moving are asked for.
    """
    wide = variable if variable.dtype == torch.float64 else variable.float()
    own = [one.clone() for one in wide]
    steps = optimiser(own)
    moving = _above(ask, list(range(len(own))), wide, limit) if iterations else []
    for _ in range(iterations):
        if not moving:
            break
        with torch.enable_grad():
            stacked = torch.stack([own[i] for i in moving]).requires_grad_()
            values, losses = ask(moving, stacked)
            (gradient,) = torch.autograd.grad(losses.sum(), stacked)
        steps.zero_grad()
        high = (values.detach() > limit).tolist()
        for i, still, part in zip(moving, high, gradient, strict=True):
            own[i].grad = part if still else None
        steps.step()  # passes over parameters without a gradient
        moving = [i for i, still in zip(moving, high, strict=True) if still]
    return torch.stack(own).to(variable.dtype)


def _above(ask: Ask, rows: list[int], variable: Tensor, limit: float) -> list[int]:
    with torch.no_grad():
        values, _ = ask(rows, variable)
    return [i for i, value in zip(rows, values.tolist(), strict=True) if value > limit]


# --- calibration ----------------------------------------------------------------------------------


def neutral_steps(task: Task, count: int, batch_size: int) -> Iterator[FirstStep]:
    """The first step of ``count`` neutral prompts (at most) and noise of their own, one for all methods.

    Raises UserError where the prompt set has none.
    """
    draws = task.shared_generator("magnitude")
    texts = chosen_prompts(task.neutral_prompts(), count, draws)
    suite = f"neutral-{int(torch.randint(2**62, (1,), generator=draws))}"
    prompts = [Prompt(str(i), text, Role.NEUTRAL, cluster="") for i, text in enumerate(texts)]
    keys = [ImageKey(suite, prompt, 0) for prompt in prompts]
    for start in range(0, len(keys), batch_size):
        yield FirstStep(prepare(task.model, keys[start : start + batch_size], task.sampler))


def calibrated(task: Task, count: int, batch_size: int, measure: Callable[[FirstStep], Tensor]) -> Artefact:
    """What ``measure`` gives (``[B]``) for neutral prompts on the task's model, rising.

    Facts: how many prompts, and the 5 %, 50 % and 95 % quantiles.
    """
    with torch.no_grad():
        values = [measure(step).float().cpu() for step in neutral_steps(task, count, batch_size)]
    found = torch.cat(values).sort().values
    low, median, high = (float(found.quantile(q)) for q in (0.05, 0.5, 0.95))
    facts = {
        "neutral_prompts": len(found),
        "neutral_low": low,
        "neutral_median": median,
        "neutral_high": high,
    }
    return Artefact({"neutral": found}, facts)


def limit(target: float, unit: str, artefact: Artefact) -> float:
    """The value that ``target`` stands for: as it is, or times the median of what was calibrated."""
    return target if unit == "absolute" else target * float(artefact.tensors["neutral"].quantile(0.5))


def require_settings(method: Any) -> None:
    """Raise ValueError where one of the settings that ``wen``, ``sail`` and ``han`` share means nothing."""
    if method.unit not in UNITS:
        raise ValueError(f"unit is {' or '.join(UNITS)}, not '{method.unit}'")
    if method.lr <= 0:
        raise ValueError(f"lr must be above 0, not {method.lr}")
    least = {"target": 0, "iterations": 0, "weight_decay": 0, "neutral_prompts": 1, "batch_size": 1}
    for name, value in least.items():
        if getattr(method, name, value) < value:
            raise ValueError(f"{name} must be at least {value}, not {getattr(method, name)}")
