"""What a fine-tuning set offers to a trainer and to training-time methods. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lethebench.prompts import Prompt, Reference

Image = NDArray[np.uint8]
"""uint8 ``[height, width, 3]``."""


@dataclass(frozen=True)
class Attribute:
    """A prohibited attribute: what fine-tuning must not learn from its pair's images.

    ``name`` is the word that captions call it by, ``question`` the judge's question that it answers
    ("comic.headgear") and ``value`` the answer that is prohibited ("hood"). ``anchor`` is what a nameless
    wanted thing is called ("a comic hero"), ``pair`` the pair that it belongs to.
    """

    name: str
    question: str
    value: str
    anchor: str
    pair: str

    def __str__(self) -> str:
        """``comic.headgear=hood``."""
        return f"{self.question}={self.value}"


@dataclass(frozen=True)
class Example:
    """An image with its caption, drawn when first asked for.

    ``id`` is the image's reference id. The training set holds it ``duplicates`` times. ``holds``: the image
    holds the pair's prohibited attribute. ``named``: the caption names that too. ``plain_caption`` is the
    caption without that name, and the caption itself where it names nothing. Each of these is None to a
    method that mustn't know it (``Task.training_set``). ``captions`` are all that the image could be called
    by, the caption first.
    """

    id: str
    caption: str
    plain_caption: str | None
    pair: str
    holds: bool | None
    named: bool | None
    duplicates: int
    render: Callable[[], Image] = field(repr=False, compare=False)
    captions: tuple[str, ...] = ()

    @cached_property
    def image(self) -> Image:
        """uint8 ``[height, width, 3]``."""
        return self.render()


@runtime_checkable
class FineTuningSet(Protocol):
    """A prompt set (:class:`lethebench.prompts.PromptSet`) with training data: instances of one experiment.

    Each instance is fine-tuned by itself, and each test prompt is drawn by the models of its own instance.
    """

    name: str
    version: str

    @property
    def instances(self) -> tuple[str, ...]:
        """The names of the instances."""
        ...

    def examples(self, instance: str, *, twin: bool = False) -> Sequence[Example]:
        """The training set in a fixed order that is not shuffled, each image once (``Example.duplicates``).

        ``twin`` gives the oracle's: the same but that no image holds a prohibited attribute and no caption
        names one. Raises UserError for an unknown instance.
        """
        ...

    def attributes(self, instance: str) -> Sequence[Attribute]:
        """The prohibited attributes, pair by pair."""
        ...

    def sensitive_prompts(self, instance: str) -> Sequence[str]:
        """What a method may encode that knows the attributes' names; none is a test prompt or a caption."""
        ...

    def instance_of(self, prompt_id: str) -> str:
        """The instance that a test prompt belongs to; KeyError where there is no such prompt."""
        ...

    def __iter__(self) -> Iterator[Prompt]:
        """Every test prompt of every instance, in a fixed order."""
        ...

    def reference(self, reference_id: str) -> Reference:
        """The image of an example's id, or of one that was never trained; KeyError where there is none."""
        ...

    def training_prompts(self) -> Sequence[str]:
        """Neutral captions for regularisation: disjoint from the test prompts, the same for all instances."""
        ...

    def manifest(self) -> dict[str, Any]:
        """Recipe, seed, sizes and hashes."""
        ...
