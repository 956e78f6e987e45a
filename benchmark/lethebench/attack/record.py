"""What an attack on a row found, as every reader of Lethe validates it.

Records lie beside the row as ``attacks/<name>.json``, one for each attack, budget and author; whoever found
more adds another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from lethebench.errors import UserError
from lethebench.row import Difference, Provenance, SuiteKey
from lethebench.specs import Spec, first_error

SCHEMA = "lethe/attack/1"


class Share(Spec):
    """The share of ``n`` attacked items that came out, with its 95 % interval."""

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    n: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Share:
        _require_order(self)
        return self


def _require_order(found: Share | Difference) -> None:
    if not found.low <= found.value <= found.high:
        raise ValueError(f"{found.value} lies outside its interval, {found.low} to {found.high}")


class AttackRecord(Spec):
    """One attack on one row.

    ``memorized`` is the share of trained items that the attack got out of the mitigated model. An item is a
    memorized prompt, or one that asks for an attribute whose learning is prohibited; it counts where any of
    the budget's images does by ``score``: is a copy, or shows the attribute. ``control`` is the same under
    the same budget for their twins, which no model (of a prompt set with instances: not the model attacked)
    was trained on: what the attack itself injects. ``plain`` and ``plain_control`` are both without the
    attack: the prompts as they are, from their first initial noises, as many images an item as the attack
    had. ``kinds`` holds ``memorized`` by kind of item.

    An attack that judges by itself (``linear-probe``) counts by what it says of each image; ``facts`` then
    hold ``judge``, how well it judges, by instance. Its ``plain`` is still of the pictures by the suite's
    score, the same draws.

    ``excess`` is memorized - control, paired by twin. ``hidden`` is excess - (plain - plain_control): what
    comes out by the attack alone, beyond what it does to twins, so what the mitigation had only hidden. There
    are two floors. One is the control: inside the same model. The other is the suite's oracle row under the
    same attack and budget (``oracle``, or ``lora-oracle`` where models are fine-tuned): its ``memorized`` and
    ``excess`` are those of a model that never had anything to hide. A fine-tuned model that nothing was done
    to needn't show on plain prompts all that it learnt: where the suite compares with one (``lora``), that
    row's own ``hidden`` is what the attack adds without a mitigation.

    Items are of one cluster each, so they are the units of every interval and test here. Items of one
    instance share a model: that no two instances were trained alike is in no interval.
    """

    schema_: Literal["lethe/attack/1"] = Field(default="lethe/attack/1", alias="schema")
    suite: SuiteKey
    model: str
    method: str
    setting: str
    row_key: str
    """``key`` of the row's ``made.json``: an attack on other images than the row's is not shown."""
    attack: str = Field(pattern=r"^[a-z0-9]+([-._][a-z0-9]+)*$")
    by: str = Field(min_length=1, max_length=200)
    how: str = Field(min_length=1, max_length=500)
    budget: dict[str, Any]
    score: str
    """By which an image counts; of an attack that judges by itself also its own name."""
    memorized: Share
    control: Share
    plain: Share
    plain_control: Share
    excess: Difference
    hidden: Difference
    kinds: dict[str, Share] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    seconds: float
    provenance: Provenance

    @model_validator(mode="after")
    def _adds_up(self) -> AttackRecord:
        shares = (self.memorized, self.control, self.plain, self.plain_control)
        if len({s.n for s in shares}) > 1:
            raise ValueError("memorized, control, plain and plain_control are of different numbers of items")
        plain = self.plain.value - self.plain_control.value
        for name, value in (
            ("excess", self.memorized.value - self.control.value),
            ("hidden", self.excess.value - plain),
        ):
            found: Difference = getattr(self, name)
            _require_order(found)
            if abs(found.value - value) > 1e-6:
                raise ValueError(f"{name} is {found.value:.4f}, and the shares make it {value:.4f}")
        return self

    def to_json(self) -> str:
        """The record as it is written: sorted keys, two spaces."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_attacks(folder: Path) -> list[AttackRecord]:
    """The records beside a row (``folder`` is the row's), by attack.

    Records of another result than the row that lies there (another ``made.json``) are left out. Raises
    UserError naming the file and the first thing that is wrong with it.
    """
    paths = sorted((folder / "attacks").glob("*.json"))
    if not paths:
        return []
    key = made_key(folder)
    return [record for path in paths if (record := read_attack(path)).row_key == key]


def read_attack(path: Path) -> AttackRecord:
    """One record. Raises UserError naming the file and the first thing that is wrong with it."""
    try:
        return AttackRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is not a valid attack record: {first_error(error)}") from error


def made_key(folder: Path) -> str | None:
    """``key`` of the ``made.json`` beside a row: which result lies there. None where there is none."""
    try:
        return str(json.loads((folder / "made.json").read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best_known(records: Sequence[AttackRecord]) -> AttackRecord | None:
    """The attack whose ``excess`` is highest, or None without records. The row's plain draws may beat it.

    Attacks that judge by themselves don't count: what a model knows hasn't come out of it.
    """
    records = [r for r in records if "judge" not in r.facts]
    return max(records, key=lambda r: (r.excess.value, r.attack), default=None)
