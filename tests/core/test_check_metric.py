"""The contract suite on every registered metric, and on metrics that each break one rule."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from lethebench.check import kind_of, metrics, run_checks
from lethebench.errors import UserError
from lethebench.plan import prompt_set
from lethebench.registry import METRICS
from lethebench.specs import SamplerSettings

SAMPLER = SamplerSettings(num_inference_steps=4, guidance_scale=3.0, height=32, width=32)
"""Latents of 16 a side, as mini-sd's: smaller ones have no multi-scale SSIM."""


@pytest.fixture(scope="module")
def subjects():
    """A subject for each metric, made once: the checks share its images and values."""
    from tiny_pipelines import tiny_sd

    from lethebench.zoo import wrap

    model, made = wrap(tiny_sd()), {}

    def subject(spec: str) -> metrics.Subject:
        if spec not in made:
            made[spec] = metrics.Subject(
                spec, lambda: model, prompt_set(METRICS.get(spec).shown), sampler=SAMPLER
            )
        return made[spec]

    return subject


@pytest.mark.parametrize("check", metrics.checks())
@pytest.mark.parametrize("metric", list(METRICS))
def test_a_metric_keeps_the_contract(subjects, metric: str, check: str) -> None:
    subject = subjects(metric)
    reason = metrics.applicable(subject, check)
    if reason is not None:
        assert re.search("needs nothing|records nothing|can't run here", reason)
        return
    metrics.checks()[check](subject)


def test_the_metrics_without_extras_and_downloads_are_checked(subjects) -> None:
    able = {name for name in METRICS if metrics.applicable(subjects(name), "is_deterministic") is None}
    assert set(METRICS) - able <= {"sscd", "clip", "fid", "kid", "nudity"}


# --- broken metrics -------------------------------------------------------------------------------

SOURCE = """
import random
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from lethebench.errors import UserError
from lethebench.hooks import Recorder
from lethebench.method import setting
from lethebench.metric import Metric, Score
from lethebench.metrics._common import check_shard
from lethebench.prompts import Role

def score(**change):
    facts = dict(name="broken.mean", column="broken_mean", direction="lower", unit="share", bounds=(0.0, 1.0))
    return Score(**{{**facts, "roles": frozenset({{Role.TRIGGER}}), "help": "mean pixel", **change}})

def mean(shard):
    check_shard("broken", shard)
    return shard.images.mean(axis=(1, 2, 3)) / 255.0

class Watch(Recorder):
    def __init__(self, name="broken_first"):
        self.name = name
    def step(self, step, predicted):
        if step.index == 0:
            self.seen = predicted.combined.flatten(1).norm(dim=1)
    def take(self, batch):
        return {{self.name: self.seen}}

@dataclass(frozen=True)
class Broken(Metric):
    scale: float = setting(1.0, "a factor")
    name = "broken"
    summary = "breaks one rule"
    source = "made for a test"
    scores = (score(),)
    def measure(self, shard):
        return {{"broken_mean": mean(shard)}}
{body}
"""

RECORDING = """
needs = frozenset({"images", "recorded"})
records = frozenset({"broken_first"})
def recorder(self):
    return Watch()
def measure(self, shard):
    first = shard.recorded.get("broken_first", np.full(len(shard), np.nan))
    if len(first) != len(shard):
        raise ValueError("broken: recorded broken_first has another length")
    return {"broken_mean": mean(shard), "broken_first": first}
"""


def measures(expression: str) -> str:
    return f"def measure(self, shard):\n    return {expression}"


