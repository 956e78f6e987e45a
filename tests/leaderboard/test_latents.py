"""The page's part about latents: what is drawn, what is written, and how it looks in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pytest
from made_runs import EVIL, METHODS, write
from markupsafe import Markup
from page_browser import Browser
from scipy.stats import norm
from sklearn.decomposition import PCA

from lethebench.errors import UserError
from lethebench.leaderboard import _latents as latents_module
from lethebench.leaderboard import scan
from lethebench.leaderboard._board import boards
from lethebench.leaderboard._build import TEMPLATES, policy
from lethebench.leaderboard._latents import Section, data_files, density, embed, section
from lethebench.leaderboard._pictures import ImageStore

BASE, BLANK, WEAK, MEDIUM, STRONG = METHODS[0], METHODS[2], *METHODS[5:8]
WILD = next(m for m in METHODS if m.method == EVIL)
RNG = np.random.default_rng


def recorded(value: float) -> dict[str, Any]:
    return {"mmd2": value, "low": value - 0.01, "high": value + 0.02, "p": 0.001, "n": 9, "m": 9}


def add_latents(folder: Path, images: int | None = None, moves: float = 0.0) -> None:
    """Gives a made row the columns and the record of the metric ``latents``."""
    path = folder / "images.parquet"
    table = pd.read_parquet(path)
    if images is not None:  # as many images as a real row has
        table = pd.concat([table] * (images // len(table) + 1), ignore_index=True).iloc[:images]
        table["index"] = np.arange(images)
        table["role"] = np.array(["concept", "trigger", "neutral"])[np.arange(images) % 3]
    r = RNG(len(table))
    x = r.standard_normal((len(table), 8)) + 2.0 * (table["role"] != "neutral").to_numpy()[:, None]
    x = x - moves * (table["role"] == "concept").to_numpy()[:, None]
    table["latent_magnitude"] = np.linalg.norm(x, axis=1) / np.sqrt(8)
    table["latent_projection"] = list(x)
    table.to_parquet(path, index=False)
    row = json.loads((folder / "row.json").read_text())
    row["metrics"]["latents"] = {
        "version": "1",
        "compared_to_base": {
            "from_base": {"concept": recorded(0.25), "neutral": recorded(0.004), "trigger": None},
            "from_neutral": {"concept": {"row": recorded(0.1), "base": recorded(0.3)}},
        },
    }
    (folder / "row.json").write_text(json.dumps(row))


def with_latents(runs: Path, images: int | None = None) -> Path:
    for i, path in enumerate(sorted(runs.rglob("images.parquet"))):
        add_latents(path.parent, images, moves=0.5 * i)
    return runs


@pytest.fixture
def made(few: Callable[..., Path]) -> Callable[..., Path]:
    """A runs folder of the given methods, all with latents."""
    return lambda *methods, images=None: with_latents(few(*methods), images)


def of_board(runs: Path, embedding: Any = "PCA") -> Section | None:
    board = boards(scan(runs).entries, {}, ImageStore(), 0)[0]
    return section(board.id, board.lines, embedding)


def there(found: Section | None) -> Section:
    assert found is not None
    return found


def rendered(found: Section) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("latents.html.jinja").render(b=SimpleNamespace(latents=found))


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# --- what is drawn --------------------------------------------------------------------------------


def test_density_is_that_of_a_normal_and_needs_two_values() -> None:
    grid = np.linspace(-4, 4, 81)
    found = density(RNG(0).standard_normal(20_000), grid)
    assert found is not None and np.abs(found - norm.pdf(grid)).max() < 0.02
    assert density(np.array([1.0]), grid) is None and density(np.full(5, 0.1) * 3, grid) is None


def test_every_setting_has_densities_and_the_middle_one_clouds(made: Callable[..., Path]) -> None:
    found = there(of_board(made(BASE, WEAK, MEDIUM, STRONG)))
    (figure,) = found.figures
    assert (figure.method, figure.setting) == ("uniforget", "medium")
    assert [d.role for d in figure.densities] == ["concept", "trigger", "neutral"]
    for d in figure.densities:
        assert d.base is not None and [c.name for c in d.curves] == ["weak", "medium", "strong"]
        assert [c.strength for c in d.curves] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [c.role for c in figure.clouds] == ["concept", "trigger", "neutral"]
    assert figure.clouds[0].separation == "MMD² 0.2500 (0.2400–0.2700), p = .001"
    assert figure.clouds[1].separation == "no separation recorded"


def test_curves_are_the_densities_of_the_table(made: Callable[..., Path]) -> None:
    runs = made(BASE, WEAK)
    curve = there(of_board(runs)).figures[0].densities[0].curves[0]
    table = pd.read_parquet(next(runs.glob("*/*/uniforget/weak/images.parquet")))
    values = table.loc[table["role"] == "concept", "latent_magnitude"].to_numpy()
    ours = density(values, np.array(curve.x))
    assert ours is not None and np.array(curve.y) == pytest.approx(ours, rel=1e-4)


def test_clouds_hold_the_same_images_of_both_and_stay_inside(made: Callable[..., Path]) -> None:
    found = there(of_board(made(BASE, WEAK, images=600)))
    for cloud in found.figures[0].clouds:
        assert cloud.base_points == cloud.own_points == 150
        places = re.findall(r"M(\d+),(\d+)h0", cloud.base + cloud.own)
        assert len(places) == 300 and all(0 < int(v) < cloud.side for place in places for v in place)
    by_row: dict[Any, set[Any]] = {}
    keys = {x.row.key: x.keys for x in found.rows}
    for key, i in found.points:
        by_row.setdefault(key, set()).add(keys[key][i])
    first, second = by_row.values()
    assert first == second


def test_pca_is_scikit_learns_and_spread_is_kept() -> None:
    x = RNG(3).standard_normal((50, 6)) * np.array([9, 5, 1, 1, 1, 1])
    theirs = PCA(2).fit(x)
    assert np.var(embed(x, "PCA"), axis=0, ddof=1) == pytest.approx(theirs.explained_variance_, rel=1e-6)


def test_umap_is_seeded_and_keeps_groups_apart() -> None:
    pytest.importorskip("umap", reason="the extra 'figures' is not installed")
    x = RNG(4).standard_normal((40, 6))
    x[:20] += 20
    first, again = embed(x, "UMAP"), embed(x, "UMAP")
    assert np.array_equal(first, again) and first.shape == (40, 2)
    a, b = first[:20], first[20:]
    gap = np.linalg.norm(a.mean(axis=0) - b.mean(axis=0))
    assert gap > 2 * max(a.std(axis=0).max(), b.std(axis=0).max())


def test_without_the_extra_the_page_says_pca_and_umap_says_how(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "find_spec", lambda name: None)
    found = there(of_board(made(BASE, WEAK), None))
    assert found.embedding == "PCA"
    text = rendered(found)
    assert (
        "by PCA" in text
        and "the extra figures, with UMAP as in the paper, is not installed" in text
        and "by UMAP" not in text
    )
    monkeypatch.setattr(latents_module, "find_spec", lambda name: object())
    monkeypatch.setattr(latents_module, "FEWEST_FOR_UMAP", 10_000)
    assert "needs 10000 images" in rendered(there(of_board(made(BASE, WEAK), None)))
    monkeypatch.setattr(latents_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lethebench\[figures\]"):
        embed(np.zeros((3, 2)), "UMAP")


# --- rows that lack something ---------------------------------------------------------------------


def test_no_section_without_latents_of_base_and_a_method(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK)
    assert of_board(runs) is None
    add_latents(next(runs.glob("*/*/base/default")))
    assert of_board(runs) is None
    assert data_files([]) == {}


def test_no_section_without_base(made: Callable[..., Path]) -> None:
    assert of_board(made(WEAK, MEDIUM)) is None


def test_rows_without_latents_are_named_and_controls_left_out(made: Callable[..., Path]) -> None:
    runs = made(BASE, BLANK, WEAK, MEDIUM, STRONG)
    next(runs.glob("*/*/uniforget/weak/images.parquet")).write_bytes(b"PAR1 no more")
    path = next(runs.glob("*/*/uniforget/strong/images.parquet"))
    table = pd.read_parquet(path)
    table["latent_projection"] = [np.zeros(3)] * len(table)
    table.to_parquet(path, index=False)
    found = there(of_board(runs))
    assert set(found.missing) == {"uniforget (weak)", "uniforget (strong)"}
    assert {x.row.method for x in found.rows} == {"base", "uniforget"}
    assert "Without latents: uniforget (weak), uniforget (strong)." in rendered(found)


def test_images_without_latents_and_equal_magnitudes_are_no_error(made: Callable[..., Path]) -> None:
    runs = made(BASE, WEAK)
    path = next(runs.glob("*/*/uniforget/weak/images.parquet"))
    table = pd.read_parquet(path)
    table["latent_magnitude"] = np.where(table["role"] == "neutral", 1.0, table["latent_magnitude"])
    table.loc[0, "latent_magnitude"] = np.nan
    table.to_parquet(path, index=False)
    found = there(of_board(runs))
    neutral = next(d for d in found.figures[0].densities if d.role == "neutral")
    assert neutral.constant == ("weak",) and not neutral.curves
    assert "No curve (one value only): weak." in rendered(found)
    drawn = table[table["role"].isin(["concept", "trigger", "neutral"])]
    assert len(found.rows[1].keys) == len(drawn) - 1, "one has no latent"


@pytest.mark.parametrize("bad", [np.zeros(1), np.full(8, 1e200), np.full(8, np.nan), np.zeros((2, 4)), "x"])
def test_vectors_that_are_none_cost_the_row_only(made: Callable[..., Path], bad: Any) -> None:
    runs = made(BASE, WEAK, MEDIUM)
    path = next(runs.glob("*/*/uniforget/weak/images.parquet"))
    table = pd.read_parquet(path)
    table["latent_projection"] = [bad.tolist() if isinstance(bad, np.ndarray) else bad] * len(table)
    table.to_parquet(path, index=False)
    assert there(of_board(runs)).missing == ("uniforget (weak)",)


def test_a_method_with_no_role_of_base_is_drawn_as_nothing(made: Callable[..., Path]) -> None:
    runs = made(BASE, WEAK)
    for name, role in (("base/default", "trigger"), ("uniforget/weak", "neutral")):
        path = next(runs.glob(f"*/*/{name}/images.parquet"))
        table = pd.read_parquet(path)
        table[table["role"] == role].to_parquet(path, index=False)
    figure = there(of_board(runs)).figures[0]
    assert not figure.densities and not figure.clouds


@pytest.mark.parametrize(
    "said", ["<b>", None, [1], {"from_base": {"concept": {"mmd2": "<b>", "low": 0, "high": 1, "p": 0}}}]
)
def test_a_record_of_another_shape_costs_the_number_only(made: Callable[..., Path], said: Any) -> None:
    runs = made(BASE, WEAK)
    path = next(runs.glob("*/*/uniforget/weak/row.json"))
    row = json.loads(path.read_text())
    row["metrics"]["latents"]["compared_to_base"] = said
    path.write_text(json.dumps(row))
    found = there(of_board(runs))
    assert found.figures[0].clouds[0].separation == "no separation recorded" and not found.headings
    assert "<b>1" not in rendered(found) and "as a table (MMD²)" not in rendered(found)


# --- what is written ------------------------------------------------------------------------------


def test_table_says_what_the_rows_record(made: Callable[..., Path]) -> None:
    found = there(of_board(made(BASE, WEAK, STRONG)))
    assert [h for h, _ in found.headings] == [
        "Protected concepts: from base",
        "Neutral prompts: from base",
        "Protected concepts: from neutral",
        "Protected concepts: from neutral, base",
    ]
    method, setting, _, cells = found.lines[0]
    assert (method, setting) == ("uniforget", "weak")
    assert [c.text for c in cells if c is not None] == ["0.2500", "0.0040", "0.1000", "0.3000"]


def test_page_is_escaped_and_its_ids_are_unique(made: Callable[..., Path]) -> None:
    text = rendered(there(of_board(made(BASE, WEAK, WILD))))
    assert EVIL not in text and "&lt;img src=x" in text
    elements = Elements(text).found
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids)) > 10
    named = [n for t, a in elements if t == "svg" for n in (a["aria-labelledby"] or "").split()]
    assert named and set(named) <= set(ids)
    tags = [t for t, _ in elements]
    assert tags.count("svg") == tags.count("desc") == 12 and "script" not in tags
    assert not [a for _, a in elements if any(name.startswith("on") for name in a)]


def test_five_rows_of_600_images_are_light(made: Callable[..., Path]) -> None:
    nemo = next(m for m in METHODS if m.method == "nemo")
    text = rendered(there(of_board(made(BASE, WEAK, MEDIUM, STRONG, nemo, images=600))))
    assert len(text.encode()) < 150_000


def test_same_rows_give_the_same_bytes(made: Callable[..., Path]) -> None:
    runs = made(BASE, WEAK, images=600)
    first, again = (there(of_board(runs)) for _ in range(2))
    assert rendered(first) == rendered(again) and data_files([first]) == data_files([again])


def test_data_files_hold_every_image_and_curve(made: Callable[..., Path]) -> None:
    found = there(of_board(made(BASE, WEAK, WILD, images=300)))
    files = data_files([found])
    lines = list(csv.DictReader(io.StringIO(files["latents.csv"])))
    assert len(lines) == 3 * 300 and {x["method"] for x in lines} == {"base", "uniforget", EVIL}
    placed = [x for x in lines if x["x"]]
    assert len(placed) == len(found.points) and {x["embedding"] for x in placed} == {"PCA"}
    one = placed[0]
    i = next(i for i, key in enumerate(found.rows[0].keys) if key == (one["prompt_id"], int(one["index"])))
    assert float(one["magnitude"]) == pytest.approx(found.rows[0].magnitudes[i], rel=1e-5)
    board = json.loads(files["latents.json"])["boards"][0]
    assert (board["suite"], board["model"], board["embedding"]) == ("planted@1", "mini-sd", "PCA")
    curves = {(c["beside"], c["method"], c["setting"], c["role"]) for c in board["densities"]}
    assert ("uniforget", "base", "default", "concept") in curves
    assert ("uniforget", "uniforget", "weak", "neutral") in curves
    assert board["separations"][0]["compared_to_base"]["from_base"]["concept"]["mmd2"] == 0.25


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("latents")
    runs = write(tmp_path / "runs", (BASE, WEAK, MEDIUM, STRONG, WILD), every=4)
    body = rendered(there(of_board(with_latents(runs, 300))))
    css = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy("")}"><title>x</title>'
        '<link rel="icon" href="data:,">'
    )
    path = tmp_path / "latents.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}<style>{css}</style></head><body><main>{body}</main>',
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1280, False), (1920, True)])
def test_it_fits_and_shows_at_any_width(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.overflow() <= 0 and browser.complaints() == []
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.overflow() <= 0
    sizes = browser.js(
        "return [...document.querySelectorAll('.latents svg')].map(s => s.getBoundingClientRect())"
        ".map(r => [r.width, r.height])"
    )
    assert len(sizes) == 12 and all(w > 120 and h > 80 for w, h in sizes)
    strokes = browser.js(
        "return ['.base-line', '.dose path'].map(x => getComputedStyle(document.querySelector('.latents ' + x)))"
        ".map(s => [s.stroke, s.fill])"
    )
    assert {fill for _, fill in strokes} == {"none"} and len({stroke for stroke, _ in strokes}) == 2
    assert browser.js("return window.pwned === undefined && !document.querySelector('[onerror]')")


def test_points_are_painted(browser: Browser, page: Path) -> None:
    """A dot is a line of no length with a round end: the browser must paint it."""
    browser.open(page, width=1280)
    painted = browser.js(
        """
      const path = document.querySelector('.latents path[stroke-linecap=round]');
      const first = path.getAttribute('d').match(/M(\\d+),(\\d+)/).slice(1).map(Number);
      const point = path.ownerSVGElement.createSVGPoint();
      [point.x, point.y] = first;
      return [path.isPointInStroke(point), path.isPointInStroke(Object.assign(point, {x: -50}))];"""
    )
    assert painted == [True, False]
