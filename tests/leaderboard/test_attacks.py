"""Attacks on the page: the best known of a row, removed or hidden, and what a record may do wrong."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import EVIL, METHODS

from lethebench.attack.record import AttackRecord
from lethebench.leaderboard import build, scan
from lethebench.leaderboard._attacks import HIDES, NOT_TOLD_APART, REFERENCE, best, newcombe
from lethebench.leaderboard._board import Board, boards
from lethebench.leaderboard._pictures import ImageStore

BASE, ORACLE, WEAK, MEDIUM, STRONG = METHODS[0], METHODS[1], *METHODS[5:8]
FAILED = METHODS[-1]


def board(runs: Path) -> Board:
    return boards(scan(runs).entries, {}, ImageStore(), 0)[0]


@pytest.fixture(scope="module")
def whole(runs: Path) -> Board:
    return board(runs)


def records(found: Board, method: str, setting: str) -> tuple[AttackRecord, ...]:
    return next(x for x in found.lines if (x.row.method, x.row.setting) == (method, setting)).attacks


# --- the best known -------------------------------------------------------------------------------


def wilson(k: int, n: int) -> SimpleNamespace:
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return SimpleNamespace(value=p, low=(middle - half) / scale, high=(middle + half) / scale)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((0, 10), (0, 20), -0.1611, 0.2775),
    ],
)
def test_newcombe_gives_the_published_intervals(a, b, low, high) -> None:
    """Newcombe (1998), table II, method 10."""
    found = newcombe(wilson(*a), wilson(*b))
    assert found[1:] == pytest.approx((low, high), abs=6e-5)


def test_best_known_is_the_highest_of_the_attacks_and_the_plain_draws(whole: Board) -> None:
    hidden = best(records(whole, "uniforget", "strong"))
    assert hidden is not None and not hidden.plain and hidden.record.attack == "embedding"
    assert hidden.value == pytest.approx(0.46) and hidden.low == hidden.record.excess.low
    plain = best(records(whole, "uniforget", "weak"))
    assert plain is not None and plain.plain and plain.value == pytest.approx(0.8 * WEAK.keeps)
    assert plain.low < plain.value < plain.high
    assert best(()) is None


def test_column_stands_beside_the_headline_and_tells_missing_apart(whole: Board) -> None:
    keys = [c.key for c in whole.columns]
    assert keys[:2] == ["fbmem.memorized", "best_known"]
    cells = {(x.row.method, x.row.setting): whole.cell(x, "best_known") for x in whole.lines}
    assert cells["uniforget", "strong"].text == "46.0"
    note = cells["uniforget", "strong"].note
    for part in ("embedding, by the tests", "Adam on", "steps 50", "66.0 %", "20.0 %", "80 items"):
        assert part in note
    assert "Without an attack" in cells["uniforget", "weak"].note
    assert cells["uniforget", "medium"].state == "not-run" and cells["uniforget", "medium"].sort is None
    assert cells["mace", "default"].state == "failed"
    assert cells["flowedit", "default"].state == "not-applicable"
    assert not cells["base", "default"].best and any(c.best for c in cells.values())


def test_without_attacks_there_is_no_column_and_no_section(few: Callable[..., Path]) -> None:
    runs = few(BASE, MEDIUM)
    for path in runs.glob("*/*/*/*/attacks/*.json"):
        path.unlink()
    found = board(runs)
    assert found.column("best_known") is None and found.attacks is None
    assert "Removed or hidden?" not in build(runs, runs.parent / "site").read_text(encoding="utf-8")


def test_exports_have_the_best_known(site: Path) -> None:
    folder = site.parent
    lines = csv.DictReader((folder / "leaderboard.csv").open(encoding="utf-8", newline=""))
    by = {(x["model"], x["method"], x["setting"]): x for x in lines}
    strong, weak = (by["mini-sd", "uniforget", s] for s in ("strong", "weak"))
    assert float(strong["best_known"]) == pytest.approx(0.46) and strong["best_known.n"] == "80"
    assert strong["best_known.attack"] == "embedding" and strong["best_known.by"] == "the tests"
    assert float(strong["best_known.control"]) == 0.2
    assert weak["best_known"] and weak["best_known.attack"] == "", "no attack beats its own draws"
    assert by["mini-sd", "uniforget", "medium"]["best_known"] == "", "not run is not zero"
    data = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))
    rows = {(r["method"], r["setting"]): r for r in data["boards"][0]["rows"]}
    assert rows["uniforget", "medium"]["best_known"] is None and rows["uniforget", "medium"]["attacks"] == []
    assert rows["uniforget", "strong"]["best_known"]["how"].startswith("Adam on")
    assert [a["attack"] for a in rows["uniforget", "strong"]["attacks"]] == ["embedding", "seeds"]
    markdown = (folder / "leaderboard.md").read_text(encoding="utf-8")
    assert "| Best known (%) ↓ |" in markdown and "46.0 (" in markdown and "*not run*" in markdown
    assert "Best known (\\%)" in (folder / "leaderboard.tex").read_text(encoding="utf-8")


# --- removed or hidden ----------------------------------------------------------------------------


def test_verdicts_come_from_the_interval_of_what_was_hidden(whole: Board) -> None:
    section = whole.attacks or pytest.fail("no section")
    found = {(f.row.method, f.row.setting): f for f in section.findings}
    assert found["uniforget", "strong"].verdict == HIDES == found["nemo", "strong"].verdict
    assert found["ca+uniforget", "strong"].verdict == NOT_TOLD_APART
    assert found["uniforget", "weak"].verdict == NOT_TOLD_APART
    assert found["base", "default"].verdict == REFERENCE == found["oracle", "default"].verdict
    for f in section.findings:
        assert (f.verdict == HIDES) == (f.record.hidden.low > 0 and f.verdict != REFERENCE)
    order = [f.record.hidden.value for f in section.findings]
    assert order == sorted(order, reverse=True)
    assert (
        section.summary.startswith("Of 7 attacked rows of methods, 4 hide") and "wen" not in section.summary
    )
    assert section.untold == sum(x.row.status == "ok" for x in whole.lines) - 9


def test_dumbbells_go_from_the_plain_excess_to_the_best_known(whole: Board) -> None:
    for picture in (whole.attacks or pytest.fail("no section")).pictures:
        assert [r.name for r in picture.references] == ["oracle", "base"], "floor and ceiling"
        assert {d.finding.row.method for d in picture.lines}.isdisjoint({"base", "oracle"})
        zero = next(t.at for t in picture.ticks if t.text == "0")
        for d in picture.lines:
            assert picture.left <= d.low <= d.end <= d.high <= picture.right and d.start <= d.end
            assert picture.top <= d.y <= picture.bottom
            assert (d.start > zero) == (d.finding.plain > 0)
        ys = [d.y for d in picture.lines]
        assert ys == sorted(ys) and len(set(ys)) == len(ys)


# --- records --------------------------------------------------------------------------------------


def spoil(runs: Path, attack: str, **changes: object) -> None:
    path = next(runs.glob(f"*/*/uniforget/strong/attacks/{attack}.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"surprise": 1}, "not a valid attack record: surprise"),
        ({"seconds": float("nan")}, "not finite"),
        ({"row_key": "0" * 64}, "another result than the row"),
        ({"setting": "weak"}, "another row: planted@1 / mini-sd / uniforget / weak"),
    ],
)
def test_a_bad_record_is_named_and_hides_nothing(few, changes, reason) -> None:
    runs = few(BASE, WEAK, STRONG)
    spoil(runs, "embedding", **changes)
    found = scan(runs)
    (problem,) = found.problems
    assert problem.path == "planted@1/mini-sd/uniforget/strong/attacks/embedding.json"
    assert reason in problem.reason and str(runs) not in problem.reason
    assert [len(e.attacks) for e in found.entries] == [1, 1, 1], "the row's other attack is still there"
    page = build(runs, runs.parent / "site").read_text(encoding="utf-8")
    assert "1 file could not be shown" in page and "uniforget/strong/attacks/embedding.json" in page


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_record_that_is_no_json_is_named(few: Callable[..., Path], data: bytes) -> None:
    runs = few(BASE, STRONG)
    next(runs.glob("*/*/uniforget/strong/attacks/seeds.json")).write_bytes(data)
    found = scan(runs)
    assert "not a valid attack record" in found.problems[0].reason and len(found.problems) == 1
    assert [a.attack for e in found.entries for a in e.attacks] == ["embedding", "embedding"]


def test_a_row_without_what_it_was_made_of_shows_no_attack(few: Callable[..., Path]) -> None:
    runs = few(BASE, STRONG)
    next(runs.glob("*/*/uniforget/strong/made.json")).unlink()
    found = scan(runs)
    assert len(found.problems) == 2 and {len(e.attacks) for e in found.entries} == {0, 1}


def test_the_hash_of_the_input_holds_the_attacks(few: Callable[..., Path]) -> None:
    runs = few(BASE, STRONG)

    def printed() -> str:
        text = build(runs, runs.parent / "site").read_text(encoding="utf-8")
        return text.split('metrics.json">')[1][:16]

    first = printed()
    assert printed() == first
    spoil(runs, "seeds", how="otherwise")
    assert printed() != first


def test_texts_of_a_record_are_escaped(whole: Board, site: Path) -> None:
    assert "<img" in records(whole, EVIL, "default")[0].by
    assert "<script>window.pwned" not in site.read_text(encoding="utf-8")