BROKEN: dict[str, list[tuple[str, str]]] = {
    "declares_its_facts": [
        ("summary = ''", "declare `summary`"),
        ("source = ''", "declare `source`"),
        ("needs = frozenset({'pictures'})", "`needs` holds 'pictures'"),
        ("records = frozenset({'x'})", "add 'recorded' to `needs`"),
        ("name = 'Broken One'", "'Broken One'"),
    ],
    "scores_are_declared": [
        ("scores = ()", "declare `scores`"),
        ("scores = (score(name='Broken Mean'),)", "use lower case"),
        ("scores = (score(), score())", "declared twice"),
        ("scores = (score(name='fbmem.vm'),)", "belongs to metric 'fbmem'"),
        ("scores = (score(direction='down'),)", "direction 'down'"),
        ("scores = (score(bounds=(1.0, 0.0)),)", "bounds"),
        ("scores = (score(help=''),)", "no help"),
    ],
    "set_valued_scores_are_named": [
        ("set_valued = frozenset({'other'})", "'other', which is no score"),
        ("set_valued = frozenset({'broken.mean'})", "override it"),
    ],
    "constructor_only_stores": [
        (
            "def __post_init__(self):\n    object.__setattr__(self, 'scale', 2.0)",
            "doesn't store `scale`",
        ),
    ],
    "settings_have_help": [
        ("y: int = 1", "setting `y` has no help"),
        ("y: object = setting((1, 2), 'a pair')", "JSON doesn't give back"),
    ],
    "says_what_is_missing": [("def check(self):\n    raise UserError('a\\nb')", "in one line")],
    "columns_are_measured": [
        ("scores = (score(column='other'),)", "'other', which isn't measured"),
        (measures("{'broken_mean': mean(shard)[:-1]}"), "values for"),
        (measures("{'broken_mean': mean(shard), 'kind': mean(shard)}"), "column 'kind'"),
        (measures("{'broken_mean': mean(shard).tolist()}"), "no numpy array"),
        ("reads = frozenset({'more'})", "'more', which isn't measured"),
        (measures("{'broken_mean': mean(shard), 'z': np.array([{}] * len(shard))}"), "numbers nor texts"),
    ],
    "detectors_are_measured": [
        ("detects = {'other': 'high'}", "'other' detects, but isn't measured"),
        ("detects = {'broken_mean': 'up'}", "say high or low"),
        (
            "detects = {'text': 'high'}\n"
            + measures("{'broken_mean': mean(shard), 'text': np.full(len(shard), 'a', dtype=object)}"),
            "holds no numbers",
        ),
    ],
    "gives_a_value": [(measures("{'broken_mean': mean(shard) * np.nan}"), "no score has a value")],
    "is_deterministic": [
        ("count = [0]\n" + "def measure(self, shard):\n    self.count[0] += 1\n    return {'broken_mean': mean(shard) / self.count[0]}", "measured again"),
    ],
    "batches_do_not_matter": [
        (measures("{'broken_mean': mean(shard) - (mean(shard).mean() if len(shard) else 0)}"), "one by one"),
    ],
    "order_does_not_matter": [
        (measures("{'broken_mean': np.sort(mean(shard))}"), "measured backwards"),
    ],
    "no_images": [
        (measures("{'broken_mean': mean(shard)} if len(shard) else {}"), "no images give the columns none"),
        (measures("{'broken_mean': mean(shard) if len(shard) else np.zeros(1)}"), "no images give 1 values"),
    ],
    "one_image": [
        (measures("{'broken_mean': mean(shard), **({} if len(shard) == 1 else {'x': mean(shard)})}"), "other columns"),
    ],
    "refuses_wrong_input": [
        (measures("{'broken_mean': np.asarray(shard.images).mean(axis=tuple(range(1, np.ndim(shard.images))))}"), "measured without an error"),
        (measures("{'broken_mean': np.stack([i.mean((0, 1, 2), dtype=float) for i in shard.images[:, :, :, :]])}"), "in place of a ValueError|without an error"),
        ("def measure(self, shard):\n    try:\n        return {'broken_mean': mean(shard)}\n    except ValueError as e:\n        raise ValueError('bad input') from e", "doesn't name the metric"),
        ("def measure(self, shard):\n    try:\n        return {'broken_mean': mean(shard)}\n    except ValueError as e:\n        raise ValueError(f'{e}\\nand more') from e", "several lines"),
        (
            "needs = frozenset({'images', 'noise_norm'})\n"
            + measures("{'broken_mean': mean(shard) + 0 * shard.noise_norm.reshape(len(shard), -1)[:, 0]}"),
            "noise norms of one axis",
        ),
        (RECORDING.replace("len(first) != len(shard)", "False"), "recordings of broken_first"),
    ],
    "nan_gives_no_value": [
        (
            "needs = frozenset({'images', 'latents'})\n"
            + measures("{'broken_mean': np.nan_to_num(shard.latents).reshape(len(shard), -1)[:, 0]}"),
            "NaN in latents makes 'broken_mean' 0.0",
        ),
    ],
    "missing_recordings_give_no_value": [
        (RECORDING.replace('shard.recorded.get("broken_first", np.full(len(shard), np.nan))', 'shard.recorded["broken_first"]'), "broken_first"),
        (RECORDING.replace("np.full(len(shard), np.nan)", "np.zeros(len(shard))"), "is 0.0: give NaN"),
    ],
    "values_are_inside_bounds": [
        (measures("{'broken_mean': 2 * mean(shard) + 1}"), "is outside 0.0 to 1.0"),
        (
            "set_valued = frozenset({'broken.mean'})\ndef aggregate(self, score, table):\n    return 7.0",
            "7.0 is outside",
        ),
    ],
    "aggregates": [
        ("set_valued = frozenset({'broken.mean'})\ndef aggregate(self, score, table):\n    return 'much'", "no float"),
        ("set_valued = frozenset({'broken.mean'})\ndef aggregate(self, score, table):\n    return float('inf')", "inf"),
        ("set_valued = frozenset({'broken.mean'})\ndef aggregate(self, score, table):\n    return float(table[score.column].iloc[0])", "backwards"),
        ("set_valued = frozenset({'broken.mean'})\ndef aggregate(self, score, table):\n    table['x'] = 1\n    return 0.5", "changes the table"),
        (
            "scores = (score(), score(name='broken.set'))\nset_valued = frozenset({'broken.set'})\n"
            "def aggregate(self, score, table):\n    return float(table[score.column].median())",
            "name it in `set_valued`",
        ),
    ],
    "columns_survive_parquet": [
        (measures("{'broken_mean': mean(shard), 'z': np.array([{1: 2} if i % 2 else 'a' for i in range(len(shard))], dtype=object)}"), "can't be written"),
    ],
    "facts_survive_json": [
        ("def facts(self):\n    return {'tau': np.float32(0.5)}", "`facts`"),
        ("def compare(self, table, base):\n    return {'nan': float('nan')}", "`compare`"),
    ],
    "leaves_its_input": [
        ("def measure(self, shard):\n    found = mean(shard)\n    shard.images[:] = 0\n    return {'broken_mean': found}", "changes the shard's images"),
    ],
    "leaves_global_random_state": [
        (measures("{'broken_mean': mean(shard) + 0 * torch.rand(1).item()}"), "torch's global"),
        (measures("{'broken_mean': mean(shard) + 0 * random.random()}"), "Python's global"),
        (measures("{'broken_mean': mean(shard) + 0 * np.random.rand()}"), "numpy's global"),
    ],
    "weights_are_files": [("def weights(self):\n    return {'net': Path('nowhere.pt')}", "nowhere.pt")],
    "records_what_it_says": [
        (RECORDING.replace("Watch()", "Watch('other')"), "takes other, `records` says broken_first"),
        ("def recorder(self):\n    return Watch()", "exactly where"),
        (RECORDING.replace("return Watch()", "return None"), "exactly where"),
    ],
    "recording_changes_nothing": [
        (
            RECORDING.replace(
                "return Watch()",
                "made = Watch()\n    made.step = lambda step, predicted: (setattr(made, 'seen', "
                "predicted.combined.flatten(1).norm(dim=1)), predicted.combined.mul_(0.5))\n    return made",
            ),
            "recording changes the",
        ),
    ],
    "recorded_batches_do_not_matter": [
        (
            RECORDING.replace(
                "return Watch()",
                "made = Watch()\n    made.step = lambda step, predicted: setattr(made, 'seen', "
                "predicted.combined.flatten(1).norm(dim=1) * len(step.keys))\n    return made",
            ),
            "recorded one by one",
        ),
    ],
}  # fmt: skip

