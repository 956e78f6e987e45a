"""Retraining after an edit: what was removed stays removed, and the edited model comes nearer to the base."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from tiny_pipelines import tiny_sd

import lethebench
from lethebench.composition import Recipe, recipes
from lethebench.errors import UserError
from lethebench.export import export
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Task
from lethebench.methods.oracle import Oracle
from lethebench.methods.random_pruning import RandomPruning
from lethebench.methods.random_tokens import RandomTokens
from lethebench.methods.retrain import Retrain
from lethebench.methods.retrain.fit import removed_entries
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning import applied
from lethebench.zoo import load_model, wrap

SUITES = Path(lethebench.__file__).parent / "suites"

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
KEYS = [ImageKey("test@1", Prompt("p", "a red star", Role.NEUTRAL, "p"), k) for k in range(2)]
PRUNING = RandomPruning(ffn=0.4, norm=0.2, residual=0.2)


class Neutral:
    def training_prompts(self):
        return [f"a {c} {t} in a night city" for c in ("red", "blue") for t in ("star", "circle", "robot")]


def task(model, method, base=None):
    return Task(model, SETTINGS, Neutral(), method.knowledge, seed_parts=("t",), base=base and (lambda: base))


def recipe(*parts):
    return Recipe(tuple(p.name for p in parts), ("x",) * len(parts), parts, "x", {})


def latents(model, hooks=()):
    return torch.from_numpy(sample(model, KEYS, SETTINGS, hooks).latents)


@pytest.fixture
def retrained(make_model):
    model, base = make_model("sd"), make_model("sd")
    pruned = PRUNING.fit(task(model, PRUNING))
    method = Retrain(steps=60, lr=1e-3, batch_size=3, dtype="float32")
    with PRUNING.apply(model, pruned):
        artefact = method.fit(task(model, method, base))
    return model, base, method, [pruned, artefact]


def test_removed_parts_stay_removed_and_predictions_are_met_better(retrained):
    model, base, method, (pruned, artefact) = retrained
    assert all(map(torch.equal, model.denoiser.parameters(), base.denoiser.parameters()))
    with PRUNING.apply(model, pruned):
        removed = removed_entries(model.denoiser, base.denoiser)
        before = latents(model)
        with method.apply(model, artefact):
            after = latents(model)
            assert removed and all(
                not bool(model.denoiser.get_parameter(n)[e].any()) for n, e in removed.items()
            )
    wanted = latents(base)
    assert (after - wanted).pow(2).mean() < 0.8 * (before - wanted).pow(2).mean()
    errors = [point["error"] for point in artefact.facts["retraining"]["curve"]]
    assert sum(errors[-3:]) < 0.8 * sum(errors[:3])
    dead = sum(int(e.sum()) for e in removed.values()) / sum(p.numel() for p in model.denoiser.parameters())
    assert artefact.facts["retraining"]["kept_removed"] == pytest.approx(dead)


def test_an_unchanged_model_has_nothing_to_learn(make_model):
    model = make_model("sd")
    artefact = Retrain(steps=3, batch_size=2, dtype="float32").fit(task(model, Retrain(), make_model("sd")))
    assert artefact.facts["retraining"]["curve"][0]["error"] < 1e-12
    assert artefact.facts["retraining"]["kept_removed"] == 0


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_every_family(make_model, name):
    model, base = make_model(name), make_model(name)
    pruning = RandomPruning(ffn=0.3)
    pruned = pruning.fit(task(model, pruning))
    method = Retrain(steps=2, batch_size=2, prompts=2)
    with pruning.apply(model, pruned):
        artefact = method.fit(task(model, method, base))
    assert any(bool(change.any()) for change in artefact.tensors.values())


def test_means_something_only_after_others():
    with pytest.raises(UserError, match=r"uniforget\+retrain"):
        recipes("retrain")
    found = recipes("uniforget+retrain")
    assert [r.setting for r in found] == ["weak+short", "medium", "strong+long"]
    assert [r.name for r in found] == ["uniforget+retrain"] * 3


def test_exported_folder_is_the_mitigated_model(retrained, tmp_path):
    """Physically smaller, with the retrained weights, and loaded by name like any model."""
    model, base, method, artefacts = retrained
    both = recipe(PRUNING, method)
    with both.apply(model, artefacts):
        expected = latents(model)
    again = load_model(str(export(model, both, artefacts, tmp_path / "smaller")))
    assert torch.allclose(latents(again), expected, atol=1e-4)
    assert torch.equal(latents(model), latents(base))
    sizes = [sum(p.numel() for p in m.denoiser.parameters()) for m in (again, model)]
    assert sizes[0] < sizes[1] and again.entry.sampler == model.entry.sampler
    with pytest.raises(UserError, match="not an empty folder"):
        export(model, both, artefacts, tmp_path / "smaller")


def test_an_edit_without_masks_is_exported_for_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    model, method = wrap(tiny_sd()), Retrain()
    name = next(n for n, _ in model.denoiser.named_parameters())
    change = torch.ones_like(model.denoiser.get_parameter(name))
    artefact = Artefact({f"edit.denoiser.{name}": change})
    export(model, recipe(method), [artefact], tmp_path / "edited")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "edited").unet.get_parameter(name)
    assert torch.allclose(again, model.denoiser.get_parameter(name) + 1)


class Revive(Retrain):
    """Adds to every weight, removed ones too."""

    @contextmanager
    def apply(self, model, artefact):
        names = [n for n, _ in model.denoiser.named_parameters()]
        changes = {
            f"edit.denoiser.{n}": torch.full_like(model.denoiser.get_parameter(n), 1e-3) for n in names
        }
        with applied(model, changes):
            yield SamplerHooks()


def test_what_a_later_part_gave_weights_again_is_not_removed(make_model, tmp_path):
    model = make_model("sd")
    both, artefacts = recipe(PRUNING, Revive()), [PRUNING.fit(task(model, PRUNING)), Artefact()]
    with both.apply(model, artefacts):
        expected = latents(model)
    again = load_model(str(export(model, both, artefacts, tmp_path / "revived")))
    assert torch.allclose(latents(again), expected, atol=1e-4)


class Hooked(Retrain):
    """Acts by a module hook: nothing of it is in the weights."""

    @contextmanager
    def apply(self, model, artefact):
        with model.denoiser.register_forward_hook(lambda m, i, o: o):
            yield SamplerHooks()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (RandomTokens(), "random-tokens doesn't change the weights"),
        (Oracle(), "oracle doesn't change the weights"),
        (Hooked(), "acts while sampling"),
    ],
)
def test_what_is_not_in_the_weights_is_not_exported(tmp_path, method, message):
    with pytest.raises(UserError, match=message):
        export(wrap(tiny_sd()), recipe(method), [Artefact()], tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        export(wrap(tiny_sd()), recipe(PRUNING), [Artefact()], tmp_path / "file")


def test_the_documented_command(tmp_path):
    """As the README has it, on a small suite: ``lethe export`` of a composition, and what it refuses."""
    suite = tmp_path / "small.yaml"
    quick = {"uniforget": {"steps": 2, "prompts": 4, "batch_size": 2, "chain_steps": 2}}
    given = yaml.safe_load((SUITES / "smoke.yaml").read_text())
    suite.write_text(yaml.safe_dump({**given, "fit": {**quick, "retrain": {"steps": 2, "batch_size": 2}}}))
    options = ["--suite", str(suite), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "model")]

    def lethe(*arguments):
        command = [sys.executable, "-m", "lethebench.cli", "export", *arguments, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = lethe("uniforget+retrain", "--strength", "strong+long")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "model"), done.stderr
    record = json.loads((tmp_path / "model" / "mitigation.json").read_text())
    assert (record["method"], record["setting"]) == ("uniforget+retrain", "strong+long")
    assert load_model(str(tmp_path / "model")).denoiser is not None
    for arguments, message in (
        (("uniforget+retrain", "--strength", "strong+long"), "not an empty folder"),
        (("uniforget", "--strength", "all"), "name one strength"),
        (("uniforget", "--strength", "huge"), "no strength 'huge'"),
    ):
        wrong = lethe(*arguments)
        assert wrong.returncode == 2 and message in wrong.stderr and wrong.stderr.count("\n") == 1
