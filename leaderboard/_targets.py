"""Quality against the number of unlearnt items and concepts, relative to base (UniForget's Figure 7).

Where the suite compares with another row, that one stands for base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._plot import Dose, DoseLine, DosePoint, Panel, panel
from lethebench.leaderboard._rows import measured, reference_of
from lethebench.row import Row

FRECHET = ("fd_mini", "fid")
"""The first of these that base has is drawn beside adherence (the paper draws FID and the CLIP score)."""

ROOM = 0.02
"""The scale shows at least this much below and above base, before its margins."""


@dataclass(frozen=True)
class Section:
    """Two plots and their numbers: (score, method, setting, ((number, value with interval), ...))."""

    panels: tuple[Panel, ...]
    lines: tuple[tuple[str, str, str, tuple[tuple[Dose, str], ...]], ...]


def section(rows: Sequence[Row], adherence: str, colours: Mapping[str, int]) -> Section | None:
    """The section of a board; None where no method was run at two numbers of targets.

    Methods that are given no targets are drawn as level lines, one a setting. The scale is that of the swept
    methods: a level line beyond it is named, with its value, not drawn.
    """
    base = measured(rows, reference_of(rows))
    swept = _swept(rows)
    if base is None or not swept:
        return None
    numbers = sorted({n for found in swept.values() for n, _ in found})
    untargeted = [
        r for r in rows if _competes(r) and r.knowledge == ("neutral-prompts",) and not _overridden(r)
    ]
    panels, table = [], []
    for name in (adherence, *(n for n in FRECHET if n in base.scores)):
        curves = [
            (method, DoseLine(f"{method} {setting}", _points(found, base, name), colour=colours[method]))
            for (method, setting), found in swept.items()
        ]
        levels = [
            (row.method, DoseLine(f"{row.method} {row.setting}", at, 0.5, colours[row.method]))
            for row in untargeted
            if (at := _points([(n, row) for n in numbers], base, name))
        ]
        curves = [(method, line) for method, line in curves if line.points]
        if curves:
            panels.append(_panel(name, base.method, curves, levels, numbers))
            table += [(name, m, x.name.removeprefix(f"{m} "), _cells(x)) for m, x in (*curves, *levels)]
    return Section(tuple(panels), tuple(table)) if panels else None


_Named = Sequence[tuple[str, DoseLine]]


def _panel(name: str, base: str, curves: _Named, levels: _Named, numbers: Sequence[int]) -> Panel:
    """One plot, its scale that of the curves with a margin of half its height on either side."""
    values = [p.value for _, line in curves for p in line.points]
    low, high = min(*values, 1 - ROOM), max(*values, 1 + ROOM)
    low, high = max(0.0, low - (high - low) / 2), high + (high - low) / 2
    inside = [(m, line) for m, line in levels if low <= line.points[0].value <= high]
    beyond = [f"{x.name} {fmt.percent(x.points[0].value)}" for m, x in levels if (m, x) not in inside]
    ones = DoseLine(base, tuple(DosePoint(n, 1.0, None, None) for n in numbers))
    shown = [*curves, *inside]
    title, lines = f"{name} / {base} (%)", [line for _, line in shown]
    drawn = panel(title, 0, ones, lines, high, low, "number of targets")
    key = dict.fromkeys((m, line.colour or 0) for m, line in shown)
    return replace(drawn, key=tuple(key), beyond=tuple(beyond))


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


def _points(found: Sequence[tuple[int, Row]], base: Row, name: str) -> tuple[DosePoint, ...]:
    return tuple(p for n, row in found if (p := _point(row, base, name, n)) is not None)


def _point(row: Row, base: Row, name: str, number: int) -> DosePoint | None:
    record, start = row.scores.get(name), base.scores[name].value
    if record is None or record.value is None or not start:
        return None
    d = record.base_difference
    low, high = (None, None) if d is None else ((start + d.low) / start, (start + d.high) / start)
    return DosePoint(number, record.value / start, low, high)


def _cells(line: DoseLine) -> tuple[tuple[Dose, str], ...]:
    short = fmt.NumberFormat(2)
    return tuple(
        (
            p.dose,
            short(p.value)
            + ("" if p.low is None or p.high is None else f" [{short(p.low)}, {short(p.high)}]"),
        )
        for p in line.points
    )
