"""Gradient projection: what must not be learnt is taken out of each update of a LoRA.

Kothandaraman, Pytlarz, "Beyond Memorization: Gradient Projection Enables Selective Learning in Diffusion
Models" (arXiv 2512.11194). Only the abstract is known to us; both variants are our reading of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.finetuning.settings import (
    ENERGY,
    LAYERS,
    TOKENS,
    require_choice,
    require_strength,
    require_subspace,
)
from lethebench.method import Knowledge, Task, setting
from lethebench.methods.lora import LoraMethod
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.finetuning import TrainingHooks

VARIANTS = ("embedding", "gradient")
PROMPTS = ("known", "captions", "all")


@METHODS.register
@dataclass(frozen=True)
class GradientProjection(LoraMethod):
    """Keeps a prohibited concept from being learnt by projecting the LoRA's updates.

    ``embedding`` (variant A): of every adapted layer that is fed the text's embeddings, A moves only in the
    orthogonal complement of the span of the concept's embeddings (their main directions by SVD, as GPM takes
    them). A's start, its gradients and each optimiser step are projected, since Adam's scaling takes a
    projected gradient back into the span. At ``strength`` 1 the update maps every direction of the span to
    zero. The embeddings are those of the sensitive prompts (``prompts``), all attributes together. Layers
    that take hidden states (SD3, FLUX) get the span of their inputs on those prompts, with images of the
    training set.

    ``gradient`` (variant B): the gradient of all layers together loses its part along the gradients of the
    denoising loss on the images that hold the concept; first-order only.

    The paper's projection dimension, lambda's values and layers aren't known to us: the defaults are ours,
    but for GPM's energy threshold.
    """

    variant: str = setting("embedding", "embedding (of the abstract's two readings the default) or gradient")
    strength: float = setting(
        1.0, "lambda: the share of the part in the subspace that is taken out (ours: all)"
    )
    dimension: int | None = setting(None, "dimension k of the subspace; none: as many as hold the energy")
    energy: float = setting(
        ENERGY, "share of the squared singular values that the subspace holds (GPM: 0.97)"
    )
    tokens: str = setting(
        "concept", "embedding: the concept's own tokens, those and all onwards, or all of a prompt"
    )
    prompts: str = setting(
        "known",
        "embedding: sensitive prompts known beforehand, training captions that name the concept, or all",
    )
    layers: str = setting(
        "text",
        "embedding: layers that the embeddings are fed to (embeddings), all fed by text (text), or all",
    )
    count: int = setting(8, "gradient: sensitive gradients a refresh (ours)")
    every: int = setting(25, "gradient: steps between refreshes (ours)")

    name = "gradient-projection"
    summary = "Projects a LoRA's updates off the subspace of what must not be learnt."
    knowledge = frozenset({Knowledge.CONCEPT_NAMES, Knowledge.TRAINING_IMAGES})
    strengths: ClassVar = {
        "weak": {"strength": 0.5},
        "medium": {"strength": 0.9},
        "strong": {},
    }
    quick: ClassVar = {"count": 2}
    citation = (
        "Kothandaraman, Pytlarz: Beyond Memorization: Gradient Projection Enables Selective Learning in "
        "Diffusion Models. arXiv:2512.11194"
    )
    licence = "Apache-2.0 (written from the abstract)"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        require_choice("variant", self.variant, VARIANTS)
        require_choice("tokens", self.tokens, TOKENS)
        require_choice("prompts", self.prompts, PROMPTS)
        require_choice("layers", self.layers, LAYERS)
        require_strength(self.strength)
        require_subspace(self.dimension, self.energy)
        for name in ("count", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Names for embeddings; images that hold the concept for gradients and image-fed layers."""
        if self.variant == "gradient":
            return frozenset({Knowledge.TRAINING_IMAGES})
        return self.knowledge if self.layers == "all" else frozenset({Knowledge.CONCEPT_NAMES})

    def hooks(self, task: Task) -> TrainingHooks:
        """The projection for the task's concept."""
        from lethebench.methods.gradient_projection.fit import projection

        return projection(self, task)


@METHODS.register
@dataclass(frozen=True)
class GradientHooks(GradientProjection):
    """The naive form, as a control: gradients alone are projected, not A's start nor the optimiser's step.

    Under AdamW that keeps nothing out. In a toy (``tests/finetuning/test_projection.py``) the span's share of
    the update is .48 with it, .20 without any projection and 6e-9 with the whole method.
    """

    name = "gradient-hooks"
    summary = "The naive form of gradient projection: gradients alone. Shows what it leaks."
    strengths: ClassVar = {"strong": {}}
    control = True

    def hooks(self, task: Task) -> TrainingHooks:
        """The same projection of gradients alone."""
        from lethebench.methods.gradient_projection.fit import projection

        return projection(self, task, gradients_only=True)
