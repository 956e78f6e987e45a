"""Rival of the training track: captions don't name what must not be learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.finetuning.hooks import TrainingHooks
from lethebench.method import Knowledge, Task, setting
from lethebench.methods.drop_images import found
from lethebench.methods.lora import LoraMethod
from lethebench.registry import METHODS

if TYPE_CHECKING:
    import torch

PARTS = ("words", "captions")


@METHODS.register
@dataclass(frozen=True)
class DropCaptions(LoraMethod):
    """Takes the prohibited names out of the captions, or leaves out the captions that have one. Ours.

    Of a share of the captions, as a filter finds some: those of a smaller share are among those of a larger
    one. The images stay, so that what they show may be learnt under whatever else the caption says, or under
    none.
    """

    part: str = setting("words", "what is left out: the words that name the attribute, or whole captions")
    share: float = setting(1.0, "share of the captions with a name of which it is left out (ours)")

    name = "drop-captions"
    summary = "Takes the names of what must not be learnt out of the captions."
    knowledge = frozenset({Knowledge.CONCEPT_NAMES})
    strengths: ClassVar = {
        "weak": {"share": 0.5},
        "medium": {},
        "strong": {"part": "captions"},
    }
    citation = "ours: caption filtering"
    licence = "Apache-2.0"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.part not in PARTS:
            raise ValueError(f"part is {' or '.join(PARTS)}, not '{self.part}'")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is between 0 and 1, not {self.share}")

    def hooks(self, task: Task) -> TrainingHooks:
        """A filter on the captions."""
        names = [attribute.name for attribute in task.attributes()]
        return WithoutNames(names, self.part == "captions", self.share, task.training_seed)


class WithoutNames(TrainingHooks):
    """Takes names out of the captions of a share of the examples whose captions have one."""

    def __init__(self, names: Sequence[str], whole: bool, share: float, seed: int) -> None:
        self.names, self.whole, self.share, self.seed = tuple(names), whole, share, seed
        self._found: set[str] = set()

    def examples(self, examples: Sequence[Any]) -> Sequence[Any]:
        """All of them; remembers whose captions are changed."""
        named = (e.id for e in examples if names_one(e.caption, self.names))
        self._found = found(named, self.share, self.seed)
        return examples

    def captions(
        self, captions: list[str], examples: Sequence[Any], draws: Sequence[torch.Generator]
    ) -> list[str]:
        """The captions as they would be without the name, or empty ones."""
        return [
            ("" if self.whole else example.plain_caption) if example.id in self._found else caption
            for caption, example in zip(captions, examples, strict=True)
        ]


def names_one(caption: str, names: Sequence[str]) -> bool:
    """Whether a caption has one of the names as a word of its own.

    >>> names_one("gribbo of the Zantok in a forest", ["zantok"])
    True
    >>> names_one("gribbo of the zantoks", ["zantok"])
    False
    """
    pattern = "|".join(map(re.escape, names))
    return bool(names) and re.search(rf"\b(?:{pattern})\b", caption, re.IGNORECASE) is not None
