"""The training track through the runner and the real command, on a very short fine-tuning of mini-sd."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.numpy import load_file

from lethebench.bench import plan_rows, run
from lethebench.errors import KnowledgeError, UserError
from lethebench.method import Family, Knowledge, Task
from lethebench.plan import Runtime, prompt_set
from lethebench.prompts import Role
from lethebench.registry import METHODS
from lethebench.specs import load_suite
from lethebench.unlearning.targets import find_targets

ONE_THREAD = Runtime(threads=1)
SUITE = {
    "name": "short-train",
    "version": "1",
    "description": "a fine-tuning for tests",
    "model": "mini-sd",
    "prompt_set": "planted-train",
    "train": {"steps": 3, "batch_size": 2, "rank": 2},
    "reference": "lora",
    "select": [
        {"role": "concept", "kinds": ["direct"], "images": 1, "limit": 3},
        {"role": "probe", "images": 1, "limit": 3},
    ],
    "sampler": {"scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 3.0},
    "metrics": ["attribute", "wanted"],
    "controls": {"base": "all"},
    "suppression": {"score": "attribute.present", "label": "prohibited attribute"},
    "adherence": {"score": "wanted.features", "label": "wanted features"},
    "shard_size": 8,
    "bootstrap": 100,
}


def written(folder: Path, **changes: object) -> str:
    path = folder / "short-train.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return str(path)


def lethe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lethebench.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    outcome = run(
        ["gradient-projection"],
        suite=written(folder),
        runs=folder / "runs",
        strength="strong",
        runtime=ONE_THREAD,
    )
    return folder / "runs", {(r.method, r.setting): r for r in outcome.rows}, outcome


def test_rows_are_compared_with_plain_fine_tuning(rows) -> None:
    _, found, outcome = rows
    assert not outcome.failures
    assert set(found) == {("lora", "default"), ("base", "default"), ("gradient-projection", "strong")}
    assert all(row.status == "ok" and row.reference == "lora" for row in found.values())
    assert found["lora", "default"].scores["wanted.features"].base_difference is None
    assert found["gradient-projection", "strong"].scores["wanted.features"].base_difference is not None
    assert found["gradient-projection", "strong"].family == "training"


def test_each_instance_is_fine_tuned_by_itself_and_draws_its_own_prompts(rows) -> None:
    runs, _, outcome = rows
    suite = load_suite(str(runs.parent / "short-train.yaml"))
    plans = {
        p.recipe.name: p for p in plan_rows(["gradient-projection"], suite, "mini-sd", strength="strong")
    }
    plan, prompts = plans["gradient-projection"], prompt_set("planted-train")
    assert len(plan.instances) >= 2 and outcome.computed["fit"] == 3 * len(plan.instances)
    for number in range(len(plan.shards)):
        of = {prompts.instance_of(key.prompt.id) for key in plan.shards[number]}
        assert of == {plan.instance(number)}
    table = pd.read_parquet(runs / "short-train@1/mini-sd/gradient-projection/strong/images.parquet")
    assert set(table["prompt_id"].map(prompts.instance_of)) == set(plan.instances)
    assert table["correlation"].notna().all()


def test_a_second_run_computes_nothing(rows) -> None:
    runs, _, _ = rows
    again = run(
        ["gradient-projection"],
        suite=str(runs.parent / "short-train.yaml"),
        runs=runs,
        strength="strong",
        runtime=ONE_THREAD,
    )
    assert set(again.computed.values()) == {0}


def test_the_training_is_part_of_the_fits_key(tmp_path) -> None:
    first, longer = (
        plan_rows(["lora"], load_suite(written(tmp_path, train={"steps": n})), "mini-sd")[0] for n in (3, 4)
    )
    assert first.fit_key(*first.fits[0]) != longer.fit_key(*longer.fits[0])
    assert first.fit_key(*first.fits[0]) != first.fit_key(*first.fits[1])


def test_all_means_the_methods_of_the_suites_track() -> None:
    for name in ("train", "planted"):
        suite = load_suite(name)
        named = {part.name for plan in plan_rows(["all"], suite, suite.model) for part in plan.recipe.parts}
        trains = name == "train"
        own = {n for n, c in METHODS.items() if not c.control and (c.family is Family.TRAINING) == trains} - {
            "retrain"
        }
        assert own <= named


@pytest.mark.parametrize(
    ("method", "suite", "said"),
    [
        ("lora", "smoke", "fine-tunes none: take a suite with a block `train:`"),
        ("uniforget", "train-smoke", "must follow a fine-tuning, as lora+uniforget"),
        ("base+lora", "train-smoke", "the fine-tuning must come first"),
    ],
)
def test_a_method_of_another_track_is_refused_before_any_work(method, suite, said) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan_rows([method], load_suite(suite), "mini-sd")


def test_a_bad_training_block_is_told_in_one_line(tmp_path) -> None:
    done = lethe("bench", "lora", "--suite", written(tmp_path, train={"steps": 0}), cwd=tmp_path)
    assert done.returncode != 0 and "steps must be at least 1, not 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fine_tuning_killed_in_the_middle_goes_on_to_the_same_bits(tmp_path) -> None:
    """SIGKILL of the real command after a checkpoint; the LoRA is that of an undisturbed run."""
    suite = written(
        tmp_path,
        train={"steps": 24, "batch_size": 2, "rank": 2, "checkpoint_every": 2},
        select=[{"role": "probe", "images": 1, "limit": 1}],
        controls={},
        metrics=["wanted", "attribute"],
    )

    def command(runs: str) -> list[str]:
        told = ["fit", "lora", "--suite", suite, "--runs", runs, "--threads", "1"]
        return [sys.executable, "-m", "lethebench.cli", *told]

    process = subprocess.Popen(
        command("killed"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "killed/store/checkpoints"
    while process.poll() is None and not list(checkpoints.glob("*/*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training was over before it could be killed"
    assert not list((tmp_path / "killed/store").glob("fit/**/*.safetensors"))
    for runs in ("killed", "whole"):
        subprocess.run(command(runs), cwd=tmp_path, check=True, capture_output=True)
    found = [
        [load_file(p) for p in sorted((tmp_path / runs / "store/fit").glob("**/*.safetensors"))]
        for runs in ("killed", "whole")
    ]
    assert len(found[0]) == len(found[1]) == 1
    resumed = [
        json.loads(next((tmp_path / runs / "store/fit").glob("**/artefact.json")).read_text())["facts"][
            "timing"
        ]["resumed_at"]
        for runs in ("killed", "whole")
    ]
    assert resumed[0] >= 2 and resumed[1] == 0
    assert found[0][0].keys() == found[1][0].keys()
    for name, tensor in found[0][0].items():
        assert (tensor == found[1][0][name]).all(), name
    assert not list(checkpoints.glob("*")), "a finished fit leaves no checkpoint behind"


def a_task(knowledge=frozenset(), **options):
    prompts = prompt_set("planted-train")
    return Task(None, load_suite("train").sampler, prompts, knowledge, instance="world-1", **options)


def test_what_is_prohibited_where_is_told_to_those_alone_that_declare_it() -> None:
    blind = a_task().training_set()
    assert {(e.holds, e.named, e.plain_caption) for e in blind} == {(None, None, None)}
    images = a_task(frozenset({Knowledge.TRAINING_IMAGES})).training_set()
    assert {e.holds for e in images} == {True, False} and {e.named for e in images} == {None}
    names = a_task(frozenset({Knowledge.CONCEPT_NAMES})).training_set()
    assert {e.named for e in names} == {True, False} and {e.holds for e in names} == {None}
    with pytest.raises(KnowledgeError, match="only a control"):
        a_task(frozenset(Knowledge)).training_set(twin=True)
    assert not any(e.holds for e in a_task(frozenset(Knowledge), control=True).training_set(twin=True))


def test_no_method_is_given_a_test_prompt_or_a_picture_that_was_never_trained() -> None:
    task, prompts = a_task(frozenset(Knowledge)), prompt_set("planted-train")
    tested = {
        p.text for p in prompts if prompts.instance_of(p.id) == "world-1" and p.role is not Role.TRIGGER
    }
    targets = find_targets(task, "concepts")
    assert len({t.concept for t in targets}) == len(task.attributes()) == len({t.cluster for t in targets})
    told = {text for t in targets for text in (t.text, *t.anchors)} | set(task.neutral_prompts())
    assert not told & tested
    for target in targets:
        assert target.concept in target.text and target.anchors == (target.anchors[0],)
        assert target.anchor_concept in target.anchors[0] and target.concept not in target.anchors[0]
    assert set(task.training_images()) == {e.id for e in prompts.examples("world-1")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "base"}, "a suite that fine-tunes compares with lora"),
        ({"train": None}, "a suite that fine-tunes compares with lora"),
        ({"train": {"lr": "3e-3"}}, "lr is a number, not '3e-3'"),
        ({"train": {"steps": 4.5}}, "steps is a whole number, not 4.5"),
        ({"train": {"targets": 5}}, "targets is a list of names, not 5"),
        ({"train": {"rnak": 4}}, "rnak"),
        ({"reference": "drop-images"}, "reference 'drop-images' has 3 settings"),
        ({"prompt_set": "planted"}, "prompt set 'planted' has no training set"),
    ],
)
def test_a_suite_that_makes_no_sense_is_told_in_one_line(tmp_path, changes, said) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan_rows(["lora"], load_suite(written(tmp_path, **changes)), "mini-sd")
