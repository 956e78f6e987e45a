"""The runner on a tiny model: what it computes, what it reuses, what a kill and a failure leave."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import lethebench
from lethebench.bench import plan_rows, run
from lethebench.errors import UserError
from lethebench.method import Family
from lethebench.plan import Runtime

ONE_THREAD = Runtime(threads=1)


def _stable(path: Path) -> str:
    """A row without what a clock or a memory counter measured."""
    row = json.loads(path.read_text())
    for field in (
        "fit_seconds",
        "seconds_per_image",
        "relative_to_base",
        "peak_memory_bytes",
        "fit_peak_memory_bytes",
    ):
        del row["cost"][field]
    for field in ("started", "finished"):
        del row["provenance"][field]
    return json.dumps(row, sort_keys=True)


def _rows(runs: Path) -> dict[str, str]:
    return {str(p.relative_to(runs)): _stable(p) for p in sorted(runs.glob("*@*/*/*/*/row.json"))}


def _bench(suite: Path, runs: Path, method: str = "random-tokens", **options) -> lethebench.bench.Outcome:
    options = {"runtime": ONE_THREAD, "strength": "weak", **options}
    return run([method], suite=str(suite), runs=runs, **options)


def test_all_methods_means_the_suites_extras_too(tiny_suite: Path) -> None:
    """Every method that is no control and stands alone, then what the suite's ``also`` names."""
    from lethebench.registry import METHODS
    from lethebench.specs import Extra, load_suite

    suite = load_suite(str(tiny_suite))
    extras = (
        Extra(method="random-pruning", strength="weak"),
        Extra(method="uniforget+retrain"),
        Extra(method="uniforget", strength="weak", set={"steps": 2}),
    )
    more = suite.model_copy(update={"also": extras})
    plans = [plan_rows(["all"], s, suite.model) for s in (suite, more)]
    named = [[(p.recipe.name, p.recipe.setting) for p in found] for found in plans]
    methods = {
        name
        for name, cls in METHODS.items()
        if not cls.control and not cls.follows and cls.family is not Family.TRAINING
    }
    assert {name for name, _ in named[0]} == {"base", "blank", *methods}
    assert "retrain" not in methods and "uniforget" in methods
    assert named[1][: len(named[0])] == named[0]
    assert set(named[1][len(named[0]) :]) == {
        ("random-pruning", "weak"),
        ("uniforget+retrain", "weak+short"),
        ("uniforget+retrain", "medium"),
        ("uniforget+retrain", "strong+long"),
        ("uniforget", "weak,steps=2"),
    }
    keys = [found[0].row_key(found[0]) for found in plans]
    assert keys[0] == keys[1]  # no row depends on what else is run


def test_a_run_writes_rows_tables_and_images(tiny_suite: Path, tmp_path: Path) -> None:
    outcome = _bench(tiny_suite, tmp_path / "runs")
    assert [(r.method, r.setting, r.status) for r in outcome.rows] == [
        ("base", "default", "ok"),
        ("blank", "default", "ok"),
        ("random-tokens", "weak", "ok"),
    ]
    blank = outcome.rows[1].scores["brightness.mean"]
    assert blank.value == pytest.approx(0.5, abs=0.01)
    assert blank.base_difference is not None
    folder = tmp_path / "runs/tiny@1/tiny-sd/random-tokens/weak"
    table = pd.read_parquet(folder / "images.parquet")
    assert (
        len(table) == outcome.rows[2].scores["brightness.mean"].n == len(list((folder / "images").iterdir()))
    )
    for _, image in table.iterrows():
        assert (folder / "images" / f"{image.prompt_id}-{image['index']}.png").exists()


FLOW_ONLY = """
from lethebench.method import Family, Method

class FlowOnly(Method):
    name = "flow-only"
    summary = "works on flow models"
    family = Family.SAMPLING
    citation = "none"
    model_families = frozenset({"flux"})
    unsupported_reason = "it follows a velocity"
"""


def test_a_method_that_does_not_apply_says_why(tiny_suite: Path, tmp_path: Path) -> None:
    (tmp_path / "flow_only.py").write_text(FLOW_ONLY)
    spec = f"{tmp_path / 'flow_only.py'}:FlowOnly"
    row = _bench(tiny_suite, tmp_path / "runs", spec, strength="all", until="row").rows[-1]
    assert (row.method, row.status, row.scores) == ("flow-only", "not-applicable", {})
    assert row.reason == "flow-only supports flux, not sd: it follows a velocity"


