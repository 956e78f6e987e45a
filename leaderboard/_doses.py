"""Panels over a dose: copies in the training set, how entangled two things are, the value of a setting.

Suppression and adherence over a correlation or a setting stand side by side, as a :class:`Pair`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._plot import (
    Dose,
    DoseLine,
    DosePoint,
    Panel,
    dose_order,
    dose_text,
    even_by_logarithm,
    panel,
)
from lethebench.leaderboard._rows import BASE, floor_of, measured, reference_of
from lethebench.row import Row, ScoreRecord, Slice

if TYPE_CHECKING:
    from lethebench.leaderboard._board import Line
    from lethebench.leaderboard._columns import Column

CORRELATION = "correlation"
FEWEST_VALUES = 3
"""Of a setting, to make a panel."""
_Where = Mapping[str, Any]


# --- copies ---------------------------------------------------------------------------------------


def by_copies(lines: Sequence[Line], headline: str) -> tuple[list[Panel], str]:
    """The dose-response of each method beside base, on the condition that most rows were sliced by.

    Where the suite compares with another row, that one stands for base, and the oracle is drawn too.
    """
    rows = [x.row for x in lines]
    condition = _condition(rows, headline, "duplicates")
    if condition is None:
        return [], ""
    base, floor = _ends(rows, headline, "duplicates", condition)
    found = {x.id: _sliced(x.row, headline, "duplicates", condition) for x in lines}
    tops = [p.value for d in found.values() if d for p in d.points]
    tops += [p.high for p in (base.points if base else ()) if p.high is not None]
    top = max(tops, default=1.0) or 1.0
    panels = [
        panel(method, colour, base, shaded, top, floor=floor)
        for method, colour, shaded in _by_method(lines, found)
    ]
    return panels, ", ".join(f"{k} {v}" for k, v in condition.items())


def _by_method(
    lines: Sequence[Line], found: Mapping[str, DoseLine | None]
) -> list[tuple[str, int, list[DoseLine]]]:
    """Of each method that is no control its name, its colour, and its lines, darker with strength."""
    result = []
    for method, group in groupby((x for x in lines if not x.row.control), key=lambda x: x.row.method):
        members = list(group)
        doses = [d for x in members if (d := found[x.id]) is not None]
        steps = max(1, len(doses) - 1)
        shaded = [replace(d, strength=i / steps if len(doses) > 1 else 1.0) for i, d in enumerate(doses)]
        if shaded:
            result.append((method, members[0].colour, shaded))
    return result


def _condition(rows: Sequence[Row], score: str, axis: str) -> dict[str, Any] | None:
    """What most slices of the score over the axis have in common; None where there are none."""
    conditions: dict[tuple[tuple[str, Any], ...], int] = {}
    for row in rows:
        for s in row.slices:
            if s.name == score and axis in s.where and s.value is not None:
                rest = tuple(sorted((k, v) for k, v in s.where.items() if k != axis))
                conditions[rest] = conditions.get(rest, 0) + 1
    if not conditions:
        return None
    first: tuple[tuple[str, Any], ...] = min(conditions, key=lambda c: (-conditions[c], len(c), repr(c)))
    return dict(first)


def _ends(
    rows: Sequence[Row], score: str, axis: str, condition: _Where
) -> tuple[DoseLine | None, DoseLine | None]:
    """The lines of the row that others are compared with and, unless that is base, of its oracle."""
    reference = reference_of(rows)
    names = [reference, *([floor_of(reference)] if reference != BASE else [])]
    ends = [measured(rows, name) for name in names]
    found = [None if row is None else _sliced(row, score, axis, condition) for row in ends]
    return found[0], found[1] if len(found) > 1 else None


def _sliced(row: Row, score: str, axis: str, condition: _Where) -> DoseLine | None:
    found = [s for s in row.slices if s.name == score and _fits(s, axis, condition)]
    points = [_dose_point(s, axis, bool(row.warnings)) for s in found]
    return DoseLine(row.setting, tuple(sorted(points, key=lambda p: dose_order(p.dose)))) if points else None


def _fits(s: Slice, axis: str, condition: _Where) -> bool:
    dose = s.where.get(axis)
    if s.value is None or isinstance(dose, bool | str) or dose is None:
        return False
    enough = dose >= 1 if axis == "duplicates" else True
    return enough and {k: v for k, v in s.where.items() if k != axis} == condition


def _dose_point(s: Slice, axis: str, flagged: bool) -> DosePoint:
    assert s.value is not None
    return DosePoint(float(s.where[axis]), s.value, s.low, s.high, flagged)


# --- pairs of panels ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableLine:
    """A line of a pair's table: the cells, (value, interval), are empty where nothing was measured."""

    score: str
    name: str
    is_end: bool
    """Whether it is not the method's, but the reference's or the oracle's."""
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pair:
    """A method's suppression and adherence over one axis, ``by``: a panel for each of the columns."""

    method: str
    colour: int
    by: str
    columns: tuple[Column, ...]
    panels: tuple[Panel, ...]
    help: str = ""
    rest: str = ""
    """What tells the rows from those of another pair over the same axis."""

    @property
    def heads(self) -> list[str]:
        """The values on the axis."""
        return [dose_text(d) for d in self._doses]

    @property
    def table(self) -> list[TableLine]:
        """What is drawn, in numbers."""
        return [
            TableLine(_head(c), d.line.name, d in (p.base, p.floor), self._cells(c, d.line))
            for c, p in zip(self.columns, self.panels, strict=True)
            for d in (p.base, *p.lines, p.floor)
            if d is not None
        ]

    @property
    def _doses(self) -> list[Dose]:
        return sorted({d for p in self.panels for d in p.doses}, key=dose_order)

    def _cells(self, column: Column, line: DoseLine) -> tuple[tuple[str, str], ...]:
        number = _number(column, [p.value for p in line.points])
        at = {p.dose: (number(p.value), number.interval(p.low, p.high)) for p in line.points}
        return tuple(at.get(dose, ("", "")) for dose in self._doses)


