"""Noise, batches, randomness, hooks, and what the loop refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.prompts import Prompt, Role
from lethebench.sampler import (
    decode,
    encode_prompts,
    image_size,
    initial_latents,
    sample,
    unconditional,
    unpack_latents,
)
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
PROMPTS = [
    Prompt("one", "a red star", Role.NEUTRAL, "one"),
    Prompt("two", "a blue circle in a city", Role.NEUTRAL, "two"),
]
KEYS = [ImageKey("test@1", p, i) for p in PROMPTS for i in range(3)]


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_sd())


# --- noise ---


def test_noise_is_pinned(model):
    """The noise of a key never changes: stored results of all machines depend on it."""
    first = initial_latents(model, KEYS[:1], SETTINGS)
    assert first.shape == (1, 4, 8, 8) and first.dtype == torch.float32
    expected = torch.tensor([-0.1424, 0.3525, -0.2442, 1.4491])
    assert torch.allclose(first.flatten()[:4], expected, atol=1e-4)


def test_noise_depends_on_the_key_alone(model):
    together = initial_latents(model, KEYS, SETTINGS)
    for order in ([5, 0, 3], [2], [1, 4]):
        assert torch.equal(initial_latents(model, [KEYS[i] for i in order], SETTINGS), together[order])
    other = [ImageKey("test@2", k.prompt, k.index) for k in KEYS]
    everything = torch.cat([together, initial_latents(model, other, SETTINGS)]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 12
    assert abs(float(everything.mean())) < 0.1 and abs(float(everything.std()) - 1) < 0.1


def test_flux_noise_is_the_same_noise_packed(model):
    packed = initial_latents(wrap(tiny_flux()), KEYS, SETTINGS)
    assert packed.shape == (6, 16, 16)
    spatial = initial_latents(model, KEYS, SETTINGS)
    assert torch.equal(packed.flatten(1).sort().values, spatial.flatten(1).sort().values)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_batches_and_order_change_nothing(model, batch_size):
    base = sample(model, KEYS, SETTINGS, batch_size=2)
    order = [3, 1, 5, 0, 2, 4]
    found = sample(model, [KEYS[i] for i in order], SETTINGS, batch_size=batch_size)
    assert np.allclose(found.latents, base.latents[order], atol=1e-4)
    assert np.abs(found.images.astype(int) - base.images[order]).max() <= 1
    assert np.allclose(found.noise_norm, base.noise_norm[order], rtol=1e-3)


def test_a_scheduler_that_draws_noise_draws_it_from_the_key():
    model = wrap(tiny_sd(EulerAncestralDiscreteScheduler))
    base = sample(model, KEYS, SETTINGS, batch_size=6)
    found = sample(model, KEYS[::-1], SETTINGS, batch_size=2)
    assert np.allclose(found.latents, base.latents[::-1], atol=1e-3)


@pytest.mark.parametrize("build", [tiny_sd, tiny_flux, lambda: tiny_sd(EulerAncestralDiscreteScheduler)])
def test_global_randomness_is_neither_used_nor_moved(build):
    model = wrap(build())
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sample(model, KEYS[:2], SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        assert np.array_equal(sample(model, KEYS[:2], SETTINGS).latents, first.latents)


def test_the_pipeline_is_left_as_it_was(model):
    scheduler = model.pipe.scheduler
    state = {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)}
    weights = model.weights_sha256()
    sample(model, KEYS[:2], SETTINGS)
    assert model.pipe.scheduler is scheduler
    assert {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)} == state
    assert model.weights_sha256() == weights


# --- results ---


def test_samples(model):
    done = []
    found = sample(model, KEYS, SETTINGS, batch_size=4, advance=done.append)
    assert done == [4, 2]
    assert found.images.shape == (6, 16, 16, 3) and found.images.dtype == np.uint8
    assert found.latents.shape == (6, 4, 8, 8) and found.latents.dtype == np.float32
    assert found.noise_norm.shape == (6, 3) and found.noise_norm.dtype == np.float32
    assert (found.noise_norm > 0).all()
    assert np.array_equal(decode(model, torch.from_numpy(found.latents)).numpy(), found.images)


def test_noise_norm_is_nan_without_guidance(model):
    unguided = SETTINGS.model_copy(update={"guidance_scale": 1.0})
    assert np.isnan(sample(model, KEYS[:2], unguided).noise_norm).all()


def test_encoded_prompts(model):
    guided = encode_prompts(model, ["a red star", "a city", "a red star"], SETTINGS)
    assert guided.embeds.shape == (3, 16, 16) and guided.negative.embeds.shape == (3, 16, 16)
    assert torch.equal(guided.embeds[0], guided.embeds[2])
    assert not torch.equal(guided.embeds[0], guided.embeds[1])
    assert encode_prompts(model, ["a"], SETTINGS.model_copy(update={"guidance_scale": 1.0})).negative is None


def test_image_size():
    plain = SamplerSettings()
    assert image_size(wrap(tiny_sd()), plain) == (16, 16)
    assert image_size(wrap(tiny_flux()), plain) == (256, 256)
    assert image_size(wrap(tiny_sd()), SamplerSettings(height=32)) == (32, 16)
    found = sample(wrap(tiny_sd3()), KEYS[:1], SamplerSettings(height=12, width=16, num_inference_steps=1))
    assert found.images.shape == (1, 12, 16, 3)


# --- hooks ---


class Recorder(SamplerHooks):
    """Writes down every call, and changes nothing."""

    def __init__(self):
        self.calls = []

    def texts(self, texts, keys):
        self.calls.append(("texts", list(texts), keys))
        return texts

    def conditioning(self, conditioning, keys):
        self.calls.append(("conditioning", tuple(conditioning.embeds.shape), keys))
        return conditioning

    def initial_noise(self, latents, keys):
        self.calls.append(("initial_noise", latents.clone(), keys))
        return latents

    def guidance(self, combined, unconditional, conditional, step):
        expected = unconditional + step.guidance_scale * (conditional - unconditional)
        assert torch.equal(combined, expected)
        self.calls.append(("guidance", step.index, step))
        return combined

    def step_end(self, latents, step):
        self.calls.append(("step_end", step.index, (latents.clone(), step)))
        return latents

    def images(self, images, keys):
        self.calls.append(("images", (images.dtype, tuple(images.shape)), keys))
        return images


def test_each_hook_is_called_as_documented(model):
    hook, batch = Recorder(), tuple(KEYS[:2])
    found = sample(model, batch, SETTINGS, [hook])
    names = [c[0] for c in hook.calls]
    steps = ["guidance", "step_end"] * 3
    assert names == ["texts", "conditioning", "initial_noise", *steps, "images"]
    by_name = {c[0]: c for c in hook.calls}
    assert by_name["texts"][1] == [k.prompt.text for k in batch]
    assert by_name["conditioning"][1] == (2, 16, 16)
    assert torch.equal(by_name["initial_noise"][1], initial_latents(model, batch, SETTINGS))
    assert by_name["images"][1] == (torch.uint8, (2, 16, 16, 3))
    assert all(by_name[n][2] == batch for n in ("texts", "conditioning", "initial_noise", "images"))
    guided = [c[2] for c in hook.calls if c[0] == "guidance"]
    ended = [c[2] for c in hook.calls if c[0] == "step_end"]
    assert [s.index for s in guided] == [0, 1, 2] and {s.total for s in guided} == {3}
    assert [int(s.timestep) for s in guided] == sorted((int(s.timestep) for s in guided), reverse=True)
    assert all(s.keys == batch and s.guidance_scale == 4.0 for s in guided)
    assert torch.equal(guided[0].latents, by_name["initial_noise"][1])
    assert torch.equal(guided[1].latents, ended[0][0])
    assert np.array_equal(ended[-1][0].numpy(), found.latents)


def test_guidance_hook_without_guidance_sees_no_unconditional(model):
    seen = []

    class Look(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            seen.append((unconditional is None, torch.equal(combined, conditional)))
            return combined

    sample(model, KEYS[:1], SETTINGS.model_copy(update={"guidance_scale": 1.0}), [Look()])
    assert seen == [(True, True)] * 3


CHANGES = {
    "texts": lambda texts, keys: ["a forest"] * len(texts),
    "conditioning": lambda c, keys: c.with_embeds(c.embeds * 0),
    "initial_noise": lambda x, keys: -x,
    "guidance": lambda combined, u, c, step: u,
    "step_end": lambda x, step: x * 0.5,
}


@pytest.mark.parametrize("point", CHANGES)
def test_what_a_hook_returns_is_used(model, point):
    hook = SamplerHooks()
    setattr(hook, point, CHANGES[point])
    found = sample(model, KEYS[:2], SETTINGS, [hook])
    assert not np.allclose(found.latents, sample(model, KEYS[:2], SETTINGS).latents, atol=1e-2)


def test_the_texts_hook_equals_other_prompts(model):
    hook = SamplerHooks()
    hook.texts = CHANGES["texts"]
    prompt = Prompt("one", "a forest", Role.NEUTRAL, "one")
    wanted = sample(model, [ImageKey("test@1", prompt, 0)], SETTINGS)
    assert np.array_equal(sample(model, KEYS[:1], SETTINGS, [hook]).latents, wanted.latents)


@pytest.mark.parametrize("point", ["initial_noise", "guidance", "step_end", "images"])
def test_hooks_compose_in_order(model, point):
    """Adding then doubling differs from doubling then adding, so the order shows."""
    first, second = SamplerHooks(), SamplerHooks()
    setattr(first, point, lambda x, *_: x + 1)
    setattr(second, point, lambda x, *_: x * 2)
    both = SamplerHooks()
    setattr(both, point, lambda x, *_: (x + 1) * 2)
    wanted = sample(model, KEYS[:1], SETTINGS, [both])
    found = sample(model, KEYS[:1], SETTINGS, [first, second])
    assert np.array_equal(found.latents, wanted.latents) and np.array_equal(found.images, wanted.images)
    swapped = sample(model, KEYS[:1], SETTINGS, [second, first])
    assert not np.array_equal(swapped.images, wanted.images) or not np.array_equal(
        swapped.latents, wanted.latents
    )


def test_a_hook_may_change_the_number_of_tokens(model):
    """Then the two halves of guidance can't share a batch."""
    hook = SamplerHooks()
    hook.conditioning = lambda c, keys: c.with_embeds(torch.cat([c.embeds, c.embeds], dim=1))
    found = sample(model, KEYS[:2], SETTINGS, [hook])
    base = sample(model, KEYS[:2], SETTINGS)
    # Attention over every token twice is attention over every token once.
    assert np.allclose(found.latents, base.latents, atol=1e-4)


