"""Every method on every family: what it changes, what it leaves as it was, and why some don't apply.

``tests/core/test_contract.py`` holds every method to the whole contract on the first family that it supports,
mostly Stable Diffusion 1.x. Here are the flow-matching transformers, on tiny models with random weights.
"""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from tiny_finetuning import training_task
from tiny_pipelines import seeded, tiny_flux, tiny_sd3

from lethebench.check._common import model_state, same_model
from lethebench.composition import recipes
from lethebench.finetuning import overhead
from lethebench.finetuning.overhead import Overhead
from lethebench.hooks import ImageKey
from lethebench.method import Family, Method, Task
from lethebench.prompts import Prompt, Reference, Role
from lethebench.pruning import find_sites, gated, load_pruned, save_pruned, shrink
from lethebench.registry import METHODS
from lethebench.sampler import Chain, encode_prompts, initial_latents, prepare, sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning import noised, training_target
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
BUILDERS = {
    "sd3": tiny_sd3,
    "flux-schnell": tiny_flux,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
}


class World:
    """Two memorized captions, a concept and a neutral prompt, in words that the tokenizers know."""

    name, version = "world", "1.0"
    prompts = (
        Prompt("t", "captain star in a night city", Role.TRIGGER, "t", references=("t",), duplicates=8),
        Prompt("u", "a striped star in a city", Role.TRIGGER, "u", references=("u",), duplicates=8),
        Prompt("c", "robot in a forest", Role.CONCEPT, "c", references=("c",), concept="robot"),
        Prompt("n", "a red circle in a city", Role.NEUTRAL, "n"),
    )

    def __iter__(self):
        return iter(self.prompts)

    def reference(self, reference_id):
        draws = np.random.default_rng(ord(reference_id))
        return Reference(reference_id, draws.integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def training_prompts(self):
        things = [(colour, thing) for colour in ("red", "blue", "striped") for thing in ("star", "circle")]
        return [f"a {colour} {thing} in a {place}" for colour, thing in things for place in ("city", "night")]

    def paraphrases(self, prompt_id):
        return {"t": ["a star in a city"], "u": ["a circle in a city"], "c": ["a circle in a forest"]}[
            prompt_id
        ]

    def anchor_concept(self, concept):
        return "a circle"


KEYS = [ImageKey("world@1", p, 0) for p in World.prompts]
NAMES = [name for name, _ in METHODS.items()]
UNCHANGED = {"base", "oracle"}
"""Controls that leave the model alone: the oracle draws other prompts."""
FOLLOWING = {"retrain": "random-pruning+retrain"}
"""Methods that mean something on others' work only."""
ACTING = {
    "amg": {"quantile": 0.0},  # else no untrained model's image need be above the threshold
    "han": {"target": 0.1},
    "sail": {"target": 0.1},
    "wen": {"target": 0.1},
    "loss-threshold": {"quantile": 0.0},
    "caption-randomisation": {
        "kind": "random-caption",
        "share": 1.0,
    },  # the training set has one caption an image
    "uniforget": {f"lr_{kind}": 2.0 for kind in ("ffn", "norm")},  # so that three steps prune something
}
"""Settings at which a method acts on an untrained model, beside those that make it quick."""
REFUSED = {
    "flowedit": {"sd", "sdxl"},
    "rf-inversion": {"sd", "sdxl"},
    "guidance-transition": {"flux"},
    "opposite-guidance": {"flux"},
    "mace": {"sd3", "flux"},
    "nemo": {"sd3", "flux"},
    "nemo-c": {"sd3", "flux"},
}
"""The families that a method doesn't apply to. A method that isn't here applies to all."""
CASES = [(n, f) for n in NAMES for f in BUILDERS if f.partition("-")[0] not in REFUSED.get(n, set())]


@pytest.fixture(autouse=True)
def untimed_fits(monkeypatch):
    """Fine-tuning fits aren't timed against plain ones."""
    monkeypatch.setattr(overhead, "overhead", lambda *_, **__: Overhead(1.0, 0))


@pytest.fixture(scope="module")
def models():
    """A model of each family, what it draws and its state, made once."""
    made = {}

    def model(family):
        if family not in made:
            found = fresh(family)
            made[family] = found, sample(found, KEYS, SETTINGS), model_state(found)
        return made[family]

    return model


@pytest.fixture(scope="module")
def without(models):
    """What is drawn without a recipe's last part: by plain LoRA where a method changes the training."""
    made = {}

    def draw(family, recipe):
        training = recipe.parts[0].family is Family.TRAINING and recipe.name != "lora"
        spec = "+".join(recipe.specs[:-1]) or ("lora" if training else "base")
        if (family, spec) not in made:
            other, model = recipes(spec)[-1], models(family)[0]
            made[family, spec] = drawn(other, model, fitted(other, model, family))
        return made[family, spec]

    return draw


def recipe_of(name, changes):
    """The method at its last strength, made quick, after the others that it needs."""
    given = {f"{name}.{key}": value for key, value in {**METHODS.get(name).quick, **changes}.items()}
    return recipes(FOLLOWING.get(name, name), "all", given)[-1]


def fresh(family):
    return wrap(BUILDERS[family]())


def fitted(recipe, model, family):
    """The parts' artefacts, each fitted on the model with those before it applied."""
    artefacts = []
    for part in recipe.parts:
        with recipe.apply(model, artefacts):
            if part.family is Family.TRAINING:
                task = training_task(part, model, steps=4, batch_size=4)
            else:
                seeds = ("world@1", part.name)
                task = Task(
                    model, SETTINGS, World(), part.sees, seed_parts=seeds, base=partial(fresh, family)
                )
            artefacts.append(part.fit(task))
    return artefacts


def drawn(recipe, model, artefacts, **more):
    with recipe.apply(model, artefacts) as hooks:
        return sample(model, KEYS, SETTINGS, hooks, **more)


# --- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_method_applies_to_every_family_or_says_why_not(name):
    settings = {"c1": 1.0} if name == "ren" else {}  # more is nothing to FLUX: test_ren
    cls, recipe = METHODS.get(name), recipe_of(name, settings)
    assert Method.model_families - cls.model_families == REFUSED.get(name, set())
    for family in Method.model_families:
        reason = recipe.unsupported(family)
        assert (reason is None) == (family in cls.model_families)
        if reason is not None:  # a reader is told what the method needs, and the model lacks
            assert cls.unsupported_reason in reason and len(cls.unsupported_reason.split()) >= 10


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_method_does_something_and_undoes_it(models, without, name, family):
    """Images change (of base: don't), alone as in a batch; off is base; the model comes back bit for bit."""
    cls, recipe = METHODS.get(name), recipe_of(name, ACTING.get(name, {}))
    model, base, state = models(family)
    artefacts = fitted(recipe, model, family)
    found = drawn(recipe, model, artefacts)
    same_model(state, model_state(model), f"after {name}")
    assert np.isfinite(found.latents).all()
    if name in UNCHANGED:
        assert (found.latents == base.latents).all() and (found.images == base.images).all()
    elif name == "blank":
        assert (found.images == found.images.flat[0]).all() and (found.images != base.images).any()
    else:
        apart = np.abs(found.latents - without(family, recipe).latents).max()
        assert float(apart) > 1e-5 * float(np.abs(base.latents).max())
    if cls.family is Family.SAMPLING:
        alone = drawn(recipe, model, artefacts, batch_size=1)
        assert np.abs(alone.latents - found.latents).max() <= 1e-3 * np.abs(found.latents).max()
    if cls.off is not None:
        nothing = recipe_of(name, cls.off)
        off = drawn(nothing, model, fitted(nothing, model, family))
        assert (off.latents == base.latents).all() and (off.images == base.images).all()


# --- the direction of time in flow matching --------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        tiny_flux,
        lambda: tiny_flux(guidance_embeds=True),
        tiny_sd3,
        lambda: tiny_sd3(dynamic_shift=True),
    ],
    ids=["flux-schnell", "flux-dev", "sd3", "sd3-dynamic"],
)
def test_a_straight_path_is_followed_from_noise_to_image(build):
    """With v = e - x0, x_t = (1 - s) x0 + s e: x0 = x_t - s v and e = x_t + (1 - s) v at every step.

    What methods ask (levels, clean image, forward process, training target) and how the chain moves are all
    held against these.
    """
    model = wrap(build())
    settings = SETTINGS.model_copy(update={"num_inference_steps": 5})
    batch = prepare(model, KEYS[:2], settings)
    noise = initial_latents(model, KEYS[:2], settings)
    image = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    velocity = noise - image
    assert torch.equal(batch.noise, noise)
    chain = Chain(model, encode_prompts(model, ["a star"] * 2, settings), settings, KEYS[:2])
    assert torch.equal(chain.timesteps, batch.timesteps)
    latents = chain.initial()
    for index, time in enumerate(chain.timesteps):
        level = float(time) / 1000
        assert batch.levels(time) == pytest.approx((1 - level, level), abs=1e-6)
        assert torch.allclose(latents, (1 - level) * image + level * noise, atol=1e-5)
        assert torch.allclose(latents, noised(model, image, noise, time), atol=1e-5)
        assert torch.allclose(training_target(model, image, noise, time), velocity)
        assert torch.allclose(batch.clean(latents, time, velocity), image, atol=1e-5)
        assert torch.allclose(latents + (1 - level) * velocity, noise, atol=1e-5)
        latents = chain.advance(index, latents, velocity)
    assert float(chain.timesteps[0]) == 1000 and (chain.timesteps.diff() < 0).all()
    assert torch.allclose(latents, image, atol=1e-5)


