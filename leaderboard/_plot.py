"""Geometry of the two plots. The template only writes what is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from lethebench.leaderboard._format import NumberFormat

COLOURS = 8
SHAPES = {
    "weights": ("circle", "square", "pentagon"),
    "sampling": ("diamond", "triangle", "wedge"),
    "training": ("hexagon", "star"),
}
"""A family's shapes: the next one where its methods are more than the colours."""
NEAR = 0.02
"""The loss, as a share of base (of the row that all are compared with), up to which the scale of adherence is
about linear; beyond it logarithmic."""
LOSSES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0, -0.01, -0.02, -0.05, -0.1, -0.2, -0.5, -1.0)
"""Where it may have ticks."""
CHARACTER = 6.3
"""Mean width of a character of a label in the plot's units (measured at 12 px in Liberation Sans)."""


@dataclass(frozen=True)
class Series:
    """A method's points, weakest setting first."""

    name: str
    colour: int
    shape: str
    family: str
    control: bool
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Point:
    """A row on the plot: value and interval on both axes."""

    row: str
    setting: str
    x: float
    y: float
    x_low: float | None
    x_high: float | None
    y_low: float | None
    y_high: float | None
    note: str
    flagged: bool = False


@dataclass(frozen=True)
class Mark:
    """A point as it is drawn."""

    point: Point
    series: Series
    x: float
    y: float
    radius: float
    cross: tuple[float, float, float, float] | None
    """Ends of the interval cross: left, right, top, bottom."""
    outside: str = ""
    """``above`` or ``below`` where the point lies outside the plot and is drawn at its edge."""

    @property
    def path(self) -> str:
        """The outline of the point's shape around (0, 0)."""
        return outline(self.series.shape, self.radius)


@dataclass(frozen=True)
class Tick:
    """A tick of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Label:
    """A series' name beside its curve."""

    text: str
    x: float
    y: float
    anchor: str
    colour: int
    control: bool


