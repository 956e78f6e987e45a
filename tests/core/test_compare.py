"""Two rows against each other, through the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lethebench.bench import run
from lethebench.comparison import Compared, compare_rows, row_folder
from lethebench.errors import UserError
from lethebench.plan import Runtime
from lethebench.row import Difference
from lethebench.specs import load_suite

BOARD = "tiny@1/tiny-sd"


def lethe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lethebench.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def runs(shared_suite: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "runs"
    run(["random-tokens"], suite=str(shared_suite), runs=folder, runtime=Runtime(threads=1))
    return folder


@pytest.fixture
def suite(shared_suite: Path):
    return load_suite(str(shared_suite))


def test_differences_are_those_of_the_images(runs: Path, suite) -> None:
    first, second = (runs / BOARD / "random-tokens" / s for s in ("strong", "weak"))
    found = {c.score: c for c in compare_rows(first, second, (), suite)}
    assert set(found) == {"brightness.mean", "brightness.neutral"}
    ours, theirs = (pd.read_parquet(f / "images.parquet")["brightness"] for f in (first, second))
    one = found["brightness.mean"]
    assert one.difference.value == pytest.approx(float(np.mean(ours - theirs)), abs=1e-12)
    assert one.first - one.second == pytest.approx(one.difference.value)
    assert one.difference.low <= one.difference.value <= one.difference.high
    turned = {c.score: c for c in compare_rows(second, first, (), suite)}["brightness.mean"]
    assert turned.difference.value == -one.difference.value and turned.difference.p == one.difference.p


def test_a_row_against_base_is_the_rows_own_difference(runs: Path, suite) -> None:
    folder = runs / BOARD / "random-tokens/strong"
    recorded = json.loads((folder / "row.json").read_text())["scores"]["brightness.neutral"][
        "base_difference"
    ]
    (found,) = compare_rows(folder, runs / BOARD / "base/default", ["brightness.neutral"], suite)
    assert found.difference.value == pytest.approx(recorded["value"])
    assert found.difference.p == pytest.approx(recorded["p"], abs=0.02)


@pytest.mark.parametrize(
    ("direction", "low", "high", "better"),
    [
        ("lower", -0.3, -0.1, "first"),
        ("lower", 0.1, 0.3, "second"),
        ("higher", 0.1, 0.3, "first"),
        ("higher", -0.3, -0.1, "second"),
        ("higher", -0.1, 0.3, ""),
        ("none", 0.1, 0.3, ""),
    ],
)
def test_better_follows_the_scores_direction(direction, low, high, better) -> None:
    difference = Difference(value=(low + high) / 2, low=low, high=high, p=0.5)
    assert Compared("s", direction, 0.0, 0.0, difference).better == better
    assert Compared("s", direction, 0.0, 0.0, None).better == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random-tokens/huge", "random-tokens has no row 'huge' there: known medium, strong, weak"),
        ("nemo/weak", "no row of nemo"),
    ],
)
def test_unknown_rows(runs: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        row_folder(name, runs, "tiny@1", "tiny-sd")
    assert row_folder("base", runs, "tiny@1", "tiny-sd").name == "default"


def test_unknown_scores_and_other_boards(runs: Path, tmp_path: Path) -> None:
    base, blank = runs / BOARD / "base/default", runs / BOARD / "blank/default"
    with pytest.raises(UserError, match="don't both have a score 'fid': known brightness"):
        compare_rows(base, blank, ["fid"])
    row = json.loads((base / "row.json").read_text())
    row["suite"]["version"] = "2"
    (tmp_path / "row.json").write_text(json.dumps(row))
    with pytest.raises(
        UserError, match="rows of different boards don't compare: tiny@1/tiny-sd, tiny@2/tiny-sd"
    ):
        compare_rows(base, tmp_path)


def test_command(runs: Path, shared_suite: Path) -> None:
    options = ["--suite", str(shared_suite), "--runs", str(runs)]  # the suite names its model by a folder
    shown = lethe("compare", "random-tokens/strong", "base", *options)
    assert shown.returncode == 0 and "brightness.mean" in shown.stdout and " to " in shown.stdout
    listed = lethe(
        "compare", "random-tokens/strong", "base", "--score", "brightness.mean", "--json", *options
    )
    (found,) = json.loads(listed.stdout)
    assert found["score"] == "brightness.mean" and set(found["difference"]) == {"value", "low", "high", "p"}
    wrong = lethe("compare", "random-tokens/x", "base", *options)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
