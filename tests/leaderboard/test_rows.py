from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import METHODS, SECOND

from lethebench.leaderboard import InvalidRowWarning, load_rows, rows_frame, scan
from lethebench.leaderboard._rows import in_strength_order, unfinished

VALID = len(METHODS) + len(SECOND)


def test_valid_rows_are_read_and_the_others_are_named(runs: Path) -> None:
    with pytest.warns(InvalidRowWarning) as caught:
        rows = load_rows(runs)
    assert len(rows) == VALID
    assert [r.key for r in rows] == sorted(r.key for r in rows)
    text = "\n".join(str(w.message) for w in caught)
    assert "broken/default/row.json: row.json is not a valid row" in text
    assert "unknown-key/default/row.json" in text and "surprise" in text
    assert "twice/default/row.json: the row planted@1 / mini-sd / uniforget / weak is already given" in text


def test_of_two_rows_with_one_key_the_one_in_its_own_folder_is_kept(runs: Path) -> None:
    kept = {e.row.key: e.folder for e in scan(runs).entries}
    assert kept["planted@1", "mini-sd", "uniforget", "weak"].parent.name == "uniforget"


def test_a_number_that_is_not_finite_is_reported(few: Callable[..., Path]) -> None:
    runs = few(METHODS[0])
    path = next(runs.rglob("row.json"))
    data = json.loads(path.read_text())
    data["scores"]["fbmem.vm"]["value"] = float("nan")
    path.write_text(json.dumps(data))
    assert "not finite" in scan(runs).problems[0].reason


def test_a_file_that_is_not_text_is_reported(few: Callable[..., Path]) -> None:
    runs = few(METHODS[0])
    next(runs.rglob("row.json")).write_bytes(b"\xff\xfe\x00")
    found = scan(runs)
    assert not found.entries and len(found.problems) == 1


def test_a_folder_without_a_row_is_unfinished(runs: Path) -> None:
    assert unfinished(runs) == ["planted@1/mini-sd/esd/weak"]


def test_frame_has_one_line_a_row_and_missing_is_not_zero(runs: Path) -> None:
    frame = rows_frame([e.row for e in scan(runs).entries]).set_index(["model", "method", "setting"])
    assert len(frame) == VALID
    strong = frame.loc["mini-sd", "uniforget", "strong"]
    assert strong["fbmem.memorized.low"] <= strong["fbmem.memorized"] <= strong["fbmem.memorized.high"]
    assert strong["fbmem.memorized.difference"] < 0 and strong["fbmem.memorized.p"] < 0.05
    assert strong["cost.sparsity"] == 0.61 and strong["cost.deactivated.ffn"] == 0.83
    assert frame.loc["mini-sd", "wen", "weak"].isna()["acc_g"], "not run"
    assert frame.loc["mini-sd", "mace", "default"].isna()["fbmem.memorized"], "failed"
    assert frame.loc["mini-sd", "blank", "default"].isna()["acc_g"], "does not apply"


def test_frame_keeps_the_columns_of_a_score_together(runs: Path) -> None:
    names = list(rows_frame([e.row for e in scan(runs).entries]).columns)
    at = names.index("fbmem.memorized")
    suffixes = ("low", "high", "n", "difference", "difference_low", "difference_high", "p")
    assert names[at + 1 : at + 8] == [f"fbmem.memorized.{s}" for s in suffixes]
    assert names[0] == "suite" and names[-1].startswith("cost.")


def test_frame_of_no_rows_is_empty() -> None:
    assert rows_frame([]).empty


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["strong", "medium", "weak"], ["weak", "medium", "strong"]),
        (["weak+strong", "weak+weak", "medium+weak"], ["weak+weak", "weak+strong", "medium+weak"]),
        (["10", "9.5", "1"], ["1", "9.5", "10"]),
        (["b", "a"], ["a", "b"]),
    ],
)
def test_settings_are_ordered_by_strength(settings: list[str], expected: list[str]) -> None:
    assert in_strength_order(settings) == expected


def test_importing_is_light() -> None:
    code = (
        "import sys, lethebench.leaderboard; "
        "print([m for m in ('torch', 'pandas', 'jinja2', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
