"""The training-time track: rows are compared with plain LoRA, over the correlation and single settings."""

from __future__ import annotations

import csv
import doctest
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import SECOND, TRAINED, write, write_trained
from page_browser import Browser

from lethebench.leaderboard import _doses, _latents, build, load_rows, scan
from lethebench.leaderboard._attacks import REFERENCE
from lethebench.leaderboard._board import Board, boards
from lethebench.leaderboard._build import tracks
from lethebench.leaderboard._doses import by_setting
from lethebench.leaderboard._pictures import ImageStore
from lethebench.leaderboard._plot import even_by_logarithm
from lethebench.row import Row

LORA, BASE, ORACLE = TRAINED[:3]
SHOWN = "section.board:not([hidden])"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tracks: the training-time track has more rows and so comes first."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    write(runs, SECOND, model="mini-flux", every=2)
    return write_trained(runs)


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(trained, tmp_path_factory.mktemp("trained-site"))


@pytest.fixture(scope="module")
def track(trained: Path) -> Board:
    return boards(scan(trained).entries, {}, ImageStore(), 12)[0]


def line_of(board: Board, method: str, setting: str = "default"):
    return next(x for x in board.lines if (x.row.method, x.row.setting) == (method, setting))


# --- what rows are compared with ------------------------------------------------------------------


def test_the_suites_reference_stands_for_base(track: Board) -> None:
    assert track.training and track.reference == "lora" and track.floor == "lora-oracle"
    assert [x.row.method for x in track.controls] == ["lora", "base", "lora-oracle", "gradient-hooks"]
    assert track.base is not None and track.base.row.method == "lora"
    cell = track.cell(line_of(track, "gradient-projection", "strong"), "attribute.present")
    assert "To lora, on the same noise" in cell.note and cell.difference.startswith("−")
    assert track.cell(line_of(track, "base"), "attribute.present").difference, "base is a row like others"
    assert not track.cell(line_of(track, "lora"), "attribute.present").difference
    plot = track.plot[0] if track.plot else pytest.fail("no plot")
    assert plot.y_label == "Wanted features learnt (%), relative to lora (%)"
    assert "lora" in {t.text for t in plot.y_ticks} and "base" not in {t.text for t in plot.y_ticks}
    marks = {m.series.name: m for m in plot.marks}
    assert marks["base"].outside == "below", "the scale is that of plain LoRA and the methods"


def test_curves_are_relative_to_the_reference(track: Board) -> None:
    found = {c.method: c for c in track.curves}
    assert found["gradient-projection"].area.value > found["loss-threshold"].area.value > 0
    assert "lora+uce" not in found, "flagged"
    assert all("lora's" in text and "base" not in text for _, text in track.curve_headings)
    assert track.floor_suppression == "100.0 %"


def test_verdict_tells_both_axes_and_both_ends(track: Board) -> None:
    parts = (
        "Images with the prohibited attribute:",
        "for lora and",
        "% for lora-oracle. Wanted features learnt:",
    )
    assert all(part in track.verdict for part in parts)


def test_columns_are_those_of_the_track(track: Board) -> None:
    keys = [c.key for c in track.columns]
    assert keys[:2] == ["attribute.present", "best_known"]
    assert [name for _, name in track.groups][:2] == ["Prohibited attribute", "Wanted content"]
    strong = line_of(track, "gradient-projection", "strong")
    texts = {key: track.cell(strong, key).text for key in keys}
    assert texts["cost.step_relative_to_plain"] == "1.08×"
    assert texts["cost.training_state_bytes"] == "40 KiB" and texts["cost.fit_seconds"] == "9.3 min"
    assert dict(strong.facts)["A step, relative to plain LoRA"] == "1.08×"
    assert dict(strong.facts)["Held beside the LoRA"] == "40 KiB"
    assert track.cell(line_of(track, "base"), "cost.step_relative_to_plain").state == "not-applicable"
    assert {t.title for t in strong.slices} >= {"By kind and correlation", "By kind and duplicates"}


def test_attacks_have_the_tracks_ends(track: Board) -> None:
    section = track.attacks or pytest.fail("no section")
    verdicts = {f.row.method: f.verdict for f in section.findings}
    assert verdicts["lora"] == REFERENCE == verdicts["lora-oracle"] and verdicts["base"] == "not told apart"
    assert [r.name for r in section.pictures[0].references] == ["lora-oracle", "lora"]
    assert section.summary.endswith(
        "hides what it seems to keep out: most gradient-projection · strong, 42.4 points."
    )


