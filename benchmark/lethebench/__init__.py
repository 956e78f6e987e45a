"""Lethe: a benchmark of memorization mitigation in text-to-image diffusion models.

>>> import lethebench
>>> lethebench.load_suite("planted").model
'mini-sd'

``lethebench.run(["uniforget"], suite="smoke")`` benches a method, ``lethebench.load_rows("runs")``
reads results as a pandas DataFrame. Importing the package is light; the work imports what it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.specs import load_suite

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.bench import Outcome

__version__ = "0.1.0"
__all__ = ["load_rows", "load_suite", "run"]


def run(methods: list[str], **options: Any) -> Outcome:
    """Bench methods and write their rows: see :func:`lethebench.bench.run` for the options."""
    from lethebench.bench import run as bench

    return bench(methods, **options)


def load_rows(runs: str | Path = "runs") -> pd.DataFrame:
    """The rows below a folder as a DataFrame: see :func:`lethebench.leaderboard.rows_frame`."""
    from lethebench.leaderboard import load_rows as read
    from lethebench.leaderboard import rows_frame

    return rows_frame(read(Path(runs)))
