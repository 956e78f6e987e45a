"""Random numbers in the prompt (Somepalli et al. 2023)."""

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
class RandomNumberHooks(InsertedWords):
    """Puts ``numbers`` random numbers into each prompt."""

    numbers: int

    purpose = "random-numbers"

    def words(self, text: str, draws: torch.Generator) -> list[str]:
        """Whole numbers, uniform from 0 to 99 999."""
        import torch

        return [str(int(torch.randint(100_000, (1,), generator=draws))) for _ in range(self.numbers)]


@METHODS.register
@dataclass(frozen=True)
class RandomNumbers(Method):
    """Inserts random numbers from 0 to 99 999 at random places of every prompt.

    "Random numbers addition" of Somepalli et al. 2023 (``rand_numb_add`` of their ``sd_mitigation.py``). What
    doesn't fit the tokenizer is cut off, as of any prompt: a small tokenizer needs a token a digit.
    """

    numbers: int = setting(
        2, "how many numbers are inserted (released code: 2 on fine-tuned models, 4 on Stable Diffusion 1.4)"
    )

    name = "random-numbers"
    summary = "Random numbers at random places of every prompt."
    family = Family.SAMPLING
    strengths: ClassVar = {"weak": {"numbers": 1}, "medium": {"numbers": 2}, "strong": {"numbers": 4}}
    citation = CITATION
    licence = LICENCE
    off: ClassVar = {"numbers": 0}

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        require_count("numbers", self.numbers)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the prompts."""
        yield RandomNumberHooks(self.numbers)
