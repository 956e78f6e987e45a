"""CA: Concept Ablation, a fine-tune that makes a target prompt's prediction its anchor's.

Kumari, Zhang, Wang, Shechtman, Zhang, Zhu, "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023
(arXiv 2303.13516). Released code: nupurkmr9/concept-ablation (MIT), its ``diffusers`` folder unless said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model

OBJECTIVES = ("model-based", "noise-based")
PARAMETERS = {"cross-attn": "cross-attn-kv", "attn": "attn", "full": "full", "embedding": "embedding"}
"""The released code's parameter groups, by the names of ``lethebench.unlearning.parameter_group``."""


COUNTS = ("batch_size", "accumulate", "images", "chain_steps")
SIZES = ("lr", "steps", "length", "prior_weight", "weight_decay", "clip")


@dataclass(frozen=True)
class Recipe:
    """The constants that the released code has for one kind of target."""

    parameters: str
    lr: float
    steps: int
    batch_size: int
    prior_weight: float


RECIPES = {
    "concepts": Recipe("cross-attn", lr=2e-6, steps=100, batch_size=8, prior_weight=0.0),
    "triggers": Recipe("full", lr=5e-7, steps=400, batch_size=4, prior_weight=1.0),
}
"""By kind of target. Batches are those of its two GPUs together (2 x 4 and 2 x 2)."""


