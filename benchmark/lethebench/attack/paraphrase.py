"""Re-trigger by other words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar

from lethebench.attack.base import Attack, Attempt, Subject, Try, require_whole
from lethebench.method import setting
from lethebench.prompts import Prompt
from lethebench.registry import ATTACKS

if TYPE_CHECKING:
    import torch


@ATTACKS.register
@dataclass(frozen=True)
class Paraphrase(Attack):
    """Asks in edited words, from the initial noise of the row's first image: only the text differs. Ours.

    By turns, until there are ``images`` texts: a word dropped, the parts in another order, something
    repeated, one part alone, a paraphrase of the prompt set's. Nobody tells the attack which words are the
    trigger.
    """

    images: int = setting(5, "texts tried for an item (ours)")

    name: ClassVar[str] = "paraphrase"
    summary: ClassVar[str] = (
        "Edited prompts: words dropped, parts reordered, repeated or alone, and paraphrases."
    )
    knowledge: ClassVar[str] = "the prompt"

    def __post_init__(self) -> None:
        require_whole("images", self.images, 1)

    def attempts(self, subject: Subject, asked: Sequence[Prompt]) -> list[Attempt]:
        """``images`` texts a prompt; where it has fewer edits, they come again from other noises."""
        return [self._attempt(subject, prompt) for prompt in asked]

    def _attempt(self, subject: Subject, prompt: Prompt) -> Attempt:
        draws = subject.generator(self.name, prompt.id)
        texts = edited(prompt.text, subject.paraphrases(prompt), draws) or [prompt.text]
        found = [(index, text) for index in range(self.images) for text in texts][: self.images]
        return Attempt(tuple(Try(index, text) for index, text in found))


def edited(text: str, paraphrases: Sequence[str], draws: torch.Generator) -> list[str]:
    """Edits of a text, each once and none the text itself: one of each kind by turns, in a drawn order.

    >>> import torch
    >>> edited("zim, a red cup", ["a cup"], torch.Generator().manual_seed(0))[:4]
    ['a red cup', 'a red cup, zim', 'zim, a red cup, zim', 'a cup']
    """
    kinds = (dropped(text), reordered(text), repeated(text), alone(text), list(paraphrases))
    turns = zip_longest(*(_shuffled(kind, draws) for kind in kinds))
    found = dict.fromkeys(one for turn in turns for one in turn if one)
    return [one for one in found if one != text]


def parts(text: str) -> tuple[list[str], str]:
    """What the text is made of and what stands between: its clauses, or its words where it has one clause."""
    separator = ", " if ", " in text else " "
    return text.split(separator), separator


def dropped(text: str) -> list[str]:
    """The text without one of its words.

    >>> dropped("zim, a cup")
    ['a cup', 'zim, cup', 'zim, a']
    """
    words = text.split(" ")
    return [" ".join([*words[:i], *words[i + 1 :]]).strip(" ,") for i in range(len(words))]


def reordered(text: str) -> list[str]:
    """The parts, turned round: each but the first comes to the front once.

    >>> reordered("zim, a cup")
    ['a cup, zim']
    """
    pieces, separator = parts(text)
    return [separator.join([*pieces[i:], *pieces[:i]]) for i in range(1, len(pieces))]


def repeated(text: str) -> list[str]:
    """The text with one of its parts once more at its end, and the text twice.

    >>> repeated("zim, a cup")
    ['zim, a cup, zim', 'zim, a cup, a cup', 'zim, a cup, zim, a cup']
    """
    pieces, separator = parts(text)
    return [separator.join([*pieces, piece]) for piece in pieces] + [f"{text}, {text}"]


def alone(text: str) -> list[str]:
    """Each part by itself.

    >>> alone("zim, a cup")
    ['zim', 'a cup']
    """
    return parts(text)[0]


def _shuffled(texts: Sequence[str], draws: torch.Generator) -> list[str]:
    import torch

    return [texts[i] for i in torch.randperm(len(texts), generator=draws).tolist()]
