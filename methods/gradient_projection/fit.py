"""Gradient projection for a task: what is known of the concept, as the hooks of a training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch

from lethebench.errors import UserError
from lethebench.finetuning import (
    EmbeddingProjection,
    GradientProjection,
    SensitivePrompt,
    TrainingHooks,
    concept_subspaces,
    lora_targets,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.finetuning.data import Attribute, Example
    from lethebench.method import Task
    from lethebench.methods.gradient_projection import GradientProjection as Method


def projection(method: Method, task: Task, *, gradients_only: bool = False) -> TrainingHooks:
    """The method's hooks. Raises UserError where the task has nothing to project out."""
    if method.variant == "gradient":
        return GradientProjection(
            sensitive_pairs(task, method.count, method.every),
            method.strength,
            count=method.count,
            every=method.every,
            dimension=method.dimension,
            energy=method.energy,
            updates=not gradients_only,
        )
    return EmbeddingProjection(subspaces(method, task), method.strength, gradients_only=gradients_only)


def subspaces(method: Method, task: Task) -> dict[str, Tensor]:
    """By adapted layer that the method projects, a basis ``[in, k]`` of what must not be learnt.

    Layers that take hidden states see each prompt with an image of the training set, in the place of one that
    the model would have to draw: any, as text states depend little on it, but for ``layers="all"`` one that
    holds the prompt's attribute.
    """
    known = [named(text, task.attributes()) for text in prompts(method.prompts, task)]
    examples = _shuffled(task, task.training_set())[: len(known)]
    if method.layers == "all":
        examples = pictures(holding(task), [attribute.pair for _, attribute in known])
    return concept_subspaces(
        task.model,
        lora_targets(task.model, task.training),
        [SensitivePrompt(text, attribute.name) for text, attribute in known],
        task.sampler,
        task.generator("subspaces"),
        tokens=method.tokens,
        layers=method.layers,
        dimension=method.dimension,
        energy=method.energy,
        examples=examples,
    )


def prompts(which: str, task: Task) -> list[str]:
    """The prompts that a method knew before, the training's captions that name an attribute, or both."""
    captions = [example.caption for example in task.training_set() if example.named]
    return {
        "known": task.sensitive_prompts(),
        "captions": captions,
        "all": task.sensitive_prompts() + captions,
    }[which]


def named(text: str, attributes: Sequence[Attribute]) -> tuple[str, Attribute]:
    """A sensitive prompt with the first attribute that it names. Raises UserError where it names none."""
    for attribute in attributes:
        if re.search(rf"\b{re.escape(attribute.name)}\b", text, re.IGNORECASE):
            return text, attribute
    raise UserError(f"the sensitive prompt '{text}' names none of the attributes")


def sensitive_pairs(task: Task, count: int, every: int) -> list[Example]:
    """The training images that hold an attribute, in random order: as many as the refreshes use, at most."""
    return _shuffled(task, holding(task))[: count * ceil(task.training.steps / every)]


def holding(task: Task) -> list[Example]:
    """The training images that hold an attribute. Raises UserError where none does."""
    found = [example for example in task.training_set() if example.holds]
    if not found:
        raise UserError("gradient projection: no image of the training set holds what must not be learnt")
    return found


def pictures(examples: Sequence[Example], pairs: Sequence[str]) -> list[Example]:
    """For each of the pairs one of its examples, by turns; of a pair that has none one of all."""
    found = []
    for number, pair in enumerate(pairs):
        own = [example for example in examples if example.pair == pair] or examples
        found.append(own[number % len(own)])
    return found


def _shuffled(task: Task, examples: Sequence[Example]) -> list[Example]:
    order = torch.randperm(len(examples), generator=task.generator("images"))
    return [examples[i] for i in order.tolist()]
