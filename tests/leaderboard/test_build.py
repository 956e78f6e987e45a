from __future__ import annotations

import base64
import csv
import doctest
import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import EVIL, METHODS, SECOND

from lethebench import stats
from lethebench.errors import UserError
from lethebench.leaderboard import _board as board_module
from lethebench.leaderboard import build, scan
from lethebench.leaderboard._board import Board, boards
from lethebench.leaderboard._build import embedded_json
from lethebench.leaderboard._pictures import ImageStore, Key, choose, image_path
from lethebench.leaderboard._rank import rank_rows, scorer
from lethebench.leaderboard._tables import read_table

BASE, WEAK, MEDIUM, STRONG = METHODS[0], *METHODS[5:8]


def board(runs: Path) -> Board:
    return boards(scan(runs).entries, {}, ImageStore(), 12)[0]


@pytest.fixture(scope="module")
def whole(runs: Path) -> Board:
    return board(runs)


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# --- the files ------------------------------------------------------------------------------------


def test_same_input_gives_identical_bytes(runs: Path, site: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs, moved)
    again = build(moved, tmp_path / "site")
    names = sorted(p.name for p in site.parent.iterdir())
    assert names == ["index.html", "leaderboard.csv", "leaderboard.json", "leaderboard.md", "leaderboard.tex"]
    assert all((again.parent / n).read_bytes() == (site.parent / n).read_bytes() for n in names)


def test_page_is_self_contained_and_small(site: Path) -> None:
    text = site.read_text(encoding="utf-8")
    assert site.stat().st_size < 3_000_000
    found = Elements(text).found
    addresses = [
        a[k] or "" for _, a in found for k in ("src", "href", "action", "srcset", "data") if a.get(k)
    ]
    others = {a for a in addresses if not a.startswith(("#", "data:"))}
    assert others == {p.name for p in site.parent.iterdir()} - {site.name}, "links to the tables beside it"
    assert "@import" not in text and "url(" not in text
    assert not any(a.get("http-equiv") == "refresh" for _, a in found)


