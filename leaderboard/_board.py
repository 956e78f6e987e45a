"""A board: the rows of one suite version on one model, with all that the page says of them.

Boards are never mixed: a table holds one suite version and one model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lethebench.attack.record import AttackRecord
from lethebench.leaderboard import _attacks
from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._columns import (
    GROUPS,
    SLICED,
    Cell,
    Column,
    columns,
    missing_cell,
    place,
    score_names,
)
from lethebench.leaderboard._curves import LOSS, MAX_LOSS, Curve, Estimate, Front, curves, front, resample
from lethebench.leaderboard._doses import Pair, by_copies, by_correlation, by_setting
from lethebench.leaderboard._latents import Section as LatentSection
from lethebench.leaderboard._latents import section as latent_section
from lethebench.leaderboard._pictures import (
    ImageStore,
    Key,
    Picture,
    choose,
    image_path,
    lookup,
    named_file,
    triplets,
)
from lethebench.leaderboard._plot import (
    COLOURS,
    NEAR,
    SHAPES,
    Axis,
    Panel,
    Point,
    Scatter,
    Series,
    scatter,
)
from lethebench.leaderboard._rank import Rank, rank_rows
from lethebench.leaderboard._rows import (
    BASE,
    Entry,
    floor_of,
    in_strength_order,
    measured,
    reference_of,
)
from lethebench.leaderboard._tables import read_table
from lethebench.leaderboard._targets import Section as TargetSection
from lethebench.leaderboard._targets import section as target_section
from lethebench.reported import Reported, reported
from lethebench.row import Row, ScoreRecord, Slice

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_AXES = {
    "suppression": {"score": "fbmem.memorized", "label": "Images still memorized"},
    "adherence": {"score": "clip_mini.score", "label": "Adherence"},
}
CONTROL_ORDER = (
    "base",
    "lora-oracle",
    "oracle",
    "blank",
    "random-tokens",
    "random-pruning",
    "magnitude-pruning",
)
"""After the row that all are compared with."""
KNOWLEDGE = {
    "neutral-prompts": "neutral prompts",
    "memorized-prompts": "memorized prompts",
    "training-images": "training images",
    "concept-names": "concept names",
    "reference-index": "reference index",
}
NOTHING = "nothing"
FAMILIES = {
    "weights": "Change the weights (solid)",
    "sampling": "Act while sampling (dashed)",
    "training": "Act while training (dotted)",
}
CONTROLS = "Controls"
Metrics = Mapping[str, Mapping[str, Any]]
_LEAD_LABELS = {"VM": 0, "FM": 1, "BM": 2}


@dataclass(frozen=True)
class SliceTable:
    """Scores by the values of one condition (kind, duplicates, ...)."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    """(value of the condition, a note on all its cells, ((text, note), ...))."""


@dataclass(frozen=True)
class ScoreLine:
    """A score in a row's drawer."""

    name: str
    help: str
    cell: Cell
    record: ScoreRecord | None
    unit: str
    p: str


@dataclass(frozen=True)
class KeyLine:
    """A method in the key of the plot, with its curve's numbers."""

    method: str
    colour: int
    shape: str
    cells: tuple[tuple[str, str], ...]
    """(value, interval) by heading; empty where the method has no curve."""


