"""The trainer's extension points: where a training-time method is written against.

In this order: ``examples`` (once, before anything else), ``started`` (once, on the untrained LoRA); then for
each micro-batch ``captions``, ``embeddings``, ``keep``; after the last micro-batch of a step ``gradients``,
and after the optimiser's step ``stepped``; ``finished`` at the end.

``draws`` are generators, one an example, that depend on the seed and on the example's place in the run alone:
what a method draws for an example does not depend on its batch, and does not move order, noise, timesteps or
caption dropout, which are the same for every method at one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lethebench.finetuning.trainer import Training
    from lethebench.hooks import Conditioning


class Captioned(Protocol):
    """What an example must have: its caption, and its image uint8 ``[height, width, 3]``.

    An attribute ``duplicates`` says how often it stands in the set (1 where there is none).
    """

    @property
    def caption(self) -> str: ...  # noqa: D102
    @property
    def image(self) -> NDArray[np.uint8]: ...  # noqa: D102


@dataclass(frozen=True)
class LoraModule:
    """A trained layer: ``scale * B(A(x))`` is added to the output of the frozen ``layer``.

    ``A`` is ``[rank, in]``, ``B`` ``[out, rank]``, both float32 whatever the model's type.
    """

    layer: nn.Linear
    A: nn.Parameter
    B: nn.Parameter
    scale: float


@dataclass(frozen=True)
class LossBatch:
    """A micro-batch after its prediction: B examples, everything without gradients.

    ``latents`` (noised), ``prediction`` and ``target`` are ``[B, ...]`` as the denoiser takes them, float32;
    ``timesteps`` and ``losses`` ``[B]``. ``unconditional()`` is the prediction without prompt (another
    pass, while the hook runs).
    """

    examples: tuple[Captioned, ...]
    captions: tuple[str, ...]
    latents: Tensor
    timesteps: Tensor
    prediction: Tensor
    target: Tensor
    losses: Tensor
    unconditional: Callable[[], Tensor]


class TrainingHooks:
    """Does nothing: override what the method needs.

    ``every`` is the number of steps after which work comes again that the steps between don't do.
    """

    every: int = 1

    def examples(self, examples: Sequence[Captioned]) -> Sequence[Captioned]:
        """The examples to train on: fewer, or some of them twice, which are then seen twice as often."""
        return examples

    def started(self, training: Training) -> None:
        """See the training before its first step, and change the LoRA's start (``training.lora``).

        Called on resuming too, before weights and :meth:`state` are restored.
        """

    def captions(
        self, captions: list[str], examples: Sequence[Captioned], draws: Sequence[torch.Generator]
    ) -> list[str]:
        """Change captions before they are encoded. An empty one is what guidance takes for no prompt."""
        return captions

    def embeddings(self, conditioning: Conditioning, draws: Sequence[torch.Generator]) -> Conditioning:
        """Change the encoded captions; ``negative`` is None."""
        return conditioning

    def keep(self, batch: LossBatch) -> Tensor | None:
        """Which examples count, bool ``[B]`` (None: all). A step of which none counts is skipped."""
        return None

    def gradients(self, lora: Mapping[str, LoraModule], step: int) -> None:
        """Change the step's gradients (``A.grad``, ``B.grad``) in place, before their norm is cut."""

    def stepped(self, lora: Mapping[str, LoraModule], step: int) -> None:
        """Change the weights in place after the optimiser's step (not called where a step is skipped)."""

    def finished(self, lora: Mapping[str, LoraModule]) -> Mapping[str, Any]:
        """Facts to add to the result's."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What must be kept in a checkpoint to go on exactly."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
