"""The real command: answers, exit codes, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lethebench.store import file_sha256
from lethebench.training import SHIPPED


def lethe(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lethebench.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **environment},
        timeout=300,
        check=False,
    )


def _one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("lethe: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "unifroget"], ["unknown method", "uniforget"]),
        (["bench", "uniforget", "--suite", "plantd"], ["unknown suite", "planted"]),
        (["bench", "uniforget", "--model", "mini-ds"], ["unknown model", "mini-sd"]),
        (["bench", "uniforget", "--strength", "stong"], ["no strength", "strong"]),
        (["bench", "uniforget", "--set", "betta=1"], ["betta", "beta"]),
        (["bench", "uniforget", "--set", "beta"], ["KEY=VALUE"]),
        (["bench", "uniforget", "--engine", "slurm"], ["unknown engine", "local"]),
        (["bench", "uniforget", "--dtype", "int8"], ["unknown dtype", "float32"]),
        (["bench", "./nowhere.py:Method"], ["not found", "nowhere.py"]),
        (["bench"], ["method"]),
        (["list", "method"], ["can't list", "methods"]),
        (["info", "metric", "fbmen"], ["unknown metric", "fbmem"]),
        (["leaderboard", "--runs", "no-such-folder"], ["no results"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    _one_line(lethe(*arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir()), "nothing is written before the request is understood"


def test_a_plugin_that_fails_to_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import torch_but_misspelt\n")
    _one_line(lethe("bench", "./bad.py:Method", cwd=tmp_path), "bad.py", "torch_but_misspelt")


def test_damaged_weights_are_found_before_any_work(
    tmp_path: Path, tiny_model: Path, tiny_suite: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    record = {str(weights.relative_to(folder)): file_sha256(weights)}
    (folder / "weights.json").write_text(json.dumps(record))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = lethe("bench", "base", "--suite", tiny_suite, "--model", folder, "--runs", tmp_path / "runs")
    _one_line(done, "damaged", "diffusion_pytorch_model.safetensors")
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_written_is_refused(tmp_path: Path, tiny_suite: Path) -> None:
    (tmp_path / "file").write_text("")
    done = lethe("bench", "base", "--suite", tiny_suite, "--runs", tmp_path / "file" / "runs")
    _one_line(done, "can't write", "--runs")


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path: Path, tiny_suite: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs can't be mounted here: {mounted.stderr.strip()}")
    try:
        done = lethe("bench", "base", "--suite", tiny_suite, "--runs", disk / "runs")
        _one_line(done, "full", "free some space")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = lethe(
            "bench", "base", "--suite", tiny_suite, "--runs", disk / "runs", "--site", tmp_path / "site"
        )
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("what", ["methods", "metrics", "prompt-sets", "models", "suites"])
def test_list_answers_for_people_and_programs(what: str) -> None:
    text, data = lethe("list", what), lethe("list", what, "--json")
    assert text.returncode == data.returncode == 0
    for entry in json.loads(data.stdout):
        assert entry["name"] in text.stdout
        assert entry["summary"] in text.stdout


def test_list_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from lethebench import listing\n"
        "for what in (*listing.REGISTRIES, 'suites'):\n"
        "    listing.entries(what)\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'sklearn', 'scipy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("what", "name", "words"),
    [
        ("method", "uniforget", ["beta", "neutral-prompts", "weak"]),
        ("metric", "fbmem", ["fbmem.vm", "version"]),
        ("prompt-set", "planted", ["trigger", "verbatim", "128"]),
        ("model", "mini-sd", ["sd"]),
        ("suite", "planted", ["num_inference_steps"]),
    ],
)
def test_info_shows_one_thing(what: str, name: str, words: list[str]) -> None:
    text, data = lethe("info", what, name), lethe("info", what, name, "--json")
    assert text.returncode == data.returncode == 0, text.stderr
    json.loads(data.stdout)
    for word in words:
        assert word in text.stdout


def test_info_shows_what_is_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("Caption,type\na cat,VM\na dog,none\n")
    spec = "name: mine\nfile: own.csv\ncolumns: {prompt: Caption, label: type}\nlabels: {VM: trigger, none: control}\n"
    (tmp_path / "own.yaml").write_text(spec)
    done = lethe("info", "prompt-set", tmp_path / "own.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["name"], found["manifest"]["rows"]) == ("mine", {"read": 2})
    assert {row["role"]: row["prompts"] for row in found["counts"]} == {"trigger": 1, "control": 1}
    (tmp_path / "own.csv").write_text("Caption,type\na cat,XX\n")
    _one_line(
        lethe("info", "prompt-set", tmp_path / "own.yaml"), "line 2 has the label 'XX'", "known are VM, none"
    )


def test_info_shows_a_model_in_a_folder() -> None:
    done = lethe("info", "model", SHIPPED / "mini-flux", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "flux"


def test_a_contact_sheet_is_written(tmp_path: Path) -> None:
    done = lethe("info", "prompt-set", "planted", "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_doctor_says_what_it_found(tmp_path: Path) -> None:
    done = lethe("doctor", "mini-sd", "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    bad = lethe("doctor", "mini-sd", "--runs", "/proc/runs")
    assert bad.returncode == 1
    assert "PROBLEM" in bad.stdout


def test_alone_it_shows_its_commands_and_it_tells_its_version() -> None:
    alone, helped, version = lethe(), lethe("--help"), lethe("--version")
    assert alone.returncode == helped.returncode == version.returncode == 0
    assert "bench" in alone.stdout and alone.stdout.split() == helped.stdout.split()
    assert version.stdout.strip() == f"lethe {metadata.version('lethebench')}"


@pytest.mark.parametrize(
    "command", ["bench", "list", "info", "check", "fit", "generate", "score", "train", "doctor", "metrics"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = lethe(command, "--help")
    assert done.returncode == 0
    assert "Example: lethe" in done.stdout
