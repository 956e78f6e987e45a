"""Re-trigger by adversarial prompt embeddings (Finding DoRI)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethebench.attack.base import Attack, Attempt, Subject, Try, require_whole
from lethebench.method import setting
from lethebench.prompts import Prompt
from lethebench.registry import ATTACKS


@ATTACKS.register
@dataclass(frozen=True)
class Dori(Attack):
    """A prompt embedding an item that makes the mitigated model denoise the item's reference image.

    From the embedding of the prompt, Adam minimises ``E ||target - prediction(x_t, t, y)||^2`` over y, with
    x_t the (first) reference image's latents noised to a random timestep, drawn anew at each step. The images
    are drawn from it with the row's own initial noises. Arithmetic:
    :func:`lethebench.attack._embeddings.adversarial`.

    The reference is the training image; of an item that asks for a prohibited attribute it is a picture that
    holds it. The attack sees it, so it can inject what the model never had: hence the twins.
    """

    steps: int = setting(50, "optimisation steps (paper: 50)")
    lr: float = setting(0.1, "Adam's learning rate (paper: 0.1)")
    batch_size: int = setting(8, "noises and timesteps a step (paper: 8)")
    images: int = setting(2, "images drawn from each embedding (ours)")
    dtype: str = setting("float32", "the denoiser's autocast while optimising: float32 or bfloat16 (ours)")
    at_once: int = setting(4, "items that are optimised in one batch: memory only (ours)")

    name: ClassVar[str] = "dori"
    summary: ClassVar[str] = "A prompt embedding optimised on a reference image against the mitigated model."
    knowledge: ClassVar[str] = "the prompt, the reference image, gradients of the mitigated model"
    citation: ClassVar[str] = "Finding DoRI. arXiv:2507.16880"

    def __post_init__(self) -> None:
        require_whole("steps", self.steps, 0)
        for name in ("batch_size", "images", "at_once"):
            require_whole(name, getattr(self, name), 1)
        if not isinstance(self.lr, (int, float)) or not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be a number above 0, not {self.lr!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")

    def attempts(self, subject: Subject, asked: Sequence[Prompt]) -> list[Attempt]:
        """The optimised embedding at the first ``images`` indices."""
        from lethebench.attack._embeddings import adversarial

        found: list[Attempt] = []
        for start in range(0, len(asked), self.at_once):
            offsets, losses = adversarial(subject, asked[start : start + self.at_once], self)
            found += [
                Attempt(tuple(Try(k, offset=offset) for k in range(self.images)), tuple(curve))
                for offset, curve in zip(offsets, losses.T.tolist(), strict=True)
            ]
        return found
