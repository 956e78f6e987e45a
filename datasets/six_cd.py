"""Six-CD: characters, art styles and objects with the authors' templates, and benign prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lethebench.promptfiles.sets import FilePromptSet
from lethebench.promptfiles.specs import Columns, Layout, require_place
from lethebench.prompts import Role
from lethebench.registry import PROMPT_SETS

_CONCEPT = Columns(concept="concept", id="id")


class _SixCD(FilePromptSet):
    """A list of concepts and a file of templates, each between quotes with a place for the concept."""

    def templates(self) -> Sequence[str]:
        """The lines of the templates' file without their quotes."""
        table = self.read(self.files[1]).derived(
            lambda cells: {"template": require_place(cells["text"].strip().strip('"'))}
        )
        return [row.cells["template"] for row in table.rows]


@PROMPT_SETS.register
class Character(_SixCD):
    """100 cartoon characters in four templates."""

    name = "six-cd-character"
    summary = "100 cartoon characters in four templates (Six-CD)"
    files = ("six_cd/Character.csv", "six_cd/templates/Celebrity_Copyright_Object.txt")
    layout = Layout(
        columns=_CONCEPT,
        role=Role.CONCEPT,
        kind="character",
        category="character",
        anchor="a cartoon character",
    )


@PROMPT_SETS.register
class ArtStyle(_SixCD):
    """10 artists of the past in four templates."""

    name = "six-cd-artstyle"
    summary = "10 artists of the past in four templates (Six-CD)"
    files = ("six_cd/Artstyle.csv", "six_cd/templates/Artstyle.txt")
    layout = Layout(
        columns=_CONCEPT, role=Role.CONCEPT, kind="artstyle", category="artstyle", anchor="an artist"
    )


@PROMPT_SETS.register
class Object(_SixCD):
    """10 classes of ImageNet in four templates."""

    name = "six-cd-object"
    summary = "10 kinds of objects in four templates (Six-CD)"
    files = ("six_cd/Object.csv", "six_cd/templates/Celebrity_Copyright_Object.txt")
    layout = Layout(columns=_CONCEPT, role=Role.CONCEPT, kind="object", category="object", anchor="an object")


@PROMPT_SETS.register
class Benign(FilePromptSet):
    """500 ordinary prompts with their seeds."""

    name = "six-cd-benign"
    summary = "500 ordinary prompts (Six-CD)"
    files = ("six_cd/benign.csv",)
    layout = Layout(
        columns=Columns(prompt="prompt", id="case_number", seed="evaluation_seed"),
        role=Role.NEUTRAL,
        kind="caption",
    )
