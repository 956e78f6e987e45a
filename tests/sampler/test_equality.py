"""The loop equals the diffusers pipelines' own output, and so does the chain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny_pipelines import PIPELINES, T5_LENGTH, tiny_flux, tiny_sd

from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.prompts import Prompt, Role
from lethebench.sampler import (
    Chain,
    encode_prompts,
    image_size,
    initial_latents,
    pack_latents,
    sample,
    unpack_latents,
)
from lethebench.sampler._families import token_limit
from lethebench.specs import SamplerSettings
from lethebench.zoo import load_model, wrap
from lethebench.zoo._files import WEIGHTS

TOLERANCE = 1e-4
TEXTS = ("a red star", "a striped blue circle in a night city", "a robot in a forest")


@pytest.fixture(scope="module")
def table():
    """The largest differences to diffusers' own output, printed as a table at the end (``pytest -s``)."""
    rows = []
    yield lambda *row: rows.append(row)
    print(f"\n{'pipeline':<32} {'guidance':>8} {'max |difference| of latents':>28}")
    for name, guidance, worst in rows:
        print(f"{name:<32} {guidance:>8} {worst:>28.1e}")


def keys(texts=TEXTS):
    return [ImageKey("test@1", Prompt(f"p{i}", t, Role.NEUTRAL, f"c{i}"), i) for i, t in enumerate(texts)]


def settings(guidance, **changes):
    return SamplerSettings(
        **{"num_inference_steps": 4, "guidance_scale": guidance, "height": 16, "width": 16, **changes}
    )


def of_diffusers(model, wanted, given, **arguments):
    """What the pipeline itself makes of the same latents, in the VAE's layout."""
    height, width = image_size(model, given)
    if model.family in ("sd3", "flux"):
        arguments["max_sequence_length"] = token_limit(model.tokenizers[-1], 512)
    found = model.pipe(
        [k.prompt.text for k in wanted],
        num_inference_steps=given.num_inference_steps,
        guidance_scale=given.guidance_scale,
        height=height,
        width=width,
        latents=initial_latents(model, wanted, given),
        output_type="latent",
        **arguments,
    ).images
    return unpack_latents(model, found, given).numpy()


