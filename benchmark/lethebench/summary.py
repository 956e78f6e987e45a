"""What ``lethe bench`` prints at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lethebench.row import Row, ScoreRecord

if TYPE_CHECKING:
    from lethebench.bench import Outcome

COLUMNS = ("fbmem.memorized", "fbmem.vm", "copy_mini.rate", "acc_g", "acc_l", "clip_mini.score", "fd_mini")
"""What is shown where a suite has it, after the scores of the suite's own axes."""


def print_summary(outcome: Outcome, page: Path) -> None:
    """A table of the rows, what was computed, and where the page is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=None)
    axes = [axis["score"] for row in outcome.rows[:1] for axis in row.axes.values()]
    first = [n for n in axes if n not in COLUMNS]
    names = [n for n in (*first, *COLUMNS) if any(n in r.scores for r in outcome.rows)]
    for heading in ("method", "setting", *names):
        table.add_column(heading)
    for row in outcome.rows:
        cells = [_cell(row, n) for n in names]
        table.add_row(row.method, row.setting, *cells)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    made = ", ".join(f"{n} {w}" for w, n in outcome.computed.items())
    print(f"{len(outcome.rows)} rows in {outcome.seconds:.1f} s; computed now: {made}")
    print(f"page: {page}")


def _cell(row: Row, name: str) -> str:
    if row.status != "ok":
        return row.status
    score = row.scores.get(name)
    return "not run" if score is None else number(score)


def number(score: ScoreRecord) -> str:
    """A score as ``0.123 [0.101, 0.150]``."""
    if score.value is None:
        return "-"
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