CASES = [(check, body, words) for check, found in BROKEN.items() for body, words in found]


def broken(folder: Path, body: str) -> str:
    path = folder / "broken.py"
    path.write_text(SOURCE.format(body=textwrap.indent(body.strip(), "    ")))
    return f"{path}:Broken"


@pytest.fixture(scope="module")
def tiny_model():
    from tiny_pipelines import tiny_sd

    from lethebench.zoo import wrap

    return wrap(tiny_sd())


@pytest.mark.parametrize(
    ("check", "body", "words"), CASES, ids=[f"{c}-{i}" for i, (c, _, _) in enumerate(CASES)]
)
def test_a_check_finds_what_it_is_for(tmp_path: Path, tiny_model, check: str, body: str, words: str) -> None:
    subject = metrics.Subject(broken(tmp_path, body), lambda: tiny_model, prompt_set("planted"))
    assert metrics.applicable(subject, check) is None
    with pytest.raises((AssertionError, KeyError), match=words):
        metrics.checks()[check](subject)


def test_every_check_has_a_metric_that_breaks_it() -> None:
    assert set(metrics.checks()) - set(BROKEN) == {"pickles"}


@pytest.mark.parametrize("body", ["", RECORDING])
def test_the_same_metric_unbroken_passes(tmp_path: Path, tiny_model, body: str) -> None:
    subject = metrics.Subject(broken(tmp_path, body), lambda: tiny_model, prompt_set("planted"))
    for name, check in metrics.checks().items():
        if metrics.applicable(subject, name) is None:
            check(subject)