def difference(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_loop_equals_pipeline(name, guidance, table):
    model, given = wrap(PIPELINES[name]()), settings(guidance)
    ours = sample(model, keys(), given, batch_size=3).latents
    worst = difference(ours, of_diffusers(model, keys(), given))
    table(name, guidance, worst)
    assert worst <= TOLERANCE


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl", "sd3", "flux-schnell", "flux-dev"])
def test_a_saved_pipeline_draws_what_diffusers_draws(name, tmp_path, table):
    """Saved to disk, loaded by the path that a user's weights take."""
    PIPELINES[name]().save_pretrained(tmp_path / name)
    given = settings(0.0 if name == "flux-schnell" else 5.0)
    model, own = load_model(str(tmp_path / name)), load_model(str(tmp_path / name))
    worst = difference(sample(model, keys(), given).latents, of_diffusers(own, keys(), given))
    table(f"{type(own.pipe).__name__} ({name})", given.guidance_scale, worst)
    assert worst <= TOLERANCE


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev"])
def test_the_comparison_can_fail(name):
    """Prompt, guidance scale and noise all move the tiny pipelines far more than the tolerance."""
    model = wrap(PIPELINES[name]())
    base = sample(model, keys(), settings(5.0)).latents
    assert difference(base, sample(model, keys(), settings(2.0)).latents) > 50 * TOLERANCE
    assert (
        difference(base, sample(model, keys(("a robot", *TEXTS[1:])), settings(5.0)).latents) > 50 * TOLERANCE
    )
    assert difference(base[0], base[1]) > 50 * TOLERANCE


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-schnell"])
def test_images_equal_pipeline(name):
    model, given = wrap(PIPELINES[name]()), settings(3.0)
    latents = initial_latents(model, keys(), given)
    longest = {"max_sequence_length": T5_LENGTH} if model.family in ("sd3", "flux") else {}
    images = model.pipe(
        list(TEXTS),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        latents=latents,
        output_type="np",
        **longest,
    ).images
    ours = sample(model, keys(), given).images
    assert ours.dtype == np.uint8 and ours.shape == (3, 16, 16, 3)
    assert np.abs(ours.astype(int) - (images * 255).round().astype(int)).max() <= 1


def test_flux_with_true_guidance_equals_pipeline():
    """A negative prompt given by a hook: FLUX's optional classifier-free guidance."""

    class Negative(SamplerHooks):
        def conditioning(self, conditioning, keys):
            return replace(conditioning, negative=encode_prompts(model, ["a forest"] * len(keys), given))

    model, given = wrap(tiny_flux()), settings(2.5)
    ours = sample(model, keys(), given, [Negative()])
    wanted = of_diffusers(model, keys(), given, true_cfg_scale=2.5, negative_prompt=["a forest"] * 3)
    assert difference(ours.latents, wanted) <= TOLERANCE
    assert difference(ours.latents, sample(model, keys(), given).latents) > 50 * TOLERANCE
    assert np.isfinite(ours.noise_norm).all()


@pytest.mark.parametrize(("name", "scheduler"), [("sd-pndm", "ddim"), ("sd", "euler"), ("sdxl", "ddim")])
def test_scheduler_by_name_equals_pipeline_with_it(name, scheduler):
    cls = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[scheduler]
    model, given = wrap(PIPELINES[name]()), settings(4.0, scheduler=scheduler)
    ours = sample(model, keys(), given).latents
    model.pipe.scheduler = cls.from_config(model.pipe.scheduler.config, clip_sample=False)
    assert difference(ours, of_diffusers(model, keys(), given)) <= TOLERANCE


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize(
    "name", ["sd", "sd-v", "sd-euler", "sdxl", "sd3", "sd3-dynamic", "flux-schnell", "flux-dev"]
)
def test_chain_equals_loop(name, guidance):
    model, given = wrap(PIPELINES[name]()), settings(guidance)
    with torch.no_grad():
        chain = Chain(model, encode_prompts(model, TEXTS, given), given, keys())
        latents = unpack_latents(model, chain.run(chain.initial()), given)
    assert difference(latents, sample(model, keys(), given, batch_size=3).latents) == 0.0


def test_packing_is_undone_by_unpacking():
    model, given = wrap(tiny_flux()), settings(1.0, height=16, width=24)
    spatial = torch.arange(2 * 4 * 8 * 12.0).reshape(2, 4, 8, 12)
    packed = pack_latents(model, spatial, given)
    assert packed.shape == (2, 4 * 6, 16)
    assert torch.equal(packed, model.pipe._pack_latents(spatial, 2, 4, 8, 12))
    assert torch.equal(unpack_latents(model, packed, given), spatial)


def test_bfloat16_stays_near_float32():
    given = settings(3.0)
    full = sample(wrap(tiny_sd()), keys(), given)
    half = wrap(tiny_sd())
    half.pipe.unet.to(torch.bfloat16)
    half.pipe.text_encoder.to(torch.bfloat16)
    half = wrap(half.pipe)
    assert half.dtype is torch.bfloat16
    found = sample(half, keys(), given)
    assert found.latents.dtype == np.float32
    assert 0 < difference(found.latents, full.latents) < 0.02 * np.abs(full.latents).max()


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("name", ["mini-sd", "mini-flux"])
def test_built_in_models_equal_their_pipelines(name, guidance, table):
    if not (WEIGHTS / name / "model_index.json").is_file():
        pytest.skip(f"{name} is not trained yet")
    model = load_model(name)
    given = model.entry.sampler.model_copy(update={"num_inference_steps": 8, "guidance_scale": guidance})
    given = given.model_copy(update={"scheduler": "model"})
    worst = difference(sample(model, keys(), given).latents, of_diffusers(model, keys(), given))
    table(name, guidance, worst)
    assert worst <= TOLERANCE