def _head(column: Column) -> str:
    return column.label + (" (%)" if column.unit == "%" else "")


def _number(column: Column, values: list[float]) -> fmt.NumberFormat:
    return fmt.number_format(values, None, "share" if column.unit == "%" else column.unit)


@dataclass(frozen=True)
class _Drawn:
    """What a panel shows of one score."""

    column: Column
    base: DoseLine | None
    floor: DoseLine | None
    lines: Sequence[DoseLine]

    def panel(self, method: str, colour: int, by: str) -> Panel:
        """Shares that should be low start at 0; intervals are drawn where the method has one line."""
        share, single = self.column.unit == "%", len(self.lines) == 1
        ends = [line for line in (self.base, self.floor) if line]
        low, high = _extent([*self.lines, *ends], [*self.lines, *ends] if single else ends)
        room = 0.06 * (high - low) or 0.06 * abs(high) or 0.06
        low, high = low - room, high + room
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
        if share and self.column.direction == "lower":
            low = 0.0
        number = _number(self.column, [low, high])
        doses = {p.dose for line in (*self.lines, *ends) for p in line.points}
        head = _head(self.column)
        return panel(
            f"{head} {self.column.arrow}".rstrip(), colour, self.base, self.lines, high, low, by,
            floor=self.floor, log=even_by_logarithm([d for d in doses if not isinstance(d, str)]),
            number=replace(number, decimals=0 if share else max(0, number.decimals - 1)),
            bars=single, about=f"{method}: {head}", y_ticks=3,
        )  # fmt: skip


def _extent(lines: Sequence[DoseLine], with_interval: Sequence[DoseLine]) -> tuple[float, float]:
    values = [p.value for line in lines for p in line.points]
    values += [v for line in with_interval for p in line.points for v in (p.low, p.high) if v is not None]
    return min(values), max(values)


def by_correlation(lines: Sequence[Line], columns: Sequence[Column]) -> list[Pair]:
    """Each method over how often what is wanted comes with what must not be learnt; empty without slices."""
    rows = [x.row for x in lines]
    drawn: dict[str, list[_Drawn]] = {}
    colours: dict[str, int] = {}
    for column in columns:
        condition = _condition(rows, column.key, CORRELATION)
        if condition is None:
            continue
        reference = reference_of(rows)
        base, floor = (
            line and replace(line, name=name)
            for line, name in zip(
                _ends(rows, column.key, CORRELATION, condition), (reference, floor_of(reference)), strict=True
            )
        )
        found = {x.id: _sliced(x.row, column.key, CORRELATION, condition) for x in lines}
        for method, colour, shaded in _by_method(lines, found):
            drawn.setdefault(method, []).append(_Drawn(column, base, floor, shaded))
            colours[method] = colour
    return [_pair(method, colours[method], CORRELATION, found) for method, found in drawn.items()]


def _pair(method: str, colour: int, by: str, drawn: Sequence[_Drawn], help: str = "", rest: str = "") -> Pair:
    columns = tuple(d.column for d in drawn)
    return Pair(method, colour, by, columns, tuple(d.panel(method, colour, by) for d in drawn), help, rest)


