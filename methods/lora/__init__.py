"""LoRA fine-tuning: what every method of the training track is compared with, and the base of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, Task, fitted_settings
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.finetuning import TrainingHooks
    from lethebench.zoo import Model

CITATION = (
    "Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models. "
    "ICLR 2022. arXiv:2106.09685"
)


class LoraMethod(Method):
    """Base of the training-time methods: fine-tunes a LoRA on the suite's training set, under its own hooks.

    Order of the images, noise, timesteps and the LoRA's start are the same for all methods of a suite that
    train on equally many images: rows are paired, but for those that leave images out. A killed fit goes on
    where it stopped. After it a few steps are timed beside plain LoRA's, which leaves the result as it is.

    ``apply`` changes the weights, so that methods after it in a composition (``lora+uce``) see and edit what
    was learnt, and so that the model can be exported. In float32 that draws what the LoRA beside the layers
    draws, to rounding. A bfloat16 or float16 model rounds each changed weight. On mini-sd that adds noise of
    .17 of an update's size in bfloat16 (.02 in float16) where the update is 1 % of the weights, .05 (.007)
    where it is 3 %: in every direction, those that were projected out included.
    """

    family = Family.TRAINING
    twin: ClassVar[bool] = False
    """Whether the model is trained on the twin set, without what must not be learnt."""

    def hooks(self, task: Task) -> TrainingHooks:
        """What the method does while training; made anew at each call."""
        from lethebench.finetuning import TrainingHooks

        return TrainingHooks()

    def fit(self, task: Task) -> Artefact:
        """Fine-tune, once; the artefact is the LoRA."""
        from lethebench.finetuning import finetune_lora
        from lethebench.finetuning.overhead import overhead

        examples = task.training_set(twin=self.twin)
        found = finetune_lora(
            task.model,
            examples,
            task.training,
            sampler=task.sampler,
            seed=task.training_seed,
            hooks=self.hooks(task),
            checkpoint=task.checkpoints,
            key=repr((self.name, sorted(fitted_settings(self).items()))),
            title=self.name,
        )
        measured = overhead(
            task.model,
            examples,
            task.training,
            sampler=task.sampler,
            seed=task.training_seed,
            hooks=lambda: self.hooks(task),
        )
        timing = {**found.facts["timing"], "step_relative_to_plain": measured.relative}
        facts = {**found.facts, "timing": timing, "training_state_bytes": measured.held_bytes}
        return Artefact(found.tensors, facts)

    def facts(self, artefact: Artefact) -> Mapping[str, Any]:
        """What ``fit`` said, with the training's time and ``step_relative_to_plain`` out of its timings."""
        timing = artefact.facts["timing"]
        relative = timing["step_relative_to_plain"]
        return {**artefact.facts, "fit_seconds": timing["seconds"], "step_relative_to_plain": relative}

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Add the LoRA to the weights while the context is open."""
        from lethebench.finetuning import merged_lora

        with merged_lora(model, artefact.tensors):
            yield SamplerHooks()


@METHODS.register
@dataclass(frozen=True)
class Lora(LoraMethod):
    """Plain LoRA fine-tuning on all images and captions: nothing is kept from being learnt."""

    name = "lora"
    summary = "Plain LoRA fine-tuning: the reference of the training track."
    citation = CITATION
    licence = "Apache-2.0"
    control = True


@METHODS.register
@dataclass(frozen=True)
class LoraOracle(LoraMethod):
    """LoRA fine-tuning on the twin set, in which no image holds what must not be learnt: the floor."""

    name = "lora-oracle"
    summary = "LoRA fine-tuning on the same images without the prohibited attribute: the floor."
    citation = CITATION
    licence = "Apache-2.0"
    control = True
    twin = True
