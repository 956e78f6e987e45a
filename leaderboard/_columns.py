"""The columns of the table and what each cell says: a value with its interval, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from lethebench.attack.record import AttackRecord
from lethebench.leaderboard import _attacks
from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._rows import BASE, reference_of
from lethebench.row import Cost, Row, ScoreRecord

Direction = Literal["lower", "higher", "none"]
State = Literal["ok", "not-run", "failed", "not-applicable"]

GROUPS = {
    "attribute": "Prohibited attribute",
    "wanted": "Wanted content",
    "memorization": "Memorization",
    "concepts": "Concepts",
    "utility": "Utility",
    "cost": "Cost",
    "more": "More scores",
}
"""Column groups, left to right. ``more`` holds every score that has no place of its own, closed at first."""

SLICED = ("attribute", "wanted", "memorization", "concepts")
"""Groups whose scores a row's drawer shows by role, kind and dose."""

SHOWN_SCORES: tuple[tuple[str, str, str], ...] = (
    ("attribute.present", "Present", "attribute"),
    ("attribute.present_corrected", "Corrected", "attribute"),
    ("attribute.paraphrase", "Paraphrased", "attribute"),
    ("attribute.wanted", "Leaked", "attribute"),
    ("attribute.*", "", "attribute"),
    ("wanted.features", "Features", "wanted"),
    ("wanted.*", "", "wanted"),
    ("fbmem.memorized", "Memorized", "memorization"),
    ("fbmem.vm", "VM", "memorization"),
    ("fbmem.fm", "FM", "memorization"),
    ("fbmem.bm", "BM", "memorization"),
    ("copy_mini.rate", "Copies", "memorization"),
    ("sscd.rate", "Copies (SSCD)", "memorization"),
    ("acc_g", "Acc_g", "concepts"),
    ("acc_l", "Acc_l", "concepts"),
    ("clip_mini.score", "Adherence", "utility"),
    ("clip_mini.trigger_score", "On triggers", "utility"),
    ("clip.score", "CLIP", "utility"),
    ("fidelity_mini.attributes", "Attributes", "utility"),
    ("fd_mini", "FD", "utility"),
    ("fid", "FID", "utility"),
    ("kid", "KID", "utility"),
    ("*diversity*", "Diversity", "utility"),
    ("*.broken", "Broken", "utility"),
)
"""(score name or pattern, heading, group), in the table's order. Other scores go to ``more``.

Without a heading it is the part of the name after the dot.
"""


@dataclass(frozen=True)
class Cell:
    """One cell. ``sort`` is None where there is no value, which sorts last in either direction."""

    state: State
    text: str = ""
    interval: str = ""
    sort: float | None = None
    note: str = ""
    """The tooltip: what the number is, its difference to the reference row, or why it is missing."""
    difference: str = ""
    difference_interval: str = ""
    significant: bool = False
    heat: int | None = None
    """0 (worst in the column) to 100 (best)."""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column: its cells are in the order of the board's rows."""

    key: str
    label: str
    group: str
    help: str
    direction: Direction
    unit: str
    cells: tuple[Cell, ...] = field(repr=False)
    headline: bool = False

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {"lower": "↓", "higher": "↑", "none": ""}[self.direction]


def columns(
    rows: Sequence[Row],
    headline: str | None,
    adherence: str | None,
    attacks: Sequence[Sequence[AttackRecord]] = (),
) -> list[Column]:
    """Every column that a row has something for, headline first, in group order."""
    order = list(GROUPS)
    scores = [score_column(name, rows, headline) for name in score_names(rows, headline, adherence)]
    attacked = [_best_known(rows, attacks)] if any(attacks) else []
    costs = _COSTS if reference_of(rows) == BASE else _TRAINING_COSTS
    found = scores[:1] + attacked + scores[1:] + [_cost_column(spec, rows) for spec in costs]
    kept = [c for c in found if c.group != "cost" or any(x.state == "ok" for x in c.cells)]
    return sorted(kept, key=lambda c: order.index(c.group))


def score_names(rows: Sequence[Row], headline: str | None = None, adherence: str | None = None) -> list[str]:
    """The names of all scores of the rows, in the table's order."""
    names = {name for row in rows for name in row.scores}
    first = [n for n in (headline,) if n in names]
    known = [n for pattern, _, _ in SHOWN_SCORES for n in sorted(names) if fnmatchcase(n, pattern)]
    second = [n for n in (adherence,) if n in names]
    return list(dict.fromkeys([*first, *known, *second, *sorted(names)]))  # type: ignore[list-item]


