"""Typed prompts, references and prompt sets: what a suite asks a model to draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError


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


def plainly(text: str) -> str:
    """A text without what makes no other prompt of it: case, blanks, a full stop at the end.

    >>> plainly(" A cat  on a mat. ")
    'a cat on a mat'
    """
    return " ".join(text.casefold().split()).rstrip(". ")


class Union:
    """Several prompt sets as one: ids and clusters begin with the set's name and a slash.

    Raises UserError for a set that is named twice, and for a set with instances (for fine-tuning).
    """

    def __init__(self, parts: Sequence[PromptSet]) -> None:
        self.parts = {part.name: part for part in parts}
        if len(self.parts) < len(parts):
            raise UserError(f"prompt sets named twice: {'+'.join(p.name for p in parts)}")
        for part in parts:
            if hasattr(part, "instances"):
                raise UserError(
                    f"prompt set '{part.name}' is for fine-tuning: it can't be joined with others"
                )
        self.name = "+".join(self.parts)
        self.version = "+".join(part.version for part in parts)

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts of each set in turn."""
        for name, part in self.parts.items():
            for prompt in part:
                yield replace(
                    prompt,
                    id=f"{name}/{prompt.id}",
                    cluster=f"{name}/{prompt.cluster}",
                    references=tuple(f"{name}/{one}" for one in prompt.references),
                    twin=None if prompt.twin is None else f"{name}/{prompt.twin}",
                )

    def reference(self, reference_id: str) -> Reference:
        """The reference of the set that the id begins with; KeyError where there is none."""
        name, _, rest = reference_id.partition("/")
        return self.parts[name].reference(rest)

    def described(self, reference_id: str) -> Any:
        """What the set that the id begins with keeps in place of the image (``referencing``); else None."""
        name, _, rest = reference_id.partition("/")
        own: Any = getattr(self.parts[name], "described", None)
        return None if own is None else own(rest)

    def training_prompts(self) -> Sequence[str]:
        """The training prompts of all sets, each text once; none that any of the sets tests."""
        tested = {plainly(prompt.text) for prompt in self}
        texts = dict.fromkeys(text for part in self.parts.values() for text in part.training_prompts())
        return [text for text in texts if plainly(text) not in tested]

    def manifest(self) -> dict[str, Any]:
        """The sets' manifests by name."""
        return {name: part.manifest() for name, part in self.parts.items()}

    def paraphrases(self, prompt_id: str) -> Sequence[str]:
        """The paraphrases of the set that the id begins with; none where it has none."""
        name, _, rest = prompt_id.partition("/")
        own: Any = getattr(self.parts[name], "paraphrases", None)
        return () if own is None else tuple(own(rest))

    def anchor_concept(self, concept: str) -> str:
        """What the first set that knows the concept puts in its place; "" where none does."""
        for part in self.parts.values():
            own: Any = getattr(part, "anchor_concept", None)
            try:
                found = "" if own is None else own(concept)
            except KeyError:
                continue
            if found:
                return str(found)
        return ""
