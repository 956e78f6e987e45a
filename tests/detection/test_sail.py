"""SAIL's sharpness: against a closed form, finite differences, and the sampling that it only watches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from metric_fakes import shard, trained
from tiny_pipelines import PIPELINES, tiny_sd

from lethebench.hooks import ImageKey, Prediction, SamplerHooks
from lethebench.magnitude import FirstStep, magnitudes
from lethebench.metrics.sail_sharpness import RECORD, SAILSharpness, hessian_product
from lethebench.prompts import Prompt, Role
from lethebench.sampler import prepare, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=4.0, height=32, width=32)
TEXTS = ("a red star", "a blue circle in a city", "a striped captain", "")
KEYS = [ImageKey("test@1", Prompt(str(i), t, Role.NEUTRAL, str(i)), 0) for i, t in enumerate(TEXTS)]


def batch_of(model, keys=KEYS):
    return prepare(model, keys, SETTINGS)


def watched(model, hooks=(), batch_size=4):
    return sample(model, KEYS, SETTINGS, hooks, recorders=[SAILSharpness().recorder()], batch_size=batch_size)


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_sd())


def test_of_a_linear_difference_it_is_the_matrix_twice(model):
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()

    def predict(latents, time, conditioning):
        return Prediction(latents, latents * 0, latents @ matrix.T)

    found = hessian_product(replace(batch_of(model), noise=noise, predict=predict))
    torch.testing.assert_close(found, (noise @ matrix.T @ matrix.T).norm(dim=1))


def test_it_is_the_finite_difference_along_the_difference(model):
    """Of the UNet in float64, which the sampler would cast."""
    batch, unet = batch_of(model), tiny_sd().unet.requires_grad_(False).double()
    embeds = [c.embeds.double() for c in (batch.conditioning.negative, batch.conditioning)]

    def predict(latents, time, conditioning):
        halves = unet(torch.cat([latents] * 2), time, torch.cat(embeds), return_dict=False)[0].chunk(2)
        return Prediction(halves[1], *halves)

    wide = replace(batch, noise=batch.noise.double(), predict=predict)
    first, x = FirstStep(wide), wide.noise
    with torch.no_grad():
        along = first.difference(x)
        wanted = (first.difference(x + 1e-4 * along) - first.difference(x - 1e-4 * along)) / 2e-4
    torch.testing.assert_close(hessian_product(wide), magnitudes(wanted), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd-euler", "sdxl", "sd3", "flux-schnell", "flux-dev"])
def test_watching_changes_no_bit_and_batches_do_not_matter(name):
    model = wrap(PIPELINES[name]())
    together, singly = watched(model), watched(model, batch_size=1)
    assert np.array_equal(together.latents, sample(model, KEYS, SETTINGS).latents)
    found = together.recorded[RECORD]
    assert found.shape == (4, 1) and (found[:3] > 0).all()
    if name != "sdxl":  # whose unconditional embedding is zeros, not the empty prompt's
        assert found[3] < 1e-3 * found[:3].max()
    np.testing.assert_allclose(found[:3], singly.recorded[RECORD][:3], rtol=1e-3)


def test_what_a_method_changes_is_seen(model):
    class Empty(SamplerHooks):
        def start(self, batch):
            return replace(
                batch, conditioning=batch.conditioning.with_embeds(batch.conditioning.negative.embeds)
            )

    assert (watched(model, [Empty()]).recorded[RECORD] < 1e-6).all()


def test_nothing_recorded_is_no_value_and_wrong_shapes_are_one_clear_error():
    pictures = [(p, np.zeros((64, 64, 3), np.uint8)) for p in trained("verbatim")[:2]]
    assert np.isnan(SAILSharpness().measure(shard(pictures))["sail_sharpness"]).all()
    with pytest.raises(ValueError, match=r"sail-sharpness: recorded 'sail_sharpness' must be \[n, 1\]"):
        SAILSharpness().measure(shard(pictures, recorded={RECORD: np.zeros((2, 2))}))