def test_flux_takes_more_text_tokens_from_a_hook():
    hook = SamplerHooks()
    hook.conditioning = lambda c, keys: c.with_embeds(torch.cat([c.embeds, c.embeds], dim=1))
    found = sample(wrap(tiny_flux()), KEYS[:2], SETTINGS, [hook])
    assert np.isfinite(found.latents).all()


def test_a_hook_may_use_gradients(model):
    class Gradient(SamplerHooks):
        def step_end(self, latents, step):
            with torch.enable_grad():
                x = latents.detach().requires_grad_()
                (gradient,) = torch.autograd.grad((x**2).sum(), x)
            return latents - 0.1 * gradient

    halved = SamplerHooks()
    halved.step_end = lambda x, step: x - 0.1 * (2 * x)
    found = sample(model, KEYS[:1], SETTINGS, [Gradient()])
    assert np.allclose(found.latents, sample(model, KEYS[:1], SETTINGS, [halved]).latents, atol=1e-6)


# --- refusals ---


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (tiny_flux, {"scheduler": "ddim"}, "flow-euler"),
        (tiny_sd3, {"scheduler": "euler"}, "flow-euler"),
        (tiny_sd, {"scheduler": "flow-euler"}, "ddim, euler or model"),
        (tiny_sd, {"height": 17}, "multiple of 2"),
        (tiny_flux, {"width": 18}, "multiple of 4"),
        (tiny_sd, {"num_inference_steps": 1000, "scheduler": "ddim"}, "1000 steps"),
    ],
)
def test_settings_that_do_not_fit(build, changes, message):
    model = wrap(build())
    if "num_inference_steps" in changes:
        model.pipe.scheduler = type(model.pipe.scheduler)(num_train_timesteps=500)
    with pytest.raises(UserError, match=message):
        sample(model, KEYS[:1], SETTINGS.model_copy(update=changes))