def test_a_method_whose_images_take_longer_costs_more(tiny_suite: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    row = _bench(tiny_suite, tmp_path / "runs", f"{tmp_path / 'slow.py'}:Slow", strength="all").rows[-1]
    assert row.cost is not None and row.cost.relative_to_base is not None
    assert row.cost.relative_to_base > 1.5  # each prediction is asked for five times more


SLOW = """
from lethebench.hooks import SamplerHooks
from lethebench.method import Family, Method

class Hooks(SamplerHooks):
    def guidance(self, combined, unconditional, conditional, step):
        for _ in range(5):
            step.batch.predict(step.latents, step.timestep, step.conditioning)
        return combined

class Slow(Method):
    name = "slow"
    summary = "asks the denoiser again and again"
    family = Family.SAMPLING
    citation = "none"

    def apply(self, model, artefact):
        from contextlib import nullcontext
        return nullcontext(Hooks())
"""


def test_a_second_run_computes_nothing(tiny_suite: Path, tmp_path: Path) -> None:
    first = _bench(tiny_suite, tmp_path / "runs")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    second = _bench(tiny_suite, tmp_path / "runs")
    assert all(n > 0 for n in first.computed.values())
    assert all(n == 0 for n in second.computed.values())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before
    assert second.rows == first.rows


def test_a_removed_row_is_written_again_without_new_images(tiny_suite: Path, tmp_path: Path) -> None:
    _bench(tiny_suite, tmp_path / "runs")
    before = _rows(tmp_path / "runs")
    (tmp_path / "runs/tiny@1/tiny-sd/base/default/row.json").unlink()
    again = _bench(tiny_suite, tmp_path / "runs")
    assert again.computed == {"fit": 0, "shard": 0, "scores": 0, "row": 1}
    assert _rows(tmp_path / "runs") == before


def test_workers_and_batch_size_change_no_noise(tiny_suite: Path, tmp_path: Path) -> None:
    _bench(tiny_suite, tmp_path / "one")
    _bench(tiny_suite, tmp_path / "two", workers=2)
    assert _rows(tmp_path / "one") == _rows(tmp_path / "two")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ArithmeticError('on purpose')", "ArithmeticError: on purpose"),
        ("UserError('on purpose')", "on purpose"),
    ],
)
def test_a_failing_method_fails_its_row_and_no_other(
    tiny_suite: Path, tmp_path: Path, error: str, reason: str
) -> None:
    plugin = tmp_path / "failing.py"
    plugin.write_text(
        "from lethebench.errors import UserError\n"
        "from lethebench.method import Family, Method\n"
        "class Failing(Method):\n"
        "    name = 'failing'\n    summary = 'raises'\n    family = Family.WEIGHTS\n"
        f"    def fit(self, task):\n        raise {error}\n"
    )
    outcome = _bench(tiny_suite, tmp_path / "runs", f"{plugin}:Failing", strength="all")
    status = {r.method: (r.status, r.reason) for r in outcome.rows}
    assert status["failing"] == ("failed", reason)
    assert status["base"][0] == status["blank"][0] == "ok"
    assert "on purpose" in (tmp_path / "runs/tiny@1/tiny-sd/failing/default/failure.txt").read_text()


