"""The contract suite on every registered method, and on methods that break it; metrics in the runner."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lethebench.bench import plan_rows, run
from lethebench.check import Subject, applicable, checks
from lethebench.errors import UserError
from lethebench.method import Family, identity_of, recorded_settings
from lethebench.metric import detectors
from lethebench.plan import RowPlan, Runtime, make_metric, prompt_set
from lethebench.registry import METHODS, METRICS
from lethebench.specs import MetricSpec, load_suite
from lethebench.store import Store, digest
from lethebench.work import read_shard, row_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def subjects():
    """A subject for each method, made once: the checks share its fit. On the first family it supports.

    Training-time methods on mini-sd, whose tokenizer knows the words of the fine-tuning set.
    """
    from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

    from lethebench.zoo import load_model, wrap

    builders = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
    models, made = {}, {}

    def subject(spec: str) -> Subject:
        if spec not in made:
            family = next(f for f in builders if f in METHODS.get(spec).model_families)
            if METHODS.get(spec).family is Family.TRAINING:
                family = "mini-sd"
            if family not in models:
                models[family] = load_model(family) if family == "mini-sd" else wrap(builders[family]())
            made[spec] = Subject(spec, models[family], prompt_set("planted"))
        return made[spec]

    return subject


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("method", [name for name, _ in METHODS.items()])
def test_a_method_keeps_the_contract(subjects, method: str, check: str) -> None:
    subject = subjects(method)
    if check == "off_is_base" and METHODS.get(method).off is None:
        assert METHODS.get(method).family is not Family.SAMPLING or not fields(METHODS.get(method))
        return
    assert applicable(subject, check) is None
    checks()[check](subject)


BROKEN = {
    "knowledge_is_respected": "def fit(self, task):\n    task.concepts()\n    return Artefact()",
    "fit_is_deterministic": (
        "def fit(self, task):\n    import time, torch\n    return Artefact({'t': torch.tensor(time.perf_counter_ns())})"
    ),
    "leaves_global_random_state": "def fit(self, task):\n    import torch\n    torch.rand(1)\n    return Artefact()",
    "shared_fits_are_equal": (
        "y: float = setting(0.0, 'how far', applied=True)\n"
        "strengths = {'a': {'y': 0.1}, 'b': {'y': 0.2}, 'c': {'y': 0.3}}\n"
        "def fit(self, task):\n    import torch\n    return Artefact({'t': torch.tensor(self.y)})"
    ),
    "shared_fits_are_equal#facts": (
        "y: float = setting(0.0, 'how far', applied=True)\n"
        "strengths = {'a': {'x': 1}, 'b': {'x': 2, 'y': 0.2}, 'c': {'x': 2, 'y': 0.3}}\n"
        "def fit(self, task):\n    return Artefact({}, {'y': self.y})"
    ),
    "fit_is_deterministic#facts": (
        "def fit(self, task):\n    import time\n    return Artefact({}, {'t': time.perf_counter_ns()})"
    ),
    "artefact_round_trips": "def fit(self, task):\n    return Artefact({}, {'shape': (1, 2)})",
    "base_is_restored": (
        "@contextmanager\ndef apply(self, model, artefact):\n"
        "    next(model.denoiser.parameters()).data.add_(1.0)\n    yield SamplerHooks()"
    ),
    "base_is_restored_after_an_error": (
        "@contextmanager\ndef apply(self, model, artefact):\n"
        "    p = next(model.denoiser.parameters()).data\n    p.mul_(2.0)\n    yield SamplerHooks()\n    p.mul_(0.5)"
    ),
    "fit_restores_the_model": (
        "def fit(self, task):\n    task.model.denoiser.conv_in.register_forward_hook(lambda *a: None)\n"
        "    return Artefact()"
    ),
    "images_dont_share": (
        "@contextmanager\ndef apply(self, model, artefact):\n"
        "    class Hooks(SamplerHooks):\n"
        "        def initial_noise(self, latents, keys):\n            return latents + latents.mean(dim=0)\n"
        "    yield Hooks()"
    ),
    "off_is_base": (
        "off = {'x': 0}\n@contextmanager\ndef apply(self, model, artefact):\n"
        "    class Hooks(SamplerHooks):\n"
        "        def initial_noise(self, latents, keys):\n            return latents + 1e-6\n"
        "    yield Hooks()"
    ),
    "base_is_restored#processors": (
        "@contextmanager\ndef apply(self, model, artefact):\n"
        "    from diffusers.models.attention_processor import AttnProcessor\n"
        "    model.denoiser.set_attn_processor(AttnProcessor())\n    yield SamplerHooks()"
    ),
    "base_is_restored#gradients": (
        "@contextmanager\ndef apply(self, model, artefact):\n"
        "    model.denoiser.requires_grad_(True)\n    yield SamplerHooks()"
    ),
    "base_draws_as_before": (
        "@contextmanager\ndef apply(self, model, artefact):\n"
        "    model.pipe.scheduler.register_to_config(beta_end=0.02)\n    yield SamplerHooks()"
    ),
    "settings_have_help": "y: int = 1",
    "three_strengths": "strengths = {'only': {'x': 1}}",
    "declares_its_facts": "model_families = frozenset({'sd'})",
}

SOURCE = """
from contextlib import contextmanager
from dataclasses import dataclass
from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, setting

