"""FlowEdit: its path in closed form, whom it edits, what it does, and the released code's numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux, tiny_sd3

from lethebench.check import Subject, checks
from lethebench.composition import recipes
from lethebench.errors import UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Knowledge, Task, configure
from lethebench.methods.flowedit import FlowEdit
from lethebench.methods.flowedit.editing import EditHooks
from lethebench.methods.flowedit.flow import flow_edit
from lethebench.plan import prompt_set
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

DATA = Path(__file__).parent / "data"
RELEASED = json.loads((DATA / "flowedit.json").read_text())
SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=3.5, height=16, width=16)
BUILDERS = {
    "sd3": tiny_sd3,
    "sd3-dynamic": lambda: tiny_sd3(dynamic_shift=True),
    "flux-schnell": tiny_flux,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
}
MEMORIZED, NEUTRAL, OTHER = RELEASED["source"], RELEASED["neutral"], "striped blue circle"
TRIGGER = ImageKey("test@1", Prompt("t", MEMORIZED, Role.TRIGGER, "item"), 0)
UNTOUCHED = ImageKey("test@1", Prompt("n", OTHER, Role.NEUTRAL, "n"), 0)
FITTED = Artefact(facts={"neutral": {MEMORIZED: NEUTRAL}})


class World:
    """A memorized caption and a concept, with what stands for them."""

    name = "world"

    def __iter__(self):
        yield Prompt("t", MEMORIZED, Role.TRIGGER, "item")
        yield Prompt("c", "captain in a forest", Role.CONCEPT, "captain", concept="captain")
        yield Prompt("n", OTHER, Role.NEUTRAL, "n")

    def paraphrases(self, prompt_id):
        return {"t": [NEUTRAL, "a circle"], "c": ["a robot in a forest"]}[prompt_id]

    def anchor_concept(self, concept):
        return "a robot"


class Unparaphrased(World):
    def paraphrases(self, prompt_id):
        return []


def fit(method, world=None):
    return method.fit(Task(None, SETTINGS, world or World(), method.sees, seed_parts=("test",))).facts


def latents(model, method=None, keys=(TRIGGER,), hooks=(), settings=SETTINGS):
    if method is None:
        return torch.tensor(sample(model, keys, settings, hooks).latents)
    with method.apply(model, FITTED) as own:
        return torch.tensor(sample(model, keys, settings, [*hooks, own]).latents)


class Captured(SamplerHooks):
    """Keeps what an edit is given."""

    def __init__(self, steps=None):
        self.hooks = EditHooks(FITTED.facts["neutral"], steps, self._edit)

    def _edit(self, drawn):
        self.drawn = drawn
        return drawn.latents

    def finish(self, latents, batch):
        return self.hooks.finish(latents, batch)


def drawn_on(model, steps=None):
    captured = Captured(steps)
    latents(model, hooks=[captured])
    return captured.drawn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_gaussian(mean, levels):
    """The exact field dx/ds of a normal distribution with unit variance round ``mean``."""

    def field(latents, index):
        s = levels[index]
        pull = (2 * s - 1) / ((1 - s) ** 2 + s**2)
        return pull * (latents - (1 - s) * mean) - mean

    return field


@pytest.mark.parametrize("n_avg", [1, 3])
def test_between_two_gaussians_the_edit_is_the_difference_of_their_means(n_avg):
    levels = [1.0, 0.8, 0.55, 0.2, 0.0]
    image, one, other = normal(2, 3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2)
    noise = iter(normal(4 * n_avg, 2, 3, 5, seed=3))
    edited = flow_edit(
        image,
        levels,
        of_gaussian(one, levels),
        of_gaussian(other, levels),
        lambda: next(noise),
        n_max=4,
        n_avg=n_avg,
    )
    assert next(noise, None) is None
    torch.testing.assert_close(edited, image + other - one, rtol=0, atol=1e-12)


def test_the_steps_that_edit_and_those_that_sample():
    levels, asked = [1.0, 0.75, 0.5, 0.25, 0.0], []
    image, noise = normal(1, 3), normal(3, 1, 3, seed=1)

    def field(name, value):
        def ask(latents, index):
            asked.append((name, index))
            return torch.full_like(latents, value)

        return ask

    draws = iter(noise)
    edited = flow_edit(
        image, levels, field("source", 1.0), field("target", 3.0), lambda: next(draws), n_max=3, n_min=1
    )
    pairs = [(name, index) for index in (1, 2) for name in ("target", "source")]
    assert asked == [*pairs, ("target", 3)]
    # two steps of 0.25 by 1 - 3; then the source noised to 0.25, moved by the edit, and a step of 0.25 by 3
    expected = 0.75 * image + 0.25 * noise[2] + (-0.5 * (3.0 - 1.0)) - 0.25 * 3.0
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BUILDERS)
def test_equal_prompts_and_guidance_return_the_source_bit_for_bit(name):
    drawn = drawn_on(wrap(BUILDERS[name]()), steps=6)
    draws = [torch.Generator().manual_seed(0)]

    def edited(conditioning, guidance):
        with torch.no_grad():
            return flow_edit(
                drawn.latents,
                drawn.levels,
                lambda z, i: drawn.velocity(z, i, drawn.source, 3.5),
                lambda z, i: drawn.velocity(z, i, conditioning, guidance),
                lambda: drawn.noise(draws),
                n_max=6,
                n_avg=2,
            )

    assert torch.equal(edited(drawn.source, 3.5), drawn.latents)
    assert not torch.equal(edited(drawn.neutral, 3.5), drawn.latents)
    felt = name != "flux-schnell"  # which takes no guidance
    assert torch.equal(edited(drawn.source, 13.5), drawn.latents) is not felt


@pytest.mark.parametrize("name", BUILDERS)
def test_only_targets_are_edited(name):
    model = wrap(BUILDERS[name]())
    keys = [UNTOUCHED, TRIGGER, replace(UNTOUCHED, index=1), replace(TRIGGER, index=1)]
    base, edited = latents(model, keys=keys), latents(model, FlowEdit(), keys)
    moved = (edited - base).abs().amax(dim=(1, 2, 3))
    assert (moved > 0).tolist() == [False, True, False, True]
    assert torch.equal(edited[0::2], base[0::2])


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_more_steps_change_more_and_few_change_little(name):
    model = wrap(BUILDERS[name]())
    base = latents(model)
    shares = [0.0, 0.1, 0.5, None, 1.0]  # one, five, six or nine, and ten of ten steps
    moved = [float((latents(model, FlowEdit(n_max=n, steps=10)) - base).norm()) for n in shares]
    assert moved[0] == 0
    assert moved == sorted(moved)
    fine = float((latents(model, FlowEdit(n_max=0.01, steps=100)) - base).norm())
    assert 0 < fine < 0.05 * moved[-1]


@pytest.mark.parametrize("number", range(len(RELEASED["cases"])))
def test_the_released_code_s_numbers(number):
    case, stored = RELEASED["cases"][number], load_file(DATA / "flowedit.safetensors")
    model = wrap(BUILDERS[case["pipeline"]]())
    base = latents(model)
    torch.testing.assert_close(base, stored[f"{number}.source"], rtol=0, atol=1e-4)
    method = FlowEdit(
        steps=case["steps"],
        n_max=case["n_max"] / case["steps"],
        n_min=case["n_min"] / case["steps"],
        n_avg=case["n_avg"],
        source_guidance=case["source_guidance"],
        target_guidance=case["target_guidance"],
    )
    edited = latents(model, method)
    assert (edited - base).abs().max() > 0.05
    torch.testing.assert_close(edited, stored[f"{number}.edited"], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "n_max", "scales"), [("sd3", 0.66, (3.5, 13.5)), ("flux-dev", 24 / 28, (1.5, 5.5))]
)
def test_the_defaults_are_the_paper_s(name, n_max, scales):
    model = wrap(BUILDERS[name]())
    given = FlowEdit(n_max=n_max, source_guidance=scales[0], target_guidance=scales[1], n_min=0.0, n_avg=1)
    assert torch.equal(latents(model, FlowEdit()), latents(model, given))


def test_the_steps_are_the_sampler_s_unless_given():
    model = wrap(tiny_sd3())
    own = drawn_on(model)
    assert own.steps == SETTINGS.num_inference_steps
    assert own.levels[0] == 1 and own.levels[-1] == 0
    assert torch.equal(own.times, drawn_on(model, steps=4).times)
    assert drawn_on(model, steps=9).steps == 9


def test_fit_finds_a_neutral_prompt_for_each_target():
    concept = {"captain in a forest": "a robot in a forest"}
    assert fit(FlowEdit()) == {"targets": 2, "clusters": 2, "neutral": {MEMORIZED: NEUTRAL, **concept}}
    assert fit(FlowEdit(targets="concepts"))["neutral"] == concept
    assert fit(FlowEdit(targets="triggers", prompt="a city"))["neutral"] == {MEMORIZED: "a city"}
    assert len(fit(FlowEdit(count=1))["neutral"]) == 1


def test_fit_sees_what_it_edits():
    assert FlowEdit(targets="triggers").sees == {Knowledge.MEMORIZED_PROMPTS}
    assert FlowEdit(targets="concepts").sees == {Knowledge.CONCEPT_NAMES}
    assert FlowEdit().sees == FlowEdit.knowledge


def test_a_target_without_a_neutral_prompt_is_named():
    with pytest.raises(UserError, match="no paraphrase of 'robot captain"):
        fit(FlowEdit(), Unparaphrased())
    assert fit(FlowEdit(prompt="a city"), Unparaphrased())["neutral"][MEMORIZED] == "a city"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"n_max": 24}, "n_max is a share of the steps, between 0 and 1, not 24"),
        ({"n_min": -0.1}, "n_min is a share"),
        ({"n_avg": 0}, "n_avg must be at least 1, not 0"),
        ({"steps": 0}, "steps is between 1 and 1000, not 0"),
        ({"target_guidance": -1.0}, "target_guidance must not be negative"),
        ({"targets": "everything"}, "targets is triggers, concepts, all, not 'everything'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, problem):
    with pytest.raises(UserError, match=problem):
        configure(FlowEdit, "medium", settings)


def test_models_that_predict_noise_are_refused():
    recipe = recipes("flowedit", "medium")[0]
    for family in ("sd", "sdxl"):
        assert "and this model predicts noise" in recipe.unsupported(family)
    assert recipe.unsupported("sd3") is None and recipe.unsupported("flux") is None


CONTRACT = ("off_is_base", "images_dont_share", "base_is_restored", "composes", "same_seed_same_images")


@pytest.mark.parametrize("method", ["flowedit", "rf-inversion"])
def test_the_contract_holds_on_flux_too(method):
    subject = Subject(method, wrap(tiny_flux(guidance_embeds=True)), prompt_set("planted"), SETTINGS)
    for check in CONTRACT:
        checks()[check](subject)


class InPlaceOf(SamplerHooks):
    """Puts given latents in place of those that were drawn."""

    def __init__(self, latents):
        self.latents = latents

    def finish(self, latents, batch):
        return self.latents


def test_on_top_of_a_pruned_model_the_pruned_model_edits(make_task):
    quick = {"steps": 3, "prompts": 6, "batch_size": 2, "chain_steps": 2, "dtype": "float32"}
    rates = {f"lr_{kind}": 2.0 for kind in ("ffn", "norm", "attn")}  # so that three steps prune something
    settings = {f"uniforget.{name}": value for name, value in (quick | rates).items()}
    recipe = recipes("uniforget+flowedit", "strong", settings)[0]
    model = wrap(tiny_flux(guidance_embeds=True))
    masks = recipe.parts[0].fit(make_task(recipe.parts[0], model))
    kept = []

    class Keep(SamplerHooks):
        def finish(self, latents, batch):
            kept.append(latents)
            return latents

    with recipe.apply(model, [masks, FITTED]) as hooks:
        drawn = latents(model, hooks=[Keep()])
        both = latents(model, hooks=hooks)
        again = latents(model, hooks=[InPlaceOf(kept[0]), *hooks])
    by_base = latents(model, recipe.parts[1], hooks=[InPlaceOf(kept[0])])
    assert not torch.equal(drawn, latents(model))
    assert not torch.equal(both, drawn)
    assert torch.equal(both, again)
    assert (both - by_base).abs().max() > 1e-3
