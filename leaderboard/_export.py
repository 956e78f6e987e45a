"""The same rows for programs and papers: CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lethebench.leaderboard import _attacks
from lethebench.leaderboard._board import Board, Line
from lethebench.leaderboard._columns import Cell, Column
from lethebench.leaderboard._rows import Problem, rows_frame

JSON_SCHEMA = "lethe/leaderboard/1"
_MISSING = {"failed": "failed", "not-run": "not run", "not-applicable": "n/a"}


def csv_text(boards: Sequence[Board]) -> str:
    """Every row of every board as one CSV table: ranks, the columns of ``rows_frame``, the best known."""
    lines = [line for board in boards for line in board.lines]
    frame = rows_frame([line.row for line in lines])
    frame.insert(0, "rank_first", [line.rank.first for line in lines])
    frame.insert(1, "rank_last", [line.rank.last for line in lines])
    told = [_best_known(line) for line in lines]
    for name in _BEST_KNOWN:
        frame[f"best_known{name}"] = [t.get(name) for t in told]
    whole = {"rank_first": "Int64", "rank_last": "Int64"} | {
        c: "Int64" for c in frame if str(c).endswith(".n")
    }
    text: str = frame.astype(whole).map(_inert).to_csv(index=False, lineterminator="\n")
    return text


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, marked as a text.

    >>> _inert("=1+1"), _inert("uce"), _inert(-0.5)
    ("'=1+1", 'uce', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


_BEST_KNOWN = ("", ".low", ".high", ".n", ".attack", ".by", ".how", ".memorized", ".control")


def _best_known(line: Line) -> dict[str, Any]:
    """The best known of a row; empty where nobody attacked it. ``attack`` is empty where none beats the row's
    own draws.
    """
    found = _attacks.best(line.attacks)
    if found is None or line.failed:
        return {}
    r = found.record
    raw, control = (r.plain, r.plain_control) if found.plain else (r.memorized, r.control)
    who = ("", "", "") if found.plain else (r.attack, r.by, r.how)
    values = (found.value, found.low, found.high, raw.n, *who, raw.value, control.value)
    return dict(zip(_BEST_KNOWN, values, strict=True))


def json_text(boards: Sequence[Board], problems: Sequence[Problem]) -> str:
    """Every row whole, with its rank and the attacks on it; and what could not be read."""
    data = {
        "schema": JSON_SCHEMA,
        "boards": [_board_data(b) for b in boards],
        "problems": [{"path": p.path, "reason": p.reason} for p in problems],
    }
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _board_data(board: Board) -> dict[str, Any]:
    return {
        "suite": board.suite,
        "model": board.model,
        "reference": board.reference,
        "axes": {k: dict(v) for k, v in board.axes.items()},
        "smallest_difference": board.resolution,
        "rows": [
            {"rank": {"first": x.rank.first, "last": x.rank.last, "note": x.rank.note}}
            | {"best_known": {k.lstrip(".") or "value": v for k, v in _best_known(x).items()} or None}
            | {"attacks": [r.model_dump(mode="json", by_alias=True) for r in x.attacks]}
            | x.row.model_dump(mode="json", by_alias=True)
            for x in board.lines
        ],
    }


def markdown_text(boards: Sequence[Board]) -> str:
    """A Markdown table for each board, without the columns of the group *More scores*."""
    return "\n".join(_markdown_board(b) for b in boards)


def _markdown_board(board: Board) -> str:
    shown = _shown(board)
    heads = ["#", "Method", "Setting", "Family", "Sees", *(_heading(c) for c in shown)]
    rule = ["--:", "---", "---", "---", "---", *("--:" for _ in shown)]
    lines = [_markdown_line(board, line, shown) for line in board.lines]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in ([*map(_md, heads)], rule, *lines))
    told = f"{_md(_track(board))}\n\n" if board.training else ""
    return f"## {_md(board.suite)}, {_md(board.model)}\n\n{told}{table}\n"


def _track(board: Board) -> str:
    return (
        f"Training-time track: rows are compared with {board.reference}, plain fine-tuning; {board.floor}, "
        "fine-tuned without the attribute, is the floor."
    )


def _markdown_line(board: Board, line: Line, shown: Sequence[Column]) -> list[str]:
    r = line.row
    first = [line.rank.text, r.method, r.setting, r.family, ", ".join(line.knowledge)]
    return [*map(_md, first), *(_md_cell(board.cell(line, c.key)) for c in shown)]


def _md_cell(cell: Cell) -> str:
    if cell.state != "ok":
        return f"*{_MISSING[cell.state]}*"
    value = f"**{cell.text}**" if cell.best else cell.text
    return f"{value} ({cell.interval})" if cell.interval else value


def _md(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text.replace("\n", " "))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def latex_text(boards: Sequence[Board]) -> str:
    """A ``booktabs`` table for each board; the best of a column is bold."""
    return "% Needs \\usepackage{booktabs}. Small figures: 95 % intervals.\n" + "\n".join(
        map(_latex_board, boards)
    )


def _latex_board(board: Board) -> str:
    shown = _shown(board)
    heads = ["\\#", "Method", "Setting", *(_tex(_heading(c)) for c in shown)]
    lines = []
    for i, line in enumerate(board.lines):
        if i == len(board.controls) and i:
            lines.append("\\midrule")
        first = [_tex(line.rank.text), _tex(line.row.method), _tex(line.row.setting)]
        lines.append(" & ".join([*first, *(_tex_cell(board.cell(line, c.key)) for c in shown)]) + r" \\")
    body = "\n".join(lines)
    spec = "rll" + "r" * len(shown)
    top = " & ".join(heads) + r" \\"
    told = f"% {_comment(_track(board))}\n" if board.training else ""
    return (
        f"% {_comment(board.name)}\n{told}\\begin{{tabular}}{{{spec}}}\n\\toprule\n{top}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def _tex_cell(cell: Cell) -> str:
    if cell.state != "ok":
        return f"\\textit{{{_MISSING[cell.state]}}}"
    value = f"\\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
    return f"{value} {{\\scriptsize {_tex(cell.interval)}}}" if cell.interval else value


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "–": "--",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "×": r"$\times$",
    "\u202f": r"\,",
    "\n": " ",
} | {c: f"\\{c}" for c in "{}$&#%_"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def _comment(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")


def _shown(board: Board) -> list[Column]:
    return [c for c in board.columns if c.group != "more"]


def _heading(column: Column) -> str:
    return " ".join(t for t in (column.label, "(%)" if column.unit == "%" else "", column.arrow) if t)
