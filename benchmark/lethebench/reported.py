"""What papers report: published numbers beside a suite's own rows, and never among them.

A file ``suites/reported/<suite>.yaml`` holds the tables that the suite follows. They are shown apart from
what was measured, by ``lethe info suite`` and on the page; they have no rank, no interval and no place in a
plot or an export.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lethebench.errors import UserError
from lethebench.specs import Spec, first_error

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent / "suites" / "reported"


class Source(Spec):
    """Where the numbers stand, and how they were read.

    ``read``: ``paper`` (its own text), ``repository`` (the authors' code or notes there) or ``second hand``.
    """

    paper: str
    table: str
    link: str = ""
    read: Literal["paper", "repository", "second hand"]


class ReportedScore(Spec):
    """A column of a published table.

    ``nearest`` is the score of the suite that comes closest, "" where there is none; the two need not be
    comparable, and ``about`` says why not.
    """

    title: str
    unit: str
    direction: Literal["lower", "higher", "none"]
    digits: int = Field(default=1, ge=0, le=6)
    """After the point, as printed."""
    nearest: str = ""
    about: str = ""


class ReportedRow(Spec):
    """A line of a published table.

    ``method`` and ``setting`` are Lethe's names for what ``label`` stands for, "" for what Lethe hasn't.
    """

    label: str
    method: str
    setting: str
    model: str
    scores: dict[str, float] = Field(min_length=1)
    spread: dict[str, float] = Field(default_factory=dict)
    """What stands behind the table's plus or minus, by score."""


class ReportedTable(Spec):
    """A published table, with what is to be known of it."""

    source: Source
    scores: dict[str, ReportedScore] = Field(min_length=1)
    rows: tuple[ReportedRow, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _of_its_columns(self) -> ReportedTable:
        for row in self.rows:
            for name in (*row.scores, *row.spread):
                if name not in self.scores:
                    raise ValueError(f"row '{row.label}' has a score '{name}' that the table has not")
            if unpaired := row.spread.keys() - row.scores.keys():
                raise ValueError(f"row '{row.label}' has a spread of '{min(unpaired)}' and no value")
        labels = [(row.label, row.model) for row in self.rows]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"row '{label[0]}' is there twice")
        return self

    @property
    def name(self) -> str:
        """The paper and its table."""
        return f"{self.source.paper}, {self.source.table}"

    def cell(self, row: ReportedRow, score: str) -> str:
        """A number as it was printed, with its plus or minus; "" where there is none."""
        if score not in row.scores:
            return ""
        digits = self.scores[score].digits
        spread = f" ± {row.spread[score]:.{digits}f}" if score in row.spread else ""
        return f"{row.scores[score]:.{digits}f}{spread}"

    def frame(self) -> pd.DataFrame:
        """The table as text: ``label``, ``method``, ``setting``, ``model``, and a column a score."""
        import pandas as pd

        lines = [
            {"label": r.label, "method": r.method, "setting": r.setting, "model": r.model}
            | {name: self.cell(r, name) for name in self.scores}
            for r in self.rows
        ]
        return pd.DataFrame(lines)


class Reported(Spec):
    """What papers report for some suites: the first is the tables' own, which the file is named after.

    Others draw part of its images (a lite tier) or part of its rows.
    """

    schema_: Literal["lethe/reported/1"] = Field(alias="schema")
    suites: tuple[str, ...] = Field(min_length=1)
    tables: tuple[ReportedTable, ...] = Field(min_length=1)


def reported(suite: str) -> Reported | None:
    """What papers report for the suite of that name; None where nothing is known."""
    return next((found for found in all_reported() if suite in found.suites), None)


@lru_cache(maxsize=1)
def all_reported() -> tuple[Reported, ...]:
    """Every file of reported rows in the package. Raises UserError for one that is not valid."""
    return tuple(read_reported(path) for path in sorted(FOLDER.glob("*.yaml")))


def read_reported(path: Path) -> Reported:
    """A file of reported rows. Raises UserError naming the file and the first thing that is wrong."""
    import yaml

    try:
        found = Reported.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        raise UserError(f"{path} is no file of reported rows: {first_error(error)}") from error
    if found.suites[0] != path.stem:
        raise UserError(f"{path} is of suite '{found.suites[0]}': name the file after it")
    return found


def as_record(found: Reported) -> dict[str, Any]:
    """For ``lethe info suite``: each table under its name, and what is to be known of it."""
    record: dict[str, Any] = {}
    for table in found.tables:
        record[f"reported, not measured by Lethe: {table.name} (read: {table.source.read})"] = table.frame()
        about = [f"{name}: {s.title}, {s.unit}; {s.about}".rstrip("; ") for name, s in table.scores.items()]
        record[f"notes on {table.source.table}"] = dict(enumerate([*about, *table.notes], start=1))
    return record