@dataclass(frozen=True)
class Broken(Method):
    name = "broken"
    summary = "breaks one rule"
    family = Family.WEIGHTS
    citation = "none"
    strengths = {{"a": {{"x": 1}}, "b": {{"x": 2}}, "c": {{"x": 3}}}}
    x: int = setting(1, "a number")
{body}
"""


@pytest.mark.parametrize("check", BROKEN)
def test_a_check_finds_what_it_is_for(tmp_path: Path, subjects, check: str) -> None:
    path = tmp_path / f"broken_{check.replace('#', '_')}.py"
    path.write_text(SOURCE.format(body=textwrap.indent(BROKEN[check], "    ")))
    with pytest.raises(AssertionError):
        checks()[check.partition("#")[0]](Subject(f"{path}:Broken", _fresh(), prompt_set("planted")))


def _fresh():
    from tiny_pipelines import tiny_sd

    from lethebench.zoo import wrap

    return wrap(tiny_sd())


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example plugin package, installed by pip into a folder."""
    folder = tmp_path_factory.mktemp("plugins")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, "--target", str(folder), str(ROOT / "plugin_package")], check=True)
    return folder


def _lethe(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "lethebench.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=False,
    )


def test_an_installed_plugin_is_listed_and_a_broken_one_breaks_nothing(installed: Path) -> None:
    done = _lethe(installed, "list", "methods")
    assert done.returncode == 0
    assert "shrink-embedding moves the prompt embedding" in " ".join(done.stdout.split())
    assert "failed to import: RuntimeError: this plugin is broken on purpose" in done.stdout
    assert "uniforget" in done.stdout


def test_an_installed_plugin_passes_the_contract_suite(installed: Path) -> None:
    done = _lethe(installed, "check", "shrink-embedding")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout


def test_a_broken_plugin_is_named_when_it_is_asked_for(installed: Path) -> None:
    done = _lethe(installed, "bench", "broken-example")
    assert done.returncode == 2
    assert "broken on purpose" in done.stderr


# --- the contract of metrics, through the runner --------------------------------------------------

ONE_THREAD = Runtime(threads=1)
METRIC = """
import numpy as np
from dataclasses import dataclass
from pathlib import Path
from lethebench.errors import UserError
from lethebench.hooks import Recorder
from lethebench.method import setting
from lethebench.metric import Metric, Score

class Watch(Recorder):
    def step(self, step, predicted):
        if step.index == 0:
            self.seen = predicted.conditional.flatten(1).norm(dim=1)
    def take(self, batch):
        return {"first_norm": self.seen}

@dataclass(frozen=True)
class Watched(Metric):
    scale: float = setting(1.0, "a factor of the values")
    file: str = setting("", "a file that the values depend on")
    name = "watched"
    summary = "the first prediction's norm"
    source = "made for a test"
    needs = frozenset({"images", "recorded"})
    records = frozenset({"first_norm"})
    scores = (Score("watched.mean", "watched", "lower", "l2 norm", (0.0, np.inf), help="norm"),)

    def recorder(self):
        return Watch()
    def check(self):
        if self.file and not Path(self.file).is_file():
            raise UserError(f"metric 'watched' needs {self.file}")
    def weights(self):
        return {"file": Path(self.file)} if self.file else {}
    def measure(self, shard):
        found = shard.recorded.get("first_norm", np.full(len(shard), np.nan))
        return {"watched": self.scale * np.asarray(found, dtype=float)}
    def compare(self, table, base):
        both = table.merge(base, on=["prompt_id", "index"], suffixes=("", "_base"))
        return {"pairs": len(both), "higher": int((both.watched > both.watched_base).sum())}
"""