def test_pictures_ask_for_the_attribute_and_the_wanted_first(track: Board) -> None:
    pictures = line_of(track, "gradient-projection", "strong").pictures
    assert [p.role for p in pictures[:4]] == ["concept", "probe", "concept", "trigger"]
    assert {p.correlation for p in pictures if p.role == "concept"} <= {0.25, 0.5, 0.75, 1.0}
    lora = line_of(track, "lora").pictures
    assert [p.base for p in pictures] == [p.method for p in lora], "beside those of plain LoRA"
    assert {p.role for p in track.lead} == {"concept"}


# --- panels ---------------------------------------------------------------------------------------


def test_correlation_has_a_pair_a_method_between_reference_and_floor(track: Board) -> None:
    methods = {x.row.method for x in track.methods if x.row.status == "ok"}
    assert {s.method for s in track.correlated} == methods
    pair = next(s for s in track.correlated if s.method == "gradient-projection")
    suppression, adherence = pair.panels
    assert pair.heads == ["0.25", "0.5", "0.75", "1"]
    assert [x.line.name for x in suppression.lines] == ["weak", "medium", "strong"], "no sweeps"
    strong = suppression.lines[-1].line.points
    slices = {
        s.where["correlation"]: s.value
        for s in line_of(track, "gradient-projection", "strong").row.slices
        if s.name == "attribute.present" and "correlation" in s.where
    }
    assert {p.dose: p.value for p in strong} == slices
    assert strong[-1].value > strong[0].value, "where everything is entangled it fails"
    for panel in pair.panels:
        assert panel.base is not None and panel.floor is not None and panel.band
        gaps = [b[0] - a[0] for a, b in zip(panel.base.dots, panel.base.dots[1:], strict=False)]
        assert max(gaps) - min(gaps) < 0.3, "the axis is even"
    assert adherence.title == "Features (%) ↑" and suppression.about == "gradient-projection: Present (%)"
    names = [(x.score, x.name, x.is_end) for x in pair.table]
    assert names[0] == ("Present (%)", "lora", True) and ("Features (%)", "lora-oracle", True) in names
    assert all(value and interval for x in pair.table for value, interval in x.cells)


def test_one_line_has_its_intervals_drawn_and_stays_on_the_panel(track: Board) -> None:
    single = next(s for s in track.correlated if s.method == "drop-captions")
    for pair in (single, *track.sweeps):
        for panel in pair.panels:
            (line,) = panel.lines
            assert line.bars.count("M") == len(line.dots)
            for x, y in line.dots:
                assert panel.left <= x <= panel.right and panel.top <= y <= panel.bottom


def test_copies_keep_their_panels_and_have_the_floor(track: Board) -> None:
    assert track.doses == [1, 4] and all(p.base and p.floor for p in track.panels)
    assert [name for name, _, _ in track.dose_lines[:2]] == ["lora", "lora-oracle"]


def test_sweeps_are_found_by_what_rows_differ_in(track: Board) -> None:
    found = {(s.method, s.by): s for s in track.sweeps}
    assert set(found) == {
        ("gradient-projection", "strength"),
        ("gradient-projection", "dimension"),
        ("loss-threshold", "threshold"),
    }
    strength, dimension = (found["gradient-projection", by] for by in ("strength", "dimension"))
    assert strength.heads == ["0.25", "0.5", "0.9", "1"] and dimension.heads == ["1", "4", "16", "none"]
    assert "lambda" in strength.help, "the installed method tells what the setting is"
    present = dimension.panels[0]
    assert [t.text for t in present.x_ticks] == ["1", "4", "16", "none"]
    xs = [x for x, _ in present.lines[0].dots]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2), "by the logarithm"
    value = track.cell(line_of(track, "gradient-projection", "strong"), "attribute.present")
    own = next(x for x in dimension.table if x.name == "gradient-projection")
    assert own.cells[-1] == (value.text, value.interval)
    levels = present.floor.dots if present.floor else ()
    assert len({y for _, y in levels}) == 1, "a level line"


