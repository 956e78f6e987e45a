"""UniForget's Figures 4 and 5 for a board: densities of the latent magnitude, and latents in two dimensions.

Base is drawn beside every method. The numbers of the captions are those that the rows record (metric
``latents``); nothing is tested here. All drawing is data for the template.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethebench.errors import UserError
from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._plot import Tick, ticks
from lethebench.leaderboard._rows import reference_of
from lethebench.leaderboard._tables import TABLE
from lethebench.row import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lethebench.leaderboard._board import Line

    Floats = NDArray[np.float64]

Embedding = Literal["UMAP", "PCA"]
INSTALL = "pip install lethebench[figures]"
ROLES = {"concept": "Protected concepts", "trigger": "Triggers", "neutral": "Neutral prompts"}
"""Roles that are drawn, with their headings."""
MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 150, 20, 4000
"""Points of a row and role: at most, at least, and about how many all rows and roles may have together."""
GRID = 64
"""Points of a density curve."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 220, 150, 8.0, 212.0, 8.0, 126.0
CLOUD = 400
"""Side of a cloud in its own units: points lie on whole numbers."""
FEWEST_FOR_UMAP = 32
LARGEST = 1e30
"""A latent beyond this is no latent: its square would not be finite."""
_COLUMNS = ("prompt_id", "index", "role", "latent_magnitude", "latent_projection")
SCHEMA = "lethe/latents/1"


# --- what is drawn --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A row's density. ``strength`` is 0 (weakest setting) to 1."""

    name: str
    path: str
    strength: float
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Densities:
    """The densities of base and of a method's settings on prompts of one role."""

    role: str
    base: Curve | None
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    constant: tuple[str, ...]
    """Rows without a curve: fewer than two images, or all of one magnitude."""
    width: int = WIDTH
    height: int = HEIGHT
    left: float = LEFT
    right: float = RIGHT
    bottom: float = BOTTOM

    @property
    def title(self) -> str:
        """The role in words."""
        return ROLES[self.role]


@dataclass(frozen=True)
class Cloud:
    """Latents of base and of one setting, on the same prompts and noise, in two dimensions."""

    role: str
    base: str
    own: str
    base_points: int
    own_points: int
    separation: str
    side: int = CLOUD

    @property
    def title(self) -> str:
        """The role in words."""
        return ROLES[self.role]


@dataclass(frozen=True)
class Figure:
    """A method's densities and clouds. ``setting`` is the one whose clouds are drawn: the middle one."""

    method: str
    colour: int
    setting: str
    densities: tuple[Densities, ...]
    clouds: tuple[Cloud, ...]


@dataclass(frozen=True)
class Separation:
    """A row's recorded separation, in words."""

    text: str
    interval: str
    p: str

    def __str__(self) -> str:
        return f"MMD² {self.text} ({self.interval}), {self.p}"


@dataclass(frozen=True)
class RowLatents:
    """A row with the latents of its images."""

    row: Row
    colour: int
    keys: tuple[tuple[str, int], ...]
    roles: tuple[str, ...]
    magnitudes: Floats
    projections: Floats

    def of(self, role: str) -> list[int]:
        """The images on prompts of that role."""
        return [i for i, r in enumerate(self.roles) if r == role]


@dataclass(frozen=True)
class Section:
    """The part of a board's page about its latents."""

    id: str
    suite: str
    model: str
    embedding: Embedding
    why: str
    """Why it is not UMAP; empty where it is."""
    figures: tuple[Figure, ...]
    rows: tuple[RowLatents, ...]
    """Base first."""
    points: Mapping[tuple[tuple[str, str, str, str], int], tuple[float, float]]
    """Where the latents of a row's image lie: by the row's key and the image's number in it."""
    missing: tuple[str, ...]
    """Rows of methods without latents."""

    @cached_property
    def headings(self) -> list[tuple[str, str]]:
        """Columns of the table of separations: heading and meaning."""
        base = self.reference
        return [
            (_HEADS[kind].format(role=ROLES[role], base=base), _HELP[kind].format(base=base))
            for kind, role in self._measured
        ]

    @property
    def reference(self) -> str:
        """The method that the others are drawn beside."""
        return self.rows[0].row.method

    @cached_property
    def lines(self) -> list[tuple[str, str, int, list[Separation | None]]]:
        """The table of separations: method, setting, colour, a cell for each heading."""
        return [
            (x.row.method, x.row.setting, x.colour, [separation(x.row, k, r) for k, r in self._measured])
            for x in self.rows[1:]
        ]

    @cached_property
    def _measured(self) -> list[tuple[str, str]]:
        every = [(kind, role) for kind in _HEADS for role in ROLES]
        return [(k, r) for k, r in every if any(separation(x.row, k, r) for x in self.rows[1:])]


