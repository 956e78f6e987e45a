"""Re-trigger by other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethebench.attack.base import Attack, Attempt, Subject, Try, require_whole
from lethebench.method import setting
from lethebench.prompts import Prompt
from lethebench.registry import ATTACKS


@ATTACKS.register
@dataclass(frozen=True)
class Seeds(Attack):
    """Asks for the prompt as it is from initial noises that the row didn't draw. Ours."""

    images: int = setting(4, "other initial noises tried for an item (ours)")

    name: ClassVar[str] = "seeds"
    summary: ClassVar[str] = "The same prompt from other initial noises."
    knowledge: ClassVar[str] = "the prompt"

    def __post_init__(self) -> None:
        require_whole("images", self.images, 1)

    def attempts(self, subject: Subject, asked: Sequence[Prompt]) -> list[Attempt]:
        """The first ``images`` indices beyond the row's own."""
        tries = tuple(Try(subject.unseen + k) for k in range(self.images))
        return [Attempt(tries) for _ in asked]