def test_nothing_to_draw(model):
    with pytest.raises(ValueError, match="0 keys"):
        sample(model, [], SETTINGS)


# --- what methods that act while sampling are written against ---


class Starting(SamplerHooks):
    """Replaces the noise, and remembers what it saw."""

    def __init__(self, noise):
        self.noise, self.seen = noise, []

    def start(self, batch):
        self.seen.append(batch)
        return replace(batch, noise=self.noise, texts=("ignored",) * len(batch.keys))

    def guidance(self, combined, unconditional, conditional, step):
        self.seen.append(step.batch)
        return combined


def test_start_changes_the_noise_that_is_drawn_from(model):
    other = initial_latents(model, KEYS[3:5], SETTINGS)
    hook = Starting(other)
    found = sample(model, KEYS[:2], SETTINGS, [hook])
    assert all(torch.equal(b.noise, other) for b in hook.seen[1:])
    assert hook.seen[1].texts == ("a red star", "a red star")
    given = sample(model, KEYS[:2], SETTINGS, [InitialNoise(other)])
    assert np.array_equal(found.latents, given.latents)


class InitialNoise(SamplerHooks):
    def __init__(self, noise):
        self.noise = noise

    def initial_noise(self, latents, keys):
        return self.noise


class Emptied(SamplerHooks):
    """Asks for the empty prompt in place of each."""

    def start(self, batch):
        empty = unconditional(batch)
        return replace(batch, conditioning=replace(empty, negative=batch.conditioning.negative))


