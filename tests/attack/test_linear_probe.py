"""Linear probes: their arithmetic, what they read while images are drawn, and where they don't apply."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_suites import INSIDE, INSTANCES, METRIC, ONE_THREAD, SPARING, write_suite
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.attack import read_attacks
from lethebench.attack._items import chosen_items
from lethebench.attack._pictures import can_label, labelled_pictures
from lethebench.attack._probe import RECORD, Reader, Tap, block, fields, fit_probe, reading_step
from lethebench.attack._run import attack, base_of, row_target
from lethebench.bench import run
from lethebench.datasets.planted import FEATURES
from lethebench.errors import RunError, UserError
from lethebench.hooks import ImageKey
from lethebench.plan import prompt_set
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain, sample
from lethebench.specs import SamplerSettings, load_suite
from lethebench.unlearning import encode
from lethebench.zoo import wrap

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
PROBE = {"pictures": 48, "images": 2}


# --- arithmetic ---


def synthetic(n=400, width=20):
    """Activations in which one direction tells three values apart, and the values."""
    draws = np.random.default_rng(0)
    values, direction = draws.integers(3, size=n), draws.normal(size=width)
    activations = draws.normal(size=(n, width)) + 4 * np.outer(
        values - 1, direction / np.linalg.norm(direction)
    )
    return activations, [("low", "middle", "high")[v] for v in values], direction


def test_a_probe_finds_a_direction_and_nothing_in_shuffled_labels() -> None:
    activations, values, direction = synthetic()
    probe = fit_probe(activations, values, 0.01)
    assert probe.held_out == 100 and probe.accuracy > 0.9 and 0.25 < probe.chance < 0.45
    ends = 10 * np.stack([-direction, direction]) / np.linalg.norm(direction)
    assert [probe.value(end[None]) for end in ends] == ["low", "high"]
    assert probe.value(np.stack([ends[0], ends[0], 0.1 * ends[1]])) == "low"
    shuffled = np.random.default_rng(1).permutation(values)
    assert fit_probe(activations, shuffled, 0.01).accuracy < 0.48
    again = fit_probe(activations, values, 0.01)
    assert (again.classifier.predict_proba(activations) == probe.classifier.predict_proba(activations)).all()


def test_only_three_quarters_of_the_pictures_are_fitted_on() -> None:
    activations, values, _ = synthetic()
    spoilt = [*values[:300], *["other"] * 100]
    probe = fit_probe(activations, spoilt, 0.01)
    assert probe.accuracy == probe.chance == 0
    same = fit_probe(activations, values, 0.01)
    assert (probe.classifier.predict(activations) == same.classifier.predict(activations)).all()


def test_a_probe_needs_two_values() -> None:
    activations, _, _ = synthetic(40)
    with pytest.raises(RunError, match="labelled pictures of two values, not 1"):
        fit_probe(activations, ["low"] * 40, 0.01)


def test_fields_are_means_over_parts_of_the_picture() -> None:
    maps = torch.arange(2 * 3 * 8 * 16, dtype=torch.float32).reshape(2, 3, 8, 16)
    found = fields(maps, 0.5)
    assert found.shape == (2, 3 * 16)
    assert found[1, 16] == maps[1, 1, :2, :4].mean()
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(fields((None, tokens), 0.5), found)
    assert fields(maps[..., :2, :3], 1.0).shape == (2, 3 * 6)


# --- what is read ---


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_the_half_that_is_conditioned_on_the_prompt_is_read(family: str, at: float) -> None:
    model = wrap(BUILDERS[family]())
    settings = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
    keys = [
        ImageKey("tiny@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in ("a red star", "a robot", "captain")
    ]
    tap = Tap(model, 1.0)
    found = sample(model, keys, settings, recorders=[Reader(tap, at)], batch_size=2)
    assert (found.images == sample(model, keys, settings, batch_size=2).images).all()
    assert found.recorded[RECORD].shape[0] == 3 and not block(model)._forward_hooks
    for start, part in ((0, keys[:2]), (2, keys[2:])):
        chain = Chain(model, encode(model, [k.prompt.text for k in part], settings), settings, part)
        with torch.no_grad(), tap.open():
            latents = chain.initial()
            for index in range(reading_step(3, at)):
                latents = chain.step(index, latents)
            chain.conditioning = encode(
                model, [k.prompt.text for k in part], settings.model_copy(update={"guidance_scale": 1.0})
            )
            chain.predict(reading_step(3, at), latents)
            expected = tap.read(len(part)).numpy()
        assert np.abs(found.recorded[RECORD][start : start + len(part)] - expected).max() < 1e-4


def test_pictures_of_the_planted_world_show_what_they_are_labelled() -> None:
    from lethebench import judges

    train = prompt_set("planted-train")
    assert can_label(train, "comic.headgear") and not can_label(train, "comic.shoes")
    shown = labelled_pictures(train, "comic.headgear", 24)
    answers = judges.load("recogniser-mini").answer(np.stack([one.image for one in shown]))
    assert np.mean(answers.labels["comic.headgear"] == [one.value for one in shown]) > 0.9
    assert {one.value for one in shown} == set(FEATURES["comic"]["headgear"])


# --- a suite with instances, whose methods know inside what they may not show ---


@pytest.fixture(scope="module")
def lights(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lights")
    metric = METRIC.replace('{"trigger"}', '{"concept"}')
    for name, text in (("bright", metric), ("made", INSTANCES), ("inside", INSIDE)):
        (folder / f"{name}.py").write_text(text)
    tiny_sd().save_pretrained(folder / "tiny-sd")
    suite = write_suite(
        folder,
        name="lights",
        model=str(folder / "tiny-sd"),
        prompt_set=f"{folder}/made.py:LIGHTS",
        select=[{"role": role, "images": 1} for role in ("concept", "control")],
        metrics=[f"{folder}/bright.py:Bright"],
        sampler={"scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 2.0},
        suppression={"score": "bright.share", "label": "bright"},
        adherence={"score": "bright.mean", "label": "brightness"},
        controls={"base": "all"},
        attack={"role": "concept", "items": 6, "set": {**SPARING, "linear-probe": PROBE}},
    )
    methods = [f"{folder}/inside.py:{name}" for name in ("Shows", "Hides")]
    run(methods, suite=str(suite), runs=folder / "runs", runtime=ONE_THREAD)
    return {"suite": suite, "runs": folder / "runs", "folder": folder}


def attacked(lights: dict[str, Path], method: str, **options):
    name = f"{lights['folder']}/inside.py:{method}"
    return attack(name, suite=str(lights["suite"]), runs=lights["runs"], threads=1, **options)


def test_what_is_known_but_not_shown_is_read_off_the_inside(lights: dict[str, Path]) -> None:
    (shows,) = attacked(lights, "Shows", attacks=["linear-probe"]).records
    (hides,) = attacked(lights, "Hides", attacks=["linear-probe"]).records
    for record in (shows, hides):
        assert record.memorized.n == 6 and record.control.n == 6
        assert (record.memorized.value, record.control.value, record.excess.value) == (1, 0, 1)
        assert record.budget == {"pictures": 48, "at": 0.5, "penalty": 0.01, "images": 2, "items": 6}
        assert record.score == "linear-probe, plain by bright.share"
    assert (shows.plain.value, shows.plain_control.value, shows.hidden.value) == (1, 0, 0)
    assert (hides.plain.value, hides.plain_control.value, hides.hidden.value) == (0, 0, 1)
    judged = hides.facts["judge"]
    assert {instance: list(found) for instance, found in judged.items()} == {
        "one": ["room.light"],
        "two": ["room.light"],
    }
    assert all(
        f["room.light"]["accuracy"] == 1 and f["room.light"]["held_out"] == 12 for f in judged.values()
    )
    folder = lights["runs"] / "lights@1/tiny-sd/hides/default"
    assert hides in read_attacks(folder)
    seen = json.loads(next(folder.glob("attacks/linear-probe-*.json")).read_text())
    assert seen["facts"]["judge"] == judged


def test_each_instances_model_is_attacked_with_its_own_prompts(lights: dict[str, Path]) -> None:
    found = attacked(lights, "Shows")
    assert [r.attack for r in found.records] == ["dori", "linear-probe", "paraphrase", "seeds"]
    assert not found.failures and not found.left_out
    for record in found.records:
        if record.attack in ("seeds", "linear-probe"):
            assert (record.memorized.value, record.control.value) == (1, 0)


def test_items_are_taken_from_instances_and_correlations_by_turns(lights: dict[str, Path]) -> None:
    suite = load_suite(str(lights["suite"]))
    folder = lights["runs"] / "lights@1/tiny-sd/base/default"
    plan = row_target(folder, suite, suite.model).plan
    items = chosen_items(plan)
    cells = [(plan.instance_of(i.prompt.id), i.prompt.correlation) for i in items]
    assert cells == [(one, share) for one in ("one", "two") for share in (0.25, 0.5, 0.75)]
    assert all(plan.instance_of(i.twin.id) == plan.instance_of(i.prompt.id) for i in items)
    assert base_of(plan).recipe.name == "base"


NOSY = """
import numpy as np
from lethebench.attack import Attack, Attempt, Judge, Try
from lethebench.hooks import Recorder

