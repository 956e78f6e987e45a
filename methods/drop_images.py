"""Rival of the training track: the images that hold what must not be learnt are left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lethebench.finetuning.hooks import TrainingHooks
from lethebench.method import Knowledge, Task, setting
from lethebench.methods.lora import LoraMethod
from lethebench.registry import METHODS
from lethebench.seeding import derive_seed


@METHODS.register
@dataclass(frozen=True)
class DropImages(LoraMethod):
    """Leaves the images out that hold a prohibited attribute, as a filter on the data does. Ours.

    A filter finds some of them: ``recall`` is the share that it finds, copies and all; what a smaller share
    finds a larger one finds, too. What is wanted and only ever seen with the attribute is lost with them. The
    steps stay as many, so that what is left is seen more often.
    """

    recall: float = setting(
        1.0, "share of the images that hold the attribute that are found and left out (ours)"
    )

    name = "drop-images"
    summary = "Leaves out the training images that hold what must not be learnt."
    knowledge = frozenset({Knowledge.TRAINING_IMAGES})
    strengths: ClassVar = {"weak": {"recall": 0.5}, "medium": {"recall": 0.9}, "strong": {}}
    citation = "ours: data filtering"
    licence = "Apache-2.0"

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 <= self.recall <= 1:
            raise ValueError(f"recall is a share, between 0 and 1, not {self.recall}")

    def hooks(self, task: Task) -> TrainingHooks:
        """A filter on the examples."""
        return WithoutImages(self.recall, task.training_seed)


@dataclass
class WithoutImages(TrainingHooks):
    """Leaves a share of the examples out that hold an attribute."""

    recall: float
    seed: int

    def examples(self, examples: Sequence[Any]) -> Sequence[Any]:
        """What is left."""
        dropped = found((e.id for e in examples if e.holds), self.recall, self.seed)
        return [e for e in examples if e.id not in dropped]


def found(ids: Iterable[str], share: float, seed: int) -> set[str]:
    """A share of the ids, at one seed always with those of a smaller share among them.

    >>> found("abcd", 0.5, 0) < found("abcd", 0.75, 0) < found("abcd", 1.0, 0) == set("abcd")
    True
    """
    order = sorted(set(ids), key=lambda one: derive_seed("found", seed, one))
    return set(order[: round(share * len(order))])