def swept(row: Row, setting: str, **settings: object) -> Row:
    parts = {row.method: settings} if "+" not in row.method else settings
    return row.model_copy(update={"setting": setting, "config": {"method": parts}})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([{"a": 1}, {"a": 2}], []),
        ([{"a": 1}, {"a": 2}, {"a": 2}], []),
        ([{"a": 1}, {"a": 2}, {"a": 4, "b": 1}], []),
        ([{"a": "x"}, {"a": "y"}, {"a": "z"}], []),
        ([{"a": 1}, {"a": "y"}, {"a": None}], []),
        ([{"a": True}, {"a": False}, {"a": 1}], []),
        ([{"a": 1}, {"a": 2}, {"a": None}], [("a", "", ["1", "2", "none"])]),
        (
            [{"a": 4, "b": 1}, {"a": 0.5, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 7}],
            [("a", "", ["0.5", "2", "4"])],
        ),
        (
            [{"a": a, "b": b} for a in (1, 2, 3) for b in ("x", "y")],
            [("a", "b x", ["1", "2", "3"]), ("a", "b y", ["1", "2", "3"])],
        ),
        ([{"a": a, "b": [1, {"c": 2}]} for a in (1, 2, 3)], [("a", "", ["1", "2", "3"])]),
    ],
)
def test_a_panel_needs_three_values_with_all_else_equal(track: Board, values, found) -> None:
    row = line_of(track, "drop-captions").row
    rows = [swept(row, f"s{i}", **v) for i, v in enumerate(values)]
    columns = [c for c in track.columns if c.key in ("attribute.present", "wanted.features")]
    pairs = by_setting(rows, columns, {"drop-captions": 0})
    assert [(p.by, p.rest, p.heads) for p in pairs] == found
    assert all(p.base is None and p.floor is None for pair in pairs for p in pair.panels), "no such rows"


@pytest.mark.parametrize("config", [{}, {"method": None}, {"method": {"x": 3}}, {"method": ["x"]}])
def test_rows_that_record_no_settings_make_no_panel(track: Board, config) -> None:
    row = line_of(track, "drop-captions").row.model_copy(update={"config": config})
    assert by_setting([row, row, row], track.columns[:1], {"drop-captions": 0}) == []


def test_settings_of_a_composition_are_named_by_part(track: Board) -> None:
    row = line_of(track, "lora+uce", "medium").row
    rows = [swept(row, f"s{i}", lora={"rank": 4}, uce={"scale": i}) for i in range(3)]
    (pair,) = by_setting(rows, track.columns[:1], {"lora+uce": 0})
    assert (pair.by, pair.heads) == ("uce.scale", ["0", "1", "2"])


def test_axis_is_the_more_even_one() -> None:
    assert even_by_logarithm([1, 2, 4, 8]) and not even_by_logarithm([0.25, 0.5, 0.75, 0.9, 1])
    assert not even_by_logarithm([0, 1, 10]) and not even_by_logarithm([3])


def test_existing_tracks_have_no_such_panels(trained: Path, site: Path) -> None:
    other = boards(scan(trained).entries, {}, ImageStore(), 0)[1]
    assert not other.training and other.correlated == [] and other.sweeps == []
    text = site.read_text(encoding="utf-8")
    assert "Training-time" not in text and "Entanglement" not in text and 'class="tracks' not in text
    assert "Differences to base" in text and "<optgroup" not in text