@pytest.fixture
def watched(tmp_path: Path, tiny_suite: Path):
    """Makes a suite file on the tiny model whose metrics are ``watched`` with settings, and more."""
    suite = yaml.safe_load(tiny_suite.read_text())

    def make(settings: dict[str, Any] | None = None, *more: Any) -> Path:
        (tmp_path / "watched.py").write_text(METRIC)
        spec = f"{tmp_path / 'watched.py'}:Watched"
        path = tmp_path / "watched.yaml"
        metrics = [{spec: settings} if settings else spec, *suite["metrics"], *more]
        path.write_text(yaml.safe_dump({**suite, "metrics": metrics}))
        return path

    return make


def plan_of(suite: Path) -> RowPlan:
    found = load_suite(str(suite))
    return plan_rows(["base"], found, found.model, runtime=ONE_THREAD, controls=False)[0]


def bench(suite: Path, runs: Path, method: str = "base") -> Any:
    strength = "all" if method == "base" else "weak"
    return run([method], suite=str(suite), runs=runs, runtime=ONE_THREAD, strength=strength)


def test_recordings_are_stored_and_given_back(watched, tmp_path: Path) -> None:
    suite, runs = watched({"scale": 2.0}), tmp_path / "runs"
    outcome = bench(suite, runs, "random-tokens")
    plan, store = plan_of(suite), Store(runs / "store")
    table = row_table(plan, store)
    values = []
    for number, keys in enumerate(plan.shards):
        folder = store.find("shard", plan.shard_key(number))
        assert folder is not None
        shard = read_shard(folder, keys, plan.suite)
        assert set(shard.recorded) == {"first_norm"}
        assert "recorded.first_norm" in load_file(folder / "images.safetensors")
        values += (2.0 * shard.recorded["first_norm"]).tolist()
    np.testing.assert_allclose(table["watched"], values, rtol=1e-6)
    blank = next(r for r in outcome.rows if r.method == "blank")
    assert blank.scores["watched.mean"].value is None, "nothing is drawn, nothing recorded"


def test_a_recorder_is_part_of_the_shards_key(watched, tiny_suite: Path) -> None:
    without, one = plan_of(tiny_suite).shard_key(0), plan_of(watched()).shard_key(0)
    two = plan_of(watched({"scale": 3.0})).shard_key(0)
    assert "recorders" not in without
    assert one["recorders"][0][0] == "watched" and one["recorders"][0][-1] == ["first_norm"]
    assert {k: v for k, v in one.items() if k != "recorders"} == without
    assert digest(one) != digest(two)


def test_settings_are_in_the_row_and_in_the_key_of_the_scores(watched, tmp_path: Path) -> None:
    suite = watched({"scale": 2.0})
    outcome = bench(suite, tmp_path / "runs")
    assert outcome.rows[0].metrics["watched"]["settings"] == {"scale": 2.0}
    two = outcome.rows[0].scores["watched.mean"].value
    again = bench(watched({"scale": 4.0}), tmp_path / "runs")
    assert again.computed["scores"] > 0
    assert again.rows[0].scores["watched.mean"].value == pytest.approx(2 * two)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scal": 2.0}, "metric 'watched' has no setting 'scal': did you mean 'scale'?"),
        ({"zzz": 2.0}, "known: scale, file"),
    ],
)
def test_an_unknown_setting_is_refused_before_any_work(
    watched, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        bench(watched(settings), tmp_path / "runs")
    assert words in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_metric_without_settings_says_so() -> None:
    with pytest.raises(UserError, match="metric 'planted-truth' has no setting 'x': known: none"):
        make_metric(MetricSpec(name="planted-truth", settings={"x": 1}))


def test_a_metric_may_be_named_once(watched) -> None:
    suite = watched({}, "fbmem", {"fbmem": {"keep": 3}})
    with pytest.raises(UserError, match="metric 'fbmem' is named twice"):
        load_suite(str(suite))


@pytest.mark.parametrize(
    ("given", "name", "settings"),
    [
        ("fbmem", "fbmem", {}),
        ({"fbmem": {"keep": 3}}, "fbmem", {"keep": 3}),
        ({"fbmem": None}, "fbmem", {}),
        ({"name": "fbmem", "settings": {"keep": 3}}, "fbmem", {"keep": 3}),
    ],
)
def test_a_suite_names_a_metric_alone_or_with_settings(given: Any, name: str, settings: Any) -> None:
    spec = MetricSpec.model_validate(given)
    assert (spec.name, spec.settings) == (name, settings)


def test_two_metrics_of_one_name_are_refused_before_any_work(watched, tmp_path: Path) -> None:
    suite = watched()
    (tmp_path / "other.py").write_text(METRIC)
    text = yaml.safe_load(suite.read_text())
    suite.write_text(
        yaml.safe_dump({**text, "metrics": [*text["metrics"], f"{tmp_path / 'other.py'}:Watched"]})
    )
    with pytest.raises(UserError, match="are both metric 'watched': rename one of them"):
        bench(suite, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def compare(self, table, base):\n        raise ArithmeticError('on purpose')", "on purpose"),
        ("def compare(self, table, base):\n        return {'x': object()}", "serialize"),
    ],
)
def test_a_metric_that_fails_after_measuring_fails_rows_and_not_the_run(
    watched, tmp_path: Path, body: str, reason: str
) -> None:
    suite = watched()
    (tmp_path / "watched.py").write_text(METRIC.replace("    def compare", f"    {body}\n    def unused"))
    outcome = bench(suite, tmp_path / "runs", "random-tokens")
    failed = next(r for r in outcome.rows if r.method == "random-tokens")
    assert failed.status == "failed" and reason in (failed.reason or "")
    assert len(outcome.rows) == 3, "every row is written"