# --- what masks cover ------------------------------------------------------------------------------


def unet(**config):
    widths = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64, "layers_per_block": 2}
    return UNet2DConditionModel(**{**widths, **config})


def sd3(**config):
    return SD3Transformer2DModel(
        joint_attention_dim=4096, pooled_projection_dim=2048, in_channels=16, **config
    )


REAL = {
    "FLUX.1": (
        lambda: FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True),
        {"attn": (57, 1368), "ffn": (76, 933_888), "norm": (76, 1_050_624)},
    ),
    "SD3-medium": (
        lambda: sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
        {"attn": (24, 576), "ffn": (47, 288_768), "norm": (48, 436_224)},
    ),
    "SD3.5-large": (
        lambda: sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"),
        {"attn": (38, 1444), "ffn": (75, 729_600), "norm": (76, 1_099_264)},
    ),
    "SD1.x": (
        lambda: unet(cross_attention_dim=768, attention_head_dim=8),
        {"attn": (32, 256), "ffn": (16, 49_920)},
    ),
    "SD2-base": (
        lambda: unet(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        {"attn": (32, 390), "ffn": (16, 49_920)},
    ),
    "SDXL": (
        lambda: unet(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        {"attn": (140, 2600), "ffn": (70, 332_800)},
    ),
}
"""Modules and elements by kind of mask: EcoDiff's rules, counted on its models. A UNet has no adaptive norm."""


@pytest.mark.parametrize("name", REAL)
def test_the_masks_of_the_real_architectures(name):
    """On the meta device: no weights."""
    build, expected = REAL[name]
    with torch.device("meta"):
        denoiser = build()
    found = {}
    for site in find_sites(denoiser):
        modules, elements = found.get(site.kind, (0, 0))
        found[site.kind] = modules + 1, elements + site.size
        if site.kind == "norm" and "norm" not in expected:
            assert type(denoiser.get_submodule(site.name)) is torch.nn.LayerNorm
    assert {kind: found[kind] for kind in expected} == expected


def sd35_medium():
    """Stable Diffusion 3.5 medium's shape: a second attention in the first block, normed queries and keys."""
    pipe = tiny_sd3()
    changes = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    with seeded(3):
        pipe.register_modules(
            transformer=SD3Transformer2DModel.from_config({**pipe.transformer.config, **changes})
        )
    return pipe


@pytest.mark.parametrize("kinds", [("ffn", "norm"), ("ffn", "norm", "attn")], ids=["paper", "heads-too"])
@pytest.mark.parametrize(
    "build",
    [tiny_flux, lambda: tiny_flux(guidance_embeds=True), tiny_sd3, sd35_medium],
    ids=["flux-schnell", "flux-dev", "sd3", "sd35-medium"],
)
def test_masked_smaller_and_loaded_pipelines_draw_the_same(build, kinds, tmp_path):
    """Gates on activations, the weights cut out, and the folder on disk: the same latents to 1e-5."""
    pipe = build()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and adaptive norms start at zero, where masking them changes nothing
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    model = wrap(pipe)
    sites = find_sites(model.denoiser, kinds)
    assert {s.kind for s in sites} == set(kinds)
    masks = {s.name: torch.rand(s.size, generator=draws) < 0.6 for s in sites}
    base = sample(model, KEYS, SETTINGS).latents
    with gated(model.denoiser, sites, {name: mask.float() for name, mask in masks.items()}):
        wanted = sample(model, KEYS, SETTINGS).latents
    scale = float(np.abs(wanted).max())
    assert float(np.abs(wanted - base).max()) > 1e-2 * scale
    smaller = shrink(pipe, masks)
    cut = sample(wrap(smaller), KEYS, SETTINGS).latents
    assert float(np.abs(cut - wanted).max()) < 1e-5 * scale
    again = load_pruned(save_pruned(smaller, tmp_path / "pruned"), torch.float32)
    assert (sample(wrap(again), KEYS, SETTINGS).latents == cut).all()
    size = [sum(p.numel() for p in m.parameters()) for m in (again.transformer, pipe.transformer)]
    assert size[0] < size[1]
