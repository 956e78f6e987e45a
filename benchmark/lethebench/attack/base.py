"""The contract of an attack: what it tries for each of some prompts, at the same budget for all of them."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.errors import UserError
from lethebench.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from lethebench.hooks import Recorder
    from lethebench.metric import Shard
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Try:
    """One image that an attack has drawn of a prompt.

    ``index`` fixes the initial noise, as for any image of the prompt; ``text`` is asked in the prompt's
    place. ``offset``, ``[tokens, width]``, is added to the text's token embeddings. It goes into the model
    behind the text: what a mitigation changes in the *text* is passed by, what it does later acts.
    """

    index: int
    text: str | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Attempt:
    """What an attack tries for one prompt, and the loss of its optimisation by step, if it has one."""

    tries: tuple[Try, ...]
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What an attacker has: the mitigated model, its sampler, and the prompt set.

    ``model`` has the method's weights and module hooks in place; what the method does while sampling acts
    when the tries are drawn, and only then. Images of index ``unseen`` and above are none of the row's own.
    """

    model: Model
    sampler: SamplerSettings
    prompts: PromptSet
    suite: str
    unseen: int

    def reference(self, prompt: Prompt) -> NDArray[np.uint8]:
        """The first image that the prompt may reproduce, or that shows what it asks for.

        uint8 ``[height, width, 3]``.
        """
        return self.prompts.reference(prompt.references[0]).image

    def paraphrases(self, prompt: Prompt) -> list[str]:
        """What the prompt set has that asks for the same in other words; [] where it has none.

        Its ``rewordings``, which are for attacks, or else its ``paraphrases``, which leave the trigger out.
        """
        names = ("rewordings", "paraphrases")
        found = next((f for name in names if (f := getattr(self.prompts, name, None)) is not None), None)
        return [] if found is None else list(found(prompt.id))

    def generator(self, *parts: object) -> torch.Generator:
        """A CPU generator for a named purpose: the only randomness that an attack may use."""
        from lethebench.seeding import generator

        return generator("attack", self.suite, *parts)


class Judge(ABC):
    """Says by itself what came out, in place of the suite's suppression score: see :meth:`Attack.judge`."""

    @abstractmethod
    def recorder(self) -> Recorder:
        """What watches the tries while they are drawn: it must not change them."""

    @abstractmethod
    def found(self, shard: Shard) -> NDArray[np.bool_]:
        """Whether each image's drawing gave away what its prompt asks for, ``[n]``.

        ``shard.recorded`` holds what the recorder took; the prompts are as blind as those of ``attempts``.
        """

    def facts(self) -> dict[str, Any]:
        """What the record says of the judge, as JSON can hold it: its error rates, say."""
        return {}


class Attack(ABC):
    """An attack: a frozen dataclass of settings, plus facts declared on the class.

    It is asked for trained items (memorized prompts, or such as ask for a prohibited attribute) and for their
    never-trained twins alike, in a drawn order, and isn't told which is which: of the prompts only id, text,
    references and attributes are filled in.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    knowledge: ClassVar[str]
    """What the attacker must have, in words."""
    citation: ClassVar[str] = ""

    @abstractmethod
    def attempts(self, subject: Subject, asked: Sequence[Prompt]) -> list[Attempt]:
        """What to try for each prompt, the same number of tries for all.

        What is tried for a prompt must not depend on which others are asked for with it.
        """

    def unsuited(self, prompts: PromptSet, asked: Sequence[Prompt]) -> str:
        """Why the attack can't be made on these prompts of the set, in words; "" where it can.

        Asked once, before any work: of all items and twins of the suite.
        """
        return ""

    def judge(self, subject: Subject, asked: Sequence[Prompt]) -> Judge | None:
        """What tells by itself what came out of the tries.

        None: an image counts by the suite's suppression score. Asked before ``attempts``, with the same
        prompts and the mitigated model in place.
        """
        return None


def configure_attack(cls: type[Attack], settings: Mapping[str, Any]) -> Attack:
    """The attack with these settings. Raises UserError for one that it hasn't or a bad value."""
    fields: list[str] = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for name in settings:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(fields) or 'none'}"
            raise UserError(f"attack '{cls.name}' has no setting '{name}': {hint}")
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"attack '{cls.name}': {error}") from error


def require_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