_HEADS = {
    "from_base": "{role}: from {base}",
    "from_neutral": "{role}: from neutral",
    "base_from_neutral": "{role}: from neutral, {base}",
}
_HELP = {
    "from_base": "How far the row's latents are from {base}'s on the same prompts and noise.",
    "from_neutral": "How far the row's latents on these prompts are from its latents on neutral prompts.",
    "base_from_neutral": "The same for {base}: what the method started from.",
}


# --- building -------------------------------------------------------------------------------------


def section(board: str, lines: Sequence[Line], embedding: Embedding | None = None) -> Section | None:
    """The section of the board of that id; None unless base and a method have latents.

    Where the suite compares with another row, that one stands for base.

    ``embedding`` None takes UMAP where it is installed and there are images enough, else PCA; the page says
    which, and why. Raises UserError for UMAP without its extra.
    """
    reference = reference_of(x.row for x in lines)
    usable = [x for x in lines if x.row.status == "ok" and (x.row.method == reference or not x.row.control)]
    found = {x.id: read_latents(x.folder, x.row, x.colour) for x in usable}
    base = next((f for x in usable if x.row.method == reference and (f := found[x.id]) is not None), None)
    if base is None:
        return None
    width = base.projections.shape[1]
    rows = [
        f
        for x in usable
        if x.row.method != reference and (f := found[x.id]) is not None and f.projections.shape[1] == width
    ]
    if not rows:
        return None
    kept = {f.row.key for f in rows}
    methods = [list(group) for _, group in groupby(rows, key=lambda f: f.row.method)]
    shown = [settings[len(settings) // 2] for settings in methods]
    how, why = (embedding, "as asked") if embedding else _embedding(base)
    points = _embedded([base, *shown], how)
    return Section(
        id=f"{board}-l",
        suite=base.row.key[0],
        model=base.row.model,
        embedding=how,
        why=why,
        figures=tuple(_figure(base, s, x, points) for s, x in zip(methods, shown, strict=True)),
        rows=(base, *rows),
        points=points,
        missing=tuple(
            f"{x.row.method} ({x.row.setting})"
            for x in usable
            if x.row.method != reference and x.row.key not in kept
        ),
    )


def read_latents(folder: Path, row: Row, colour: int = -1) -> RowLatents | None:
    """The latents in a row's per-image table; None where there are none, or the table can't be read."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / TABLE
    if not path.is_file():
        return None
    try:
        if not set(_COLUMNS) <= set(pq.read_schema(path).names):
            return None
        table = pq.read_table(path, columns=list(_COLUMNS)).to_pandas()
        magnitudes = table["latent_magnitude"].to_numpy(dtype=float)
        at = np.flatnonzero(np.isfinite(magnitudes) & table["role"].isin(list(ROLES)).to_numpy(dtype=bool))
        vectors = np.stack([np.asarray(v, dtype=float) for v in table["latent_projection"].iloc[at]])
        keys = [(str(p), int(i)) for p, i in zip(table["prompt_id"], table["index"], strict=True)]
    except (OSError, ValueError, TypeError, OverflowError, pa.ArrowException):
        return None
    if vectors.ndim != 2 or min(vectors.shape) < 2:
        return None
    if not (np.abs(vectors) < LARGEST).all() or not (np.abs(magnitudes[at]) < LARGEST).all():
        return None
    roles = table["role"].astype(str).tolist()
    return RowLatents(
        row, colour, tuple(keys[i] for i in at), tuple(roles[i] for i in at), magnitudes[at], vectors
    )


def _figure(
    base: RowLatents,
    settings: Sequence[RowLatents],
    shown: RowLatents,
    points: Mapping[Any, tuple[float, float]],
) -> Figure:
    roles = [r for r in ROLES if base.of(r) and any(s.of(r) for s in settings)]
    return Figure(
        method=shown.row.method,
        colour=shown.colour,
        setting=shown.row.setting,
        densities=_densities(base, settings, roles),
        clouds=tuple(c for r in roles if (c := _cloud(base, shown, r, points)) is not None),
    )


# --- densities (Figure 5) -------------------------------------------------------------------------


def _densities(
    base: RowLatents, settings: Sequence[RowLatents], roles: Sequence[str]
) -> tuple[Densities, ...]:
    """A panel for each role, all on the scales of this method: a broken one spoils no other's."""
    import numpy as np

    if not roles:
        return ()
    everything = np.concatenate([x.magnitudes[x.of(r)] for x in (base, *settings) for r in roles])
    low, high = float(everything.min()), float(everything.max())
    pad = (high - low) * 0.08 or abs(high) * 0.08 or 1.0
    grid = np.linspace(low - pad, high + pad, GRID)
    found = [
        (
            role,
            density(base.magnitudes[base.of(role)], grid),
            [density(x.magnitudes[x.of(role)], grid) for x in settings],
        )
        for role in roles
    ]
    top = max((float(y.max()) for _, b, own in found for y in (b, *own) if y is not None), default=1.0)
    at = [Tick(_across(t, grid), f"{t:g}") for t in ticks(float(grid[0]), float(grid[-1]), 4)]

    def curve(name: str, y: Floats | None, strength: float) -> Curve | None:
        if y is None:
            return None
        xs = [LEFT + (RIGHT - LEFT) * i / (GRID - 1) for i in range(GRID)]
        ys = [BOTTOM - (BOTTOM - TOP) * float(v) / top for v in y]
        path = _path(xs, ys)
        rounded = [tuple(float(f"{v:.6g}") for v in values) for values in (grid, y)]
        return Curve(name, path, strength, *rounded)

    panels = []
    for role, of_base, own in found:
        named = [
            (base.row.setting, of_base),
            *((x.row.setting, y) for x, y in zip(settings, own, strict=True)),
        ]
        curves = [curve(n, y, (i + 1) / len(settings)) for i, (n, y) in enumerate(named[1:])]
        constant = (*([base.row.method] if of_base is None else []), *(n for n, y in named[1:] if y is None))
        kept = tuple(c for c in curves if c is not None)
        panels.append(Densities(role, curve(base.row.setting, of_base, 1.0), kept, tuple(at), constant))
    return tuple(panels)


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """A curve in whole units across and tenths up, each point relative to the last: half as long to write.

    >>> _path([8, 11.2, 14.6], [126, 125.96, 120.5])
    'M8 126l3 0 4-5.5'
    """
    at = [(round(x), round(10 * y)) for x, y in zip(xs, ys, strict=True)]
    steps = [(b[0] - a[0], (b[1] - a[1]) / 10) for a, b in pairwise(at)]
    written = (f"{dx}{'' if dy < 0 else ' '}{_short(dy)}" for dx, dy in steps)
    return f"M{at[0][0]} {at[0][1] / 10:g}l{' '.join(written)}"


def _short(number: float) -> str:
    text = f"{number:g}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def density(values: Floats, grid: Floats) -> Floats | None:
    """The Gaussian kernel density of ``values`` on ``grid`` (Scott's bandwidth), None where it has none."""
    import numpy as np
    from scipy.stats import gaussian_kde

    if len(values) < 2 or np.ptp(values) <= 1e-9 * np.abs(values).max():
        return None
    return np.asarray(gaussian_kde(values)(grid))


def _across(value: float, grid: Floats) -> float:
    share = (value - float(grid[0])) / float(grid[-1] - grid[0])
    return round(LEFT + share * (RIGHT - LEFT), 1)


# --- clouds (Figure 4) ----------------------------------------------------------------------------


def embed(vectors: Floats, how: Embedding) -> Floats:
    """Vectors ``[n, d]`` in two dimensions, ``[n, 2]``: the same for the same input on one machine.

    UMAP (McInnes, Healy and Melville 2018) with its own defaults (15 neighbours, minimum distance 0.1),
    seeded, in one thread; PCA by a full singular value decomposition. Raises UserError for UMAP without its
    extra.
    """
    import numpy as np

    if how == "PCA":
        from sklearn.decomposition import PCA

        return np.asarray(PCA(2, svd_solver="full").fit_transform(vectors))
    if find_spec("umap") is None:
        raise UserError(f"the UMAP of the latents needs umap-learn: `{INSTALL}`, or choose PCA")
    import umap  # type: ignore[import-untyped, import-not-found, unused-ignore]

    neighbours = min(15, len(vectors) - 1)
    made = umap.UMAP(n_components=2, n_neighbors=neighbours, random_state=0, n_jobs=1)
    return np.asarray(made.fit_transform(vectors), dtype=np.float64)


def _embedding(base: RowLatents) -> tuple[Embedding, str]:
    """UMAP if it can be had, and if not, why."""
    if find_spec("umap") is None:
        return "PCA", "the extra figures, with UMAP as in the paper, is not installed"
    if len(base.keys) < FEWEST_FOR_UMAP:
        return "PCA", f"UMAP as in the paper needs {FEWEST_FOR_UMAP} images"
    return "UMAP", ""


def _embedded(
    rows: Sequence[RowLatents], how: Embedding
) -> dict[tuple[tuple[str, str, str, str], int], tuple[float, float]]:
    """One embedding of some images of all rows (base first), the same images of each."""
    import numpy as np

    base = rows[0]
    count = min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // (len(rows) * len(ROLES))))
    chosen = {base.keys[i] for role in ROLES for i in _some(base, role, count)}
    at = [(x, i) for x in rows for i, key in enumerate(x.keys) if key in chosen]
    found = embed(np.stack([x.projections[i] for x, i in at]), how)
    return {(x.row.key, i): (float(a), float(b)) for (x, i), (a, b) in zip(at, found.tolist(), strict=True)}


def _some(base: RowLatents, role: str, count: int) -> list[int]:
    from lethebench import stats

    own = sorted(base.of(role), key=lambda i: base.keys[i])
    if len(own) <= count:
        return own
    drawn = stats.rng("figures", *base.row.key[:2], role).choice(len(own), count, replace=False)
    return [own[i] for i in drawn]


def _cloud(
    base: RowLatents, shown: RowLatents, role: str, points: Mapping[Any, tuple[float, float]]
) -> Cloud | None:
    """The role's points, as large as they fit; None where one of the two rows has none."""
    both = [[points[x.row.key, i] for i in x.of(role) if (x.row.key, i) in points] for x in (base, shown)]
    if not all(both):
        return None
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*both[0], *both[1], strict=True))
    size = max(x1 - x0, y1 - y0) or 1.0
    inner = CLOUD - 24

    def place(x: float, y: float) -> str:
        across, up = (x - (x0 + x1) / 2) / size, (y - (y0 + y1) / 2) / size
        return f"M{12 + inner * (0.5 + across):.0f},{12 + inner * (0.5 - up):.0f}h0"

    of_base, own = ("".join(place(x, y) for x, y in part) for part in both)
    number = separation(shown.row, "from_base", role)
    told = str(number) if number else "no separation recorded"
    return Cloud(role, of_base, own, len(both[0]), len(both[1]), told)