def place(name: str) -> tuple[str, str]:
    """(heading, group) of a score."""
    for pattern, label, group in SHOWN_SCORES:
        if fnmatchcase(name, pattern):
            return label or name.partition(".")[2].replace("_", " ").capitalize(), group
    return name, "more"


def score_column(name: str, rows: Sequence[Row], headline: str | None) -> Column:
    """The column of one score."""
    label, group = place(name)
    if name == headline and group == "more":
        group = "memorization"
    records = [row.scores.get(name) for row in rows]
    first = next(r for r in records if r is not None)
    values = [v for r in records if r is not None for v in (r.value, r.low, r.high) if v is not None]
    number = fmt.number_format(values, first.bounds, first.unit)
    cells = [_score_cell(row, record, number) for row, record in zip(rows, records, strict=True)]
    unit = "%" if number.percent else first.unit
    help_ = " ".join(t for t in (first.help, _judged(first), _better(first.direction)) if t)
    shaded = _shade(cells, rows, first.direction)
    return Column(name, label, group, help_, first.direction, unit, tuple(shaded), name == headline)


def _judged(record: ScoreRecord) -> str:
    judge = f"Judge: {record.judge}." if record.judge else ""
    question = f"Question: {record.question}" if record.question else ""
    return f"{judge} {question}".strip()


def _better(direction: Direction) -> str:
    return {"lower": "Lower is better.", "higher": "Higher is better.", "none": "Neither way is better."}[
        direction
    ]


def _score_cell(row: Row, record: ScoreRecord | None, number: fmt.NumberFormat) -> Cell:
    missing = missing_cell(row, record)
    if missing is not None:
        return missing
    assert record is not None and record.value is not None
    unit = " %" if number.percent else ""
    interval = number.interval(record.low, record.high)
    note = f"{record.n} images in {record.clusters} clusters"
    difference = span = ""
    significant = False
    if record.base_difference is not None:
        d = record.base_difference
        difference, span = number.signed(d.value), f"{number.signed(d.low)} to {number.signed(d.high)}"
        significant = d.p < 0.05
        note += f"\nTo {row.reference}, on the same noise: {difference}{unit} ({span}), {fmt.p_value(d.p)}"
    return Cell("ok", number(record.value), interval, record.value, note, difference, span, significant)


def missing_cell(row: Row, record: ScoreRecord | None) -> Cell | None:
    """Why there is no value: missing is not zero, and its kinds are different. None where there is one."""
    if row.status == "failed":
        return Cell("failed", note=f"The row failed: {row.reason or 'no reason recorded'}")
    if row.status == "not-applicable":
        return Cell("not-applicable", note=f"The method does not apply: {row.reason or 'no reason recorded'}")
    if record is None:
        return Cell("not-run", note="This metric was not run on this row.")
    if record.value is None:
        return Cell(
            "not-applicable", note="The score does not apply: no image of this row can be judged by it."
        )
    return None


def _shade(cells: Sequence[Cell], rows: Sequence[Row], direction: Direction) -> list[Cell]:
    """Give cells their heat, from the worst to the best of the methods and the row that they are compared
    with, and mark the best method.
    """
    if direction == "none":
        return list(cells)
    sign = 1.0 if direction == "higher" else -1.0
    good = [None if c.sort is None else sign * c.sort for c in cells]
    scale = [
        g
        for g, r in zip(good, rows, strict=True)
        if g is not None and (not r.control or r.method == r.reference)
    ]
    trusted = [
        g for g, r in zip(good, rows, strict=True) if g is not None and not r.control and not r.warnings
    ]
    if not scale or min(scale) == max(scale):
        return list(cells)
    low, high, best = min(scale), max(scale), max(trusted, default=None)
    return [
        cell
        if value is None or row.control
        else replace(
            cell, heat=round(100 * (value - low) / (high - low)), best=value == best and not row.warnings
        )
        for cell, value, row in zip(cells, good, rows, strict=True)
    ]


# --- attacks --------------------------------------------------------------------------------------

BEST_KNOWN = "best_known"
_BEST_KNOWN_HELP = (
    "The highest memorization that anyone got out of the row, by an attack or without one: the share of the "
    "memorized items of which a copy came out, less that of twins that no model ever saw (the control: what "
    "the attack itself injects). In points. The interval is that of the one shown; it isn't widened for "
    "choosing the highest. Other items and another budget than Memorized. Lower is better."
)
_BEST_KNOWN_TRAINING_HELP = (
    "The most of the prohibited attributes that anyone got out of the row, by an attack or without one: the "
    "share of the attacked items that showed theirs, less that of controls whose attribute was never trained "
    "(what the attack itself injects). In points. The interval is that of the one shown; it isn't widened "
    "for choosing the highest. Other items and another budget than Present. Lower is better."
)


