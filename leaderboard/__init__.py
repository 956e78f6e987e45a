"""The leaderboard: rows in, tables and one self-contained HTML page out.

>>> from lethebench.leaderboard import build, load_rows, rows_frame   # doctest: +SKIP
>>> rows_frame(load_rows(Path("runs")))                               # doctest: +SKIP
>>> build(Path("runs"), Path("site"))                                 # doctest: +SKIP
PosixPath('site/index.html')
"""

from __future__ import annotations

from lethebench.leaderboard._build import build
from lethebench.leaderboard._rows import (
    Entry,
    InvalidRowWarning,
    Problem,
    Results,
    load_rows,
    rows_frame,
    scan,
)

__all__ = ["Entry", "InvalidRowWarning", "Problem", "Results", "build", "load_rows", "rows_frame", "scan"]