@dataclass(frozen=True)
class Scatter:
    """Suppression against adherence, as it is drawn."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str
    curves: tuple[tuple[Series, str], ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    front: str
    band: tuple[str, ...]
    """The front in some resamples."""
    better_right: bool
    better_up: bool


@dataclass(frozen=True)
class Axis:
    """An axis of the plot: its label, number format and better direction."""

    label: str
    format: NumberFormat
    better: str
    """``lower``, ``higher`` or ``none``."""


@dataclass(frozen=True)
class Scale:
    """Values on pixels. Spread out near a ``centre``: about linear up to :data:`NEAR`, logarithmic beyond."""

    low: float
    high: float
    start: float
    end: float
    centre: float | None = None

    def __call__(self, value: float) -> float:
        """The place of a value, in pixels."""
        low, high, at = (self._bent(v) for v in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)

    def _bent(self, value: float) -> float:
        if not self.centre:
            return value
        away = (value - self.centre) / abs(self.centre)
        return math.copysign(math.log1p(abs(away) / NEAR), away)


def scatter(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    front: frozenset[str],
    fronts: Sequence[Sequence[tuple[float, float]]],
    width: int,
    height: int,
    most_labels: int,
    reference: str = "base",
) -> Scatter:
    """Lay out the plot. ``front`` names the rows on the Pareto front, ``fronts`` are its resamples.

    With the method on it that all are compared with (``reference``) the scale of ``y`` is relative to it.
    """
    left, right, top, bottom = 56.0, width - 14.0, 14.0, height - 46.0
    sx = _scale_of(list(series), "x", x.format.percent, left, right)
    sy = _scale_of(
        [s for s in series if not s.control or s.name == reference] or list(series), "y", False, bottom, top
    )
    base = next((s.points[0].y for s in series if s.name == reference), 0.0)
    if base:
        values = [p.y for s in series if not s.control or s.name == reference for p in s.points]
        room = NEAR / 2 * abs(base)
        sy = Scale(min(values) - room, max(values) + room, bottom, top, base)
    marks = tuple(_mark(p, s, i, sx, sy, top, bottom) for s in series for i, p in enumerate(s.points))
    curves = tuple(
        (s, _path([(m.x, m.y) for m in marks if m.series is s])) for s in series if len(s.points) > 1
    )

    def stairs(points: Sequence[tuple[float, float]]) -> str:
        inside = [(sx(a), min(max(sy(b), top), bottom)) for a, b in points]
        return _steps(inside, x.better, y.better, left, right)

    corner = _Box(right - 74, 0, right, 0) if x.better == "higher" else _Box(left, 0, left + 74, 0)
    arrow = (
        replace(corner, y0=top, y1=top + 40)
        if y.better != "lower"
        else replace(corner, y0=bottom - 40, y1=bottom)
    )
    frame = _Box(left, top, right, bottom)
    return Scatter(
        width, height, left, right, top, bottom,
        _labelled(sx, x.format, ticks(sx.low, sx.high, 6 if width > 500 else 4)),
        _relative_ticks(sy, reference) if base else _labelled(sy, y.format, ticks(sy.low, sy.high, 5)),
        x.label, f"{y.label}, relative to {reference} (%)" if base else y.label, curves, marks,
        tuple(_labels(series, front, marks, frame, arrow, reference)[:most_labels]),
        stairs([(m.point.x, m.point.y) for m in marks if m.point.row in front]),
        tuple(stairs(f) for f in fronts),
        x.better == "higher", y.better != "lower",
    )  # fmt: skip


def _scale_of(series: Sequence[Series], axis: str, from_zero: bool, start: float, end: float) -> Scale:
    values = [v for s in series for p in s.points for v in _extent(p, axis)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = 0.0
    pad = (high - low or abs(high) or 1.0) * 0.06
    return Scale(low - (pad / 2 if from_zero else pad), high + pad, start, end)


def _extent(point: Point, axis: str) -> list[float]:
    found = (point.x, point.x_low, point.x_high) if axis == "x" else (point.y, point.y_low, point.y_high)
    return [v for v in found if v is not None]


def _mark(point: Point, series: Series, place: int, sx: Scale, sy: Scale, top: float, bottom: float) -> Mark:
    y = sy(point.y)
    outside = "below" if point.y < sy.low else "above" if point.y > sy.high else ""
    y = min(max(y, top), bottom)
    cross = None
    if not outside and None not in (point.x_low, point.x_high, point.y_low, point.y_high):
        ends = sx(point.x_low), sx(point.x_high), sy(point.y_high), sy(point.y_low)  # type: ignore[arg-type]
        cross = ends[0], ends[1], max(ends[2], top), min(ends[3], bottom)
    radius = 4.0 if len(series.points) == 1 else min(3.0 + place, 5.5)
    return Mark(point, series, sx(point.x), y, radius, cross, outside)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else ""


def _steps(
    points: Sequence[tuple[float, float]], x_better: str, y_better: str, left: float, right: float
) -> str:
    """The Pareto front as a staircase: the best adherence that is had at each suppression or less."""
    if not points or "none" in (x_better, y_better):
        return ""
    (x, y), *rest = sorted(points, reverse=x_better == "higher")
    steps = "".join(f"H{a:g}V{b:g}" for a, b in rest)
    return f"M{x:g},{y:g}{steps}H{right if x_better == 'lower' else left:g}"


_CORNERS = {"pentagon": (5, None), "hexagon": (6, None), "star": (10, 0.55)}
"""Corners of a shape, and the radius of every second one."""


def outline(shape: str, r: float) -> str:
    """An SVG path of the shape, about as large as a circle of radius ``r``."""
    if shape == "square":
        a = r * 0.9
        return f"M{-a:.1f},{-a:.1f}h{2 * a:.1f}v{2 * a:.1f}h{-2 * a:.1f}z"
    if shape == "diamond":
        a = r * 1.25
        return f"M0,{-a:.1f}L{a:.1f},0L0,{a:.1f}L{-a:.1f},0z"
    if shape == "triangle":
        a = r * 1.3
        return f"M0,{-a:.1f}L{a * 0.9:.1f},{a * 0.75:.1f}H{-a * 0.9:.1f}z"
    if shape == "wedge":
        a = r * 1.3
        return f"M0,{a:.1f}L{a * 0.9:.1f},{-a * 0.75:.1f}H{-a * 0.9:.1f}z"
    if shape in _CORNERS:
        n, inner = _CORNERS[shape]
        radii = [r * 1.15 if inner is None or i % 2 == 0 else r * inner for i in range(n)]
        angles = [2 * math.pi * i / n for i in range(n)]
        corners = [(a * math.sin(w), -a * math.cos(w)) for a, w in zip(radii, angles, strict=True)]
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in corners) + "z"
    return f"M{-r:.1f},0a{r:.1f},{r:.1f} 0 1 0 {2 * r:.1f},0a{r:.1f},{r:.1f} 0 1 0 {-2 * r:.1f},0z"


def _labelled(scale: Scale, number: NumberFormat, at: Sequence[float]) -> tuple[Tick, ...]:
    """The ticks, with as many more decimals than the column's as it takes to write them exactly."""
    factor = 100 if number.percent else 1
    exact = (d for d in range(4) if all(abs(round(t * factor, d) - t * factor) < 1e-9 for t in at))
    finer = replace(number, decimals=max(number.decimals, next(exact, 4)))
    return tuple(Tick(scale(t), finer(t)) for t in at)