@METHODS.register
@dataclass(frozen=True)
class ConceptAblation(Method):
    """Fine-tunes the model until it predicts for a target prompt what it predicts for its anchor.

    For a concept the anchor is the same prompt with a wider word in the name's place; for a memorized caption
    (the paper's section on memorization) a paraphrase. The model draws images of the anchors itself; they are
    noised to a random time ``t``, and the loss is (paper, eq. 4 and 5)

    - model-based: ``mse(eps(x_t, t, target), stop_gradient(eps(x_t, t, anchor)))``;
    - noise-based: ``mse(eps(x_t, t, target), noise)``;

    plus, with a ``prior_weight``, the model's own training loss on other anchor images with their anchors.
    Models that predict v or a velocity have those in the place of ``eps`` and of the noise (``noise - x`` for
    flow matching; minimalist_concept_erasure's CA for FLUX regresses a velocity onto the bare noise).

    Unlike the released code: the drawn latents are kept as they are, with no round trip through the VAE and
    so no resizing or flipping (its ``--noaug`` without ``--hflip``); the loss is the mean over all of the
    latent (its mask leaves out the border, and its sum over the mask counts the four channels as one, so that
    the ablation loss has four times the weight of the prior's); the prior loss of a v model has v for its
    target, not the noise; ``embedding`` trains all of the targets' own tokens and no other row (the code
    leaves out the last of them, and weight decay moves every row); paraphrases are not chosen beforehand by
    their share of copies, only images are.
    With several targets ``steps`` are for all of them together (the paper ablates one at a time).
    """

    targets: str = setting("all", "what to unlearn: triggers (memorized prompts), concepts, or all")
    count: int = setting(0, "how many memorized items or concepts to unlearn; 0: all")
    objective: str = setting("model-based", "loss: model-based (paper) or noise-based")
    anchor_weights: str = setting(
        "current", "whose prediction for the anchor is the target: current weights (released code) or base"
    )
    parameters: str | None = setting(
        None,
        "what is trained: cross-attn (keys and values), attn, full or embedding (token embeddings of the "
        "target's own tokens); none: full for triggers and all, cross-attn for concepts (paper)",
    )
    lr: float | None = setting(
        None, "learning rate before scale_lr; none: 5e-7 for triggers and all, 2e-6 for concepts (paper)"
    )
    scale_lr: bool = setting(
        True, "multiply lr by batch_size and accumulate, and by 2 with a prior loss (released commands)"
    )
    steps: int | None = setting(
        None, "optimiser steps at length 1; none: 400 for triggers and all, 100 for concepts (paper)"
    )
    length: float = setting(1.0, "multiplies steps: what the strengths differ in (ours)")
    batch_size: int | None = setting(
        None, "targets a step; none: 4 for triggers and all, 8 for concepts (released commands, both GPUs)"
    )
    accumulate: int = setting(1, "batches whose gradients make one step")
    prior_weight: float | None = setting(
        None,
        "weight of the loss on anchor images with their own prompts; none: 1 for triggers and all, 0 for "
        "concepts (released commands)",
    )
    images: int = setting(
        1000, "anchor images drawn for each memorized item or concept (paper: 1000); at most what steps use"
    )
    descriptor: str = setting(
        "copy-mini",
        "drops copies among the triggers' anchor images: copy-mini (built in; paper: SSCD) or none",
    )
    similarity: float = setting(0.5, "an anchor image is a copy above this cosine (released code: 0.5)")
    chain_steps: int = setting(25, "denoising steps of the anchor images (released code: 25)")
    guidance: float | None = setting(
        6.0, "guidance scale of the anchor images (released code: 6); none takes the suite's"
    )
    detach_start: bool = setting(
        True, "no gradient through the start token's keys and values (released code; UNets only)"
    )
    weight_decay: float = setting(0.01, "decoupled weight decay (released code: 1e-2)")
    clip: float = setting(1.0, "largest norm of the gradient (released code: 1); 0: any")
    dtype: str = setting(
        "float32", "type of the passes while fitting: float32 (released code's default) or bfloat16"
    )

    name = "ca"
    summary = "Concept Ablation: fine-tunes until a target prompt's prediction is its anchor's."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES, Knowledge.TRAINING_IMAGES})
    strengths: ClassVar = {"weak": {"length": 0.5}, "medium": {"length": 1.0}, "strong": {"length": 2.0}}
    quick: ClassVar = {
        "count": 2,
        "steps": 2,
        "batch_size": 2,
        "images": 2,
        "chain_steps": 2,
        "similarity": 1.0,
    }
    citation = (
        "Kumari, Zhang, Wang, Shechtman, Zhang, Zhu: Ablating Concepts in Text-to-Image Diffusion Models, "
        "ICCV 2023"
    )
    licence = "Apache-2.0 (written from the paper; constants of the released code: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that contradict themselves."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        for name, known in {
            "objective": OBJECTIVES,
            "anchor_weights": ("current", "base"),
            "parameters": (None, *PARAMETERS),
            "descriptor": ("copy-mini", "none"),
            "dtype": ("float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in known:
                choices = ", ".join(k for k in known if k is not None)
                raise ValueError(f"{name} is one of {choices}, not '{getattr(self, name)}'")
        for name in (*COUNTS, *SIZES):
            value, whole = getattr(self, name), name in COUNTS
            if value is None:
                continue
            if not isinstance(value, int if whole else (int, float)) or value < whole:
                wanted = "a whole number of at least 1" if whole else "a number of at least 0"
                raise ValueError(f"{name} must be {wanted}, not {value!r}")

    @property
    def recipe(self) -> Recipe:
        """The constants in force: the settings', else the released code's for this kind of target."""
        recipe = RECIPES["concepts" if self.targets == "concepts" else "triggers"]
        given = {name: getattr(self, name) for name in Recipe.__dataclass_fields__}
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
        scale = (
            recipe.batch_size * self.accumulate * (2 if recipe.prior_weight else 1) if self.scale_lr else 1
        )
        return replace(recipe, lr=recipe.lr * scale, steps=round(recipe.steps * self.length))

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Training images only where copies among the anchor images are dropped."""
        if self.targets == "concepts":
            return frozenset({Knowledge.CONCEPT_NAMES})
        images = {Knowledge.TRAINING_IMAGES} if self.descriptor != "none" else set()
        names = {Knowledge.CONCEPT_NAMES} if self.targets == "all" else set()
        return frozenset({Knowledge.MEMORIZED_PROMPTS} | images | names)

    def fit(self, task: Task) -> Artefact:
        """Draw the anchor images and fine-tune; the artefact holds the changes of the weights."""
        from lethebench.methods.ca.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Add the changes to the weights while the context is open."""
        from lethebench.unlearning import applied

        with applied(model, artefact.tensors):
            yield SamplerHooks()
