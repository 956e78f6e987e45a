"""RF-Inversion: its two paths in closed form, whom it edits, what it does, and the released code's numbers."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux, tiny_sd3

from lethebench.composition import recipes
from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Artefact, configure
from lethebench.methods.flowedit.editing import EditHooks
from lethebench.methods.rf_inversion import RFInversion
from lethebench.methods.rf_inversion.flow import controlled, inverted
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.seeding import generator
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

DATA = Path(__file__).parent / "data"
RELEASED = json.loads((DATA / "rf_inversion.json").read_text())
SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=3.5, height=16, width=16)
BUILDERS = {
    "sd3": tiny_sd3,
    "sd3-dynamic": lambda: tiny_sd3(dynamic_shift=True),
    "flux-schnell": tiny_flux,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
}
MEMORIZED, NEUTRAL = RELEASED["source"], RELEASED["neutral"]
TRIGGER = ImageKey("test@1", Prompt("t", MEMORIZED, Role.TRIGGER, "item"), 0)
UNTOUCHED = ImageKey("test@1", Prompt("n", "striped blue circle", Role.NEUTRAL, "n"), 0)
FITTED = Artefact(facts={"neutral": {MEMORIZED: NEUTRAL}})
LEVELS = [1.0, 0.9, 0.6, 0.25, 0.0]


def latents(model, method=None, keys=(TRIGGER,), settings=SETTINGS):
    if method is None:
        return torch.tensor(sample(model, keys, settings).latents)
    with method.apply(model, FITTED) as hooks:
        return torch.tensor(sample(model, keys, settings, [hooks]).latents)


def drawn_on(model, steps):
    """What an edit is given on a model, its schedule of so many steps."""
    seen = []

    def edit(drawn):
        seen.append(drawn)
        return drawn.latents

    sample(model, [TRIGGER], SETTINGS, [EditHooks(FITTED.facts["neutral"], steps, edit)])
    return seen[0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bent(latents, index):
    """Some field."""
    return torch.sin(3 * latents) + index


def rising():
    return [(level, after - level) for level, after in pairwise(LEVELS[::-1])]


def test_full_pull_to_noise_ends_at_the_noise():
    image, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    torch.testing.assert_close(inverted(image, noise, bent, rising(), 1.0), noise, rtol=0, atol=1e-12)
    assert (inverted(image, noise, bent, rising(), 0.5) - noise).abs().max() > 0.1


def test_full_pull_to_the_image_ends_at_the_image():
    image, noised = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    torch.testing.assert_close(controlled(noised, image, bent, LEVELS, [1.0] * 4), image, rtol=0, atol=1e-12)
    etas = [1.0, 1.0, 1.0, 0.0]
    assert (controlled(noised, image, bent, LEVELS, etas) - image).abs().max() > 0.1


def test_without_pull_a_straight_field_goes_out_and_back():
    image, slope = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    noised = inverted(image, torch.zeros_like(image), lambda z, i: slope, rising(), 0.0)
    torch.testing.assert_close(noised, image + slope, rtol=0, atol=1e-12)
    back = controlled(noised, torch.zeros_like(image), lambda z, i: slope, LEVELS, [0.0] * 4)
    torch.testing.assert_close(back, image, rtol=0, atol=1e-12)


def test_half_the_pull_is_half_way_between_the_fields():
    image, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    one_step = [inverted(image, noise, bent, rising()[:1], gamma) for gamma in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(one_step[1], (one_step[0] + one_step[2]) / 2, rtol=0, atol=1e-12)
    one_step = [controlled(noise, image, bent, LEVELS, [eta]) for eta in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(one_step[1], (one_step[0] + one_step[2]) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BUILDERS)
def test_held_to_the_end_the_image_is_reconstructed(name):
    model = wrap(BUILDERS[name]())
    base = latents(model)
    held = latents(model, RFInversion(eta=1.0, stop=1.0, steps=7))
    torch.testing.assert_close(held, base, rtol=0, atol=2e-6)
    assert (latents(model, RFInversion(eta=0.5, stop=1.0, steps=7)) - base).abs().max() > 0.05


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_full_gamma_draws_the_neutral_prompt_from_the_image_s_own_noise(name):
    model = wrap(BUILDERS[name]())
    drawn = drawn_on(model, None)
    noise = drawn.noise([generator("rf-inversion", "test@1", "t", 0)])
    own = RFInversion(gamma=1.0, eta=0.0)
    with torch.no_grad():
        again = controlled(
            noise,
            drawn.latents,
            lambda z, i: drawn.velocity(z, i, drawn.neutral, 3.5),
            drawn.levels,
            [0.0] * drawn.steps,
        )
        edited = own.edit(drawn)
    torch.testing.assert_close(edited, again, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_only_targets_are_edited(name):
    model = wrap(BUILDERS[name]())
    keys = [UNTOUCHED, TRIGGER, replace(UNTOUCHED, index=1), replace(TRIGGER, index=1)]
    base, edited = latents(model, keys=keys), latents(model, RFInversion(), keys)
    moved = (edited - base).abs().amax(dim=(1, 2, 3))
    assert (moved > 0).tolist() == [False, True, False, True]
    assert torch.equal(edited[0::2], base[0::2])


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_the_strengths_change_more_and_more_and_a_small_share_little(name):
    model = wrap(BUILDERS[name]())
    base = latents(model)
    moved = [
        float((latents(model, replace(configure(RFInversion, s), steps=10)) - base).norm())
        for s in RFInversion.strengths
    ]
    assert moved == sorted(moved) and moved[0] > 0
    little = float((latents(model, RFInversion(share=0.01, steps=100, eta=0.0)) - base).norm())
    assert 0 < little < 0.05 * moved[0]
    assert torch.equal(latents(model, RFInversion(share=0.0)), base)


@pytest.mark.parametrize("number", range(len(RELEASED["cases"])))
def test_the_released_code_s_numbers(number):
    case, stored = RELEASED["cases"][number], load_file(DATA / "rf_inversion.safetensors")
    steps = case["steps"]
    drawn = drawn_on(wrap(BUILDERS[case["pipeline"]]()), steps)
    torch.testing.assert_close(drawn.latents, stored[f"{number}.source"], rtol=0, atol=1e-4)
    levels = drawn.levels
    times = [i / (steps + 1) for i in range(steps)]  # theirs: not the levels that the latents have
    sizes = [levels[i] - levels[i + 1] for i in range(steps)]
    asked = replace(drawn, times=1000 * torch.tensor(times))
    with torch.no_grad():
        noised = inverted(
            drawn.latents,
            drawn.noise([generator("rf-inversion", "test@1", "t", 0)]),
            lambda z, i: asked.velocity(z, i, drawn.empty, case["source_guidance"]),
            list(zip(times, sizes, strict=True)),
            case["gamma"],
        )
        torch.testing.assert_close(noised, stored[f"{number}.inverted"], rtol=0, atol=2e-4)
        on = range(int(case["start"] * steps), int(case["stop"] * steps))
        edited = controlled(
            noised,
            drawn.latents,
            lambda z, i: drawn.velocity(z, i, drawn.neutral, case["target_guidance"]),
            levels,
            [case["eta"] if i in on else 0.0 for i in range(steps)],
        )
    assert (edited - drawn.latents).abs().max() > 0.5
    torch.testing.assert_close(edited, stored[f"{number}.edited"], rtol=0, atol=2e-4)


def test_eta_acts_from_start_to_stop():
    model = wrap(tiny_flux())
    base = latents(model)
    whole = latents(model, RFInversion(eta=1.0, start=0.0, stop=1.0))
    late = latents(model, RFInversion(eta=1.0, start=0.75, stop=1.0))  # the last step is enough
    early = latents(model, RFInversion(eta=1.0, start=0.0, stop=0.75))
    for held in (whole, late):
        torch.testing.assert_close(held, base, rtol=0, atol=2e-6)
    assert (early - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"eta": 1.5}, "eta is between 0 and 1, not 1.5"),
        ({"stop": 7.0}, "stop is between 0 and 1, not 7.0"),
        ({"start": 0.5}, "start is 0.5, after stop, 0.25"),
        ({"source_guidance": -1.0}, "source_guidance must not be negative"),
        ({"steps": 2000}, "steps is between 1 and 1000, not 2000"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, problem):
    with pytest.raises(UserError, match=problem):
        configure(RFInversion, "medium", settings)


def test_models_that_predict_noise_are_refused():
    recipe = recipes("rf-inversion", "medium")[0]
    for family in ("sd", "sdxl"):
        assert "and this model predicts noise" in recipe.unsupported(family)
    assert recipe.unsupported("sd3") is None and recipe.unsupported("flux") is None