def _relative_ticks(scale: Scale, reference: str) -> tuple[Tick, ...]:
    """Gains and losses relative to the reference in percent, the smallest first, where there is room."""
    assert scale.centre is not None
    found: list[Tick] = []
    for share in sorted(LOSSES, key=abs):
        value = scale.centre + share * abs(scale.centre)
        if scale.low <= value <= scale.high:
            at = scale(value)
            if all(abs(at - t.at) >= 18 for t in found):
                found.append(
                    Tick(at, NumberFormat(0, True).signed(share) if share else clipped(reference, 7))
                )
    return tuple(sorted(found, key=lambda t: t.at))


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers between ``low`` and ``high``.

    >>> ticks(0, 1, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / max(1, count)
    if not math.isfinite(raw) or raw <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


# --- labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Box:
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: _Box) -> float:
        wide = min(self.x1, other.x1) - max(self.x0, other.x0)
        high = min(self.y1, other.y1) - max(self.y0, other.y0)
        return wide * high if wide > 0 and high > 0 else 0.0


def _labels(
    series: Sequence[Series],
    front: frozenset[str],
    marks: Sequence[Mark],
    frame: _Box,
    arrow: _Box,
    reference: str,
) -> list[Label]:
    """Names beside their curves, as many as have room: no label covers another, the arrow or many marks.

    Methods on the front come first, and may cover marks; then the reference, the others in their order,
    controls last. The key names all.
    """
    dots = [_Box(m.x - m.radius, m.y - m.radius, m.x + m.radius, m.y + m.radius) for m in marks]
    leading = {m.series.name for m in marks if m.point.row in front}
    order = sorted(series, key=lambda s: (s.name not in leading, s.control and s.name != reference))
    labels: list[Label] = []
    taken = [arrow]
    for s in order:
        own = [m for m in marks if m.series is s]
        text = clipped(s.name, 24)
        width = len(text) * CHARACTER
        places = [
            (_covered(place[2], dots, frame) + 0.03 * i, place)
            for i, place in enumerate(_places(own, width))
            if not any(place[2].overlap(t) for t in taken)
        ]
        cost, place = min(places, key=lambda found: found[0], default=(math.inf, None))
        if place is not None and (cost < MOST_COVERED or s.name in leading):
            x, anchor, box = place
            taken.append(_Box(box.x0 - 5, box.y0, box.x1 + 5, box.y1))
            labels.append(Label(text, round(x, 1), round(box.y1 - 3.5, 1), anchor, s.colour, s.control))
    return labels


