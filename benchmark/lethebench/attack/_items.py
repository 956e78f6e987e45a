"""Which trained items of a suite are attacked, each with its never-trained twin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from lethebench.errors import UserError
from lethebench.plan import RowPlan
from lethebench.prompts import Prompt
from lethebench.seeding import derive_seed
from lethebench.specs import AttackSettings, Suite


@dataclass(frozen=True)
class Item:
    """A trained prompt and its twin, as the row draws them (a control may draw others in their place).

    The prompt is one that is memorized, or one that asks for a prohibited attribute; the twin is like it, and
    no model that draws it was trained on it.
    """

    prompt: Prompt
    twin: Prompt


def attack_settings(suite: Suite) -> AttackSettings:
    """The suite's ``attack`` block. Raises UserError where it has none."""
    if suite.attack is None:
        raise UserError(
            f"suite {suite.key} doesn't say what to attack: give it a block `attack: {{items: 16}}`"
        )
    return suite.attack


def chosen_items(plan: RowPlan) -> list[Item]:
    """The items that the suite attacks: see :class:`lethebench.specs.AttackSettings`.

    One a cluster, so that items are independent; taken by turns from the kinds, and within those from the
    instances and correlations, where a set has such. Raises UserError without an ``attack`` block, or with
    fewer than two items.
    """
    settings = attack_settings(plan.suite)
    cells: dict[tuple[str, str, float], list[Item]] = {}
    for item in sorted(
        _pairs(plan, settings), key=lambda i: derive_seed("attack", plan.suite.seed_key, i.prompt.cluster)
    ):
        p = item.prompt
        cells.setdefault((p.kind, plan.instance_of(p.id), p.correlation or 0.0), []).append(item)
    turns = zip_longest(*(cells[cell] for cell in sorted(cells)))
    found = [item for turn in turns for item in turn if item is not None][: settings.items]
    if len(found) < 2:
        raise UserError(
            f"suite {plan.suite.key} draws {len(found)} trained items of its `attack` block together with "
            "their never-trained twins, and an attack needs two: select more controls"
        )
    return found


def unseen_index(plan: RowPlan) -> int:
    """The first image index that no prompt of the row is drawn at."""
    return max(key.index for key in plan.images) + 1


def _pairs(plan: RowPlan, settings: AttackSettings) -> Iterator[Item]:
    """The first fitting prompt of each cluster, with its twin."""
    drawn = {key.prompt.id: key.prompt for key in plan.images}
    taken = set()
    for prompt in drawn.values():
        twin = drawn.get(prompt.twin) if prompt.twin is not None else None
        if twin is None or twin.trained is not False or prompt.role is not settings.role:
            continue
        fits = (
            prompt.references
            and twin.references
            and (not settings.kinds or prompt.kind in settings.kinds)
            and (prompt.duplicates or 0) >= (settings.min_duplicates or 0)
        )
        if fits and prompt.cluster not in taken:
            taken.add(prompt.cluster)
            yield Item(prompt, twin)