@dataclass
class Line:
    """A row as the page shows it."""

    id: str
    row: Row
    folder: Path
    rank: Rank
    colour: int
    shape: str
    first_of_method: bool
    pictures: list[Picture]
    slices: list[SliceTable]
    scores: list[ScoreLine]
    attacks: tuple[AttackRecord, ...]
    metrics_text: str
    """What the row alone records of its metrics, as indented JSON; empty where others record the same."""
    made_with: Metrics
    """Weights, data and packages that other rows don't have alike."""

    @property
    def attack_lines(self) -> list[_attacks.AttackLine]:
        """The attacks on the row, the strongest first."""
        return _attacks.attack_lines(self.attacks, self.row.reference)

    @property
    def knowledge(self) -> list[str]:
        """What the method sees, in words; ``nothing`` where it sees nothing."""
        return [KNOWLEDGE.get(k, k) for k in self.row.knowledge] or [NOTHING]

    @property
    def failed(self) -> bool:
        """Whether there is nothing measured to show."""
        return self.row.status != "ok"

    @property
    def config_text(self) -> str:
        """Configuration and seeds as indented JSON."""
        return json.dumps({"config": self.row.config, "seeds": self.row.seeds}, indent=2, sort_keys=True)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Cost, in words."""
        cost = self.row.cost
        if cost is None:
            return []
        ratio, step = cost.relative_to_base, cost.step_relative_to_plain
        base = "base" if self.row.reference == BASE else "the model before fine-tuning"
        pairs = [
            ("Fit", fmt.seconds(cost.fit_seconds)),
            ("Time an image", fmt.seconds(cost.seconds_per_image)),
            (f"Relative to {base}", "" if ratio is None else f"{ratio:.2f}×"),
            ("A step, relative to plain LoRA", "" if step is None else f"{step:.2f}×"),
            ("Held beside the LoRA", fmt.size(cost.training_state_bytes)),
            ("Peak memory", fmt.size(cost.peak_memory_bytes)),
            ("Peak memory of the fit", fmt.size(cost.fit_peak_memory_bytes)),
            ("Unlearnt prompts", "" if cost.targets is None else str(cost.targets)),
            ("Unlearnt items and concepts", "" if cost.clusters is None else str(cost.clusters)),
            ("Parameters changed", fmt.percent(cost.parameters_changed)),
            ("Sparsity", fmt.percent(cost.sparsity)),
            *((f"Off: {k}", fmt.percent(v)) for k, v in sorted(cost.deactivated.items())),
        ]
        return [(k, v) for k, v in pairs if v]

    @property
    def search(self) -> str:
        """The text that the filter looks in."""
        r = self.row
        return " ".join([r.method, r.setting, r.family, *self.knowledge, r.status, r.summary]).lower()


@dataclass
class Board:
    """One suite version on one model."""

    id: str
    suite: str
    model: str
    axes: Mapping[str, Mapping[str, str]]
    controls: list[Line]
    methods: list[Line]
    columns: list[Column]
    plot: tuple[Scatter, Scatter] | None
    """The plot for a wide and for a narrow page."""
    panels: list[Panel]
    """Plots and curves leave out settings with single values overridden, where a method has named ones."""
    dose_where: str
    correlated: list[Pair]
    """By how often what is wanted comes with what must not be learnt."""
    sweeps: list[Pair]
    """By single settings; none where nothing is fine-tuned."""
    targets: TargetSection | None
    curves: list[Curve]
    images: int
    headline_images: int
    headline_clusters: int
    resolution: float | None
    """The smallest paired difference of the headline that is found with 80 % power, or None."""
    attacks: _attacks.Section | None
    """None where no row was attacked."""
    metrics_text: str
    """What all rows record alike of their metrics, as indented JSON."""
    made_with: Metrics
    """Weights, data and packages of all rows."""
    unranked: str
    """Why there are no ranks; empty where there are."""
    latents: LatentSection | None
    """UniForget's Figures 4 and 5; None unless base and a method have latents."""
    reference: str = BASE
    """The method that all rows are compared with."""

    @property
    def reported(self) -> Reported | None:
        """What papers report for the suite; None where nothing is known."""
        return reported(self.suite.rpartition("@")[0])

    @property
    def training(self) -> bool:
        """Whether models are fine-tuned: the training-time track."""
        return self.reference != BASE

    @property
    def floor(self) -> str:
        """The control that never saw what must not be drawn."""
        return floor_of(self.reference)

    @property
    def floor_suppression(self) -> str:
        """The share of the reference's headline score that is gone in the floor; empty where unknown."""
        from lethebench import stats

        ends = [measured([x.row for x in self.lines], name) for name in (self.reference, self.floor)]
        found = [None if r is None else r.scores.get(self.headline) for r in ends]
        base, floor = (None if s is None else s.value for s in found)
        return "" if base is None or floor is None else fmt.percent(stats.suppression(floor, base))

    @property
    def has_labels(self) -> bool:
        """Whether images are labelled VM, FM, BM or NM."""
        return any(c.key.startswith("fbmem.") for c in self.columns)

    def reference_word(self, picture: Picture) -> str:
        """What the left image of a triplet is."""
        if self.training and picture.role != "trigger":
            return "reference"
        return "held-out image" if picture.held_out else "training image"

    @property
    def lines(self) -> list[Line]:
        """All rows: controls first."""
        return [*self.controls, *self.methods]

    @property
    def name(self) -> str:
        """As the selector shows it."""
        return f"{self.suite} · {self.model}"

    @property
    def headline(self) -> str:
        """The score that rows are ranked by."""
        return self.axes["suppression"]["score"]

    @property
    def adherence(self) -> str:
        """The score on the plot's other axis."""
        return self.axes["adherence"]["score"]

    def column(self, key: str) -> Column | None:
        """The column of that key."""
        return next((c for c in self.columns if c.key == key), None)

    def cells(self, line: Line) -> list[tuple[Column, Cell]]:
        """A row's cells with their columns."""
        at = self.lines.index(line)
        return [(c, c.cells[at]) for c in self.columns]

    def line(self, name: str) -> Line:
        """The row of that id."""
        return next(x for x in self.lines if x.id == name)

    def cell(self, line: Line, key: str) -> Cell:
        """One cell of a row."""
        return next(x for c, x in self.cells(line) if c.key == key)

    @property
    def groups(self) -> list[tuple[str, str]]:
        """The column groups that have columns: (key, heading)."""
        present = {c.group for c in self.columns}
        return [(k, v) for k, v in GROUPS.items() if k in present]

    def group_size(self, key: str) -> int:
        """How many columns a group has."""
        return sum(c.group == key for c in self.columns)

    @property
    def edges(self) -> set[str]:
        """The first column of each group."""
        return {next(c.key for c in self.columns if c.group == key) for key, _ in self.groups}

    @property
    def families(self) -> list[str]:
        """The families of the methods, for the facet."""
        return sorted({x.row.family for x in self.methods})

    @property
    def knowledges(self) -> list[str]:
        """The knowledge that methods have, for the facet; ``nothing`` first."""
        found = {k for x in self.methods for k in x.knowledge}
        order = [NOTHING, *KNOWLEDGE.values()]
        return sorted(found, key=lambda k: (order.index(k) if k in order else len(order), k))

    @property
    def lead_line(self) -> Line | None:
        """The row that the picture at the top shows: the first of the first tie group."""
        ranked = sorted((x for x in self.methods if x.rank.first is not None), key=_lead_order)
        return next((x for x in ranked if x.pictures), None)

    @property
    def lead(self) -> list[Picture]:
        """The first triplets of that row that have all three images, verbatim copies by base first.

        Where models are fine-tuned those that ask for what must not be learnt.
        """
        line = self.lead_line
        whole = [p for p in line.pictures if p.reference and p.base and p.method] if line else []
        whole = [p for p in whole if p.role == "concept" or not self.training]
        return sorted(whole, key=lambda p: _LEAD_LABELS.get(p.before, len(_LEAD_LABELS)))[:3]

    @property
    def resolution_text(self) -> str:
        """The smallest difference found, with its unit."""
        column = self.column(self.headline)
        if self.resolution is None or column is None:
            return ""
        if column.unit == "%":
            return f"{self.resolution * 100:.1f} points"
        return fmt.number_format([self.resolution], None, column.unit)(self.resolution)

    @property
    def verdict(self) -> str:
        """The board in two sentences."""
        return _verdict(self)

    @property
    def curve_headings(self) -> list[tuple[str, str]]:
        """Headings of the table of curves, with what they mean."""
        at, most, base = f"{LOSS * 100:.0f} %", f"{MAX_LOSS * 100:.0f} %", self.reference
        what = "leak" if self.training else "memorization"
        return [
            (
                f"Suppressed at {at} loss ↑",
                f"The share of {base}'s {what} that is gone where {at} of {base}'s adherence is lost, with "
                "straight lines between settings. In percent, with its 95 % interval.",
            ),
            (
                "Area ↑",
                f"The mean suppression over losses of 0 to {most} of {base}'s adherence. In percent, with "
                "its 95 % interval.",
            ),
        ]

    @property
    def key(self) -> list[tuple[str, str, list[KeyLine]]]:
        """The plot's methods by family, best area first: (family, heading, lines). Controls come last."""
        if self.plot is None:
            return []
        drawn = [s for s, _ in groupby(m.series for m in self.plot[0].marks)]
        numbers = {c.method: (_estimate(c.at_loss), _estimate(c.area)) for c in self.curves}
        place = {c.method: i for i, c in enumerate(self.curves)}
        drawn.sort(key=lambda s: place.get(s.name, len(place)))
        found: dict[str, list[KeyLine]] = {f: [] for f in (*FAMILIES, *self.families, CONTROLS)}
        for s in drawn:
            line = KeyLine(s.name, s.colour, s.shape, numbers.get(s.name, ()))
            found[CONTROLS if s.control else s.family].append(line)
        return [(f, FAMILIES.get(f, f), lines) for f, lines in found.items() if lines]

    @property
    def attack_headings(self) -> Sequence[tuple[str, str]]:
        """Headings of a row's table of attacks, with what they mean."""
        return _attacks.TRAINING_HEADINGS if self.training else _attacks.HEADINGS

    @property
    def near(self) -> int:
        """The loss of adherence up to which the plot's scale is even, in percent."""
        return round(NEAR * 100)

    @property
    def doses(self) -> list[int]:
        """Every number of copies on the panels."""
        return sorted({int(d) for p in self.panels for d in p.doses})

    @property
    def dose_lines(self) -> list[tuple[str, str, list[str]]]:
        """The panels as a table: method, setting, the share at each number of copies in percent."""
        percent = fmt.NumberFormat(1, percent=True)
        drawn = [(self.reference, p.base.line) for p in self.panels[:1] if p.base]
        drawn += [(self.floor, p.floor.line) for p in self.panels[:1] if p.floor]
        drawn += [(p.title, x.line) for p in self.panels for x in p.lines]
        return [
            (name, line.name, [percent({p.dose: p.value for p in line.points}.get(d)) for d in self.doses])
            for name, line in drawn
        ]

    @property
    def leaders(self) -> list[Line]:
        """The rows of the first tie group."""
        return [x for x in self.methods if x.rank.first == 1]

    @property
    def base(self) -> Line | None:
        """The row that all are compared with: the unmitigated model's, or the suite's ``reference``."""
        return next((x for x in self.lines if x.row.method == self.reference), None)


