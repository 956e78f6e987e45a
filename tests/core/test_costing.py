"""The plan of a run: its counts are what the run then does, and it names what is missing without stopping."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lethebench.bench import plan_rows, run
from lethebench.cli import app
from lethebench.costing import bytes_an_image, chain_passes, costs
from lethebench.errors import UserError
from lethebench.method import configure
from lethebench.plan import Runtime
from lethebench.prompts import Prompt, Role
from lethebench.registry import METHODS, MODELS, PROMPT_SETS
from lethebench.row import read_row
from lethebench.specs import Selection, load_suite
from lethebench.store import Store
from lethebench.zoo import ModelEntry

ONE = Runtime(threads=1)
NOTHING = {"fit": 0, "shard": 0, "scores": 0, "row": 0}


@pytest.fixture
def planned(tiny_suite: Path) -> Path:
    """The tiny suite with a quick fit that two of its rows share."""
    found = yaml.safe_load(tiny_suite.read_text())
    quick = {name: dict(METHODS.get(name).quick) for name in ("uniforget", "retrain")}
    methods = [
        {"method": "uniforget", "strength": "weak"},
        {"method": "uniforget+retrain", "strength": "weak+short"},
        {"method": "random-tokens", "strength": "weak"},
    ]
    tiny_suite.write_text(yaml.safe_dump({**found, "fit": quick, "methods": methods}))
    return tiny_suite


def _plan(suite: Path | str, runs: Path, methods: tuple[str, ...] = (), **options: Any) -> Any:
    return costs(methods, suite=str(suite), runs=runs, runtime=ONE, **options)


def test_a_plan_counts_what_the_run_does_and_then_nothing_is_left(planned: Path, tmp_path: Path) -> None:
    """Fits that rows share once, images of methods that the suite names; and nothing is written to plan."""
    runs = tmp_path / "runs"
    before = _plan(planned, runs)
    assert not runs.exists()
    outcome = run([], suite=str(planned), runs=runs, runtime=ONE)
    assert not outcome.failures
    assert before.jobs == outcome.computed
    assert before.jobs["fit"] == 5  # two rows share one of their six parts
    assert {(r.method, r.setting): r.images for r in before.rows} == {
        (r.method, r.setting): r.scores["brightness.mean"].n for r in outcome.rows
    }
    assert before.images == before.images_left == 5 * before.sets[0].images and before.missing == ()
    after = _plan(planned, runs)
    assert after.jobs == NOTHING and after.images_left == 0 and after.hours == 0 and not after.untimed
    assert all(row.there for row in after.rows)


def test_what_a_killed_run_left_is_planned(planned: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(["random-tokens"], suite=str(planned), strength="weak", runs=runs, runtime=ONE)
    suite = load_suite(str(planned))
    row = plan_rows(["random-tokens"], suite, suite.model, strength="weak", runtime=ONE)[-1]
    store = Store(runs / "store")
    shutil.rmtree(store.path("shard", row.shard_key(1)))
    shutil.rmtree(row.folder(runs))
    found = _plan(planned, runs, ("random-tokens",), strength="weak")
    again = run(["random-tokens"], suite=str(planned), strength="weak", runs=runs, runtime=ONE)
    assert found.jobs == again.computed == {"fit": 0, "shard": 1, "scores": 0, "row": 1}
    assert [r.images_left for r in found.rows] == [0, 0, len(row.shards[1])]


def test_times_come_from_earlier_rows_or_from_the_user(planned: Path, tmp_path: Path) -> None:
    """A suite of another name on the same model: base's rate, a method's own overhead, and measured fits."""
    runs = tmp_path / "runs"
    run([], suite=str(planned), runs=runs, runtime=ONE)
    rows = {(r.method, r.setting): r for r in map(read_row, sorted(runs.glob("*@*/*/*/*/row.json")))}
    other = planned.with_name("other.yaml")
    other.write_text(yaml.safe_dump({**yaml.safe_load(planned.read_text()), "name": "other"}))
    found = {(r.method, r.setting): r for r in _plan(other, runs).rows}

    base, tokens = rows["base", "default"].cost, rows["random-tokens", "weak"].cost
    assert base is not None and tokens is not None and tokens.relative_to_base is not None
    assert base.seconds_per_image is not None
    drawn = found["base", "default"]
    assert drawn.seconds_per_image == pytest.approx(base.seconds_per_image)
    assert drawn.rate_from == "measured in tiny@1"
    own = found["random-tokens", "weak"]
    assert own.seconds_per_image == pytest.approx(base.seconds_per_image * tokens.relative_to_base)
    assert own.seconds == pytest.approx(
        own.images * own.seconds_per_image + 2 * 4 * (own.seconds_per_image + base.seconds_per_image)
    )  # and the first shard's four images, twice with and twice without the method
    fitted, retrained = found["uniforget", "weak"], found["uniforget+retrain", "weak+short"]
    whole, alone = rows["uniforget+retrain", "weak+short"].cost, rows["uniforget", "weak"].cost
    assert whole is not None and alone is not None
    assert fitted.fit_seconds == pytest.approx(alone.fit_seconds) and fitted.fit_from == "measured"
    assert retrained.fit_seconds == pytest.approx(
        whole.fit_seconds - alone.fit_seconds
    )  # uniforget's own fit is shared
    assert found["blank", "default"].seconds == 0

    given = _plan(other, runs, rate=2.0)
    assert {r.method: r.seconds_per_image for r in given.rows}["base"] == 2.0
    assert given.hours > _plan(other, runs).hours


def test_an_unmeasured_time_is_named_and_not_guessed(planned: Path, tmp_path: Path) -> None:
    found = _plan(planned, tmp_path / "runs")
    assert found.hours == 0
    assert found.untimed == {"images": 4, "fit of uniforget": 1, "fit of retrain": 1}  # blank draws nothing
    rated = _plan(planned, tmp_path / "runs", rate=0.5)
    assert rated.untimed == {"fit of retrain": 1}
    fit = next(r for r in rated.rows if r.method == "uniforget")
    assert fit.fit_from == "reckoned from passes"
    # 3 steps of 2 prompts through a chain of 2, four passes each, at 0.25 s a step of an image
    assert fit.fit_seconds == pytest.approx(3 * 2 * 2 * 4 * 0.5 / 2)


def test_a_batch_is_drawn_to_measure(planned: Path, tmp_path: Path) -> None:
    found = _plan(planned, tmp_path / "runs", measure=True)
    rate = found.rows[0].seconds_per_image
    assert rate is not None and 0 < rate < 60
    assert not (tmp_path / "runs").exists()


def test_passes_follow_the_settings() -> None:
    method = METHODS.get("uniforget")
    sizes = {"steps": 2000, "batch_size": 20, "chain_steps": 5}
    assert chain_passes(configure(method, "weak", sizes)) == 4 * 2000 * 20 * 5
    assert chain_passes(configure(method, "weak", {**sizes, "recompute": False})) == 3 * 2000 * 20 * 5
    assert chain_passes(configure(METHODS.get("retrain"), "short")) is None


# --- what is missing ------------------------------------------------------------------------------


class Absent:
    """A prompt set whose file isn't there."""

    name, version = "absent-set", "1"

    def __iter__(self) -> Iterator[Prompt]:
        raise UserError("absent.csv is not in the data folder: run `lethe fetch absent.csv`")

    def reference(self, reference_id: str) -> Any:
        raise KeyError(reference_id)

    def training_prompts(self) -> list[str]:
        return []

    def manifest(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def unready(tiny_suite: Path) -> Iterator[Path]:
    """A suite whose model, one of whose prompt sets and one of whose metrics are not here."""
    PROMPT_SETS.register(Absent)
    MODELS.register(ModelEntry("absent-flux", "flux", "nobody/absent-flux", revision="0" * 40))
    found = yaml.safe_load(tiny_suite.read_text())
    selections = [
        {"role": "trigger", "sets": ["planted"], "images": 2, "limit": 3},
        {"role": "concept", "sets": ["absent-set"], "images": 2, "expect": 700},
    ]
    found |= {"prompt_set": "planted+absent-set", "select": selections, "model": "absent-flux"}
    found["metrics"] = [*found["metrics"], {"fid": {"reference": "no-such.npz"}}]
    tiny_suite.write_text(yaml.safe_dump(found))
    yield tiny_suite
    del PROMPT_SETS._items["absent-set"]
    del MODELS._items["absent-flux"]


def test_a_plan_needs_neither_model_nor_prompts_nor_weights(unready: Path, tmp_path: Path) -> None:
    found = _plan(unready, tmp_path / "runs", ("random-tokens",), rate=1.0)
    assert [lack.what for lack in found.missing] == ["model", "prompt set absent-set", "metric fid"]
    assert "lethe fetch absent.csv" in found.missing[1].message
    planted, absent = found.sets
    assert planted.how == "counted" and planted.images == 2 * planted.prompts > 0
    assert (absent.prompts, absent.images, absent.how) == (700, 1400, "expected by the suite")
    assert found.images == found.images_left == (planted.images + 1400) * len(found.rows)
    assert set(found.jobs.values()) == {None}
    assert (found.height, found.width) == (1024, 1024)
    assert found.disk_bytes == found.images_left * bytes_an_image(1024, 1024, 16)
    json.dumps(found.as_dict())
    with pytest.raises(UserError, match="--measure needs the model"):
        _plan(unready, tmp_path / "runs", ("random-tokens",), measure=True)


def test_without_an_expectation_a_missing_set_stays_unknown(unready: Path, tmp_path: Path) -> None:
    suite = load_suite(str(unready))
    select = (*suite.select[:1], Selection(role=Role.CONCEPT, sets=("absent-set",), images=1))
    found = costs(
        ["random-tokens"], suite=suite.model_copy(update={"select": select}), runs=tmp_path, rate=1.0
    )
    assert found.sets[1].how == "unknown"
    assert (
        found.images is None and found.disk_bytes is None and found.untimed["images"] == len(found.rows) - 1
    )


def test_wrong_requests_are_refused(tiny_suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no methods of its own"):
        _plan(tiny_suite, tmp_path)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="--rate is the time of an image"):
            _plan(tiny_suite, tmp_path, ("random-tokens",), rate=rate)
    with pytest.raises(UserError, match="unknown model"):
        _plan(tiny_suite, tmp_path, ("random-tokens",), model="mini-ds")


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_plan_and_starts_nothing(
    unready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "random-tokens", "--suite", str(unready), "--runs", str(tmp_path / "runs"), "--plan"]
    app([*asked, "--rate", "2"], standalone_mode=False)
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "nothing is started",
        "expected by the suite",
        "CPU-hours",
        "missing",
        "lethe fetch absent.csv",
    ):
        assert part in told, told
    app([*asked, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["suite"] == "tiny@1" and found["untimed"]["images"] == 4
    assert not (tmp_path / "runs").exists()


def test_a_method_that_does_not_apply_has_one_line(
    tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "flowedit", "--suite", str(tiny_suite), "--runs", str(tmp_path / "runs"), "--plan"]
    app(asked, standalone_mode=False)
    told = capsys.readouterr().out
    assert sum(line.startswith("│ flowedit ") for line in told.splitlines()) == 1
    assert all(name in told for name in METHODS.get("flowedit").strengths)


def test_measure_and_rate_belong_to_a_plan(tiny_suite: Path) -> None:
    for more in (["--measure"], ["--rate", "1"]):
        with pytest.raises(UserError, match="belong to --plan"):
            app(["bench", "random-tokens", "--suite", str(tiny_suite), *more], standalone_mode=False)