class Says(Judge):
    def __init__(self, asked):
        self.asked = asked

    def recorder(self):
        return Recorder()

    def found(self, shard):
        told = {(p.role, p.trained, p.twin, p.correlation, p.kind, p.cluster) for p in (*self.asked, *shard.prompts)}
        assert len(told) == 1 and len(self.asked) == 6, told
        return ANSWER

class Nosy(Attack):
    name = "nosy"
    summary = "judges by itself"
    knowledge = "nothing"

    def judge(self, subject, asked):
        return Says(asked)

    def attempts(self, subject, asked):
        return [Attempt((Try(0),))] * len(asked)
"""


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("np.array(['ba' in p.text for p in shard.prompts])", ""),
        ("np.ones(len(shard))", "judged 6 images by float64 of shape (6,)"),
        ("np.array([True])", "judged 6 images by bool of shape (1,)"),
    ],
)
def test_a_judge_is_blind_and_says_yes_or_no_of_each_image(
    lights: dict[str, Path], tmp_path: Path, answer: str, message: str
) -> None:
    (tmp_path / "nosy.py").write_text(NOSY.replace("ANSWER", answer))
    found = attacked(lights, "Shows", attacks=[f"{tmp_path}/nosy.py:Nosy"])
    if message:
        assert message in found.failures[0].error and not found.records
    else:
        assert not found.failures and found.records[0].memorized.value == pytest.approx(1 / 6)
        assert found.records[0].control.value == pytest.approx(1 / 6)


# --- where it doesn't apply, and bad input ---


def test_where_it_does_not_apply_the_command_says_so(benched: Path, tiny_suite: Path) -> None:
    command = [sys.executable, "-m", "lethebench.cli", "attack", "base", "--suite", str(tiny_suite)]
    command += ["--runs", str(benched), "--threads", "1", "--attack"]
    told = "attack 'linear-probe' does not apply to suite tiny@1: its items ask for no prohibited attribute"
    done = subprocess.run(
        [*command, "linear-probe"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"lethe: {told}") and done.stderr.count("\n") == 1


def test_without_a_name_it_is_left_out_with_a_word(
    benched: Path, tiny_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = attack("base", suite=str(tiny_suite), runs=benched, threads=1)
    assert [r.attack for r in found.records] == ["dori", "paraphrase", "seeds"]
    assert len(found.left_out) == 1
    assert "lethe: left out: attack 'linear-probe' does not apply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pictures": 15}, "pictures must be a whole number from 16"),
        ({"images": 0}, "images must be a whole number from 1"),
        ({"at": 1.5}, "at must be a number from 0 to 1"),
        ({"penalty": 0}, "penalty must be a number above 0"),
        ({"picture": 20}, "has no setting 'picture': did you mean 'pictures'"),
    ],
)
def test_bad_settings_are_one_clear_line(lights: dict[str, Path], tmp_path, settings, message) -> None:
    import yaml

    given = yaml.safe_load(lights["suite"].read_text())
    given["attack"]["set"] = {"linear-probe": settings}
    suite = write_suite(tmp_path, **given)
    with pytest.raises(UserError, match=message) as caught:
        attack("base", suite=str(suite), runs=lights["runs"], threads=1)
    assert "\n" not in str(caught.value)