@pytest.mark.parametrize("build", [tiny_sd, tiny_flux])
def test_start_changes_the_conditioning(build):
    model = wrap(build())
    nothing = [ImageKey(k.suite, replace(k.prompt, text=""), k.index) for k in KEYS[:3]]
    expected = sample(model, nothing, SETTINGS)
    found = sample(model, KEYS[:3], SETTINGS, [Emptied()])
    assert np.allclose(found.latents, expected.latents, atol=1e-5)


class Finishing(SamplerHooks):
    def finish(self, latents, batch):
        return latents * 0 + batch.noise


def test_finish_changes_what_is_decoded():
    model = wrap(tiny_flux())
    found = sample(model, KEYS[:2], SETTINGS, [Finishing()])
    noise = unpack_latents(model, initial_latents(model, KEYS[:2], SETTINGS), SETTINGS)
    assert np.array_equal(found.latents, noise.numpy())


class Cleaning(SamplerHooks):
    """Keeps the clean latents of each step and the scheduler's own, from the next latents."""

    def __init__(self):
        self.clean, self.levels, self.latents, self.predicted = [], [], [], []

    def guidance(self, combined, unconditional, conditional, step):
        self.clean.append(step.batch.clean(step.latents, step.timestep, combined))
        self.levels.append(step.batch.levels(step.timestep))
        self.latents.append(step.latents)
        self.predicted.append(combined)
        return combined


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_clean_latents_are_the_schedulers_own(cls, kind):
    model = wrap(tiny_sd(cls, prediction_type=kind))
    hook = Cleaning()
    sample(model, KEYS[:2], SETTINGS.model_copy(update={"scheduler": "model"}), [hook])
    for index, (clean, latents, predicted) in enumerate(
        zip(hook.clean, hook.latents, hook.predicted, strict=True)
    ):
        scheduler = cls.from_config(model.pipe.scheduler.config)
        scheduler.set_timesteps(SETTINGS.num_inference_steps)
        time = scheduler.timesteps[index]
        if cls is DPMSolverMultistepScheduler:
            scheduler._init_step_index(time)
            own = scheduler.convert_model_output(predicted, sample=latents)
        else:
            scheduler.scale_model_input(latents, time)
            own = scheduler.step(predicted, time, latents).pred_original_sample
        assert torch.allclose(clean, own, rtol=1e-4, atol=1e-3 * float(own.abs().max()))


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
def test_clean_latents_of_a_flow(build):
    """Of the true velocity e - x_0 at (1 - s) x_0 + s e the clean latents are x_0."""
    model = wrap(build())
    hook = Cleaning()
    sample(model, KEYS[:1], SETTINGS, [hook])

    class Again(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            clean, noise = torch.zeros_like(combined) + 0.5, torch.ones_like(combined)
            signal, share = step.batch.levels(step.timestep)
            assert signal + share == pytest.approx(1)
            at = signal * clean + share * noise
            assert torch.allclose(step.batch.clean(at, step.timestep, noise - clean), clean, atol=1e-6)
            return combined

    sample(model, KEYS[:1], SETTINGS, [Again()])
    assert [s for _, s in hook.levels] == sorted((s for _, s in hook.levels), reverse=True)
