"""RF-Inversion's two controlled paths, on any velocity field (Rout et al. 2025, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Field = Callable[[Tensor, int], Tensor]
"""dx/ds at latents ``[B, ...]`` and the index of a step."""


def inverted(
    latents: Tensor, noise: Tensor, field: Field, steps: Sequence[tuple[float, float]], gamma: float
) -> Tensor:
    """From the image ``[B, ...]`` towards noise, one (level, size) a step (Algorithm 1, equation 8).

    The velocity is gamma of the straight one to ``noise`` and 1 - gamma of the field's. With gamma 1, and
    each level the sum of the sizes before it, up to 1, the end is ``noise``.
    """
    for index, (level, size) in enumerate(steps):
        straight = (noise - latents) / (1 - level)
        velocity = field(latents, index)
        latents = latents + size * (velocity + gamma * (straight - velocity))
    return latents


def controlled(
    latents: Tensor, image: Tensor, field: Field, levels: Sequence[float], etas: Sequence[float]
) -> Tensor:
    """From noised latents ``[B, ...]`` at ``levels[0]`` down to the last level (Algorithm 2).

    The velocity is eta of the straight one from ``image`` and 1 - eta of the field's; ``etas`` has one for
    each step. With all etas 1 and a last level of 0 the end is ``image``.
    """
    for index, eta in enumerate(etas):
        straight = (latents - image) / levels[index]
        velocity = field(latents, index)
        size = levels[index + 1] - levels[index]
        latents = latents + size * (velocity + eta * (straight - velocity))
    return latents
