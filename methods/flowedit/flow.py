"""FlowEdit's path from one image to another, on any velocity field (Kulikov et al. 2025, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Field = Callable[[Tensor, int], Tensor]
"""dx/ds at latents ``[B, ...]`` and the index of a noise level."""


def flow_edit(
    latents: Tensor,
    levels: Sequence[float],
    source: Field,
    target: Field,
    noise: Callable[[], Tensor],
    *,
    n_max: int,
    n_min: int = 0,
    n_avg: int = 1,
) -> Tensor:
    """The edited latents of ``latents``, ``[B, ...]``.

    ``levels`` ``[steps + 1]`` falls from 1 (noise) to 0 (image). Of its steps the first are passed over until
    ``n_max`` are left; those before the last ``n_min`` move the image by the difference of the two fields,
    taken at the noised source and at the same point moved by the edit so far, a mean over ``n_avg`` draws of
    ``noise``; the last ``n_min`` are ordinary sampling along ``target`` from the edit, noised.

    The moved point is written so that it is the source's, bit for bit, as long as nothing was edited.
    """
    steps = len(levels) - 1
    edit = latents
    for index in range(steps - n_max, steps - n_min):
        difference = torch.zeros_like(latents)
        for _ in range(n_avg):
            noised = _noised(latents, noise(), levels[index])
            moved = noised + (edit - latents)
            difference += (target(moved, index) - source(noised, index)) / n_avg
        edit = edit + (levels[index + 1] - levels[index]) * difference
    if n_min == 0:
        return edit
    drawn = _noised(latents, noise(), levels[steps - n_min]) + (edit - latents)
    for index in range(steps - n_min, steps):
        drawn = drawn + (levels[index + 1] - levels[index]) * target(drawn, index)
    return drawn


def _noised(latents: Tensor, noise: Tensor, level: float) -> Tensor:
    return (1 - level) * latents + level * noise
