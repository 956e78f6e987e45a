"""Retrain: a short fine-tuning on neutral prompts after any permanent edit (UniForget's "w retrain")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class Retrain(Method):
    """Gives an edited model its quality back, while what the edit removed stays removed.

    Comes after other methods: ``METHOD=uniforget+retrain``. The paper (UniForget, Table 1) fine-tunes all
    parameters "utilizing the same training configuration" and says no more. Ours is distillation: at latents
    along the base model's own chains of neutral prompts, the edited denoiser learns the base model's
    predictions with and without the prompt. No training image is needed, so the knowledge is neutral
    prompts. Weights that are zero in the edited model and weren't in the base model stay zero.
    """

    steps: int = setting(120, "fine-tuning steps (the paper doesn't say)")
    lr: float = setting(1e-4, "learning rate, annealed to 0 along a cosine (the paper doesn't say)")
    batch_size: int = setting(16, "prompts a step (ours)")
    prompts: int = setting(256, "neutral prompts to train on, at most (paper: 256 for the masks)")
    guidance: float | None = setting(None, "guidance scale of the chains; none takes the suite's (ours)")
    dtype: str = setting("bfloat16", "type of the arithmetic: bfloat16 or float32 (weights: float32)")

    name = "retrain"
    summary = "Fine-tunes what an edit left, on neutral prompts, towards the base model's predictions."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {"short": {"steps": 40}, "medium": {"steps": 120}, "long": {"steps": 240}}
    quick: ClassVar = {"steps": 2, "prompts": 4, "batch_size": 2}
    follows = True
    citation = (
        "Jin, Zhang, Mou, Dong, Decker, Kawaguchi, Stegmaier: Unconsciously Forget: Mitigating Memorization "
        "Without Knowing What is being Memorized"
    )
    licence = "Apache-2.0 (written from the paper)"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        for name in ("steps", "prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is 'bfloat16' or 'float32', not '{self.dtype}'")

    def fit(self, task: Task) -> Artefact:
        """Fine-tune a copy; the artefact is what that adds to each parameter of the denoiser."""
        from lethebench.methods.retrain.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Add the changes to the weights."""
        from lethebench.unlearning import applied

        with applied(model, artefact.tensors):
            yield SamplerHooks()
