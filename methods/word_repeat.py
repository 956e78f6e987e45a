"""Repeated words of the prompt (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, setting
from lethebench.methods._inserted_words import CITATION, LICENCE, InsertedWords, require_count
from lethebench.registry import METHODS

if TYPE_CHECKING:
    import torch

    from lethebench.zoo import Model


@dataclass(frozen=True)
class WordRepeatHooks(InsertedWords):
    """Repeats ``repeats`` words of each prompt."""

    repeats: int

    purpose = "word-repeat"

    def words(self, text: str, draws: torch.Generator) -> list[str]:
        """Words of the prompt itself, each drawn from all of them."""
        import torch

        own = text.split(" ")
        return [own[int(torch.randint(len(own), (1,), generator=draws))] for _ in range(self.repeats)]


@METHODS.register
@dataclass(frozen=True)
class WordRepeat(Method):
    """Repeats random words of every prompt at random places of it.

    "Caption word repetition" of Somepalli et al. 2023 (``rand_word_repeat`` of their ``sd_mitigation.py``):
    a word is drawn from the prompt as it was given, so that a repeated word is no likelier to come again. In
    a prompt that fills the tokenizer the repeated word may be cut off, or push other words out.
    """

    repeats: int = setting(
        2, "how many words are repeated (released code: 2 on fine-tuned models, 4 on Stable Diffusion 1.4)"
    )

    name = "word-repeat"
    summary = "Random words of every prompt once more, at random places."
    family = Family.SAMPLING
    strengths: ClassVar = {"weak": {"repeats": 1}, "medium": {"repeats": 2}, "strong": {"repeats": 4}}
    citation = CITATION
    licence = LICENCE
    off: ClassVar = {"repeats": 0}

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        require_count("repeats", self.repeats)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the prompts."""
        yield WordRepeatHooks(self.repeats)