def test_settings_hidden_in_a_constructor_are_found(tmp_path: Path, tiny_model) -> None:
    body = "def __init__(self, keep=24):\n    self.keep = keep"
    spec = broken(tmp_path, body)
    path = Path(spec.partition(":")[0])
    path.write_text(
        path.read_text().replace("@dataclass(frozen=True)\n", "").replace("scale: float", "scale_")
    )
    subject = metrics.Subject(spec, lambda: tiny_model, prompt_set("planted"))
    with pytest.raises(AssertionError, match="`keep` looks like a setting that no suite can set"):
        metrics.check_constructor_only_stores(subject)


def test_a_metric_that_cannot_run_here_is_skipped_with_the_reason(tmp_path: Path) -> None:
    spec = broken(tmp_path, "def check(self):\n    raise UserError('get weights.pt first')")
    results = {r.name: r for r in run_checks(spec)}
    assert results["declares_its_facts"].status == "passed"
    skipped = results["is_deterministic"]
    assert (
        skipped.status == "skipped" and skipped.message == "the metric can't run here: get weights.pt first"
    )
    assert not [r for r in results.values() if r.status == "failed"]


def test_a_subject_holds_only_what_the_metric_declares(tmp_path: Path, tiny_model) -> None:
    plain = metrics.Subject(broken(tmp_path, ""), lambda: pytest.fail("drawn"), prompt_set("planted"))
    assert plain.shard.latents is None and plain.shard.noise_norm is None and not plain.shard.recorded
    roles = {str(p.role) for p in plain.shard.prompts}
    assert roles == {"trigger", "control", "concept", "neutral", "probe"}
    drawn = metrics.Subject("noise-magnitude", lambda: tiny_model, prompt_set("planted"))
    assert drawn.shard.latents is None
    assert drawn.shard.noise_norm is not None and np.isfinite(drawn.shard.noise_norm).all()


def lethe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lethebench.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# --- the command ----------------------------------------------------------------------------------


def test_the_kind_is_found_by_the_registries(tmp_path: Path, monkeypatch) -> None:
    assert kind_of("uniforget") == "method" and kind_of("fbmem") == "metric"
    assert kind_of(broken(tmp_path, "")) == "metric"
    assert kind_of("fbmem", "metric") == "metric"
    monkeypatch.setitem(METRICS._items, "uniforget", METRICS.get("fbmem"))
    with pytest.raises(UserError, match="is a method and a metric: say which with --kind"):
        kind_of("uniforget")
    assert kind_of("uniforget", "method") == "method"


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("fbmen", None, "unknown method or metric 'fbmen': did you mean fbmem"),
        ("zzzzqq", None, "lethe list methods"),
        ("fbmem", "method", "unknown method 'fbmem'"),
        ("fbmem", "modell", "unknown kind 'modell'"),
        ("./no.py:X", None, "not found: no.py"),
    ],
)
def test_unknown_names_and_kinds_are_one_line(spec: str, kind: str | None, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        kind_of(spec, kind)


def test_a_class_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("class Other:\n    name = 'other'\n")
    with pytest.raises(UserError, match="neither a method nor a metric"):
        kind_of(f"{tmp_path / 'other.py'}:Other")


def test_the_command_checks_a_metric_from_a_file(tmp_path: Path) -> None:
    spec = broken(tmp_path, "source = ''")
    done = lethe("check", spec)
    assert done.returncode == 1
    assert "failed  declares_its_facts: declare `source` as a text" in done.stdout
    assert "passed  batches_do_not_matter" in done.stdout
    assert "skipped recording_changes_nothing: the metric records nothing" in done.stdout
    assert done.stdout.count("failed") == 1 and "1 of" in done.stderr
    done = lethe("check", spec, "--set", "scal=2")
    assert done.returncode == 2 and "did you mean 'scale'?" in done.stderr