def _best_known(rows: Sequence[Row], attacks: Sequence[Sequence[AttackRecord]]) -> Column:
    cells = [_best_cell(row, records) for row, records in zip(rows, attacks, strict=True)]
    shaded = tuple(_shade(cells, rows, "lower"))
    group, help_ = "memorization", _BEST_KNOWN_HELP
    if reference_of(rows) != BASE:
        group, help_ = "attribute", _BEST_KNOWN_TRAINING_HELP
    return Column(BEST_KNOWN, "Best known", group, help_, "lower", "%", shaded)


def _best_cell(row: Row, records: Sequence[AttackRecord]) -> Cell:
    missing = missing_cell(row, None) if row.status != "ok" else None
    found = _attacks.best(records)
    if missing is not None:
        return missing
    if found is None:
        return Cell("not-run", note="Nobody has attacked this row: lethe attack.")
    number = _attacks.PERCENT
    interval, note = number.interval(found.low, found.high), _attacks.note(found, row.reference != BASE)
    return Cell("ok", number(found.value), interval, found.value, note)


# --- cost -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CostSpec:
    key: str
    label: str
    help: str
    direction: Direction
    value: Callable[[Cost], float | None]
    text: Callable[[float | None], str]
    unit: str = ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.1f}"


def _size(value: float | None) -> str:
    return fmt.size(None if value is None else int(value))


_COSTS = (
    _CostSpec(
        "cost.fit_seconds",
        "Fit",
        "Time to fit the method once.",
        "lower",
        lambda c: c.fit_seconds,
        fmt.seconds,
    ),
    _CostSpec(
        "cost.relative_to_base",
        "Per image",
        "Time to draw an image with the method, relative to drawing it without: by turns in one process, "
        "the faster of two draws of the same images each. Base is 1.",
        "lower",
        lambda c: c.relative_to_base,
        _ratio,
    ),
    _CostSpec(
        "cost.sparsity",
        "Sparsity",
        "Share of the masked elements that the method switches off.",
        "none",
        lambda c: c.sparsity,
        _percent,
        "%",
    ),
    _CostSpec(
        "cost.parameters_changed",
        "Changed",
        "Share of the model's parameters that the method changes.",
        "none",
        lambda c: c.parameters_changed,
        _percent,
        "%",
    ),
    _CostSpec(
        "cost.peak_memory_bytes",
        "Memory",
        "Peak memory, the greater of fitting the method and drawing its images: of the accelerator, else of "
        "the whole process.",
        "lower",
        lambda c: c.peak_memory_bytes,
        _size,
    ),
)
_TRAINING_COSTS = (
    replace(_COSTS[0], label="Training", help="Time of one fine-tuning: the mean over the suite's sets."),
    _CostSpec(
        "cost.step_relative_to_plain",
        "A step",
        "Time of an optimiser step, relative to plain LoRA: by turns in one process. Plain LoRA is 1.",
        "lower",
        lambda c: c.step_relative_to_plain,
        _ratio,
    ),
    _CostSpec(
        "cost.training_state_bytes",
        "Held",
        "Memory that the method holds beside the LoRA and its optimiser while training.",
        "lower",
        lambda c: c.training_state_bytes,
        _size,
    ),
    replace(
        _COSTS[1],
        help="Time to draw an image with the method, relative to drawing it without: by turns in one "
        "process, the faster of two draws of the same images each. The model before fine-tuning is 1.",
    ),
    *_COSTS[2:],
)
"""Where models are fine-tuned."""


def _cost_column(spec: _CostSpec, rows: Sequence[Row]) -> Column:
    cells = tuple(_cost_cell(spec, row) for row in rows)
    return Column(
        spec.key,
        spec.label,
        "cost",
        f"{spec.help} {_better(spec.direction)}",
        spec.direction,
        spec.unit,
        cells,
    )


def _cost_cell(spec: _CostSpec, row: Row) -> Cell:
    missing = missing_cell(row, None) if row.status != "ok" else None
    if missing is not None:
        return missing
    value = None if row.cost is None else spec.value(row.cost)
    if value is None:
        return Cell("not-applicable", note=f"{spec.help} Not measured, or does not apply to this method.")
    return Cell("ok", spec.text(value), sort=float(value), note=spec.help)
