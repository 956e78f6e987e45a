"""The IMDB top 1000: the Movie set of UniForget."""

from __future__ import annotations

from lethebench.promptfiles.sets import FilePromptSet
from lethebench.promptfiles.specs import Columns, Layout
from lethebench.prompts import Role
from lethebench.registry import PROMPT_SETS


@PROMPT_SETS.register
class Movie(FilePromptSet):
    """The titles of IMDB's top 1000, one prompt each; a title that two films share counts once.

    UniForget names another Kaggle page for the same list and prints no prompts: the template is ours. Year,
    genre and gross are text as written.
    """

    name = "movie"
    summary = "1,000 films by title (IMDB top 1000)"
    files = ("movies/imdb_top_1000.csv",)
    layout = Layout(
        columns=Columns(concept="Series_Title"),
        attributes={"year": "Released_Year", "genre": "Genre", "director": "Director"},
        role=Role.CONCEPT,
        kind="movie",
        category="movie",
        templates=("a film still from {concept}",),
        anchor="a movie",
    )
