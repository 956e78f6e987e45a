"""What the prompt perturbations of Somepalli et al. 2023 share: words put at random places of every prompt.

The released code (somepago/DCR, Apache-2.0, ``sd_mitigation.py``) draws a word and its place in turn; here an
image's words are drawn first, so that a stronger setting's words begin with a weaker one's. Its randomness is
one stream for the whole run; here each image's depends on suite, prompt and index alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.seeding import generator

if TYPE_CHECKING:
    import torch

CITATION = (
    "Somepalli, Singla, Goldblum, Geiping, Goldstein: Understanding and Mitigating Copying in "
    "Diffusion Models. NeurIPS 2023. arXiv:2305.20086"
)
LICENCE = "Apache-2.0 (written from the paper; released code: Apache-2.0)"


def insert_words(text: str, words: Sequence[str], draws: torch.Generator) -> str:
    """Insert each word at a random place between the words of the text (or at an end)."""
    import torch

    found = text.split(" ")
    for word in words:
        found.insert(int(torch.randint(len(found) + 1, (1,), generator=draws)), word)
    return " ".join(found)


def require_count(name: str, count: int) -> None:
    """Raise ValueError for a negative count."""
    if count < 0:
        raise ValueError(f"{name} must be 0 or more, not {count}")


class InsertedWords(SamplerHooks, ABC):
    """Changes each image's prompt on its own: the draws depend on suite, prompt and index alone."""

    purpose: ClassVar[str]
    """What the draws are for: the method's name."""

    @abstractmethod
    def words(self, text: str, draws: torch.Generator) -> list[str]:
        """The words to insert into a prompt."""

    def texts(self, texts: list[str], keys: tuple[ImageKey, ...]) -> list[str]:
        """The texts with the words inserted."""
        return [self._changed(text, key) for text, key in zip(texts, keys, strict=True)]

    def _changed(self, text: str, key: ImageKey) -> str:
        draws = generator(self.purpose, key.suite, key.prompt.id, key.index)
        return insert_words(text, self.words(text, draws), draws)