MOST_COVERED = 0.6
"""The cost of a label's place, in shares of its area, beyond which the name is left to the legend."""


def clipped(text: str, length: int) -> str:
    """The text, its end cut where it is longer.

    >>> clipped("random-pruning", 8)
    'random-…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def _places(own: Sequence[Mark], width: float) -> list[tuple[float, str, _Box]]:
    found = []
    for mark in [own[-1], *own[:-1]]:
        gap = mark.radius + 4
        for dy in (0.0, -12.0, 12.0):
            y = mark.y + dy
            near = gap if dy == 0 else gap - 2
            found.append((mark.x + near, "start", _Box(mark.x + near, y - 7, mark.x + near + width, y + 7)))
            found.append((mark.x - near, "end", _Box(mark.x - near - width, y - 7, mark.x - near, y + 7)))
        for y in (mark.y - gap - 7, mark.y + gap + 7):
            found.append((mark.x, "middle", _Box(mark.x - width / 2, y - 7, mark.x + width / 2, y + 7)))
    return found


def _covered(box: _Box, dots: Sequence[_Box], frame: _Box) -> float:
    """What a label covers of the marks and what of it lies outside, as a share of its area."""
    area = (box.x1 - box.x0) * (box.y1 - box.y0)
    outside = area - box.overlap(frame)
    return (2 * sum(box.overlap(dot) for dot in dots) + 5 * outside) / area


# --- dose and response ----------------------------------------------------------------------------

Dose = float | str
"""A number of copies or targets, a correlation, a setting's value; a word where that is no number."""
PERCENT = NumberFormat(0, percent=True)
TICK_ROOM = 5.0
"""Between the texts of two ticks of a panel, in its units."""


@dataclass(frozen=True)
class DosePoint:
    """The value at one dose. Hollow where the guard flags the row."""

    dose: Dose
    value: float
    low: float | None
    high: float | None
    flagged: bool = False


@dataclass(frozen=True)
class DoseLine:
    """A row's values by dose, or a method's by its setting.

    ``strength`` is 0 (weakest) to 1 (strongest); a ``colour`` of None is the panel's.
    """

    name: str
    points: tuple[DosePoint, ...]
    strength: float = 1.0
    colour: int | None = None


@dataclass(frozen=True)
class DrawnLine:
    """A line of a panel as it is drawn."""

    line: DoseLine
    path: str
    dots: tuple[tuple[float, float], ...]
    bars: str = ""
    """The points' intervals."""


@dataclass(frozen=True)
class Panel:
    """A method's dose-response beside that of ``base`` (the row compared with) and ``floor`` (the oracle)."""

    title: str
    colour: int
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    base: DrawnLine | None
    band: str
    lines: tuple[DrawnLine, ...]
    doses: tuple[Dose, ...] = field(default=())
    by: str = "number of copies"
    key: tuple[tuple[str, int], ...] = ()
    """Names and colours to tell lines of more than one method apart by."""
    beyond: tuple[str, ...] = ()
    """What lies beyond the scale."""
    floor: DrawnLine | None = None
    about: str = ""
    """What it shows, for those who don't see it; else the title does."""