def boards(
    entries: Sequence[Entry], strengths: Mapping[str, Sequence[str]], store: ImageStore, count: int
) -> list[Board]:
    """A board for each suite version and model: the one with most rows first, equal ones by name."""
    ordered = sorted(entries, key=lambda e: e.row.key)
    groups = [list(group) for _, group in groupby(ordered, key=lambda e: e.row.key[:2])]
    groups.sort(key=len, reverse=True)
    return [_board(f"b{i}", group, strengths, store, count) for i, group in enumerate(groups)]


def _board(
    name: str, entries: list[Entry], strengths: Mapping[str, Sequence[str]], store: ImageStore, count: int
) -> Board:
    suite, model = entries[0].row.key[:2]
    axes = next(
        (dict(e.row.axes) for e in entries if {"suppression", "adherence"} <= set(e.row.axes)), DEFAULT_AXES
    )
    headline, adherence = axes["suppression"]["score"], axes["adherence"]["score"]
    tables = {e.row.key: read_table(e.folder) for e in entries if e.row.status == "ok"}
    ranks, unranked = rank_rows([e.row for e in entries], tables, headline)
    entries = _order(entries, ranks, strengths, headline)
    looks = _looks([e.row for e in entries])
    attacks = [e.attacks for e in entries]
    alike = _alike([e.row.metrics for e in entries if e.row.metrics])
    made_with = _alike([_made_with(e.row) for e in entries])
    found = columns([e.row for e in entries], headline, adherence, attacks)
    pictures = _pictures(entries, tables, store, count)
    lines = [
        Line(
            id=_line_id(e.row),
            row=e.row,
            folder=e.folder,
            rank=ranks[e.row.key],
            colour=looks[e.row.method][0],
            shape=looks[e.row.method][1],
            first_of_method=i == 0 or entries[i - 1].row.method != e.row.method,
            pictures=pictures[e.row.key],
            slices=_slice_tables(e.row),
            scores=_score_lines(e.row, found, i),
            attacks=e.attacks,
            metrics_text=_indented(_without(e.row.metrics, alike)),
            made_with=_without(_made_with(e.row), made_with),
        )
        for i, e in enumerate(entries)
    ]
    rows = [x.row for x in lines]
    drawn = resample(rows, tables, headline, adherence)
    named = {m: [x for x in lines if x.row.method == m and "=" not in x.row.setting] for m in looks}
    shown = [x for x in lines if not named[x.row.method] or x in named[x.row.method]]
    best = front([x.row for x in shown], drawn, headline, adherence)
    series = _series(lines, shown, headline, adherence, found, best)
    panels, where = by_copies(shown, headline)
    reference = reference_of(rows)
    axis_columns = [c for key in (headline, adherence) for c in found if c.key == key]
    colours = {m: look[0] for m, look in looks.items()}
    of_base = measured(rows, reference)
    record = None if of_base is None else of_base.scores.get(headline)
    table = tables.get(of_base.key) if of_base is not None else None
    return Board(
        id=name,
        suite=suite,
        model=model,
        axes=axes,
        controls=[x for x in lines if x.row.control],
        methods=[x for x in lines if not x.row.control],
        columns=found,
        plot=_plots(series, found, axes, best, {x.row.key: x.id for x in lines}, reference),
        panels=panels,
        dose_where=where,
        correlated=by_correlation(shown, axis_columns),
        sweeps=by_setting(rows, axis_columns, colours) if reference != BASE else [],
        targets=target_section(rows, adherence, colours),
        curves=curves([x.row for x in shown], drawn, headline, adherence),
        images=0 if table is None else len(table),
        headline_images=0 if record is None else record.n,
        headline_clusters=0 if record is None else record.clusters,
        resolution=_resolution(rows, headline),
        attacks=_attacks.section(rows, {x.row.key: x.id for x in lines}, attacks),
        metrics_text=_indented(alike),
        made_with={what: told for what, told in made_with.items() if told},
        unranked=unranked,
        latents=latent_section(name, lines),
        reference=reference,
    )


