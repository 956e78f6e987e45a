"""Two rows of one board against each other: paired differences on the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lethebench.errors import UserError
from lethebench.plan import file_name, make_metric
from lethebench.row import Difference, Row, read_row

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.metric import Metric, Score
    from lethebench.specs import Suite

RESAMPLES = 2000


@dataclass(frozen=True)
class Compared:
    """One score of two rows: both values and the first minus the second."""

    score: str
    direction: str
    first: float | None
    second: float | None
    difference: Difference | None

    @property
    def better(self) -> str:
        """``first`` or ``second`` where the interval of the difference leaves 0 out, else an empty text."""
        d = self.difference
        if d is None or self.direction == "none" or d.low <= 0 <= d.high:
            return ""
        return "first" if (d.value < 0) == (self.direction == "lower") else "second"


def row_folder(name: str, runs: Path, suite: str, model: str) -> Path:
    """The folder of a row: a path, or ``METHOD/SETTING`` of the suite (``name@version``) on the model.

    ``model`` is named as its rows' folder is, or as anywhere. Raises UserError where there is no such row.
    """
    given = Path(name)
    if (given / "row.json").is_file():
        return given
    method, slash, setting = name.partition("/")
    board = runs / suite / file_name(model)
    if not board.is_dir():
        from lethebench.zoo import find_model

        board = runs / suite / file_name(find_model(model).name)
    folder = board / file_name(method)
    settings = sorted(p.parent.name for p in folder.glob("*/row.json"))
    if not settings:
        raise UserError(f"no row of {method} in {folder.parent}: run 'lethe bench {method}' first")
    if not slash and len(settings) == 1:
        return folder / settings[0]
    found = folder / file_name(setting)
    if not (found / "row.json").is_file():
        raise UserError(f"{method} has no row '{setting}' there: known {', '.join(settings)}")
    return found


def compare_rows(
    first: Path, second: Path, scores: Sequence[str] = (), suite: Suite | None = None
) -> list[Compared]:
    """Every score that both rows have (or those named), the first minus the second, paired.

    The interval is a bootstrap over clusters, p from the sign-flip test (``lethebench.stats``). ``suite`` is
    the rows' own, for metrics that only it can name (by a path). Raises UserError for rows of different
    boards, for unknown scores, and where a row has no table of its images.
    """
    from lethebench import stats
    from lethebench.leaderboard._rank import mismatch, scorer

    rows = [read_row(folder / "row.json") for folder in (first, second)]
    one, other = rows
    if one.key[:2] != other.key[:2]:
        raise UserError(
            f"rows of different boards don't compare: {'/'.join(one.key[:2])}, {'/'.join(other.key[:2])}"
        )
    tables = [_table(folder, row) for folder, row in zip((first, second), rows, strict=True)]
    shared = [n for n in one.scores if n in other.scores]
    unknown = sorted(set(scores) - set(shared))
    if unknown:
        raise UserError(f"the rows don't both have a score '{unknown[0]}': known {', '.join(shared)}")
    own = {}
    if suite is not None and suite.key == one.key[0]:
        own = {m.name: m for m in map(make_metric, suite.metrics)}
    found = []
    for name in scores or shared:
        metric = own.get(one.scores[name].metric)
        made = scorer(one, name) if metric is None else _found(metric, name)
        if made is None:
            raise UserError(f"no metric '{one.scores[name].metric}' that gives {name} is installed")
        for row, table in zip(rows, tables, strict=True):
            reason = mismatch(*made, row.scores[name], table)
            if reason:
                raise UserError(f"{row.method}/{row.setting}: {reason}")
        difference = stats.compare(*made, *tables, resamples=RESAMPLES, seed_parts=(one.key[0], name))
        values = (one.scores[name].value, other.scores[name].value)
        found.append(Compared(name, one.scores[name].direction, *values, difference))
    return found


def _found(metric: Metric, name: str) -> tuple[Metric, Score] | None:
    score = next((s for s in metric.all_scores() if s.name == name), None)
    return None if score is None else (metric, score)


def _table(folder: Path, row: Row) -> pd.DataFrame:
    import pandas as pd

    path = folder / "images.parquet"
    if row.status != "ok" or not path.is_file():
        raise UserError(f"{row.method}/{row.setting} has no measured images ({row.status})")
    return pd.read_parquet(path)


def print_comparison(first: str, second: str, found: Sequence[Compared]) -> None:
    """A table on the terminal."""
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("score", first, second, "difference", "95 % interval", "p", "better"):
        table.add_column(heading)
    for one in found:
        d = one.difference
        table.add_row(
            f"{one.score} {'↓' if one.direction == 'lower' else '↑' if one.direction == 'higher' else ''}",
            *("-" if v is None else f"{v:.3f}" for v in (one.first, one.second)),
            *(
                ("-", "-", "-")
                if d is None
                else (f"{d.value:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", f"{d.p:.4f}")
            ),
            {"first": first, "second": second, "": ""}[one.better],
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
