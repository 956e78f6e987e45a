"""Gradients through a whole denoising chain, in memory that doesn't grow with its length.

EcoDiff's "time step gradient checkpointing" (``scripts/train.py``): run the chain without a graph and
keep the latents of every step; then, from the last step to the first, run one step again with a graph and
carry the gradient of the latents through it. Unlike EcoDiff's, the second run of a step sees the same gate
noise as the first, so that the gradients are those of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Steps(Protocol):
    """A denoising chain: ``step`` is a pure, differentiable function of the latents."""

    @property
    def steps(self) -> int:
        """How many steps the chain has."""
        ...

    def step(self, index: int, latents: Tensor) -> Tensor:
        """The latents after step ``index``."""
        ...


Gates = Callable[[int], AbstractContextManager[None]]
"""Installs the gates of a step, the same ones whenever it is called for that step."""


def backward_through_chain(
    chain: Steps, start: Tensor, gates: Gates, loss: Callable[[Tensor], Tensor], *, recompute: bool = True
) -> Tensor:
    """Add the gradients of ``loss(final latents)`` to every leaf that the gates depend on.

    Returns the loss, detached. With ``recompute`` only one step's graph is alive at a time, for the price of
    one more forward pass of all steps but the last; without it the graph of the whole chain is kept.
    """
    if not recompute:
        return _backward_at_once(chain, start, gates, loss)
    inputs = _inputs_of_steps(chain, start, gates)
    carried: Tensor | None = None
    value = torch.zeros(())
    for index in reversed(range(chain.steps)):
        latents = inputs[index].requires_grad_(index > 0)
        with torch.enable_grad(), gates(index):
            out = chain.step(index, latents)
            if carried is None:
                objective = loss(out)
                value = objective.detach()
                objective.backward()  # type: ignore[no-untyped-call]
            else:
                torch.autograd.backward(out, carried)
        carried = latents.grad
        inputs.pop()
    return value


def _inputs_of_steps(chain: Steps, start: Tensor, gates: Gates) -> list[Tensor]:
    """The latents that each step takes, ``steps`` tensors shaped like ``start``, without a graph."""
    inputs = [start.detach().clone()]
    with torch.no_grad():
        for index in range(chain.steps - 1):
            with gates(index):
                inputs.append(chain.step(index, inputs[-1]).detach())
    return inputs


def _backward_at_once(chain: Steps, start: Tensor, gates: Gates, loss: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        latents = start.detach()
        for index in range(chain.steps):
            with gates(index):
                latents = chain.step(index, latents)
        objective = loss(latents)
        objective.backward()  # type: ignore[no-untyped-call]
    return objective.detach()