SHARING = """
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, setting

class Shift(SamplerHooks):
    def __init__(self, by):
        self.by = by
    def step_end(self, latents, step):
        return latents + self.by

@dataclass(frozen=True)
class Sharing(Method):
    by: float = setting(0.0, "how far", applied=True)
    breaks: bool = setting(False, "raise in fit")
    name = "sharing"
    summary = "strengths that only apply tells apart"
    family = Family.SAMPLING
    strengths = {"weak": {"by": 0.1}, "medium": {"by": 0.2}, "strong": {"by": 0.4}}
    citation = "made for a test"

    def fit(self, task):
        if self.breaks:
            raise RuntimeError("on purpose")
        with Path("FITS").open("a") as file:
            file.write("fit ")
        return Artefact()

    @contextmanager
    def apply(self, model, artefact):
        yield Shift(self.by)
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_strengths_that_only_apply_tells_apart_share_a_fit(
    tiny_suite: Path, tmp_path: Path, workers: int
) -> None:
    """Also where they begin a composition, and with several workers; each keeps images of its own."""
    plugin = tmp_path / "sharing.py"
    plugin.write_text(SHARING.replace("FITS", str(tmp_path / "fits")))
    method = f"{plugin}:Sharing"
    options = {"suite": str(tiny_suite), "runs": tmp_path / "runs", "runtime": ONE_THREAD, "workers": workers}
    outcome = run([method, f"{method}+random-pruning"], **options)
    assert all(r.status == "ok" for r in outcome.rows) and len(outcome.rows) == 2 + 3 + 3
    assert (tmp_path / "fits").read_text() == "fit "
    values = {r.scores["brightness.mean"].value for r in outcome.rows if r.method == "sharing"}
    assert len(values) == 3
    again = run([method], **options)
    assert not any(again.computed.values())
    broken = run([method], overrides={"breaks": True}, **options)
    assert [r.status for r in broken.rows if r.method == "sharing"] == ["failed"] * 3
    assert {r.reason for r in broken.rows if r.method == "sharing"} == {"RuntimeError: on purpose"}


def test_a_method_that_asks_for_more_than_it_declares_fails(tiny_suite: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "greedy.py"
    plugin.write_text(
        "from lethebench.method import Family, Method\n"
        "class Greedy(Method):\n"
        "    name = 'greedy'\n    summary = 'peeks'\n    family = Family.WEIGHTS\n"
        "    def fit(self, task):\n        task.memorized_prompts()\n"
    )
    outcome = _bench(tiny_suite, tmp_path / "runs", f"{plugin}:Greedy", strength="all")
    (row,) = [r for r in outcome.rows if r.method == "greedy"]
    assert row.status == "failed"
    assert "asked for memorized-prompts, but declares nothing" in (row.reason or "")


def test_a_changed_plugin_is_run_again(tiny_suite: Path, tmp_path: Path) -> None:
    source = (
        "from contextlib import contextmanager\n"
        "from lethebench.hooks import SamplerHooks\n"
        "from lethebench.method import Family, Method\n"
        "class Fill(Method):\n"
        "    name = 'fill'\n    summary = 'fills'\n    family = Family.SAMPLING\n"
        "    @contextmanager\n    def apply(self, model, artefact):\n        yield Hooks()\n"
        "class Hooks(SamplerHooks):\n"
        "    def images(self, images, keys):\n        return images * 0 + VALUE\n"
    )
    script = (
        "import sys, lethebench\n"
        "from lethebench.plan import Runtime\n"
        "o = lethebench.run([sys.argv[1]], suite=sys.argv[2], runs=sys.argv[3], runtime=Runtime(threads=1))\n"
        "print(o.rows[-1].scores['brightness.mean'].value, o.computed['shard'])\n"
    )
    found = []
    for value in (51, 102):
        (tmp_path / "fill.py").write_text(source.replace("VALUE", str(value)))
        arguments = [str(tmp_path / "fill.py") + ":Fill", str(tiny_suite), str(tmp_path / "runs")]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        found.append(done.stdout.split())
    assert [float(f[0]) for f in found] == [pytest.approx(0.2), pytest.approx(0.4)]
    assert int(found[1][1]) > 0


def test_unknown_names_fail_before_any_work(tiny_suite: Path, tmp_path: Path) -> None:
    for arguments in ({"methods": ["no-such"]}, {"methods": ["base"], "suite": "plantd"}):
        with pytest.raises(UserError):
            run(**{"suite": str(tiny_suite), "runs": tmp_path / "runs", **arguments})  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()


def test_a_run_killed_at_any_instant_resumes_to_the_same_rows(tiny_suite: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "lethebench.cli", "bench", "random-tokens", "--suite", str(tiny_suite),
        "--strength", "weak", "--threads", "1",
    ]  # fmt: skip

    def start(name: str) -> subprocess.Popen[bytes]:
        places = ["--runs", str(tmp_path / name), "--site", str(tmp_path / f"{name}-site")]
        return subprocess.Popen(command + places, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("whole").wait() == 0
    seconds = time.monotonic() - began
    chance = random.Random(0)
    for _ in range(3):
        process = start("killed")
        time.sleep(seconds * (0.4 + 0.6 * chance.random()))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "whole")
    assert list((tmp_path / "killed-site").iterdir())


def test_rows_load_as_a_data_frame(tiny_suite: Path, tmp_path: Path) -> None:
    _bench(tiny_suite, tmp_path / "runs")
    frame = lethebench.load_rows(tmp_path / "runs")
    assert set(frame["method"]) == {"base", "blank", "random-tokens"}
    assert len(frame) == 3