# --- settings -------------------------------------------------------------------------------------

_Settings = Mapping[str, Any]


def by_setting(rows: Sequence[Row], columns: Sequence[Column], colours: Mapping[str, int]) -> list[Pair]:
    """Each method over each setting in which at least three of its rows differ, and in nothing else.

    Of the values two or more must be numbers; others (``none``, a word) follow these on the axis. Controls
    are left out, and rows without a value of each of the columns.
    """
    usable = [r for r in rows if all(_record(r, c) is not None for c in columns)]
    result = []
    for method in dict.fromkeys(r.method for r in usable if not r.control):
        members = [(r, _settings(r)) for r in usable if r.method == method]
        for name in dict.fromkeys(key for _, settings in members for key in settings):
            sweeps = _sweeps(members, name)
            for sweep in sweeps:
                drawn = [_levels(usable, sweep, column) for column in columns]
                rest = _told_apart(name, sweep, sweeps)
                result.append(_pair(method, colours[method], name, drawn, _help(method, name), rest))
    return result


@dataclass(frozen=True)
class _Sweep:
    rows: Mapping[Dose, Row]
    settings: _Settings


def _sweeps(members: Sequence[tuple[Row, _Settings]], name: str) -> list[_Sweep]:
    """The rows by their value of the setting, for each choice of all other settings."""
    groups: dict[str, tuple[dict[Dose, Row], _Settings]] = {}
    for row, settings in members:
        if name in settings:
            others = json.dumps({k: v for k, v in settings.items() if k != name}, sort_keys=True, default=str)
            groups.setdefault(others, ({}, settings))[0].setdefault(_dose(settings[name]), row)
    return [_Sweep(found, settings) for found, settings in groups.values() if _is_axis(found)]


def _is_axis(values: Mapping[Dose, Any]) -> bool:
    return len(values) >= FEWEST_VALUES and sum(not isinstance(v, str) for v in values) >= 2


def _dose(value: Any) -> Dose:
    """A setting's value on an axis: itself if it is a number, else a word.

    >>> _dose(0.5), _dose(None), _dose(True)
    (0.5, 'none', 'true')
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _settings(row: Row) -> _Settings:
    """A row's settings by name, of a composition by part and name; none where it records them otherwise."""
    told = row.config.get("method")
    parts = {n: s for n, s in told.items() if isinstance(s, Mapping)} if isinstance(told, Mapping) else {}
    return {f"{n}.{k}" if len(parts) > 1 else str(k): v for n, s in parts.items() for k, v in s.items()}


def _levels(rows: Sequence[Row], sweep: _Sweep, column: Column) -> _Drawn:
    """The sweep's line; the rows at the scale's ends are level lines."""
    doses = sorted(sweep.rows, key=dose_order)
    reference = reference_of(rows)
    base, floor = (
        None if row is None else DoseLine(name, tuple(_point(row, column, d) for d in doses))
        for name in (reference, floor_of(reference))
        for row in (measured(rows, name),)
    )
    method = sweep.rows[doses[0]].method
    own = DoseLine(method, tuple(_point(sweep.rows[d], column, d) for d in doses))
    return _Drawn(column, base, floor, [own])


def _point(row: Row, column: Column, dose: Dose) -> DosePoint:
    record = _record(row, column)
    assert record is not None and record.value is not None
    return DosePoint(dose, record.value, record.low, record.high, bool(row.warnings) and not row.control)


def _record(row: Row, column: Column) -> ScoreRecord | None:
    record = row.scores.get(column.key) if row.status == "ok" else None
    return None if record is None or record.value is None else record


def _told_apart(name: str, sweep: _Sweep, sweeps: Sequence[_Sweep]) -> str:
    """The other settings in which a sweep differs from another one of the same setting."""
    several = [k for k in sweep.settings if k != name and len({str(s.settings.get(k)) for s in sweeps}) > 1]
    return ", ".join(f"{k} {dose_text(_dose(sweep.settings[k]))}" for k in several)


def _help(method: str, setting: str) -> str:
    """What the installed method says of the setting; empty where it isn't installed or says nothing."""
    from lethebench.registry import METHODS

    part, _, name = setting.rpartition(".")
    if (part or method) not in METHODS:  # a row's words never load a file
        return ""
    cls = METHODS.get(part or method)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return next((str(f.metadata.get("help", "")) for f in fields if f.name == name), "")
