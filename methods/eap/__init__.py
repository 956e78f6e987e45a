"""EAP: erase texts while the concept that suffers most from it is kept.

Bui, Vuong, Doan, Le, Montague, Abraham, Phung, "Erasing Undesirable Concepts in Diffusion Models with
Adversarial Preservation", NeurIPS 2024 (arXiv 2410.15618). Written from the formulas and constants; the
released code (tuananhbui89/Erasing-Adversarial-Preservation, commit 7222925,
``train_adversarial_gumbel.py``) has no licence and was not run.
"""

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

GROUPS = {"xattn": "esd-x", "noxattn": "esd-u"}
"""The released code's names of the original ESD's groups of parameters."""
VOCABULARIES = ("words", "prompts", "tokenizer")


@METHODS.register
@dataclass(frozen=True)
class EAP(Method):
    """ESD's loss plus the change of an adversarial concept, which is searched for while training.

    For an erased text c and an adversarial text a the student minimises
    ``|x0(c) - [x0*(null) - ng (x0*(c) - x0*(null))]|^2 + |x0(a) - x0*(a)|^2``, where ``x0`` are predicted
    clean images and ``*`` is the base model. ``a`` is the text of a vocabulary for which the second term is
    largest: its logits over the candidates of c are trained by Gumbel-softmax, in turns with the model.
    Candidates are the words closest to c by their encoded embeddings, thinned by K-means to the word nearest
    each centre. Latents are sampled by the student with c and with a, from the same noise.

    Flow-matching families (SD3, FLUX) compare velocities, not predicted images (constants and this choice:
    minimalist concept erasure's EAP on FLUX). The search follows the gradient of both predictions for ``a``
    (the released code holds the base model's fixed), pooled embeddings are mixed like the token embeddings,
    and the timestep is the one at whose noise level the latents are (see ESD).
    """

    negative_guidance: float = setting(1.0, "how far past the prediction without text (paper: 1)")
    preservation: float = setting(1.0, "weight of the adversarial concept's change (paper: 1)")
    group: str = setting(
        "xattn", "parameters to train: xattn (paper: objects, styles) or noxattn (paper: nudity)"
    )
    vocabulary: str = setting(
        "words",
        "where adversarial texts come from: 'words' of the neutral prompts or the 'prompts' themselves "
        "(ours), or whole words of the 'tokenizer' (released: 3000 English words, or the tokenizer's)",
    )
    k_closest: int = setting(1000, "texts of the vocabulary closest to what is erased (released: 1000)")
    centers: int = setting(100, "K-means centres of them, the candidates (released: 100; 0: all of them)")
    temperature: float = setting(2.0, "temperature of the Gumbel-softmax (released: 2)")
    hard: bool = setting(True, "one candidate at a time, by straight-through gradients (released: on)")
    gumbel_lr: float = setting(1e-2, "Adam's learning rate of the logits (released scripts: 1e-2)")
    search_steps: int = setting(1, "search steps a chain of latents (released: 1 of 2 iterations)")
    concept_text: str = setting(
        "name", "what is erased of a concept: its 'name' (paper) or each 'prompt' that asks for it (ours)"
    )
    targets: str = setting("all", "what is erased: triggers, concepts or all")
    count: int = setting(0, "how many clusters of targets (memorized items, concepts); 0: all")
    steps: int = setting(1000, "optimiser steps of the model (released: 1000)")
    lr: float = setting(1e-5, "Adam's learning rate of the model (released: 1e-5)")
    batch_size: int = setting(1, "targets an optimiser step (released: 1)")
    guidance: float = setting(3.0, "guidance scale while latents are sampled (released: 3)")
    chain_steps: int = setting(50, "sampling steps of a whole chain (released: 50)")
    points: int = setting(
        1, "latents taken from each chain, at as many random steps (released: 1; more is ours, and faster)"
    )
    dtype: str = setting("float32", "type of the student's forward pass: float32 or bfloat16")

    name = "eap"
    summary = "Erases texts and keeps the concept that the erasing would change most, searched as it goes."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES, Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {
        "weak": {"negative_guidance": 0.0},
        "medium": {"negative_guidance": 1.0},
        "strong": {"negative_guidance": 2.0},
    }
    quick: ClassVar = {"steps": 2, "count": 2, "batch_size": 2, "chain_steps": 3, "centers": 3}
    citation = (
        "Bui, Vuong, Doan, Le, Montague, Abraham, Phung: Erasing Undesirable Concepts in Diffusion Models "
        "with Adversarial Preservation, NeurIPS 2024, arXiv 2410.15618"
    )
    licence = "Apache-2.0 (written from the paper's formulas; the released code has no licence)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        for name, known in {
            "group": tuple(GROUPS),
            "vocabulary": VOCABULARIES,
            "concept_text": ("name", "prompt"),
            "dtype": ("float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not '{getattr(self, name)}'")
        least = {"k_closest": 1, "centers": 0, "search_steps": 0, "steps": 0, "batch_size": 1}
        for name, value in {**least, "chain_steps": 1, "points": 1, "preservation": 0}.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, not {getattr(self, name)}")
        for name in ("temperature", "lr", "gumbel_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.points > self.chain_steps:
            raise ValueError(f"a chain of {self.chain_steps} steps has no {self.points} points")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Of the targets those that are erased; neutral prompts where the vocabulary is made of them."""
        unused = {"triggers": {Knowledge.CONCEPT_NAMES}, "concepts": {Knowledge.MEMORIZED_PROMPTS}}
        found = self.knowledge - unused.get(self.targets, set())
        return found - {Knowledge.NEUTRAL_PROMPTS} if self.vocabulary == "tokenizer" else found

    def fit(self, task: Task) -> Artefact:
        """Train model and adversary in turns; the artefact is what was added to each parameter."""
        from lethebench.methods.eap.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Add the changes to the weights while the context is open."""
        from lethebench.unlearning import applied

        with applied(model, artefact.tensors):
            yield SamplerHooks()
