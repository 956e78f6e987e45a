"""The contract suite on every registered method, and on methods that break it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lethebench.check import Subject, applicable, checks
from lethebench.plan import prompt_set
from lethebench.registry import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def subjects():
    """A subject for each method, made once: the checks share its fit."""
    from tiny_pipelines import tiny_sd

    from lethebench.zoo import wrap

    model, made = wrap(tiny_sd()), {}

    def subject(spec: str) -> Subject:
        if spec not in made:
            made[spec] = Subject(spec, model, prompt_set("planted"))
        return made[spec]

    return subject


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("method", [name for name, _ in METHODS.items()])
def test_a_method_keeps_the_contract(subjects, method: str, check: str) -> None:
    subject = subjects(method)
    assert applicable(subject, check) is None
    checks()[check](subject)


BROKEN = {
    "knowledge_is_respected": "def fit(self, task):\n    task.concepts()\n    return Artefact()",
    "fit_is_deterministic": (
        "def fit(self, task):\n    import time, torch\n    return Artefact({'t': torch.tensor(time.perf_counter_ns())})"
    ),
    "leaves_global_random_state": "def fit(self, task):\n    import torch\n    torch.rand(1)\n    return Artefact()",
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
    "settings_have_help": "y: int = 1",
    "three_strengths": "strengths = {'only': {'x': 1}}",
    "declares_its_facts": "summary = ''",
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
    path = tmp_path / f"broken_{check}.py"
    path.write_text(SOURCE.format(body=textwrap.indent(BROKEN[check], "    ")))
    with pytest.raises(AssertionError):
        checks()[check](Subject(f"{path}:Broken", _fresh(), prompt_set("planted")))


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
    assert "shrink-embedding  moves the prompt embedding" in done.stdout
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
