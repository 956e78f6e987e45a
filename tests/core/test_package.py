"""The package as a whole: every module imports, its examples run, and Hugging Face's names stay theirs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lethebench

ROOT = Path(lethebench.__file__).parent
ROOMS = ("", ".methods", ".metrics", ".datasets", ".leaderboard")


def _modules() -> list[str]:
    found = {"lethebench"}
    for room in ROOMS:
        package = importlib.import_module(f"lethebench{room}")
        found |= {m.name for m in pkgutil.walk_packages(package.__path__, f"lethebench{room}.")}
    return sorted(found)


@pytest.mark.parametrize("name", _modules())
def test_a_module_imports_and_its_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_every_source_file_is_a_module_of_the_package() -> None:
    files = {p.resolve() for p in ROOT.rglob("*.py")}
    for room in ("methods", "metrics", "datasets", "leaderboard"):
        files |= {p.resolve() for p in (ROOT / room).resolve().rglob("*.py")}
    modules = {Path(importlib.import_module(n).__file__ or "").resolve() for n in _modules()}
    assert {f.name for f in files - modules} == set()


def test_hugging_face_datasets_is_not_hidden(tmp_path: Path) -> None:
    repository = ROOT.parents[1]
    for folder in (tmp_path, repository):
        script = "import datasets, lethebench.datasets.planted; print(hasattr(datasets, 'load_dataset'))"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "True"
