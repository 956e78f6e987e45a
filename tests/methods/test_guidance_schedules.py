"""Jain et al.: guidance off, or opposite, until a transition point."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, configure
from lethebench.methods.guidance_transition import DynamicPoint, GuidanceTransition, StaticPoint
from lethebench.methods.opposite_guidance import OppositeGuidance, PrepassPoint, transition_steps, turns
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain, encode_prompts, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=8, guidance_scale=4.0, height=16, width=16)
BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3}
TEXTS = ("a red star", "a striped blue circle in a night city", "a robot in a forest")
DATA = json.loads((Path(__file__).parent / "data" / "guidance_schedules.json").read_text())


def keys(texts=TEXTS, suite="test@1"):
    return [ImageKey(suite, Prompt(f"p{i}", t, Role.NEUTRAL, f"p{i}"), 0) for i, t in enumerate(texts)]


def by_hand(model, wanted, given, scales):
    """Latents of a chain at guidance ``scales`` ``[images][steps]``."""
    chain = Chain(model, encode_prompts(model, [k.prompt.text for k in wanted], given), given, wanted)
    latents, scales = chain.initial(), torch.tensor(scales)
    with torch.no_grad():
        for index in range(chain.steps):
            _, unconditional, conditional = chain.predict(index, latents)
            scale = scales[:, index].view(-1, *(1,) * (latents.dim() - 1))
            latents = chain.advance(index, latents, unconditional + scale * (conditional - unconditional))
    return latents.numpy()


def drawn(model, method, wanted=None, given=SETTINGS, **more):
    with method.apply(model, Artefact()) as hooks:
        return sample(model, wanted or keys(), given, [hooks], **more).latents


def worst(found, wanted):
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max())


# --- static points ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("method", "early"),
    [
        (GuidanceTransition(until=500.0), 0.0),
        (GuidanceTransition(until=500.0, early=1.5), 1.5),
        (OppositeGuidance(until=650.0), -2.0),
    ],
)
def test_a_static_point_is_a_schedule_written_by_hand(name, method, early):
    model = wrap(BUILDERS[name]())
    times = Chain(model, encode_prompts(model, [""], SETTINGS), SETTINGS).timesteps.tolist()
    scales = [early if t > method.until else 4.0 for t in times]
    assert 0 < scales.count(early) < len(scales)
    found = drawn(model, method)
    assert worst(found, by_hand(model, keys(), SETTINGS, [scales] * 3)) < 1e-4
    assert worst(found, sample(model, keys(), SETTINGS).latents) > 1e-2


def test_guidance_that_stays_off_is_the_empty_prompt_and_at_1_the_model_without_guidance():
    model = wrap(tiny_sd())
    empty = [replace(k, prompt=replace(k.prompt, text="")) for k in keys()]
    unguided = SETTINGS.model_copy(update={"guidance_scale": 1.0})
    for early, wanted in ((0.0, empty), (1.0, keys())):
        found = drawn(model, GuidanceTransition(until=0.0, early=early))
        assert worst(found, sample(model, wanted, unguided).latents) < 1e-4


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("cls", [GuidanceTransition, OppositeGuidance])
def test_a_point_at_the_start_or_the_samplers_own_scale_changes_nothing(name, cls):
    model = wrap(BUILDERS[name]())
    base = sample(model, keys(), SETTINGS).latents
    for off in (cls.off, {"early": 4.0}, {"point": "dynamic", "early": 4.0}):
        assert (drawn(model, configure(cls, "weak", off)) == base).all()
    nearly = drawn(model, configure(cls, "weak", {"early": 4.0001, "until": 0.0}))
    assert 0 < worst(nearly, base) < 1e-2


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_time_carries_to_any_number_of_steps_and_scheduler(steps, scheduler):
    given = SETTINGS.model_copy(update={"num_inference_steps": steps, "scheduler": scheduler})

    class Seen(StaticPoint):
        def passed(self, difference, step):
            found = super().passed(difference, step)
            on.append((float(step.timestep), bool(found[0])))
            return found

    on = []
    sample(wrap(tiny_sd()), keys(TEXTS[:1]), given, [Seen(0.0, 500.0)])
    assert len(on) == steps and all(passed == (time <= 500) for time, passed in on)


def test_times_are_of_1000_whatever_the_models_own_scale():
    model = wrap(tiny_sd(num_train_timesteps=500))
    chain = Chain(model, encode_prompts(model, [""], SETTINGS), SETTINGS)
    scales = [0.0 if t > 250 else 4.0 for t in chain.timesteps.tolist()]
    assert 0.0 in scales and 4.0 in scales
    wanted = by_hand(model, keys(), SETTINGS, [scales] * 3)
    assert worst(drawn(model, GuidanceTransition(until=500.0)), wanted) < 1e-4


# --- dynamic points --------------------------------------------------------------------------------


def first_on(norms):
    """The first step of guidance, from the definition; the number of steps where there is none."""
    minima = [i for i in range(1, len(norms) - 1) if norms[i - 1] > norms[i] < norms[i + 1]]
    return minima[0] + 1 if minima else len(norms)


class Batch:
    """What :class:`DynamicPoint` reads of a batch."""

    def __init__(self, size):
        self.noise, self.keys = torch.zeros(size, 1), range(size)


def on_at(norms):
    """Steps and images with guidance, ``[images, steps]``, when the norms are ``[images, steps]``."""
    point = DynamicPoint(1.0)
    point.begin(Batch(len(norms)))
    return torch.stack([point.passed(n[:, None], None) for n in norms.T], dim=1)


def test_the_point_is_seen_when_the_norm_rises_again():
    norms = torch.tensor([[3.0, 2.0, 1.0, 2.0, 1.0], [1.0, 2.0, 3.0, 2.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert on_at(norms).sum(dim=1).tolist() == [2, 1, 0]


def test_each_image_has_the_first_local_minimum_of_its_own():
    norms = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    wanted = [[step >= first_on(row) for step in range(12)] for row in norms.tolist()]
    assert on_at(norms).tolist() == wanted


def test_the_batch_before_is_forgotten():
    model, wanted = moved_sd(), keys(suite="jain@1")
    method = GuidanceTransition(point="dynamic")
    one_by_one = drawn(model, method, wanted, of_data(), batch_size=1)
    assert worst(one_by_one, drawn(model, method, wanted, of_data(), batch_size=3)) < 1e-3


def test_local_minima_to_steps():
    flat = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    rows = {
        3: [9.0, 8.0, 7.0, 1.0, 5.0, 4.0, 3.0, 5.0, 1.0, 0.0],
        6: [9.0, 1.0, 7.0, 6.0, 5.0, 4.0, 3.0, 5.0, 1.0, 0.0],
        1: [9.0, 1.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
    }
    found = transition_steps(torch.tensor([*rows.values(), flat])).tolist()
    assert found == [*rows, 1], "a tenth of the steps where there is no minimum"
    assert transition_steps(torch.arange(50.0)[None]).tolist() == [5]


def test_turns_at_the_samplers_scale_are_those_of_the_images():
    class Look(SamplerHooks):
        def start(self, batch):
            self.turns, self.latents = turns(batch, 4.0), [batch.noise * batch.init_noise_sigma]
            return batch

        def step_end(self, latents, step):
            self.latents.append(latents)
            return latents

    for build in (tiny_sd, tiny_sdxl, tiny_sd3):
        look = Look()
        sample(wrap(build()), keys(), SETTINGS, [look])
        pairs = zip(look.latents, look.latents[1:], strict=False)
        cosines = [torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double()) for a, b in pairs]
        assert worst(look.turns, 1 - torch.stack(cosines, dim=1)) < 1e-6


@pytest.mark.parametrize("name", BUILDERS)
def test_opposite_guidance_ends_at_the_step_of_the_chain_before(name):
    model, seen = wrap(BUILDERS[name]()), []

    class Look(SamplerHooks):
        def start(self, batch):
            seen.extend(transition_steps(turns(batch, -4.0)).tolist())
            return batch

    sample(model, keys(), SETTINGS, [Look()])
    scales = [[-4.0 if step < first else 4.0 for step in range(8)] for first in seen]
    found = drawn(model, OppositeGuidance(point="dynamic"))
    assert worst(found, by_hand(model, keys(), SETTINGS, scales)) < 1e-4


# --- the released code -----------------------------------------------------------------------------


def moved_sd():
    """The pipeline that the released loops were run on."""
    pipe, draws = tiny_sd(seed=DATA["seed"]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    return wrap(pipe)


def of_data():
    return SETTINGS.model_copy(
        update={"num_inference_steps": DATA["steps"], "guidance_scale": DATA["guidance_scale"]}
    )


@pytest.mark.parametrize(
    ("name", "cls"),
    [("static", GuidanceTransition), ("dynamic", GuidanceTransition), ("opposite", OppositeGuidance)],
)
def test_latents_are_the_released_codes(name, cls):
    """To 1e-5 of the latents' size: both run in float32, in other batches."""
    model, wanted = moved_sd(), keys(DATA["prompts"], DATA["suite"])
    reference = np.array(DATA[name]["latents"])
    found = drawn(model, configure(cls, "weak", DATA[name]["set"]), wanted, of_data()).reshape(3, -1)
    assert worst(found, reference) < 1e-5 * np.abs(reference).max()
    base = sample(model, wanted, of_data()).latents.reshape(3, -1)
    assert (np.abs(base - reference).max(axis=1) > 1).all()