def panel(
    title: str,
    colour: int,
    base: DoseLine | None,
    lines: Sequence[DoseLine],
    top_value: float,
    bottom_value: float = 0.0,
    by: str = "number of copies",
    *,
    floor: DoseLine | None = None,
    log: bool = True,
    number: NumberFormat = PERCENT,
    bars: bool = False,
    about: str = "",
    y_ticks: int = 2,
) -> Panel:
    """One small plot over ``by``, logarithmic if ``log``; its scale holds base, floor and these lines."""
    width, height = 220, 150
    left, right, top, bottom = 30.0, width - 8.0, 8.0, height - 24.0
    everything = [*lines, *(line for line in (base, floor) if line)]
    doses = sorted({p.dose for line in everything for p in line.points}, key=dose_order)
    at = _across(doses, log, left, right)
    sy = Scale(bottom_value, top_value, bottom, top)

    def inside(value: float) -> float:
        return sy(min(max(value, bottom_value), top_value))

    def draw(line: DoseLine) -> DrawnLine:
        dots = tuple((at[p.dose], sy(min(p.value, top_value))) for p in line.points)
        spans = [(at[p.dose], p.low, p.high) for p in line.points] if bars else []
        whole = (
            f"M{x:g},{inside(low):g}V{inside(high):g}"
            for x, low, high in spans
            if low is not None and high is not None
        )
        return DrawnLine(line, _path(dots), dots, "".join(whole))

    return Panel(
        title, colour, width, height, left, right, top, bottom,
        _dose_ticks(doses, at),
        _labelled(sy, number, ticks(bottom_value, top_value, 4 if bottom_value else y_ticks)),
        draw(base) if base else None,
        _band(base, at, sy) if base else "",
        tuple(draw(line) for line in lines),
        tuple(doses),
        by,
        floor=draw(floor) if floor else None,
        about=about or title,
    )  # fmt: skip


def dose_order(dose: Dose) -> tuple[float, str]:
    """Numbers first, then words."""
    return (math.inf, dose) if isinstance(dose, str) else (dose, "")


def dose_text(dose: Dose) -> str:
    """A dose on an axis.

    >>> dose_text(0.25), dose_text(8), dose_text("none")
    ('0.25', '8', 'none')
    """
    return dose if isinstance(dose, str) else f"{dose:g}"


def even_by_logarithm(values: Sequence[float]) -> bool:
    """Whether numbers lie more evenly by their logarithms: how an axis over them should be.

    >>> even_by_logarithm([1, 2, 4, 8]), even_by_logarithm([0.25, 0.5, 0.75, 0.9, 1])
    (True, False)
    """
    at = sorted(values)
    return len(at) > 1 and at[0] > 0 and _smallest_gap([math.log(v) for v in at]) > _smallest_gap(at)


def _smallest_gap(at: Sequence[float]) -> float:
    """As a share of the whole."""
    return min(b - a for a, b in pairwise(at)) / (at[-1] - at[0])


def _across(doses: Sequence[Dose], log: bool, left: float, right: float) -> dict[Dose, float]:
    """The place of each dose, those that are words after the numbers."""
    at: dict[Dose, float] = {d: math.log2(d) if log else d for d in doses if not isinstance(d, str)}
    numbers = list(at.values()) or [0.0]
    step = (numbers[-1] - numbers[0]) / max(1, len(numbers) - 1) or 1.0
    words = [d for d in doses if isinstance(d, str)]
    at |= {word: numbers[-1] + step * (i + 1) for i, word in enumerate(words)}
    room = 0.2 if log else 0.06 * (max(at.values()) - numbers[0]) or 1.0
    scale = Scale(numbers[0] - room, max(at.values()) + room, left, right)
    return {dose: scale(value) for dose, value in at.items()}


def _dose_ticks(doses: Sequence[Dose], at: dict[Dose, float]) -> tuple[Tick, ...]:
    """Ticks at the doses, the outer ones first, as many as have room."""
    thinned = doses if len(doses) <= 5 else doses[:: math.ceil(len(doses) / 5)]
    kept: list[Tick] = []
    for dose in dict.fromkeys((thinned[0], thinned[-1], *thinned)):
        tick = Tick(at[dose], dose_text(dose))
        if all(abs(tick.at - t.at) >= _half(tick) + _half(t) + TICK_ROOM for t in kept):
            kept.append(tick)
    return tuple(sorted(kept, key=lambda t: t.at))


def _half(tick: Tick) -> float:
    return len(tick.text) * CHARACTER / 2


def _band(line: DoseLine, at: dict[Dose, float], sy: Scale) -> str:
    whole = [(at[p.dose], p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    if len(whole) < 2:
        return ""
    upper = [(x, sy(min(h, sy.high))) for x, _, h in whole]
    lower = [(x, sy(max(low, sy.low))) for x, low, _ in reversed(whole)]
    return _path([*upper, *lower]) + "z"