def _made_with(row: Row) -> Metrics:
    p = row.provenance
    return {"Weights": p.weights_sha256, "Data": p.data_sha256, "Packages": p.packages}


def _alike(found: Sequence[Metrics]) -> Metrics:
    """What every row that has a metric (or a kind of file) records of it with the same value."""
    result: dict[str, dict[str, Any]] = {}
    for name in sorted({n for metrics in found for n in metrics}):
        first, *others = [metrics[name] for metrics in found if name in metrics]
        result[name] = {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}
    return result


def _without(metrics: Metrics, alike: Metrics) -> Metrics:
    kept = {n: {k: v for k, v in told.items() if k not in alike[n]} for n, told in metrics.items()}
    return {n: told for n, told in kept.items() if told}


def _indented(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1, sort_keys=True) if found else ""


def _estimate(found: Estimate) -> tuple[str, str]:
    percent = fmt.NumberFormat(0, percent=True)
    return percent(found.value), percent.interval(found.low, found.high)


def _lead_order(line: Line) -> tuple[Any, ...]:
    return (line.rank.first, line.rank.last, line.row.method, line.row.setting)


def _verdict(board: Board) -> str:
    if board.column(board.headline) is None or not board.leaders:
        return ""
    names = list(dict.fromkeys(f"{x.row.method} ({x.row.setting})" for x in board.leaders))
    told = _told(board, "suppression")
    if board.training and board.column(board.adherence) is not None:
        told += f" {_told(board, 'adherence')}"
    if len(names) == 1:
        return f"{names[0]} leads. {told}"
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) <= 4 else f"{len(names)} rows"
    return f"{listed} share the lead: the data can’t tell them apart. {told}"


