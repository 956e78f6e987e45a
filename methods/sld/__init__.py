"""Safe latent diffusion: guidance away from a concept, where the image goes towards it.

Schramowski, Brack, Deiseroth, Kersting, "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in
Diffusion Models", CVPR 2023 (arXiv 2211.05105). Released code: ml-research/safe-latent-diffusion (MIT), and
``StableDiffusionPipelineSafe`` of diffusers.
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
class SLD(Method):
    """Subtracts from classifier-free guidance what points to a concept (``lethebench.methods.sld.guidance``).

    The paper's concept is one text for every prompt, ``concept``. By default it comes from the task (ours): a
    target's distinguishing words are those that no anchor of any target has (of a memorized caption its
    trigger, of a concept its name). A prompt that has some of them is guided away from these alone, in their
    order; any other prompt from as many of all targets' as fit the tokenizer, in an order drawn once. A
    concept that is the whole prompt changes nothing, as both predictions are the same.

    The paper's numbers are for 50 steps. Elsewhere guidance begins after the same share of the steps, and the
    momentum forgets as much in the same share (``beta`` to the power of 50 / steps): ours.

    The released code runs on Stable Diffusion 1.x; for models that predict velocities the formulas and
    thresholds stay (ours). FLUX samples without an unconditional prediction, so the empty prompt is asked for
    its own: three passes a step, as minimalist_concept_erasure's SLD on FLUX has them. That code also guides
    the prompt itself, by half; here the prompt's prediction stays, and only the safety term is taken off
    (ours). A scale of 1 or less switches the released code off; here the formula holds down to 0.
    """

    concept: str = setting("", "what to guide away from; empty: the targets' distinguishing words (ours)")
    targets: str = setting("all", "whose words: triggers (memorized prompts), concepts or all (ours)")
    count: int = setting(0, "clusters of targets (items, concepts) to take, 0 for all")
    scale: float = setting(1000.0, "safety guidance scale (paper, medium: 1000)", applied=True)
    warmup: int = setting(
        10, "steps of 50 before it begins; momentum builds up meanwhile (paper, medium: 10)", applied=True
    )
    threshold: float = setting(
        0.01,
        "how far an element of the prediction may be above the concept's and still be changed (paper, "
        "medium: 0.01)",
        applied=True,
    )
    momentum: float = setting(0.3, "scale of the momentum that is added (paper, medium: 0.3)", applied=True)
    beta: float = setting(
        0.4, "share of the momentum that a step of 50 keeps (paper, medium: 0.4)", applied=True
    )

    name = "sld"
    summary = "Guides away from memorized triggers and concept names where the image goes towards them."
    family = Family.SAMPLING
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES})
    strengths: ClassVar = {
        "weak": {"scale": 20.0, "warmup": 15, "threshold": 0.0, "momentum": 0.0, "beta": 0.0},
        "medium": {},
        "strong": {"scale": 2000.0, "warmup": 7, "threshold": 0.025, "momentum": 0.5, "beta": 0.7},
        "max": {"scale": 5000.0, "warmup": 0, "threshold": 1.0, "momentum": 0.5, "beta": 0.7},
    }
    citation = (
        "Schramowski, Brack, Deiseroth, Kersting: Safe Latent Diffusion: Mitigating Inappropriate "
        "Degeneration in Diffusion Models. CVPR 2023. arXiv:2211.05105"
    )
    licence = "Apache-2.0 (written from the paper; released code: MIT, in diffusers Apache-2.0)"
    off: ClassVar = {"scale": 0.0}

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        for name, most in (("scale", None), ("warmup", 50), ("momentum", None), ("beta", 1)):
            value = getattr(self, name)
            if value < 0 or (most is not None and value > most):
                limits = "0 or more" if most is None else f"between 0 and {most}"
                raise ValueError(f"{name} must be {limits}, not {value}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """What the concept comes from: nothing where it is given."""
        if self.concept.strip():
            return frozenset()
        return frozenset(
            {
                "triggers": {Knowledge.MEMORIZED_PROMPTS},
                "concepts": {Knowledge.CONCEPT_NAMES},
                "all": self.knowledge,
            }[self.targets]
        )

    def fit(self, task: Task) -> Artefact:
        """Choose the words to guide away from: ``words``, and ``text`` for prompts that have none of them."""
        if self.concept.strip():
            return Artefact(facts={"words": [], "text": self.concept.strip()})
        from lethebench.methods.sld.words import choose

        return choose(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the guided prediction at each step."""
        from lethebench.methods.sld.guidance import SafetyGuidance

        yield SafetyGuidance(self, artefact.facts["words"], artefact.facts["text"])
