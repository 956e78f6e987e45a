"""Published numbers on the page: beside the measured rows of their suite, and nowhere among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import METHODS

from lethebench.leaderboard import build, scan
from lethebench.leaderboard._board import boards
from lethebench.leaderboard._pictures import ImageStore
from lethebench.reported import reported

LABEL = "Reported by the papers, not measured by Lethe"
BASE, MEDIUM = METHODS[0], METHODS[6]


def renamed(runs: Path, suite: str) -> Path:
    """The same rows under another suite's name."""
    for path in sorted(runs.glob("planted@1/*/*/*/row.json")):
        row = json.loads(path.read_text())
        row["suite"]["name"] = suite
        path.write_text(json.dumps(row))
        (path.parent / "made.json").unlink(missing_ok=True)
    (runs / "planted@1").rename(runs / f"{suite}@1")
    return runs


def test_the_block_stands_on_the_page_of_its_suite(few: Callable[..., Path], tmp_path: Path) -> None:
    page = build(renamed(few(BASE, MEDIUM), "uniforget-table1"), tmp_path / "site").read_text()
    assert page.count(LABEL) == 1
    block = page[page.index(LABEL) :]
    for told in ("Our (medium) w retrain", "FLUX.1-schnell", "48.3", "Anime Acc_g", "Table 1"):
        assert told in block and told not in page[: page.index(LABEL)]
    assert "not published" in block  # the notes
    assert "They are those of" not in block


def test_the_block_is_no_row_rank_mark_or_export(few: Callable[..., Path], tmp_path: Path) -> None:
    plain = few(BASE, MEDIUM)
    for attacks in plain.glob("*@*/*/*/*/attacks"):  # they name the suite that they are of
        shutil.rmtree(attacks)
    before = boards(scan(plain).entries, {}, ImageStore(), 4)[0]
    runs = renamed(plain, "uniforget-table1")
    after = boards(scan(runs).entries, {}, ImageStore(), 4)[0]
    assert before.reported is None and after.reported is reported("uniforget-table1")
    assert [line.rank for line in after.lines] == [line.rank for line in before.lines]
    assert [c.cells for c in after.columns] == [c.cells for c in before.columns]
    assert before.plot is not None and after.plot is not None
    assert len(after.plot[0].marks) == len(before.plot[0].marks) == 2
    site = build(runs, tmp_path / "site").parent
    for path in sorted(site.iterdir()):
        if path.suffix != ".html":
            text = path.read_text()
            assert "FLUX" not in text and "w retrain" not in text, path.name


@pytest.mark.parametrize("suite", ["uniforget-table1-lite", "nemo-table1-tm"])
def test_a_lite_tier_names_the_suite_whose_numbers_they_are(
    suite: str, few: Callable[..., Path], tmp_path: Path
) -> None:
    page = build(renamed(few(BASE, MEDIUM), suite), tmp_path / "site").read_text()
    found = reported(suite)
    assert found is not None and found.suites[0] != suite
    assert f"They are those of the suite <b>{found.suites[0]}</b>" in page


def test_no_block_without_published_numbers_or_without_rows(few: Callable[..., Path], tmp_path: Path) -> None:
    assert LABEL not in build(few(BASE, MEDIUM), tmp_path / "site").read_text()
    empty = tmp_path / "none"
    empty.mkdir()
    assert LABEL not in build(empty, tmp_path / "other").read_text()
