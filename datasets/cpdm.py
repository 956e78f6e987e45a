"""Anime and celebrities (CPDM, Ma et al. 2024): two sets of UniForget, from lists of names that you give.

CPDM's layout isn't published, so any list of names serves: a table with a column ``name`` or ``concept``, or
a text with a name a line.
"""

from __future__ import annotations

from lethebench.promptfiles.sets import FilePromptSet
from lethebench.promptfiles.specs import Layout
from lethebench.prompts import Role
from lethebench.registry import PROMPT_SETS


@PROMPT_SETS.register
class Anime(FilePromptSet):
    """Names of anime or their characters, at most the 100 of UniForget; the template is ours."""

    name = "anime"
    summary = "100 anime names of a list that you give (CPDM's, say)"
    files = ("cpdm/anime.csv",)
    layout = Layout(
        role=Role.CONCEPT,
        kind="anime",
        category="anime",
        templates=("an anime illustration of {concept}",),
        anchor="an anime character",
        limit=100,
    )


@PROMPT_SETS.register
class Celebrity(FilePromptSet):
    """Names of celebrities, at most the 700 of UniForget, only where names of living persons are allowed.

    The template is that of the one prompt that the paper prints.
    """

    name = "celebrity"
    summary = "700 celebrities of a list that you give (CPDM's, say); needs --allow living-persons"
    files = ("cpdm/celebrity.csv",)
    layout = Layout(
        role=Role.CONCEPT,
        kind="celebrity",
        category="celebrity",
        templates=("A photo of {concept}",),
        anchor="a person",
        limit=700,
    )
