"""The gradient loop of the methods that fine-tune parts of a model: CA, ESD, EAP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lethebench.errors import RunError
from lethebench.progress import progress
from lethebench.unlearning.neutral import autocast

CURVE_POINTS = 20
"""Points of the loss curve, at most."""

Loss = Callable[[int], Mapping[str, Tensor]]
"""The terms of a step's loss by name, scalars with their weights; their sum is minimised."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW at a constant learning rate, with its gradient's norm over all parameters cut to ``clip``.

    The defaults are diffusers' training scripts', which the released code of CA keeps. Without
    ``weight_decay`` it is Adam; ``clip`` 0 doesn't clip. ``accumulate`` gradients are averaged before a step.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip: float = 1.0
    accumulate: int = 1


def finetune(
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    steps: int,
    optimiser: Optimiser,
    *,
    title: str,
    moving: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, float]]:
    """Take ``steps`` optimiser steps on the parameters in place, and return the loss curve.

    ``loss(i)`` gives the terms of micro-batch ``i``, numbered from 0 (``steps * accumulate`` in all); it runs
    under autocast to ``dtype`` where that is smaller than float32 (the parameters stay float32).
    ``moving`` names entries that alone may change: a boolean tensor that broadcasts to the parameter of its
    name (others' gradients count as 0 before clipping, and weight decay leaves them alone).
    A point of the curve is ``{"step", <term>...}``: the terms' means over the steps since the point before.
    Raises RunError where the loss is not finite, ValueError without a parameter.
    """
    if not parameters:
        raise ValueError(f"{title}: no parameter to fine-tune")
    trained = list(parameters.values())
    held = {
        name: (parameters[name], mask, parameters[name].detach().clone())
        for name, mask in (moving or {}).items()
    }
    adam = torch.optim.AdamW(
        trained,
        lr=optimiser.lr,
        betas=optimiser.betas,
        eps=optimiser.eps,
        weight_decay=optimiser.weight_decay,
    )
    device, every = trained[0].device, max(1, math.ceil(steps / CURVE_POINTS))
    curve: list[dict[str, float]] = []
    seen: list[dict[str, float]] = []
    with progress(title, total=steps) as bar:
        for step in range(steps):
            adam.zero_grad()
            for part in range(optimiser.accumulate):
                with torch.enable_grad(), autocast(device, dtype):
                    terms = loss(step * optimiser.accumulate + part)
                    total = torch.stack(list(terms.values())).sum()
                seen.append(_checked(terms, title, step))
                (total / optimiser.accumulate).backward()  # type: ignore[no-untyped-call]
            for parameter, mask, _ in held.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)
            if optimiser.clip:
                torch.nn.utils.clip_grad_norm_(trained, optimiser.clip)
            adam.step()
            with torch.no_grad():
                for parameter, mask, base in held.values():
                    parameter.copy_(torch.where(mask, parameter, base))
            if (step + 1) % every == 0 or step == steps - 1:
                curve.append({"step": step, **_mean(seen)})
                seen.clear()
            bar.advance(note=f"loss {float(total.detach()):.4f}")
    return curve


def _checked(terms: Mapping[str, Tensor], title: str, step: int) -> dict[str, float]:
    values = {name: float(term.detach()) for name, term in terms.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunError(f"{title}: the {name} is {value} at step {step}: lower the learning rate (lr)")
    return values


def _mean(points: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(p[name] for p in points) / len(points) for name in points[0]}
