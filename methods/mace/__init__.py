"""MACE: mass concept erasure, a closed form, one LoRA a concept, and a closed form that joins them.

Lu, Wang, Li, Liu, Kong: MACE: Mass Concept Erasure in Diffusion Models, CVPR 2024 (arXiv:2403.06135). Written
from the paper's formulas: the released code's licence is non-commercial, and none of it was used.
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

SEGMENTERS = ("none", "segmenter-mini", "birefnet", "sam")
COUNTS = ("rank", "images", "preserve", "batch_size")
SIZES = ("steps", "lr", "chain_steps", "preserve_scale", "lamb", "scale")


@METHODS.register
@dataclass(frozen=True)
class MACE(Method):
    """Three steps on the keys and values of cross-attention (``attn2.to_k``, ``attn2.to_v``).

    1. Refinement: words beside the target's get the keys and values that they have in the same prompt with
       the target replaced (closed form).
    2. A LoRA for each item or concept, trained until no pixel where it is attends to the target's tokens: the
       loss is the sum over layers of ``|A * mask|^2``, with A the attention to the target's tokens.
    3. Fusion: one weight that does on each target's prompts what its own LoRA does (closed form).

    The target's tokens are those of the prompt that its (first) anchor lacks (difflib over token ids): a
    concept's name, what a paraphrase leaves out of a memorized caption (ordinary words and commas, too).
    Ours, where the paper or its data could not be used: neutral prompts are preserved in place of cached sums
    over COCO captions; masks come from a foreground segmenter or there are none, in place of Grounded-SAM;
    the fusion's rows are each prompt's from the first target token through the padding, whose embeddings
    hold the target; training pictures are drawn from the targets' own prompts.
    """

    targets: str = setting("all", "what is erased: triggers (memorized prompts), concepts, or all")
    count: int = setting(0, "how many items and concepts are erased; 0 takes all")
    refine: bool = setting(True, "do the first step (paper); off trains the LoRAs on the model as it is")
    steps: int = setting(50, "training steps of each LoRA; 0 trains none (released configuration: 50)")
    lr: float = setting(
        1e-4, "AdamW's learning rate (released configuration: 1e-4 celebrities, 1e-5 objects)"
    )
    rank: int = setting(1, "rank of a LoRA (paper: 1)")
    images: int = setting(8, "pictures that are drawn for each item or concept (paper: 8)")
    chain_steps: int = setting(0, "denoising steps of these pictures; 0 takes the suite's")
    importance: bool = setting(
        True, "draw timesteps by sigmoid(.05 (t - 200)) - sigmoid(.05 (t - 400)) (paper); off: uniformly"
    )
    segmenter: str = setting(
        "none",
        "where the item is: segmenter-mini (64 x 64 pictures), birefnet or sam (paper: Grounded-SAM), or "
        "none for the whole picture (ours)",
    )
    segmenter_weights: str = setting("", "the file of birefnet's or sam's weights", place=True)
    preserve: int = setting(256, "neutral prompts that are preserved, at most (paper: captions of COCO)")
    preserve_scale: float = setting(
        1e-4,
        "weight of each preserved token in both closed forms (released configuration: 1e-4 celebrities, for "
        "sums over COCO); with lamb 0 and fewer tokens than the embedding is wide nothing holds the weights",
    )
    lamb: float = setting(
        0.0, "weight of staying near the old layer (released configuration: 0 celebrities, 1000 objects)"
    )
    batch_size: int = setting(4, "LoRAs that are trained side by side, each as if it were alone (ours)")
    scale: float = setting(1.0, "share of the edit that is put on the model (paper: 1)", applied=True)

    name = "mace"
    summary = "Closed-form refinement, an attention-suppressing LoRA for each target, closed-form fusion."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES, Knowledge.NEUTRAL_PROMPTS})
    model_families = frozenset({"sd", "sdxl"})
    unsupported_reason = "it edits the cross-attention to the prompt, which joint-attention transformers lack"
    strengths: ClassVar = {"weak": {"scale": 0.5}, "medium": {"scale": 0.75}, "strong": {"scale": 1.0}}
    quick: ClassVar = {"count": 2, "steps": 2, "images": 1, "chain_steps": 2, "preserve": 4}
    citation = (
        "Lu, Wang, Li, Liu, Kong: MACE: Mass Concept Erasure in Diffusion Models. CVPR 2024. arXiv:2403.06135"
    )
    licence = "Apache-2.0 (written from the paper; the released code is non-commercial and was not used)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        if self.segmenter not in SEGMENTERS:
            raise ValueError(f"segmenter is {', '.join(SEGMENTERS)}, not '{self.segmenter}'")
        for name in (*COUNTS, *SIZES):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, not '{value}'")
            if name in COUNTS and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, it is {value}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Neutral prompts, and of the targets those that are erased."""
        unused = {
            "concepts": {Knowledge.MEMORIZED_PROMPTS},
            "triggers": {Knowledge.CONCEPT_NAMES},
        }.get(self.targets, set())
        return self.knowledge - unused

    def fit(self, task: Task) -> Artefact:
        """Refine, train the LoRAs, and join them."""
        from lethebench.methods.mace.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Put the edited layers in while the context is open."""
        from lethebench.unlearning import applied

        with applied(model, artefact.tensors, self.scale):
            yield SamplerHooks()
