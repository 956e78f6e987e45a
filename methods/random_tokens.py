"""Control: random tokens in the prompt (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Family, Method, setting
from lethebench.registry import METHODS
from lethebench.seeding import generator

if TYPE_CHECKING:
    import torch

    from lethebench.zoo import Model


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


def insert_words(text: str, words: Sequence[str], draws: torch.Generator) -> str:
    """Insert each word at a random place between the words of the text (or at an end)."""
    import torch

    found = text.split(" ")
    for word in words:
        found.insert(int(torch.randint(len(found) + 1, (1,), generator=draws)), word)
    return " ".join(found)


@dataclass(frozen=True)
class RandomTokenHooks(SamplerHooks):
    """Changes each image's prompt on its own: the draws depend on suite, prompt and index alone."""

    tokenizer: Any
    tokens: int

    def texts(self, texts: list[str], keys: tuple[ImageKey, ...]) -> list[str]:
        """The texts with ``tokens`` random tokens in each."""
        return [self._changed(text, key) for text, key in zip(texts, keys, strict=True)]

    def _changed(self, text: str, key: ImageKey) -> str:
        draws = generator("random-tokens", key.suite, key.prompt.id, key.index)
        return insert_words(text, random_words(self.tokenizer, self.tokens, draws), draws)


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
    citation = (
        "Somepalli, Singla, Goldblum, Geiping, Goldstein: Understanding and Mitigating Copying in "
        "Diffusion Models. NeurIPS 2023. arXiv:2305.20086"
    )
    control = True
    off: ClassVar = {"tokens": 0}

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the prompts with the model's own (first) tokenizer."""
        yield RandomTokenHooks(model.pipe.tokenizer, self.tokens)
