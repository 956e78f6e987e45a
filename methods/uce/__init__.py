"""UCE: unified concept editing, a closed-form change of the layers that take text embeddings.

Gandikota, Orgad, Belinkov, Materzynska, Bau: Unified Concept Editing in Diffusion Models, WACV 2024
(arXiv:2308.14761). Released code: github rohitgandikota/unified-concept-editing (MIT), where the current
``trainscripts/uce_sd_erase.py`` (28c81ed) and the original ``train-scripts/train_erase.py`` (35e91e2) edit
different tokens: setting ``rule``.
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

RULES = ("current", "original")
TECHNIQUES = ("replace", "tensor")
ANCHOR = "anchor"


@METHODS.register
@dataclass(frozen=True)
class UCE(Method):
    """Maps the erased prompts' embeddings to where the guide's go, and keeps the rest (eq. 7).

    Edited are ``attn2.to_k`` and ``to_v`` of UNets. On FLUX ``context_embedder`` (token embeddings) and
    ``text_embedder.linear_1`` (pooled embedding), as in the released ``uce_flux_edit.py``; the same layers on
    Stable Diffusion 3, with the last content token of either tokenizer (ours: no code was released).

    Of a concept the erased text is its name, of a trigger the memorized caption. The closed form is solved in
    float64. Defects of the released code that are not kept: it inverts in float32, and on FLUX the targets
    hold the layer's bias, which is then added a second time.

    The released rules preserve next to nothing. They suit a few concepts in 768 dimensions or more: where the
    erased texts come near the width of the embedding, preserve neutral prompts by all their tokens
    (``rule="original"``, ``preserve=256``), or every picture breaks.
    """

    targets: str = setting("all", "what is erased: triggers (memorized prompts), concepts, or all")
    count: int = setting(0, "how many items and concepts are erased; 0 takes all")
    rule: str = setting(
        "current",
        "edited tokens: 'current' (the last content token) or 'original' (from it through the padding; "
        "'' is always preserved)",
    )
    guide: str = setting(
        "",
        "where erased prompts are mapped: a text (released code: '' for objects, 'art' for artists), or "
        "'anchor' (ours: a trigger's paraphrase, a concept's generic noun)",
    )
    technique: str = setting(
        "replace",
        "'replace' takes the guide's outputs, 'tensor' what they have orthogonal to the erased ones",
    )
    templates: bool = setting(
        False, "erase 'photo of NAME' and four more as well (released code: expand_prompts, off)"
    )
    lamb: float = setting(0.5, "lambda, the weight of staying near the old layer (released code: 0.5)")
    erase_scale: float = setting(
        1.0, "weight of the erased embeddings (released code: 1, its authors advise less where images break)"
    )
    preserve: int = setting(0, "neutral prompts that are preserved (released code: none for objects)")
    preserve_scale: float | None = setting(
        None, "weight of preserved embeddings; none takes the rule's: 1, or max(0.1, 1 / preserved texts)"
    )

    name = "uce"
    summary = "Maps erased prompts to a guide in the layers that take text embeddings, by a closed form."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES, Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {
        "weak": {"erase_scale": 0.01},
        "medium": {"erase_scale": 0.1},
        "strong": {"erase_scale": 1.0},
    }
    quick: ClassVar = {"count": 2, "preserve": 2}
    citation = (
        "Gandikota, Orgad, Belinkov, Materzynska, Bau: Unified Concept Editing in Diffusion Models. "
        "WACV 2024. arXiv:2308.14761"
    )
    licence = "Apache-2.0 (written from the paper; the released code's constants: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        if self.rule not in RULES:
            raise ValueError(f"rule is {' or '.join(RULES)}, not '{self.rule}'")
        if self.technique not in TECHNIQUES:
            raise ValueError(f"technique is {' or '.join(TECHNIQUES)}, not '{self.technique}'")
        for name in ("lamb", "erase_scale", "preserve", "preserve_scale"):
            value = getattr(self, name)
            if value is None and name == "preserve_scale":
                continue
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, not '{value}'")
            if value < 0:
                raise ValueError(f"{name} must not be negative, it is {value}")
        if self.lamb == 0:
            raise ValueError("lamb must be positive, not 0")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Neutral prompts only where some are preserved, and of the targets those that are erased."""
        unused = {Knowledge.NEUTRAL_PROMPTS} if not self.preserve else set()
        if self.targets == "concepts":
            unused.add(Knowledge.MEMORIZED_PROMPTS)
        if self.targets == "triggers":
            unused.add(Knowledge.CONCEPT_NAMES)
        return self.knowledge - unused

    def fit(self, task: Task) -> Artefact:
        """Solve for the edited layers."""
        from lethebench.methods.uce.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Put the edited layers in while the context is open."""
        from lethebench.unlearning import applied

        with applied(model, artefact.tensors):
            yield SamplerHooks()