def _told(board: Board, axis: str) -> str:
    """The leaders on an axis, against the row that all are compared with and in training the floor."""
    column = board.column(board.axes[axis]["score"])
    assert column is not None
    order = sorted((board.cell(x, column.key) for x in board.leaders), key=lambda c: c.sort or 0.0)
    low, high = order[0].text, order[-1].text
    unit = " %" if column.unit == "%" else ""
    span = f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
    ends = [board.reference, board.floor] if board.training else [board.reference]
    rows = [next((x for x in board.lines if x.row.method == end and not x.failed), None) for end in ends]
    texts = [(x.row.method, board.cell(x, column.key).text) for x in rows if x is not None]
    against = " and ".join(f"{text}{unit} for {name}" for name, text in texts if text)
    what = board.axes[axis].get("label") or column.label
    return f"{what}: {span}{f', against {against}' if against else ''}."


def _line_id(row: Row) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{row.method}-{row.setting}".lower()).strip("-")[:40]
    return f"{slug}-{hashlib.sha256(json.dumps(row.key).encode()).hexdigest()[:6]}"


def _order(
    entries: Sequence[Entry],
    ranks: Mapping[tuple[str, str, str, str], Rank],
    strengths: Mapping[str, Sequence[str]],
    headline: str,
) -> list[Entry]:
    """Controls first; then methods by their best rank and value, each with its settings in order."""
    by_method: dict[str, list[Entry]] = {}
    for e in entries:
        by_method.setdefault(e.row.method, []).append(e)

    def place_of(method: str) -> tuple[Any, ...]:
        rows = [e.row for e in by_method[method]]
        if rows[0].control:
            known = CONTROL_ORDER.index(method) if method in CONTROL_ORDER else len(CONTROL_ORDER)
            return (0, -1 if method == rows[0].reference else known, 0.0, method)
        first = min((ranks[r.key].first or 10**6 for r in rows), default=10**6)
        return (1, first, min((_better_first(r, headline) for r in rows), default=0.0), method)

    result = []
    for method in sorted(by_method, key=place_of):
        found = {e.row.setting: e for e in by_method[method]}
        result += [found[s] for s in in_strength_order(found, strengths.get(method, ()))]
    return result


