"""Wanda pruning of memorized prompts (Chavhan et al.).

Chavhan, Bohdal, Zong, Li, Hospedales, "Memorized Images in Diffusion Models share a Subspace that can be
Located and Deleted" (arXiv 2406.18566). Written from the formulas; the facts of the released code
(ruchikachavhan/concept-prune, no licence) are from reading it.
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


@METHODS.register
@dataclass(frozen=True)
class Wanda(Method):
    """Zeroes the weights that memorized prompts use most, and more than an empty prompt does.

    In each second feed-forward layer and denoising step, weight ``W_ij`` scores ``|W_ij| * ||X_j||``
    (Wanda, Sun et al. 2024, which prunes the smallest), where ``X_j`` is input j over all tokens of all
    prompts. A step's mask is the ``ratio`` largest scores of each row under the target prompts, where they
    exceed those under the base prompts. The masks of the first ``tau`` steps are joined.

    As released: each token's inputs are first scaled to unit norm; both halves of classifier-free guidance
    count; all targets are pooled into one mask. Otherwise than released: every prompt has noise of its own
    (released: seed 0 for all), shared with its base prompt; DDIM (released: PNDM, whose second step counts
    twice); layers are found by name (released: by counting calls). Since ``|W_ij|`` is on both sides,
    "exceed" compares inputs only: a base prompt takes whole inputs out of the reckoning.

    In transformers (ours; the paper has UNets only) the layers are those of both streams, and in FLUX's
    single blocks the columns of ``proj_out`` that take the neurons.
    """

    targets: str = setting("all", "what is unlearnt: triggers (the paper), concepts or all")
    count: int = setting(0, "clusters of targets, at most; 0 takes all")
    ratio: float = setting(
        0.01, "share of a row's weights in a step's mask (paper: 0.01; medium and strong are ours)"
    )
    tau: int = setting(10, "first denoising steps whose masks are joined (paper: 10 of 50)")
    union: float = setting(
        0.0, "a weight goes where more than this share of the steps' masks hold it (paper: 0, the union)"
    )
    base: str = setting(
        "empty",
        "prompts to compare with: empty (paper) or neutral (released as the variant with COCO captions)",
    )
    chain_steps: int = setting(50, "denoising steps of a whole chain (paper: 50); 0 takes the suite's")
    guidance: float | None = setting(None, "guidance scale; none takes the suite's (released: 7.5)")
    batch_size: int = setting(16, "prompts drawn at once (ours)")

    name = "wanda"
    summary = "Zeroes the feed-forward weights that memorized prompts use more than an empty prompt."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES, Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {"weak": {"ratio": 0.01}, "medium": {"ratio": 0.1}, "strong": {"ratio": 0.3}}
    quick: ClassVar = {"count": 2, "tau": 2, "chain_steps": 4, "ratio": 0.1}
    citation = (
        "Chavhan, Bohdal, Zong, Li, Hospedales: Memorized Images in Diffusion Models share a Subspace that "
        "can be Located and Deleted, arXiv 2406.18566"
    )
    licence = "Apache-2.0 (written from the formulas)"

    @property
    def sees(self) -> frozenset[Knowledge]:
        """The kinds of target, and neutral prompts where they are the base."""
        unused = {
            Knowledge.CONCEPT_NAMES: self.targets == "triggers",
            Knowledge.MEMORIZED_PROMPTS: self.targets == "concepts",
            Knowledge.NEUTRAL_PROMPTS: self.base == "empty",
        }
        return self.knowledge - {what for what, off in unused.items() if off}

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.targets not in ("triggers", "concepts", "all"):
            raise ValueError(f"targets is triggers, concepts or all, not '{self.targets}'")
        if self.base not in ("empty", "neutral"):
            raise ValueError(f"base is empty or neutral, not '{self.base}'")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is a share above 0 and up to 1, not {self.ratio}")
        if not 0 <= self.union < 1:
            raise ValueError(f"union is a share from 0 and below 1, not {self.union}")
        for name, least in (("count", 0), ("tau", 1), ("chain_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def fit(self, task: Task) -> Artefact:
        """Measure the inputs under target and base prompts, and choose the weights."""
        from lethebench.methods.wanda.masks import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Zero the chosen weights while the context is open; biases stay."""
        from lethebench.methods.wanda.masks import zeroed

        with zeroed(model.denoiser, artefact.tensors):
            yield SamplerHooks()
