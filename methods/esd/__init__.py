"""ESD: fine-tune the denoiser until a text's prediction points away from what the text asks for.

Gandikota, Materzynska, Fiotto-Kaufman, Bau, "Erasing Concepts from Diffusion Models", ICCV 2023
(arXiv 2303.07345). The released code (rohitgandikota/erasing) holds two different methods under the name: the
paper's (``train-scripts/train-esd.py``, commit a2189e9) and the one that replaced it (``esd_sd.py`` and
``esd_sdxl.py``, commit 25613d2). The setting ``algorithm`` says which is meant.
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

ALGORITHMS = ("original", "current")
GROUPS = {"original": ("esd-x", "esd-u"), "current": ("esd-x", "esd-u", "esd-all", "esd-x-strict")}
ERASE_FROM = ("", "prompt", "anchor")


@METHODS.register
@dataclass(frozen=True)
class ESD(Method):
    """Erases texts by negative guidance, learnt into the weights.

    ``original``: the student's prediction for the text c learns ``null - ng (c* - null)``, where ``c*`` and
    ``null`` are the base model's predictions with the text and without (paper, eq. 7), at latents x_t that
    the student itself has sampled to a random step. ``current``: it learns ``from - ng (c* - null)`` at
    latents that the base model has sampled; ``from`` is the prediction for another text to erase c from, by
    default c's own, so that ``ng`` 2 there is ``ng`` 1 of the original, and ``ng`` 1 (SDXL's default) the
    prediction without text.

    The weights of ``c*``, ``null`` and ``from`` add up to 1, so the same target holds for every kind of
    prediction: epsilon, v, and the velocity of flow matching (SD3, FLUX: from forks of the released code;
    SD3 takes FLUX's values, ours).

    Different from the released code: the timestep is the one at whose noise level x_t is (the original
    leaves out the noisiest step and gives the denoiser a time above the latents' level; ``esd_sdxl.py``
    doesn't scale x_t as its Euler scheduler asks); UNets sample with DDIM throughout; ``null`` is what the
    model's guidance takes for it (SDXL: zeros, where ``esd_sdxl.py`` encodes the empty prompt); targets come
    in shuffled rounds, each once a round, not drawn with replacement.
    """

    algorithm: str = setting("current", "'original' (the paper's code) or 'current' (the repository's today)")
    group: str = setting(
        "esd-x",
        "parameters to train: esd-x (cross-attention; paper: for styles), esd-u (the others; paper: for "
        "objects and nudity), and of 'current' esd-all and esd-x-strict (keys and values)",
    )
    negative_guidance: float | None = setting(
        None, "how far past the prediction without text; none: original 1, current 2 (SDXL, FLUX, SD3: 1)"
    )
    erase_from: str = setting(
        "",
        "'current' only, the text that is changed: '' (the erased text), 'prompt' (the prompt that holds it) "
        "or 'anchor' (the prompt with something else in its place)",
    )
    concept_text: str = setting(
        "name", "what is erased of a concept: its 'name' (paper) or each 'prompt' that asks for it (ours)"
    )
    targets: str = setting("all", "what is erased: triggers, concepts or all")
    count: int = setting(0, "how many clusters of targets (memorized items, concepts); 0: all")
    steps: int | None = setting(
        None, "optimiser steps; none: original 1000, current 200 (FLUX and SD3: 1400, forks)"
    )
    lr: float | None = setting(
        None,
        "Adam's learning rate; none: original 1e-5, current 5e-5 (SDXL 2e-4, its esd-u and esd-all 1e-5; "
        "FLUX and SD3 1e-4, forks)",
    )
    batch_size: int = setting(1, "targets an optimiser step (released: 1)")
    guidance: float | None = setting(
        None, "guidance scale while x_t is sampled; none: 3 (current SDXL 2; FLUX and SD3 3.5, forks)"
    )
    chain_steps: int | None = setting(
        None, "sampling steps of a whole chain; none: 50 (FLUX and SD3 28, forks)"
    )
    points: int = setting(
        1, "x_t taken from each chain, at as many random steps (released: 1; more is ours, and faster)"
    )
    dtype: str = setting(
        "float32", "type of the student's forward pass: float32 or bfloat16 (released: bfloat16)"
    )

    name = "esd"
    summary = "Fine-tunes the model so that the erased texts are guided away from what they ask for."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES})
    strengths: ClassVar = {
        "weak": {"negative_guidance": 1.0},
        "medium": {"negative_guidance": 2.0},
        "strong": {"negative_guidance": 3.0},
    }
    quick: ClassVar = {"steps": 2, "count": 2, "batch_size": 2, "chain_steps": 3}
    citation = (
        "Gandikota, Materzynska, Fiotto-Kaufman, Bau: Erasing Concepts from Diffusion Models, ICCV 2023, "
        "arXiv 2303.07345"
    )
    licence = "Apache-2.0 (written from the paper; released code: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that contradict themselves."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is 'original' or 'current', not '{self.algorithm}'")
        if self.group not in GROUPS[self.algorithm]:
            known = ", ".join(GROUPS[self.algorithm])
            raise ValueError(f"group of the {self.algorithm} algorithm is {known}, not '{self.group}'")
        if self.erase_from not in ERASE_FROM:
            raise ValueError(f"erase_from is '', 'prompt' or 'anchor', not '{self.erase_from}'")
        if self.erase_from and self.algorithm == "original":
            raise ValueError("erase_from belongs to the current algorithm: leave it empty for the original")
        if self.concept_text not in ("name", "prompt"):
            raise ValueError(f"concept_text is 'name' or 'prompt', not '{self.concept_text}'")
        for name, least in (("steps", 0), ("batch_size", 1), ("chain_steps", 1), ("points", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is 'float32' or 'bfloat16', not '{self.dtype}'")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Memorized prompts, concept names, or both, as ``targets`` says."""
        unused = {"triggers": {Knowledge.CONCEPT_NAMES}, "concepts": {Knowledge.MEMORIZED_PROMPTS}}
        return self.knowledge - unused.get(self.targets, set())

    def fit(self, task: Task) -> Artefact:
        """Fine-tune a copy of the denoiser; the artefact is what was added to each parameter."""
        from lethebench.methods.esd.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Add the changes to the weights while the context is open."""
        from lethebench.unlearning import applied

        with applied(model, artefact.tensors):
            yield SamplerHooks()