def test_records_show_no_folders() -> None:
    home = str(Path.home())
    fbmem = make_metric(
        MetricSpec(name="fbmem", settings={"segmenter": "sam", "segmenter_weights": f"{home}/w/sam.pth"})
    )
    assert recorded_settings(fbmem)["segmenter_weights"] == "sam.pth"
    assert "segmenter_weights" not in identity_of(fbmem)
    vqa = make_metric(
        MetricSpec(name="vqa", settings={"judges": [{"judge": f"transformers:{home}/llava", "cache": "~/c"}]})
    )
    assert recorded_settings(vqa)["judges"] == [{"judge": "transformers:llava", "cache": "c"}]
    names = make_metric(
        MetricSpec(name="vqa", settings={"judges": f"recogniser-mini, transformers:{home}/a"})
    )
    assert recorded_settings(names)["judges"] == "recogniser-mini,transformers:a"


def test_what_a_metric_lacks_is_said_before_any_work(watched, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric 'watched' needs /nowhere/net\.pt"):
        bench(watched({"file": "/nowhere/net.pt"}), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_metrics_weights_are_in_key_and_provenance(watched, tmp_path: Path) -> None:
    net = tmp_path / "net.pt"
    net.write_bytes(b"first")
    suite = watched({"file": str(net)})
    first = bench(suite, tmp_path / "runs")
    sha = hashlib.sha256(b"first").hexdigest()
    assert first.rows[0].provenance.weights_sha256["watched/file"] == sha
    assert bench(suite, tmp_path / "runs").computed == dict.fromkeys(first.computed, 0)
    net.write_bytes(b"second!")
    again = bench(suite, tmp_path / "runs")
    assert again.computed["scores"] > 0
    assert again.rows[0].provenance.weights_sha256["watched/file"] != sha


def test_the_change_from_base_is_in_the_row(watched, tmp_path: Path) -> None:
    outcome = bench(watched(), tmp_path / "runs", "random-tokens")
    rows = {r.method: r for r in outcome.rows}
    assert "compared_to_base" not in rows["base"].metrics["watched"]
    found = rows["random-tokens"].metrics["watched"]["compared_to_base"]
    assert found["pairs"] == rows["base"].scores["watched.mean"].n
    assert 0 <= found["higher"] <= found["pairs"]
    on_disk = json.loads((tmp_path / "runs/tiny@1/tiny-sd/random-tokens/weak/row.json").read_text())
    assert on_disk["metrics"]["watched"]["compared_to_base"] == found


def test_detectors_follow_from_the_scores_unless_they_are_named() -> None:
    assert detectors(METRICS.get("copy-mini")())["copy_mini_similarity"] == "high"
    assert detectors(METRICS.get("clip-mini")()) == {}
    truth = detectors(METRICS.get("planted-truth")())
    assert truth["truth_near_copy"] == "high" and truth["truth_nm"] == "low"
    assert detectors(METRICS.get("fd-mini")()) == {}