def test_the_chain_before_is_the_released_codes():
    """Its turns to float32's rounding of a cosine near 1, and its choice of step from them."""
    reference = torch.tensor(DATA["opposite_dynamic"]["turns"], dtype=torch.float64)
    assert transition_steps(reference).tolist() == DATA["opposite_dynamic"]["tp"]

    class Look(SamplerHooks):
        def start(self, batch):
            self.turns = turns(batch, -DATA["guidance_scale"])
            return batch

    look = Look()
    sample(moved_sd(), keys(DATA["prompts"], DATA["suite"]), of_data(), [look])
    assert worst(look.turns, reference) < 1e-6 < 1e-3 * float(reference.max())


# --- with other methods, and bad input -------------------------------------------------------------


def test_what_another_method_added_stays():
    class Add(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            return combined + 0.25

    class Look(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            assert torch.allclose(combined, unconditional + 0.25, atol=1e-5)
            return combined

    sample(wrap(tiny_sd()), keys(), SETTINGS, [Add(), StaticPoint(0.0, 0.0), Look()])


@pytest.mark.parametrize("cls", [GuidanceTransition, OppositeGuidance])
def test_models_without_guidance_are_refused(cls):
    assert "flux" not in cls.model_families
    for model in (wrap(tiny_flux()), wrap(tiny_sd())):
        given = SETTINGS.model_copy(update={"guidance_scale": 1.0})
        with pytest.raises(UserError, match="set the sampler's guidance_scale above 1"):
            drawn(model, cls(), given=given)


def test_the_chain_before_needs_a_scheduler_without_memory():
    model, given = wrap(PIPELINES["sd-dpm"]()), SETTINGS.model_copy(update={"scheduler": "model"})
    with pytest.raises(UserError, match="set the sampler's scheduler to ddim, euler"):
        drawn(model, OppositeGuidance(point="dynamic"), given=given)
    assert np.isfinite(drawn(model, GuidanceTransition(point="dynamic"), given=given)).all()


@pytest.mark.parametrize("cls", [GuidanceTransition, OppositeGuidance])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"point": "later"}, "point is static or dynamic, not 'later'"),
        ({"until": 1001.0}, "until is a time from 0"),
        ({"early": "low"}, "early is a number or null"),
    ],
)
def test_settings_that_mean_nothing_are_refused(cls, settings, words):
    with pytest.raises(UserError, match=words):
        configure(cls, "weak", settings)


def test_the_early_scale_of_a_chain_before_is_the_samplers_negated():
    point = PrepassPoint(None)
    sample(wrap(tiny_sd()), keys(), SETTINGS, [point])
    assert point.early == -SETTINGS.guidance_scale
