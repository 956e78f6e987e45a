"""Comic characters (FiveThirtyEight's DC and Marvel tables): the Comic set of UniForget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lethebench.promptfiles.readers import Table
from lethebench.promptfiles.sets import FilePromptSet, Item
from lethebench.promptfiles.specs import Columns, Layout
from lethebench.prompts import Role
from lethebench.registry import PROMPT_SETS

_IN_BRACKETS = re.compile(r"(\s*\([^()]*\))+$")
_ESCAPED = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["/\\]))')
_LEFT_OUT = {"dc": {"403631", "49157", "224129"}, "marvel": {"194000", "48680", "287363"}}
"""Pages that are no characters: one for trying things out, and living heads of state."""


def character_name(written: str) -> str:
    r"""A character's name as people say it: escapes resolved, what stands in brackets at the end removed.

    That is a universe for nearly all, and for a few dozen of the best known who is behind the mask.

    >>> character_name(r"Armando Mu\u00f1oz (Earth-616)")
    'Armando Muñoz'
    >>> character_name(r'Wolverine (James \"Logan\" Howlett)')
    'Wolverine'
    """
    plain = _ESCAPED.sub(lambda m: chr(int(m[1], 16)) if m[1] else m[2], written)
    return _IN_BRACKETS.sub("", plain).strip()


def _described(universe: str, cells: Mapping[str, str]) -> dict[str, str] | None:
    if cells["page_id"] in _LEFT_OUT[universe]:
        return None
    return {
        "character": character_name(cells["name"]),
        "universe": universe,
        "key": f"{universe}-{cells['page_id']}",
        "appearances": str(int(cells["APPEARANCES"] or 0)),
    }


@PROMPT_SETS.register
class Comic(FilePromptSet):
    """The 2,000 characters of DC and Marvel with most appearances, one prompt each.

    UniForget has 2,000 characters of these tables, "preselected" by a VLM as likely to be drawn, and prints
    neither the list nor the prompts: that the best known stand for them, the names' cleaning
    (:func:`character_name`) and the template are ours. Of characters of one name the best known counts. Left
    out are a wiki's test page and the heads of state among the characters who are living persons (ours).
    """

    name = "comic"
    summary = "2,000 comic characters of DC and Marvel with most appearances (FiveThirtyEight)"
    files = ("comic_characters/dc-wikia-data.csv", "comic_characters/marvel-wikia-data.csv")
    layout = Layout(
        columns=Columns(concept="character", id="key"),
        attributes={"universe": "universe", "appearances": "appearances"},
        role=Role.CONCEPT,
        kind="comic",
        category="comic",
        templates=("a comic book illustration of {concept}",),
        anchor="a comic character",
        limit=2000,
    )

    def tables(self) -> Sequence[Table]:
        """Both tables; of characters of one name, those with most appearances."""
        universes = dict(zip(self.files, ("dc", "marvel"), strict=True))
        tables = [
            self.read(name).derived(partial(_described, universe)) for name, universe in universes.items()
        ]
        most: dict[str, int] = {}
        for row in (row for table in tables for row in table.rows):
            character, count = row.cells["character"], int(row.cells["appearances"])
            most[character] = max(count, most.get(character, 0))
        return [
            table.derived(lambda cells: {} if int(cells["appearances"]) == most[cells["character"]] else None)
            for table in tables
        ]

    def order(self, item: Item) -> Any:
        """By appearances, then by id."""
        return -int(item.attributes["appearances"]), item.id
