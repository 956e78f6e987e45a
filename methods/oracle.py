"""Control: what a model that never memorized would score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lethebench.method import Family, Knowledge, Method
from lethebench.prompts import Prompt, Role
from lethebench.registry import METHODS


@METHODS.register
@dataclass(frozen=True)
class Oracle(Method):
    """The twins' score: the base model on identically drawn items that it never saw.

    For each trained trigger or concept prompt, the base model draws the prompt of its *twin*, the item on
    the other side of the planting coin, and is scored against the twin's references. So a row of this
    control says what perfect removal of memorization leaves (chance likeness between items of one kind), not
    what a retrained model would draw. All other prompts are the base model's own.
    """

    name = "oracle"
    summary = "The base model on never-memorized twins of the planted items."
    family = Family.SAMPLING
    knowledge = frozenset({Knowledge.TRAINING_IMAGES})
    control = True

    def substitute(self, prompt: Prompt, prompts: Mapping[str, Prompt]) -> Prompt:
        """The prompt with its twin's text, references and content, under its own id, cluster and role.

        So it takes the same place in every slice and pairing. Left as it is where it has no twin in
        ``prompts``, or wasn't trained.
        """
        twin = prompts.get(prompt.twin) if prompt.twin is not None else None
        if twin is None or not prompt.trained or prompt.role not in (Role.TRIGGER, Role.CONCEPT):
            return prompt
        return replace(
            prompt,
            text=twin.text,
            references=twin.references,
            concept=twin.concept,
            category=twin.category,
            attributes=twin.attributes,
        )
