"""Recorders watch the sampling: what they see, what is kept of it, and that they change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3
from torch import Tensor

from lethebench.hooks import Batch, ImageKey, Prediction, Recorder, SamplerHooks, Step
from lethebench.prompts import Prompt, Role
from lethebench.sampler import initial_latents, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
PROMPTS = [
    Prompt("one", "a red star", Role.NEUTRAL, "one"),
    Prompt("two", "a blue circle in a city", Role.NEUTRAL, "two"),
]
KEYS = [ImageKey("test@1", p, i) for p in PROMPTS for i in range(3)]


class Norms(Recorder):
    """The norm of each step's guidance, and the number of times that a module ran."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.open = 0

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        self.batches.append(batch)
        self.seen: list[Tensor] = []
        self.calls = 0
        module = batch.model.denoiser.time_embedding

        def count(*_: object) -> None:
            self.calls += 1

        handle = module.register_forward_hook(count)
        self.open += 1
        try:
            yield
        finally:
            handle.remove()
            self.open -= 1

    def step(self, step: Step, predicted: Prediction) -> None:
        assert self.open == 1
        assert predicted.unconditional is not None
        self.seen.append((predicted.conditional - predicted.unconditional).flatten(1).norm(dim=1))

    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        assert self.open == 0, "the context is closed before take"
        calls = torch.full((len(batch.keys),), self.calls)
        return {"norms": torch.stack(self.seen, dim=1), "calls": calls}


class Again(Recorder):
    """Asks the denoiser again after the denoising, at the first timestep and the images' own noise."""

    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        latents = batch.scale(batch.init_noise_sigma * batch.noise, batch.timesteps[0])
        predicted = batch.predict(latents, batch.timesteps[0], batch.conditioning)
        return {"again": predicted.combined, "noise": batch.noise}

    def step(self, step: Step, predicted: Prediction) -> None:
        if step.index == 0:
            self.first = predicted.combined.clone()


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.denoiser.modules())


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_sd())


def test_what_is_taken_is_kept_by_name_with_batches_joined(model) -> None:
    recorder = Norms()
    found = sample(model, KEYS, SETTINGS, recorders=[recorder], batch_size=4)
    assert set(found.recorded) == {"norms", "calls"}
    assert found.recorded["norms"].shape == (6, 3)
    np.testing.assert_array_equal(found.recorded["norms"], found.noise_norm)
    np.testing.assert_array_equal(found.recorded["calls"], [3] * 6)
    assert [len(b.keys) for b in recorder.batches] == [4, 2]
    assert [k for b in recorder.batches for k in b.keys] == KEYS


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3, tiny_flux])
def test_images_are_the_same_with_and_without(build) -> None:
    model = wrap(build())
    bare = sample(model, KEYS[:2], SETTINGS, batch_size=2)
    watched = sample(model, KEYS[:2], SETTINGS, recorders=[Again()], batch_size=2)
    np.testing.assert_array_equal(watched.images, bare.images)
    np.testing.assert_array_equal(watched.latents, bare.latents)
    np.testing.assert_array_equal(watched.noise_norm, bare.noise_norm)
    assert bare.recorded == {} and set(watched.recorded) == {"again", "noise"}


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3, tiny_flux])
def test_take_may_ask_the_denoiser_and_gets_the_first_step_back(build) -> None:
    model, recorder = wrap(build()), Again()
    found = sample(model, KEYS[:2], SETTINGS, recorders=[recorder], batch_size=2)
    np.testing.assert_allclose(found.recorded["again"], recorder.first.numpy(), atol=1e-6)
    noise = initial_latents(model, KEYS[:2], SETTINGS).numpy()
    np.testing.assert_array_equal(found.recorded["noise"], noise)


def test_several_recorders_are_asked_in_their_order(model) -> None:
    order: list[str] = []

    def named(name: str) -> Recorder:
        made = Recorder()
        made.step = lambda step, predicted: order.append(f"{name}{step.index}")  # type: ignore[method-assign]
        made.take = lambda batch: {name: torch.zeros(len(batch.keys), 2)}  # type: ignore[method-assign]
        return made

    found = sample(model, KEYS[:2], SETTINGS, recorders=[named("a"), named("b")])
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert {k: v.shape for k, v in found.recorded.items()} == {"a": (2, 2), "b": (2, 2)}


def test_hooks_are_removed_after_an_error_too(model) -> None:
    before = hooks_of(model)
    sample(model, KEYS[:2], SETTINGS, recorders=[Norms()])
    assert hooks_of(model) == before

    class Failing(Norms):
        def step(self, step: Step, predicted: Prediction) -> None:
            raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError):
        sample(model, KEYS[:2], SETTINGS, recorders=[Failing()])
    assert hooks_of(model) == before


def test_a_recorder_sees_the_models_predictions_before_any_hook(model) -> None:
    class Off(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            return unconditional

    class Keep(Recorder):
        def step(self, step: Step, predicted: Prediction) -> None:
            if step.index == 0:
                self.combined = predicted.combined.clone()

    with_hook, without = Keep(), Keep()
    changed = sample(model, KEYS[:2], SETTINGS, [Off()], recorders=[with_hook])
    plain = sample(model, KEYS[:2], SETTINGS, recorders=[without])
    assert torch.equal(with_hook.combined, without.combined)
    assert not np.array_equal(changed.latents, plain.latents)


def test_a_recorder_sees_a_methods_conditioning(model) -> None:
    """What ``take`` asks the denoiser is asked with the method in place."""

    class Blank(SamplerHooks):
        def conditioning(self, conditioning, keys):
            return conditioning.with_embeds(torch.zeros_like(conditioning.embeds))

    found = [
        sample(model, KEYS[:1], SETTINGS, hooks, recorders=[Again()]).recorded["again"]
        for hooks in ([], [Blank()])
    ]
    assert not np.allclose(found[0], found[1])
