"""ESD: the target, the groups, the two algorithms, what they do, and the released code's numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.method import Knowledge, Task, configure
from lethebench.methods.esd import ESD
from lethebench.methods.esd.chains import Point, random_steps, rounds, sample_points, sampling_settings
from lethebench.methods.esd.fit import Eraser, Erasure, erasing_target, erasures, shuffled
from lethebench.methods.esd.recipe import recipe, trained_parameters
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain
from lethebench.specs import SamplerSettings
from lethebench.unlearning import (
    EDIT,
    Target,
    applied,
    editable,
    encode,
    find_targets,
    prediction,
    training_target,
    working_model,
)
from lethebench.unlearning.finetune import Optimiser, finetune
from lethebench.zoo import wrap

DATA = Path(__file__).parent / "data"
SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=3.0, height=16, width=16)
BUILDERS = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
}
ERASED, OTHER = "robot captain, a red star in a night city", "striped blue circle"


class World:
    """A memorized caption and a concept."""

    name = "world"

    def __iter__(self):
        yield Prompt("t", ERASED, Role.TRIGGER, "item")
        yield Prompt("c", "captain in a forest", Role.CONCEPT, "captain", concept="captain")
        yield Prompt("d", "captain in a city", Role.CONCEPT, "captain", concept="captain")

    def paraphrases(self, prompt_id):
        found = {"t": "a red star in a night city", "c": "a robot in a forest", "d": "a robot in a city"}
        return [found[prompt_id]]

    def anchor_concept(self, concept):
        return "a robot"


def task_for(method, model=None):
    return Task(model or wrap(tiny_sd()), SETTINGS, World(), method.sees, seed_parts=("test",))


def quick(**settings):
    given = {"steps": 3, "batch_size": 2, "chain_steps": 3, "lr": 1e-3, "targets": "triggers", **settings}
    return ESD(**given)


def change_of(model, artefact, text):
    """How far the prediction for a text moves, at fixed latents."""
    draws = torch.Generator().manual_seed(5)
    latents = torch.randn(4, 4, 8, 8, generator=draws)
    times = torch.tensor([100, 400, 700, 950])
    asked = encode(model, [text] * 4, SETTINGS)
    with torch.no_grad():
        before = prediction(model, latents, times, asked, SETTINGS)
        with applied(model, artefact.tensors):
            after = prediction(model, latents, times, asked, SETTINGS)
        null = prediction(model, latents, times, encode(model, [""] * 4, SETTINGS), SETTINGS)
    return before, after, null


# --- the target -----------------------------------------------------------------------------------


def predictions(count):
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 8, 8, generator=draws, dtype=torch.float64) for _ in range(count)]


def test_the_target_is_the_papers() -> None:
    erased, null, start = predictions(3)
    for eta in (0.5, 1.0, 3.0):
        by_hand = torch.empty_like(null)
        for i in range(null.numel()):
            n, c = null.view(-1)[i].item(), erased.view(-1)[i].item()
            by_hand.view(-1)[i] = n - eta * (c - n)
        torch.testing.assert_close(erasing_target(erased, null, null, eta), by_hand, atol=1e-14, rtol=0)
    by_hand = start - 1.5 * erased + 1.5 * null
    torch.testing.assert_close(erasing_target(erased, null, start, 1.5), by_hand, atol=1e-14, rtol=0)


def test_two_of_the_current_is_one_of_the_original_and_one_is_no_text() -> None:
    erased, null = predictions(2)
    original, current = (erasing_target(erased, null, s, g) for s, g in ((null, 1.0), (erased, 2.0)))
    torch.testing.assert_close(original, current, atol=1e-14, rtol=0)
    torch.testing.assert_close(erasing_target(erased, null, erased, 1.0), null, atol=1e-14, rtol=0)


def test_v_prediction_has_the_same_target() -> None:
    """The target in v, made from epsilons, is the v of the target in epsilon."""
    model = wrap(tiny_sd(prediction_type="v_prediction"))
    latents, erased, null = (x.float() for x in predictions(3))
    times = torch.tensor([200, 800])
    kept = model.pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)

    def velocity(noise):
        clean = (latents - (1 - kept).sqrt() * noise) / kept.sqrt()
        return training_target(model, clean, noise, times)

    wanted = velocity(erasing_target(erased, null, null, 1.0))
    found = erasing_target(velocity(erased), velocity(null), velocity(null), 1.0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("algorithm", ["original", "current"])
def test_the_loss_is_the_distance_from_the_target(name: str, algorithm: str) -> None:
    model = wrap(BUILDERS[name]())
    method = quick(algorithm=algorithm, negative_guidance=1.5)
    settings = sampling_settings(SETTINGS, model.family, 3, 3.0)
    eraser = Eraser(model, model, method, recipe(method, model.family), settings)
    batch = [Erasure(ERASED, ERASED), Erasure("captain", "captain")]
    asked = encode(model, [e.erased for e in batch], settings)
    point = sample_points(model, asked, settings, torch.tensor([[0], [2]]), seed=1)[0]
    chain = Chain(model, asked, settings)
    empty = asked.negative or replace(encode(model, ["", ""], settings), negative=None)
    with torch.no_grad():
        erased = prediction(model, *point, asked, settings)
        null = prediction(model, *point, empty, settings)
        start = null if algorithm == "original" else erased
        wanted = (erased - (start - 1.5 * (erased - null))).square().mean()
        torch.testing.assert_close(eraser.loss(batch, point), wanted, atol=1e-6, rtol=1e-4)
    assert point.timesteps.tolist() == [chain.timesteps[0].item(), chain.timesteps[2].item()]


def test_without_guidance_of_sdxl_the_student_learns_the_prediction_without_text() -> None:
    model = wrap(tiny_sdxl())
    values = recipe(ESD(), "sdxl")
    assert (values.negative_guidance, values.lr, values.guidance, values.steps) == (1.0, 2e-4, 2.0, 200)
    assert recipe(ESD(group="esd-u"), "sdxl").lr == 1e-5
    settings = sampling_settings(SETTINGS, "sdxl", 3, 2.0)
    eraser = Eraser(model, model, ESD(), values, settings)
    asked = encode(model, [ERASED], settings)
    assert asked.negative is not None
    point = sample_points(model, asked, settings, torch.tensor([[1]]), seed=1)[0]
    null = prediction(model, *point, asked.negative, settings)
    found = eraser.target([Erasure(ERASED, ERASED)], point)
    torch.testing.assert_close(found, null, atol=1e-6, rtol=1e-5)


# --- settings -------------------------------------------------------------------------------------


def test_what_is_left_open_follows_the_algorithm() -> None:
    original, current = recipe(ESD(algorithm="original"), "sd"), recipe(ESD(), "sd")
    assert (original.steps, original.lr, original.negative_guidance) == (1000, 1e-5, 1.0)
    assert (current.steps, current.lr, current.negative_guidance) == (200, 5e-5, 2.0)
    assert original.guidance == current.guidance == 3.0 and original.chain_steps == 50
    assert recipe(ESD(steps=7, lr=0.5, chain_steps=2), "flux").steps == 7
    flux = recipe(ESD(), "flux")
    assert (flux.steps, flux.lr, flux.guidance, flux.chain_steps) == (1400, 1e-4, 3.5, 28)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"algorithm": "new"}, "algorithm is 'original' or 'current', not 'new'"),
        ({"algorithm": "original", "group": "esd-all"}, "original algorithm is esd-x, esd-u, not 'esd-all'"),
        ({"group": "xattn"}, "not 'xattn'"),
        ({"erase_from": "name"}, "erase_from is '', 'prompt' or 'anchor'"),
        ({"algorithm": "original", "erase_from": "anchor"}, "belongs to the current algorithm"),
        ({"concept_text": "word"}, "concept_text"),
        ({"targets": "none"}, "targets is"),
        ({"points": 0}, "points must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"dtype": "int8"}, "dtype is"),
    ],
)
def test_bad_settings_are_refused(settings, words: str) -> None:
    with pytest.raises(UserError, match=words):
        configure(ESD, "weak", settings)


def test_more_points_than_steps_are_refused_before_work() -> None:
    method = quick(points=5)
    with pytest.raises(UserError, match="a chain of 3 steps has no 5 points"):
        method.fit(task_for(method))


def test_only_the_knowledge_that_is_used_is_seen() -> None:
    assert ESD(targets="triggers").sees == {Knowledge.MEMORIZED_PROMPTS}
    assert ESD(targets="concepts").sees == {Knowledge.CONCEPT_NAMES}
    assert ESD().sees == ESD.knowledge


def test_what_is_erased_from_what() -> None:
    targets = find_targets(task_for(ESD()))
    name, scene = "captain", "captain in a forest"
    assert erasures(targets, "name", "") == [Erasure(ERASED, ERASED), Erasure(name, name)]
    assert erasures(targets, "prompt", "")[1:] == [
        Erasure(t, t) for t in ("captain in a forest", "captain in a city")
    ]
    assert erasures(targets, "name", "prompt")[1] == Erasure(name, scene)
    assert erasures(targets, "name", "anchor")[1] == Erasure(name, "a robot in a forest")
    alone = Target("x", "a", (), Role.TRIGGER, "x")
    with pytest.raises(UserError, match="'a' has no anchor"):
        erasures([alone], "name", "anchor")


# --- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_points_are_those_of_the_chain(name: str) -> None:
    model = wrap(BUILDERS[name]())
    settings = sampling_settings(SETTINGS, model.family, 4, 3.0)
    asked = encode(model, [ERASED, OTHER], settings)
    steps = torch.tensor([[3, 0], [1, 2]])
    first, second = sample_points(model, asked, settings, steps, seed=3)
    chain = Chain(model, asked, settings)
    walked = [second.latents[:1]]  # row 0 at step 0: the noise itself
    alone = encode(model, [ERASED], settings)
    single = Chain(model, alone, settings)
    with torch.no_grad():
        for index in range(3):
            walked.append(single.step(index, walked[-1]))
    torch.testing.assert_close(first.latents[:1], walked[3], atol=1e-4, rtol=1e-4)
    assert first.timesteps.tolist() == chain.timesteps[[3, 1]].tolist()
    assert second.timesteps.tolist() == chain.timesteps[[0, 2]].tolist()


def test_random_steps_are_distinct_and_rounds_are_fair() -> None:
    draws = torch.Generator().manual_seed(0)
    steps = random_steps(5, 3, 20, draws)
    assert steps.shape == (20, 3) and all(len(set(row)) == 3 for row in steps.tolist())
    assert set(steps.flatten().tolist()) == set(range(5))
    batches = rounds("abcde", 2, draws)
    seen = [item for _ in range(5) for item in next(batches)]
    assert sorted(seen) == sorted("aabbccddee")


def test_batches_drawn_ahead_keep_rows_together() -> None:
    def numbered():
        for i in range(100):
            values = torch.tensor([2.0 * i, 2.0 * i + 1])
            yield [Erasure(str(int(v)), "") for v in values], Point(values.view(2, 1), values + 0.5)

    found = list(shuffled(numbered(), 3, 2, torch.Generator().manual_seed(0)))
    assert len(found) == 3
    for batch, point in found:
        assert [float(e.erased) for e in batch] == point.latents.flatten().tolist()
        torch.testing.assert_close(point.timesteps, point.latents.flatten() + 0.5)


# --- fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["original", "current"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "flux-dev"])
def test_only_the_groups_parameters_move_on_every_family(name: str, algorithm: str) -> None:
    model = wrap(BUILDERS[name]())
    for group in ("esd-x", "esd-u"):
        method = quick(algorithm=algorithm, group=group, steps=1, targets="all")
        artefact = method.fit(task_for(method, model))
        names = set(trained_parameters(model, algorithm, group))
        moved = {n.removeprefix(EDIT) for n in artefact.tensors}
        assert moved and moved <= names
        assert artefact.facts["targets"] == 3 and artefact.facts["clusters"] == 2
        assert 0 < artefact.facts["parameters_changed"] <= 1


def test_esd_x_and_esd_u_share_nothing() -> None:
    model = wrap(tiny_sd())
    for algorithm in ("original", "current"):
        x, u = (set(trained_parameters(model, algorithm, g)) for g in ("esd-x", "esd-u"))
        assert not x & u
        assert all("attn2" in n for n in x) and not any("attn2" in n for n in u)
    everything = set(trained_parameters(model, "current", "esd-all"))
    strict = set(trained_parameters(model, "current", "esd-x-strict"))
    assert everything == x | u
    assert strict < x and all(".to_k." in n or ".to_v." in n for n in strict)


def test_no_steps_are_the_identity() -> None:
    method = quick(steps=0)
    artefact = method.fit(task_for(method))
    assert artefact.tensors == {} and artefact.facts["parameters_changed"] == 0


@pytest.mark.parametrize("algorithm", ["original", "current"])
def test_the_erased_prompt_moves_towards_no_text_and_another_moves_less(algorithm: str) -> None:
    model = wrap(tiny_sd())
    method = quick(algorithm=algorithm, steps=40, lr=5e-3, points=2, group="esd-x", negative_guidance=1.0)
    if algorithm == "original":
        method = replace(method, negative_guidance=0.0)
    artefact = method.fit(task_for(method, model))
    before, after, null = change_of(model, artefact, ERASED)
    assert (after - null).norm() < 0.6 * (before - null).norm()
    unrelated_before, unrelated_after, _ = change_of(model, artefact, OTHER)
    assert (unrelated_after - unrelated_before).norm() < 0.8 * (after - before).norm()


def test_more_negative_guidance_goes_further_from_the_prompt() -> None:
    model = wrap(tiny_sd())
    shares = []
    for strength in ESD.strengths:
        method = replace(quick(steps=30, lr=6e-3, points=3), **ESD.strengths[strength])
        before, after, null = change_of(model, method.fit(task_for(method, model)), ERASED)
        away = (null - before).flatten()
        shares.append(float((after - before).flatten() @ away / (away @ away)))
    assert 0.3 < shares[0] < shares[1] < shares[2], shares


def test_the_original_samples_with_the_student_and_the_current_with_the_base(monkeypatch) -> None:
    import lethebench.methods.esd.fit as module

    sampled = []
    real = module.sample_points
    monkeypatch.setattr(module, "sample_points", lambda m, *a: sampled.append(m) or real(m, *a))
    for algorithm, own in (("original", False), ("current", True)):
        sampled.clear()
        method = quick(algorithm=algorithm)
        task = task_for(method)
        method.fit(task)
        assert len(sampled) == 3 and all((m is task.model) == own for m in sampled)


def test_the_fit_is_deterministic_and_depends_on_the_seed() -> None:
    method = quick(points=2)
    first, second = method.fit(task_for(method)), method.fit(task_for(method))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(t, second.tensors[n]) for n, t in first.tensors.items())
    other = method.fit(Task(wrap(tiny_sd()), SETTINGS, World(), method.sees, seed_parts=("other",)))
    assert any(not torch.equal(t, other.tensors[n]) for n, t in first.tensors.items())


# --- the released code ----------------------------------------------------------------------------

REFERENCE = json.loads((DATA / "esd.json").read_text())["cases"]


@pytest.mark.parametrize("case", REFERENCE, ids=lambda c: f"{c['algorithm']}-{c['group']}")
def test_losses_and_changes_are_those_of_the_released_code(case) -> None:
    """Equal x_t, t and texts; ours is float32, the reference float64 (found: losses 1e-6, changes 3e-4).

    Adam's first step is the learning rate times the gradient's sign, so entries whose gradient is rounding
    noise may differ by that much: changes are compared in norm.
    """
    key = f"{case['algorithm']}.{case['group']}"
    data = {n.removeprefix(f"{key}."): t for n, t in load_file(DATA / "esd.safetensors").items()}
    base = wrap(tiny_sd())
    student = working_model(base, torch.float32, own=True)
    method = ESD(
        algorithm=case["algorithm"], group=case["group"], negative_guidance=case["negative_guidance"]
    )
    values = recipe(method, "sd")
    assert values.lr == case["lr"]
    names = trained_parameters(base, case["algorithm"], case["group"])
    assert len(names) == case["parameters"]
    eraser = Eraser(base, student, method, values, sampling_settings(SETTINGS, "sd", 50, 3.0))
    batch = [Erasure(case["erased"], case["changed"])]
    losses = []

    def loss(index):
        point = Point(data["latents"][index : index + 1], data["timesteps"][index : index + 1])
        losses.append(eraser.loss(batch, point))
        return {"error": losses[-1]}

    with editable(student, names) as edit:
        optimiser = Optimiser(values.lr, weight_decay=0.0, clip=0.0)
        finetune(edit.parameters, loss, len(data["losses"]), optimiser, title="test")
        changes = edit.changes()
    found = torch.stack([x.detach() for x in losses]).double()
    torch.testing.assert_close(found, data["losses"], rtol=1e-5, atol=0)
    change = changes[f"{EDIT}denoiser.{case['parameter']}"]
    assert (change - data["change"]).norm() < 1e-3 * data["change"].norm()
    norms = torch.tensor([float(changes[EDIT + n].norm()) for n in sorted(names)], dtype=torch.float64)
    torch.testing.assert_close(norms, data["change_norms"], rtol=1e-2, atol=1e-3 * float(norms.max()))