# --- numbers --------------------------------------------------------------------------------------


def separation(row: Row, kind: str, role: str) -> Separation | None:
    """What the row records: ``from_base``, ``from_neutral`` or ``base_from_neutral`` of a role.

    None where it records none, or something else in its place: rows come from others too.
    """
    found: Any = row.metrics
    whose = {"from_base": (), "from_neutral": ("row",), "base_from_neutral": ("base",)}[kind]
    part = "from_base" if kind == "from_base" else "from_neutral"
    for key in ("latents", "compared_to_base", part, role, *whose):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    numbers = [found.get(name) for name in ("mmd2", "low", "high", "p")]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in numbers):
        return None
    value, low, high, p = (float(v) for v in numbers)  # type: ignore[arg-type]
    number = fmt.NumberFormat(4)
    return Separation(number(value), number.interval(low, high), fmt.p_value(p))


# --- data -----------------------------------------------------------------------------------------


def data_files(sections: Sequence[Section]) -> dict[str, str]:
    """What the figures show, as files beside the page: every image in CSV, curves and numbers in JSON.

    Empty where no board has latents.
    """
    if not sections:
        return {}
    return {"latents.csv": _csv_text(sections), "latents.json": _json_text(sections)}


def _csv_text(sections: Sequence[Section]) -> str:
    """One line an image; the place in two dimensions is empty where the image is not drawn."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ("suite", "model", "method", "setting", "prompt_id", "index", "role", "magnitude", "x", "y")
    writer.writerow((*heads, "embedding"))
    for s in sections:
        for x in s.rows:
            for i, (key, role) in enumerate(zip(x.keys, x.roles, strict=True)):
                place = s.points.get((x.row.key, i))
                where = (*(f"{v:.6g}" for v in place), s.embedding) if place else ("", "", "")
                writer.writerow((*x.row.key, *key, role, f"{x.magnitudes[i]:.6g}", *where))
    return text.getvalue()


def _json_text(sections: Sequence[Section]) -> str:
    data = {"schema": SCHEMA, "boards": [_board_data(s) for s in sections]}
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _board_data(s: Section) -> dict[str, Any]:
    def recorded(row: Row) -> Any:
        found = row.metrics.get("latents")
        return found.get("compared_to_base") if isinstance(found, Mapping) else None

    return {
        "suite": s.suite,
        "model": s.model,
        "embedding": s.embedding,
        "densities": [
            {"beside": f.method, "method": method, "setting": c.name, "role": d.role}
            | {"magnitude": list(c.x), "density": list(c.y)}
            for f in s.figures
            for d in f.densities
            for method, c in ((s.reference, d.base), *((f.method, x) for x in d.curves))
            if c is not None
        ],
        "separations": [
            {"method": x.row.method, "setting": x.row.setting, "compared_to_base": recorded(x.row)}
            for x in s.rows[1:]
        ],
    }
