"""Typed prompts, references and prompt sets: what a suite asks a model to draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Role(StrEnum):
    """What a prompt is in the set for."""

    TRIGGER = "trigger"
    """Known or planted to be memorized."""
    CONCEPT = "concept"
    """Asks for protected content."""
    NEUTRAL = "neutral"
    """An ordinary prompt."""
    CONTROL = "control"
    """Looks like a trigger or a concept, and was never memorized."""
    PROBE = "probe"
    """A near neighbour of a concept, to see over-suppression."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and what is known about it.

    ``cluster`` is the unit of resampling: prompts that stand or fall together (the captions of one
    planted item, the scenes of one character) share it. ``references`` are the ids of the images
    that the prompt may reproduce, in the set's :meth:`PromptSet.reference`. ``twin`` is the id of
    the prompt of the identically drawn item on the other side of the coin (trained or held out).
    ``correlation`` is, of a prompt about a thing that is to be learnt, the share of its training images that
    hold what is not to be learnt.
    ``attributes`` holds what the picture should show (``object``, ``colour``, ``pattern``,
    ``background``), for judges that can answer it.
    """

    id: str
    text: str
    role: Role
    cluster: str
    kind: str = "neutral"
    references: tuple[str, ...] = ()
    concept: str | None = None
    category: str | None = None
    duplicates: int | None = None
    correlation: float | None = None
    trained: bool | None = None
    twin: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """An image that a prompt may reproduce.

    ``image`` is uint8 ``[height, width, 3]``; ``mask`` is the foreground's coverage, uint8
    ``[height, width]`` (0 background, 255 foreground), or None where no truth is known.
    """

    id: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None = None


@runtime_checkable
class PromptSet(Protocol):
    """An iterable of prompts with references and a manifest.

    A set for methods that unlearn given prompts may have two methods more: ``paraphrases(prompt_id)``, texts
    that ask for the same without the trigger or the concept's name, and ``anchor_concept(concept)``, what to
    put in a concept's place ("a comic hero").
    """

    name: str
    version: str

    def __iter__(self) -> Iterator[Prompt]:
        """Every test prompt, in a fixed order."""
        ...

    def reference(self, reference_id: str) -> Reference:
        """The reference of that id; KeyError where there is none."""
        ...

    def training_prompts(self) -> Sequence[str]:
        """Neutral prompts that a method may fit on: disjoint from the test prompts."""
        ...

    def manifest(self) -> dict[str, Any]:
        """Upstream file, commit, sha256 and licence; for a generated set its recipe and seed."""
        ...
