"""Quality against the number of unlearnt items and concepts, relative to base (UniForget's Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._plot import DoseLine, DosePoint, Panel, panel
from lethebench.row import Row

FRECHET = ("fd_mini", "fid")
"""The first of these that base has is drawn beside adherence (the paper draws FID and the CLIP score)."""


@dataclass(frozen=True)
class Section:
    """Two plots and their numbers: (score, method, setting, ((number, value with interval), ...))."""

    panels: tuple[Panel, ...]
    lines: tuple[tuple[str, str, str, tuple[tuple[int, str], ...]], ...]


def section(rows: Sequence[Row], adherence: str, colours: Mapping[str, int]) -> Section | None:
    """The section of a board; None where no method was run at two numbers of targets.

    Methods that are given no targets are drawn as level lines, one a setting.
    """
    base = next((r for r in rows if r.method == "base" and r.status == "ok"), None)
    swept = _swept(rows)
    if base is None or not swept:
        return None
    numbers = sorted({n for found in swept.values() for n, _ in found})
    untargeted = [
        r for r in rows if _competes(r) and r.knowledge == ("neutral-prompts",) and not _overridden(r)
    ]
    panels, table = [], []
    for name in (adherence, *(n for n in FRECHET if n in base.scores)):
        drawn: list[tuple[str, DoseLine]] = []
        for (method, setting), found in swept.items():
            points = [p for n, row in found if (p := _point(row, base, name, n)) is not None]
            drawn.append((method, DoseLine(f"{method} {setting}", tuple(points), colour=colours[method])))
        for row in untargeted:
            level = [p for n in numbers if (p := _point(row, base, name, n)) is not None]
            name_of = f"{row.method} {row.setting}"
            drawn.append((row.method, DoseLine(name_of, tuple(level), 0.5, colours[row.method])))
        kept = [(m, line) for m, line in drawn if line.points]
        values = [v for _, line in kept for p in line.points for v in (p.value, 1.0)]
        if values:
            room = 0.05 * (max(values) - min(values)) or 0.05
            ones = DoseLine("base", tuple(DosePoint(n, 1.0, None, None) for n in numbers))
            shown = [line for _, line in kept]
            panels.append(
                panel(
                    f"{name} / base",
                    0,
                    ones,
                    shown,
                    max(values) + room,
                    max(0.0, min(values) - room),
                    "number of targets",
                )
            )
            table += [(name, m, line.name.removeprefix(f"{m} "), _cells(line)) for m, line in kept]
    return Section(tuple(panels), tuple(table)) if panels else None


def _swept(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[int, Row]]]:
    """By method and setting but for ``count``, its rows by number of targets: where there are two or more."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        clusters = row.cost.clusters if row.cost is not None else None
        if _competes(row) and clusters:
            rest = [part for part in row.setting.split(",") if not part.startswith("count=")]
            found.setdefault((row.method, ", ".join(rest)), {})[clusters] = row
    return {key: sorted(by.items()) for key, by in found.items() if len(by) > 1}


def _competes(row: Row) -> bool:
    return row.status == "ok" and not row.control


def _overridden(row: Row) -> bool:
    return "," in row.setting


def _point(row: Row, base: Row, name: str, number: int) -> DosePoint | None:
    record, start = row.scores.get(name), base.scores[name].value
    if record is None or record.value is None or not start:
        return None
    d = record.base_difference
    low, high = (None, None) if d is None else ((start + d.low) / start, (start + d.high) / start)
    return DosePoint(number, record.value / start, low, high)


def _cells(line: DoseLine) -> tuple[tuple[int, str], ...]:
    short = fmt.NumberFormat(2)
    return tuple(
        (
            p.dose,
            short(p.value)
            + ("" if p.low is None or p.high is None else f" [{short(p.low)}, {short(p.high)}]"),
        )
        for p in line.points
    )