def test_policy_allows_only_the_pages_own_script(site: Path) -> None:
    text = site.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(
        a["content"] for t, a in Elements(text).found if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_whatever_comes_from_a_row_is_escaped(site: Path) -> None:
    text = site.read_text(encoding="utf-8")
    found = Elements(text).found
    assert not [a for _, a in found if any(name.startswith("on") for name in a)]
    assert [a.get("type") for t, a in found if t == "script"] == ["application/json", None]
    assert "&lt;img src=x onerror=alert(1)&gt;" in text and EVIL not in text
    assert "{{ 7 * 7 }}" in text, "a template in a row's text is not run"


def test_json_in_a_script_can_not_end_it() -> None:
    text = embedded_json({"</script>": "<!-- & \u2028"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"</script>": "<!-- & \u2028"}


def test_csv_has_every_row(site: Path) -> None:
    lines = list(csv.DictReader((site.parent / "leaderboard.csv").open(encoding="utf-8", newline="")))
    assert len(lines) == len(METHODS) + len(SECOND)
    by_key = {(x["model"], x["method"], x["setting"]): x for x in lines}
    strong = by_key["mini-sd", "uniforget", "strong"]
    assert strong["rank_first"] == "1" and 0 < float(strong["fbmem.memorized"]) < 0.2
    assert by_key["mini-sd", "wen", "weak"]["acc_g"] == "", "not run is not zero"
    assert by_key["mini-sd", EVIL, "default"]["family"] == "weights"


def test_json_has_whole_rows_and_problems(site: Path) -> None:
    data = json.loads((site.parent / "leaderboard.json").read_text(encoding="utf-8"))
    assert [(b["suite"], b["model"]) for b in data["boards"]] == [
        ("planted@1", "mini-sd"),
        ("planted@1", "mini-flux"),
    ]
    assert {p["path"].split("/")[2] for p in data["problems"]} == {"broken", "twice", "unknown-key"}
    row = next(r for r in data["boards"][0]["rows"] if (r["method"], r["setting"]) == ("uniforget", "strong"))
    assert (
        row["rank"]["first"] == 1 and row["scores"]["fbmem.vm"]["n"] > 0 and row["provenance"]["threads"] == 4
    )


def test_markdown_and_latex_are_escaped(site: Path) -> None:
    markdown = (site.parent / "leaderboard.md").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;" in markdown and EVIL not in markdown
    widths = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    latex = (site.parent / "leaderboard.tex").read_text(encoding="utf-8")
    assert "\\textless{}img src=x" in latex and "Acc\\_g (\\%)" in latex
    body = [line for line in latex.splitlines() if line.endswith("\\\\")]
    assert len({line.replace("\\&", "").count("&") for line in body}) == 1


def test_no_rows_give_a_page_that_says_so(tmp_path: Path) -> None:
    page = build(tmp_path / "nothing", tmp_path / "site")
    assert "No rows yet" in page.read_text(encoding="utf-8")


def test_a_folder_that_can_not_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write the page to"):
        build(tmp_path / "nothing", tmp_path / "file" / "site")


# --- ranks ----------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_statistics(runs: Path) -> None:
    entries = [e for e in scan(runs).entries if e.row.model == "mini-sd"]
    tables = {e.row.key: read_table(e.folder) for e in entries if e.row.status == "ok"}
    ours, why = rank_rows([e.row for e in entries], tables, "fbmem.memorized")
    assert why == ""
    metric, score = scorer(entries[0].row, "fbmem.memorized") or pytest.fail("no metric")
    ranked = {k: t for k, r in ours.items() if r.first is not None and (t := tables[k]) is not None}
    theirs = stats.rank(metric, score, {"\x1f".join(k): t for k, t in ranked.items()})
    assert len(ranked) >= 12
    for name, place in theirs.items():
        rank = ours[tuple(name.split("\x1f"))]  # type: ignore[index]
        assert (rank.first, rank.last) == (place.rank, place.rank + place.size - 1)


def test_controls_failures_and_flagged_rows_are_not_ranked(whole: Board) -> None:
    ranks = {(x.row.method, x.row.setting): x.rank for x in whole.lines}
    for key, note in {
        ("base", "default"): "control",
        ("blank", "default"): "control",
        ("mace", "default"): "Nothing was measured",
        ("ecodiff", "strong"): "guard",
    }.items():
        assert ranks[key].first is None and note in ranks[key].note
    assert ranks["uniforget", "strong"].first == 1


def test_a_table_that_does_not_give_the_score_costs_the_rank_only(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK, STRONG)
    path = next(runs.glob("*/*/uniforget/strong/row.json"))
    data = json.loads(path.read_text())
    data["scores"]["fbmem.memorized"]["value"] = 0.0
    path.write_text(json.dumps(data))
    ranks = {x.row.setting: x.rank for x in board(runs).methods}
    assert "doesn't give the fbmem.memorized" in ranks["strong"].note
    assert ranks["weak"].first == 1


def test_a_missing_or_damaged_table_costs_rank_and_pictures_only(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK, MEDIUM, STRONG)
    next(runs.glob("*/*/uniforget/strong/images.parquet")).unlink()
    next(runs.glob("*/*/uniforget/medium/images.parquet")).write_bytes(b"PAR1 no more")
    found = {x.row.setting: x for x in board(runs).methods}
    assert found["strong"].rank.first is None and found["medium"].rank.first is None
    assert not found["strong"].pictures and found["weak"].pictures
    assert build(runs, runs.parent / "site").is_file()


def test_without_the_metric_there_are_no_ranks_and_the_page_says_why(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK)
    for path in runs.rglob("row.json"):
        path.write_text(path.read_text().replace('"metric": "fbmem"', '"metric": "not-installed"'))
    page = build(runs, runs.parent / "site").read_text(encoding="utf-8")
    assert "the metric &#39;not-installed&#39; of the headline is not installed here" in page


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_chosen_by_base_alone_and_are_the_same_for_all_rows(whole: Board) -> None:
    captions = {tuple(p.text for p in x.pictures) for x in whole.lines if x.row.status == "ok"}
    assert len(captions) == 1 and len(captions.pop()) == 12
    triggers = [p for p in whole.controls[0].pictures if p.role == "trigger"]
    assert len(triggers) >= 8 and all(p.before in ("VM", "FM", "BM") for p in triggers)
    assert len({p.kind for p in triggers}) >= 4
    assert {p.role for p in whole.controls[0].pictures} == {"trigger", "neutral", "concept", "control"}


def test_base_pictures_are_embedded_once(whole: Board) -> None:
    shown = [x.pictures for x in whole.lines if x.pictures]
    assert {tuple(p.base for p in pictures) for pictures in shown} == {tuple(p.base for p in shown[0])}
    assert all(p.base == p.method for p in shown[0]), "the row of base shows itself"


def test_a_page_that_is_too_large_shortens_every_row_alike(runs: Path, site: Path, tmp_path: Path) -> None:
    limit = site.stat().st_size - 60_000
    page = build(runs, tmp_path / "site", page_bytes=limit)
    text = page.read_text(encoding="utf-8")
    counts = {
        block.count("<li>") for block in re.findall(r'<ul class="triplets">(.*?)</ul>', text, re.DOTALL)
    }
    assert len(counts) == 1 and 0 < counts.pop() < 12
    assert page.stat().st_size < limit
    embedded = json.loads(re.findall(r'id="images">(.*?)</script>', text)[0])
    assert set(re.findall(r'data-i="(\w+)"', text)) == set(embedded)


def test_missing_images_are_shown_as_missing(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK)
    shutil.rmtree(runs / "planted@1" / "references")
    shutil.rmtree(next(runs.glob("*/*/uniforget/weak/images")))
    page = build(runs, runs.parent / "site").read_text(encoding="utf-8")
    assert "no training image" in page and "no image" in page


def test_an_id_with_a_slash_stays_in_its_folder(tmp_path: Path) -> None:
    assert image_path(tmp_path, Key("../../etc/x", 0)).parent == tmp_path / "images"


def test_choosing_needs_no_labels(few: Callable[..., Path]) -> None:
    table = read_table(next(few(BASE).glob("*/*/base/default")))
    assert table is not None
    plain = table[["prompt_id", "index", "role", "kind"]]
    assert len(choose(plain, "salt")) == 12
    assert choose(plain, "salt") == choose(plain.sample(frac=1, random_state=1), "salt")


# --- the board ------------------------------------------------------------------------------------


def test_missing_has_three_faces(whole: Board) -> None:
    cell = {x.row.method: whole.cell(x, "acc_g") for x in whole.lines}
    assert cell["wen"].state == "not-run" and cell["mace"].state == "failed"
    assert cell["flowedit"].state == "not-applicable" and "supports flux" in cell["flowedit"].note
    assert cell["blank"].state == "not-applicable" and cell["blank"].sort is None


def test_best_is_an_unflagged_method(whole: Board) -> None:
    for column in whole.columns:
        for line, cell in zip(whole.lines, column.cells, strict=True):
            assert not cell.best or not (line.row.control or line.row.warnings)
    assert any(c.best for c in whole.columns[0].cells)


def test_methods_are_ordered_by_rank_with_settings_from_weak_to_strong(whole: Board) -> None:
    settings = [x.row.setting for x in whole.methods if x.row.method == "uniforget"]
    assert settings == ["weak", "medium", "strong"]
    assert [x.row.method for x in whole.controls][:2] == ["base", "oracle"]
    firsts = [x.row.method for x in whole.methods if x.first_of_method]
    assert len(firsts) == len(set(firsts)) and set(firsts[-2:]) == {"flowedit", "mace"}


def test_strengths_given_by_the_caller_win(few: Callable[..., Path]) -> None:
    entries = scan(few(BASE, WEAK, MEDIUM, STRONG)).entries
    found = boards(entries, {"uniforget": ("strong", "weak", "medium")}, ImageStore(), 0)[0]
    assert [x.row.setting for x in found.methods] == ["strong", "weak", "medium"]


def test_curves_leave_flagged_settings_out_and_have_intervals(whole: Board) -> None:
    found = {c.method: c for c in whole.curves}
    assert EVIL not in found, "its only setting is flagged"
    for curve in found.values():
        for estimate in (curve.at_loss, curve.area):
            assert estimate.low is not None and estimate.high is not None
            assert estimate.low - 0.05 <= estimate.value <= estimate.high + 0.05
    assert found["nemo"].area.value > found["ecodiff"].area.value


def test_plot_puts_controls_outside_the_scale_at_its_edge(whole: Board) -> None:
    plot = (whole.plot or pytest.fail("no plot"))[0]
    marks = {m.series.name: m for m in plot.marks}
    assert marks["blank"].outside == "below" and marks["base"].outside == ""
    for mark in plot.marks:
        assert plot.left <= mark.x <= plot.right and plot.top <= mark.y <= plot.bottom
    assert plot.front.startswith("M") and len(plot.band) > 10


def test_dose_response_has_base_and_every_measured_method(whole: Board) -> None:
    assert {p.title for p in whole.panels} == {x.row.method for x in whole.methods if x.row.status == "ok"}
    assert whole.doses == [1, 2, 4, 8, 16, 32, 64, 128]
    base = whole.panels[0].base
    assert base is not None and base.line.points[-1].value > base.line.points[0].value


def test_a_lone_method_without_base_still_has_a_page(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK)
    shutil.rmtree(runs / "planted@1" / "mini-sd" / "base")
    found = board(runs)
    assert found.base is None and found.curves == [] and found.methods[0].rank.first == 1
    assert build(runs, runs.parent / "site").is_file()


def test_rows_of_failures_only_have_a_page(few: Callable[..., Path]) -> None:
    runs = few(*METHODS[-2:])
    assert "out of memory at step 12" in build(runs, runs.parent / "site").read_text(encoding="utf-8")


def test_key_names_every_method_of_the_plot_by_family(whole: Board) -> None:
    found = {heading: [k.method for k in lines] for _, heading, lines in whole.key}
    assert list(found) == ["Change the weights (solid)", "Act while sampling (dashed)", "Controls"]
    assert found["Act while sampling (dashed)"] == ["wen"]
    assert set(found["Controls"]) == {"base", "oracle", "blank", "random-tokens"}
    plotted = {m.series.name for m in (whole.plot or pytest.fail("no plot"))[0].marks}
    assert {m for methods in found.values() for m in methods} == plotted
    areas = [c.method for c in whole.curves if c.method in found["Change the weights (solid)"]]
    assert found["Change the weights (solid)"] == [*areas, EVIL], "flagged in every setting: no curve"


def test_what_rows_record_alike_of_their_metrics_stands_once(few: Callable[..., Path]) -> None:
    runs = few(BASE, WEAK)
    path = next(runs.glob("*/*/uniforget/weak/row.json"))
    data = json.loads(path.read_text())
    data["metrics"]["fbmem"]["risk"] = 0.25
    path.write_text(json.dumps(data))
    found = board(runs)
    assert json.loads(found.metrics_text)["fbmem"] == {"threshold": 0.8, "version": "1"}
    assert json.loads(found.methods[0].metrics_text) == {"fbmem": {"risk": 0.25}}
    assert found.controls[0].metrics_text == ""


@pytest.mark.parametrize("name", ["_format", "_rows", "_plot", "_build"])
def test_doctests(name: str) -> None:
    module = importlib.import_module(f"{board_module.__package__}.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