@pytest.mark.parametrize("module", [_doses, _latents], ids=lambda m: m.__name__.rpartition(".")[2])
def test_doctests(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# --- the files ------------------------------------------------------------------------------------


def test_exports_say_what_differences_are_to(trained: Path, page: Path) -> None:
    lines = list(csv.DictReader((page.parent / "leaderboard.csv").open(encoding="utf-8", newline="")))
    assert {(x["suite"], x["reference"]) for x in lines} == {("train", "lora"), ("planted", "base")}
    strong = next(x for x in lines if (x["method"], x["setting"]) == ("gradient-projection", "strong"))
    row = next(
        r for r in load_rows(trained) if r.key == ("train@1", "mini-sd", "gradient-projection", "strong")
    )
    assert (
        float(strong["attribute.present.difference"]) == row.scores["attribute.present"].base_difference.value
    )
    assert strong["cost.step_relative_to_plain"] == "1.08"
    assert float(strong["cost.training_state_bytes"]) == 40960
    data = json.loads((page.parent / "leaderboard.json").read_text(encoding="utf-8"))
    assert {b["suite"]: b["reference"] for b in data["boards"]} == {"train@1": "lora", "planted@1": "base"}
    for name in ("leaderboard.md", "leaderboard.tex"):
        told = (page.parent / name).read_text(encoding="utf-8")
        assert told.count("rows are compared with lora") == 1, "for the training-time track alone"


def test_without_the_reference_row_there_is_still_a_page(tmp_path: Path) -> None:
    runs = write_trained(tmp_path / "runs", (LORA, *TRAINED[4:7]))
    for path in runs.glob("*/*/lora/*/row.json"):
        path.unlink()
    (found,) = boards(scan(runs).entries, {}, ImageStore(), 12)
    assert found.training and found.base is None and found.curves == [] and found.sweeps
    text = build(runs, tmp_path / "site").read_text(encoding="utf-8")
    assert "Differences to lora" in text and "Training-time track" in text


def test_boards_are_grouped_by_track(trained: Path) -> None:
    found = tracks(boards(scan(trained).entries, {}, ImageStore(), 0))
    assert [(t.name, [b.suite for b in t.boards]) for t in found] == [
        ("Training time", ["train@1"]),
        ("Mitigation", ["planted@1"]),
    ]


class Told(HTMLParser):
    """All that a reader is told: texts, tooltips and texts for those who don't see, without code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.found += [v for k, v in attrs if v and k in ("title", "aria-label", "alt", "data-tip")]

    def handle_data(self, data: str) -> None:
        self.found += [] if self.tag in ("pre", "code") else [data]


def test_base_is_only_a_row_of_the_track(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = text[text.index('data-name="train@1/mini-sd"') : text.index('data-name="planted@1/mini-flux"')]
    told = {x.strip() for x in Told(text).found if re.search(r"\bbase\b", x)}
    own = ("base · default", "Plugin base", "training image or reference · lora · base")
    names = {x for x in told if x == "base" or x.startswith(own)}
    assert told - names == set() and len(names) > 2
    other = Told(page.read_text(encoding="utf-8").partition('data-name="planted@1/mini-flux"')[2]).found
    assert any("To base, on the same noise" in x for x in other), "where it is what all are compared with"


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_track_fits_its_page(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.overflow() <= 0 and browser.complaints() == []
    browser.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.js(f"document.querySelectorAll('{SHOWN} tr.row .open').forEach(b => b.click())")
    assert browser.overflow() <= 0
    heading = browser.driver.find_element("css selector", f"{SHOWN} .track h2")
    assert heading.is_displayed() and heading.text.startswith("Training-time track")
    inside = f"""
      return [...document.querySelectorAll('{SHOWN} .pair svg')].every(svg => {{
        const box = svg.getBoundingClientRect();
        return box.width > 120 && [...svg.querySelectorAll('text, circle, path')].every(e => {{
          const r = e.getBoundingClientRect();
          return r.left >= box.left - 14 && r.right <= box.right + 14 && r.bottom <= box.bottom + 4; }}); }});"""
    assert browser.js(inside)
    labels = browser.js(f"return [...document.querySelectorAll('{SHOWN} .pair svg')].map(s => s.ariaLabel)")
    assert "gradient-projection: Features (%) by dimension; the table below has the numbers" in labels


def test_tracks_are_chosen_above_the_boards(browser: Browser, page: Path) -> None:
    browser.open(page)
    current = "return document.querySelector('.tracks a[aria-current] b').textContent"
    assert browser.js(current) == "Training time"
    browser.js("document.querySelectorAll('.tracks a')[1].click()")
    browser.js("return new Promise(r => setTimeout(r, 50))")
    shown = browser.js(f"return document.querySelector('{SHOWN}').dataset.name")
    assert shown == "planted@1/mini-flux" and browser.js(current) == "Mitigation"
    groups = "return [...document.querySelectorAll('#board optgroup')].map(g => g.label)"
    assert browser.js(groups) == ["Training time", "Mitigation"]
    browser.js("document.querySelectorAll('.tracks a')[0].click()")
    browser.js("return new Promise(r => setTimeout(r, 50))")
    assert browser.js(current) == "Training time" and browser.complaints() == []


def test_columns_of_the_track_can_be_closed(browser: Browser, page: Path) -> None:
    browser.open(page)
    head = browser.driver.find_element("css selector", f'{SHOWN} th[data-key="wanted.features"]')
    assert head.is_displayed()
    button = browser.driver.find_element("css selector", f'{SHOWN} [data-group="wanted"]')
    browser.js("arguments[0].click()", button)
    assert not head.is_displayed()


def test_one_track_alone_has_no_choice(tmp_path: Path, few: Callable[..., Path]) -> None:
    text = build(write_trained(tmp_path / "train", TRAINED[:5]), tmp_path / "site").read_text(
        encoding="utf-8"
    )
    assert "Training-time track" in text and 'class="tracks' not in text
