"""What is to be unlearnt: memorized prompts and protected concepts, with what to put in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lethebench.errors import UserError
from lethebench.prompts import Role

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.prompts import Prompt

TARGETS = ("triggers", "concepts", "all")
"""What ``find_targets`` takes: memorized prompts, prompts of protected concepts, or both."""


@dataclass(frozen=True)
class Target:
    """A prompt whose result is to be unlearnt.

    ``anchors`` are prompts to put in its place: for a memorized caption its paraphrases, for a concept the
    same prompt with ``anchor_concept`` ("a comic hero") in the name's place; empty where the prompt set has
    none. Targets of one ``cluster`` are
    one memorized item or one concept.
    """

    id: str
    text: str
    anchors: tuple[str, ...]
    role: Role
    cluster: str
    concept: str | None = None
    anchor_concept: str = ""


def require_targets(which: str, count: int) -> None:
    """Raise ValueError unless ``which`` is one of :data:`TARGETS` and ``count`` isn't negative."""
    if which not in TARGETS:
        raise ValueError(f"targets is {', '.join(TARGETS)}, not '{which}'")
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be a whole number, 0 (all) or more, not {count!r}")


def find_targets(task: Task, which: str = "all", count: int = 0) -> list[Target]:
    """The task's targets, cluster by cluster. Needs the knowledge of what it asks for.

    ``count`` > 0 takes that many clusters (items or concepts), in an order drawn from the task: a longer list
    contains the shorter. Raises UserError where there is none.
    """
    require_targets(which, count)
    prompts: list[Prompt] = []
    if which in ("triggers", "all"):
        prompts += task.memorized_prompts()
    if which in ("concepts", "all"):
        prompts += [p for asked in task.concepts().values() for p in asked]
    if not prompts:
        raise UserError(f"the prompt set has no {which if which != 'all' else 'targets'} to unlearn")
    found = [_target(task, p) for p in prompts]
    if not count:
        return found
    clusters = list(dict.fromkeys(t.cluster for t in found))
    if count > len(clusters):
        raise UserError(f"count is {count}, but there are only {len(clusters)} items and concepts to unlearn")
    order = torch.randperm(len(clusters), generator=task.shared_generator("targets", which)).tolist()
    kept = {clusters[i] for i in order[:count]}
    return [t for t in found if t.cluster in kept]


def require_anchors(targets: Sequence[Target]) -> None:
    """Raise UserError unless every target has an anchor."""
    without = [t for t in targets if not t.anchors]
    if without:
        raise UserError(
            f"the prompt set has no paraphrase of '{without[0].text}' ({len(without)} of {len(targets)} "
            "prompts), which this setting puts in its place"
        )


def _target(task: Task, prompt: Prompt) -> Target:
    concept = prompt.concept if prompt.role is Role.CONCEPT else None
    return Target(
        prompt.id,
        prompt.text,
        tuple(task.paraphrases(prompt)),
        prompt.role,
        prompt.cluster,
        concept,
        task.anchor_concept(concept) if concept is not None else "",
    )