def _better_first(row: Row, headline: str) -> float:
    record = row.scores.get(headline)
    if record is None or record.value is None:
        return float("inf")
    return -record.value if record.direction == "higher" else record.value


def _looks(rows: Sequence[Row]) -> dict[str, tuple[int, str]]:
    """A colour and a shape for each method: by family and name, so that a new setting changes none."""
    found = {r.method: (-1, "circle") for r in rows if r.control}
    families: dict[str, set[str]] = {}
    for r in rows:
        if not r.control:
            families.setdefault(r.family, set()).add(r.method)
    for family, methods in families.items():
        shapes = SHAPES.get(family, SHAPES["weights"])
        for i, method in enumerate(sorted(methods)):
            found[method] = (i % COLOURS, shapes[i // COLOURS % len(shapes)])
    return found


def _resolution(rows: Sequence[Row], headline: str) -> float | None:
    """From the median half-width h of the paired intervals: 80 % power at 5 % needs 2.8 / 1.96 h.

    An interval without width (every cluster differs alike) says nothing about it.
    """
    scores = [r.scores[headline] for r in rows if not r.control and headline in r.scores]
    halves = [(d.high - d.low) / 2 for s in scores if (d := s.base_difference) and d.high > d.low]
    return median(halves) * (1.96 + 0.84) / 1.96 if halves else None


# --- drawers --------------------------------------------------------------------------------------


def _pictures(
    entries: Sequence[Entry], tables: Mapping[Any, pd.DataFrame | None], store: ImageStore, count: int
) -> dict[Any, list[Picture]]:
    with_table = [e for e in entries if tables.get(e.row.key) is not None]
    found: dict[Any, list[Picture]] = {e.row.key: [] for e in entries}
    if not with_table:
        return found
    base = next((e for e in with_table if e.row.method == e.row.reference), None)
    guide = base or with_table[0]
    table = tables[guide.row.key]
    assert table is not None
    keys = choose(table, "/".join(guide.row.key[:2]), count, guide.row.reference != BASE)
    base_lines = lookup(tables[base.row.key], keys) if base else {}
    references = guide.folder.parents[2] / "references"

    def of(entry: Entry | None, key: Key) -> str | None:
        return None if entry is None else store.add(image_path(entry.folder, key))

    for e in with_table:
        own = lookup(tables[e.row.key], keys)
        found[e.row.key] = triplets(
            keys,
            base_lines,
            own,
            lambda k: of(base, k),
            lambda k, e=e: of(e, k),  # type: ignore[misc]
            lambda r: store.add(named_file(references, f"{r}.png")),
        )
    return found


def _score_lines(row: Row, found: Sequence[Column], at: int) -> list[ScoreLine]:
    by_key = {c.key: c for c in found}
    lines = []
    for name in score_names([row]):
        column, record = by_key[name], row.scores[name]
        p = "" if record.base_difference is None else fmt.p_value(record.base_difference.p)
        lines.append(ScoreLine(name, column.help, column.cells[at], record, column.unit, p))
    return lines


def _slice_tables(row: Row) -> list[SliceTable]:
    """A table for each condition: the scores on memorization and concepts. The row has the others."""
    groups: dict[tuple[str, ...], list[Slice]] = {}
    for s in row.slices:
        if place(s.name)[1] in SLICED:
            groups.setdefault(tuple(sorted(s.where, key=lambda k: (k != "kind", k))), []).append(s)
    return [_slice_table(keys, groups[keys], row) for keys in sorted(groups, key=lambda k: (len(k), k))]


def _slice_table(keys: tuple[str, ...], slices: Sequence[Slice], row: Row) -> SliceTable:
    names = [n for n in score_names([row]) if any(s.name == n for s in slices)]
    slices = [s for s in slices if s.name in names]
    cells = {(tuple(s.where[k] for k in keys), s.name): s for s in slices}
    values = sorted({v for v, _ in cells}, key=lambda v: [(isinstance(x, str), x) for x in v])
    lines = []
    for value in values:
        found = [cells.get((value, n)) for n in names]
        counts = {s.n for s in found if s is not None and s.value is not None}
        each = len(counts) > 1
        shown = tuple(_slice_cell(s, row.scores[n], each) for s, n in zip(found, names, strict=True))
        note = "" if each or not counts else f"{counts.pop()} images"
        lines.append((", ".join(str(v) for v in value), note, shown))
    headings = [
        place(n)[0] + (" %" if fmt.is_share(row.scores[n].bounds, row.scores[n].unit) else "") for n in names
    ]
    return SliceTable("By " + " and ".join(keys), tuple(headings), tuple(lines))


def _slice_cell(found: Slice | None, record: ScoreRecord, with_count: bool) -> tuple[str, str]:
    if found is None or found.value is None:
        return "", "not measured"
    values = [v for v in (found.value, found.low, found.high) if v is not None]
    number = fmt.number_format(values, record.bounds, record.unit)
    interval = number.interval(found.low, found.high)
    count = f"{found.n} images" if with_count else ""
    return number(found.value), ", ".join(t for t in (interval, count) if t)


# --- plots ----------------------------------------------------------------------------------------


def _series(
    lines: Sequence[Line],
    shown: Sequence[Line],
    x: str,
    y: str,
    found: Sequence[Column],
    best: Front,
) -> list[Series]:
    """The plot's points by method: of the lines shown, with the cells at their places among all lines."""
    by_key = {c.key: c for c in found}
    if x not in by_key or y not in by_key:
        return []
    result = []
    for method, group in groupby(enumerate(lines), key=lambda pair: pair[1].row.method):
        members = [(i, line) for i, line in group if line in shown]
        points = [p for i, line in members if (p := _point(line, by_key[x], by_key[y], i, best)) is not None]
        if points:
            first = members[0][1]
            look = first.colour, first.shape, first.row.family, first.row.control
            result.append(Series(method, *look, tuple(points)))
    return result


def _point(line: Line, x: Column, y: Column, at: int, best: Front) -> Point | None:
    of_x, of_y = line.row.scores.get(x.key), line.row.scores.get(y.key)
    if missing_cell(line.row, of_x) or missing_cell(line.row, of_y):
        return None
    assert of_x is not None and of_y is not None and of_x.value is not None and of_y.value is not None
    note = "\n".join(f"{c.label}: {_with_interval(c.cells[at], c.unit)}" for c in (x, y))
    share = best.share.get(line.row.key)
    if share is not None:
        note += f"\nOn the front in {share * 100:.0f} % of resamples"
    flagged = bool(line.row.warnings)
    name = f"{line.row.method} · {line.row.setting}" + (" ⚑" if flagged else "")
    return Point(
        line.id, line.row.setting, of_x.value, of_y.value, of_x.low, of_x.high, of_y.low, of_y.high,
        f"{name}\n{note}", flagged,
    )  # fmt: skip


def _with_interval(cell: Cell, unit: str) -> str:
    mark = " %" if unit == "%" else ""
    return f"{cell.text}{mark}" + (f" ({cell.interval})" if cell.interval else "")


def _plots(
    series: Sequence[Series],
    found: Sequence[Column],
    axes: Mapping[str, Mapping[str, str]],
    best: Front,
    ids: Mapping[Any, str],
    reference: str,
) -> tuple[Scatter, Scatter] | None:
    if not series:
        return None
    by_key = {c.key: c for c in found}
    both = []
    for which in ("suppression", "adherence"):
        column = by_key[axes[which]["score"]]
        values = [v for s in series for p in s.points for v in ([p.x] if which == "suppression" else [p.y])]
        bounds = (0.0, 1.0) if column.unit == "%" else None
        number = fmt.number_format(values, bounds, "share" if bounds else column.unit)
        short = fmt.NumberFormat(0, True) if number.percent else fmt.NumberFormat(max(0, number.decimals - 1))
        label = axes[which].get("label") or column.label
        both.append(Axis(label + (" (%)" if number.percent else ""), short, column.direction))
    on = frozenset(ids[key] for key in best.rows)
    x, y = both
    wide = scatter(series, x, y, on, best.resampled, 1080, 600, len(series), reference)
    return wide, scatter(series, x, y, on, best.resampled, 380, 500, 10, reference)
