"""Control: random tokens in the prompt (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, setting
from lethebench.methods._inserted_words import CITATION, LICENCE, InsertedWords, insert_words, require_count
from lethebench.registry import METHODS

if TYPE_CHECKING:
    import torch

    from lethebench.zoo import Model

__all__ = ["RandomTokenHooks", "RandomTokens", "insert_words", "random_words"]


def random_words(tokenizer: Any, count: int, draws: torch.Generator) -> list[str]:
    """``count`` tokens of the vocabulary as text, special tokens and tokens without text left out."""
    import torch

    special = set(tokenizer.all_special_ids)
    words: list[str] = []
    while len(words) < count:
        token = int(torch.randint(len(tokenizer), (1,), generator=draws))
        word = "" if token in special else str(tokenizer.decode([token])).strip()
        if word:
            words.append(word)
    return words


@dataclass(frozen=True)
class RandomTokenHooks(InsertedWords):
    """Puts ``tokens`` random tokens into each prompt."""

    tokenizer: Any
    tokens: int

    purpose = "random-tokens"

    def words(self, text: str, draws: torch.Generator) -> list[str]:
        """Random tokens of the vocabulary, whatever the prompt."""
        return random_words(self.tokenizer, self.tokens, draws)


@METHODS.register
@dataclass(frozen=True)
class RandomTokens(Method):
    """Inserts random tokens of the tokenizer's vocabulary at random places of every prompt.

    "Random token addition" of Somepalli et al. 2023, as their code does it at inference time (a token is
    decoded to text and put between two words; 4 by default there).
    """

    tokens: int = setting(2, "how many random tokens are inserted")

    name = "random-tokens"
    summary = "Random vocabulary tokens at random places of every prompt."
    family = Family.SAMPLING
    strengths: ClassVar = {"weak": {"tokens": 1}, "medium": {"tokens": 2}, "strong": {"tokens": 4}}
    citation = CITATION
    licence = LICENCE
    control = True
    off: ClassVar = {"tokens": 0}

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        require_count("tokens", self.tokens)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the prompts with the model's own (first) tokenizer."""
        yield RandomTokenHooks(model.pipe.tokenizer, self.tokens)
