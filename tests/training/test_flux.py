"""mini-flux is trained, stopped, resumed, exported, loaded and carded, all in small."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_world import AUTOENCODER

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.training import Job, parts, train_all
from lethebench.training.autoencoder import build_autoencoder
from lethebench.training.export import export, sums_of
from lethebench.training.flux import (
    Examples,
    FluxRecipe,
    Velocity,
    build_transformer,
    guidance_loss,
    packed,
    spread_times,
    train_flux,
)

CPU = torch.device("cpu")
FLUX = FluxRecipe(
    heads=2,
    rotary=(2, 2, 4),
    dual=1,
    single=2,
    text_width=16,
    text_layers=1,
    text_heads=2,
    steps=4,
    steps_again=2,
    distil_steps=4,
    batch=4,
    compiled=False,
    inference_steps=2,
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """An untrained autoencoder of four channels."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    model = build_autoencoder(AUTOENCODER)
    model.register_to_config(scaling_factor=1.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(world, cache, vae, tmp_path_factory) -> Path:
    """Both phases without interruption."""
    folder = tmp_path_factory.mktemp("flux")
    torch.set_num_threads(1)
    train_flux(world, FLUX, folder, vae, cache, CPU)
    return folder


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory) -> Path:
    """The exported folder."""
    target = tmp_path_factory.mktemp("weights") / "mini-flux"
    export(trained / "pipeline", target, FLUX)
    return target


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "pipeline").rglob("*.safetensors"))
    }


class Stopped(Exception):
    pass


def test_a_stopped_training_resumes_to_the_same_bits(trained, world, cache, vae, tmp_path):
    """Stopped in phase one, then in phase two, then run to its end."""
    stops = []
    for folder, at in (("flow-run", 3), ("guidance-run", 2)):

        def stop(step: int, at: int = at, folder: str = folder) -> None:
            if step == at and (tmp_path / folder / "checkpoint.safetensors").exists():
                raise Stopped

        with pytest.raises(Stopped):
            train_flux(world, FLUX, tmp_path, vae, cache, CPU, checkpoint_seconds=0, on_checkpoint=stop)
        stops.append(sorted(path.name for path in tmp_path.iterdir()))
    assert stops == [["flow-run"], ["flow-run", "guidance-run"]]
    train_flux(world, FLUX, tmp_path, vae, cache, CPU)
    assert digests(tmp_path) == digests(trained)
    assert len(digests(tmp_path)) == 4  # vae, transformer, two text encoders


def test_finished_training_is_not_repeated(trained, world, cache, vae):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    record = train_flux(world, FLUX, trained, vae, cache, CPU)
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()} == before
    assert (record["steps"], record["guidance"]["steps"]) == (6, 4)
    assert set(record["parameters"]) == {"transformer", "text_encoder", "text_encoder_2"}


def test_other_defaults_need_no_training_and_another_distillation_only_itself(
    trained, world, cache, vae, tmp_path
):
    folder = tmp_path / "flux"
    shutil.copytree(trained, folder)
    before = digests(folder)
    teacher = (folder / "flow-run" / "checkpoint.safetensors").read_bytes()
    options = (folder, vae, cache, CPU)
    train_flux(world, replace(FLUX, inference_steps=5, guidance_scale=2.0), *options)
    assert digests(folder) == before
    record = train_flux(world, replace(FLUX, distil_steps=2), *options)
    assert record["guidance"]["steps"] == 2
    changed = [name for name, value in digests(folder).items() if value != before[name]]
    assert changed == ["pipeline/transformer/diffusion_pytorch_model.safetensors"]
    assert (folder / "flow-run" / "checkpoint.safetensors").read_bytes() == teacher


def test_every_part_learnt(trained, world):
    """The transformer starts with zero output, so a part that no gradient reached would be as it was made."""
    from diffusers import FluxPipeline

    from lethebench.training.flux import build_text_encoders

    pipe = FluxPipeline.from_pretrained(trained / "pipeline")
    text = build_text_encoders(FLUX, world.vocabulary_captions())
    made = {
        "transformer": build_transformer(FLUX, 4),
        "text_encoder": text.clip,
        "text_encoder_2": text.t5,
    }
    for name, model in made.items():
        now = getattr(pipe, name).state_dict()
        moved = [key for key, value in model.state_dict().items() if not torch.equal(value, now[key])]
        assert len(moved) > 0.8 * len(now), name
    start = made["transformer"].state_dict()["time_text_embed.guidance_embedder.linear_1.weight"]
    learnt = pipe.transformer.state_dict()["time_text_embed.guidance_embedder.linear_1.weight"]
    assert not torch.equal(start, learnt)


def test_export_is_float16_and_loads_as_float32(trained, weights):
    from safetensors.torch import load_file

    from lethebench.zoo import load_model

    for path in weights.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}
    assert sums_of(weights) == json.loads((weights / "weights.json").read_text())
    model = load_model(str(weights))
    assert model.family == "flux"
    parts_of = (model.denoiser, model.vae, *model.text_encoders)
    assert {p.dtype for part in parts_of for p in part.parameters()} == {torch.float32}
    assert [type(t).__name__ for t in model.tokenizers] == ["CLIPTokenizer", "T5Tokenizer"]
    assert [t.model_max_length for t in model.tokenizers] == [32, 32]
    sampler = model.entry.sampler
    assert (sampler.num_inference_steps, sampler.guidance_scale) == (2, 3.0)
    assert (sampler.height, sampler.width) == (64, 64)


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (3, 3.5)])
def test_it_draws_what_the_pipeline_draws(weights, world, steps, guidance):
    from lethebench.sampler import initial_latents, sample
    from lethebench.zoo import load_model

    model = load_model(str(weights))
    asked = {"scheduler": "flow-euler", "num_inference_steps": steps, "guidance_scale": guidance}
    settings = model.entry.sampler.model_copy(update=asked)
    keys = [ImageKey("test", prompt, 0) for prompt in list(world)[:3]]
    drawn = sample(model, keys, settings)
    latents = model.pipe(
        [key.prompt.text for key in keys],
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=32,
        latents=initial_latents(model, keys, settings),
        output_type="latent",
    ).images
    assert drawn.images.shape == (3, 64, 64, 3)
    assert torch.allclose(packed(torch.from_numpy(drawn.latents)), latents, atol=1e-4)


def test_an_untrained_transformer_predicts_nothing_and_sees_exact_times():
    from diffusers import FluxTransformer2DModel

    before = torch.random.get_rng_state()
    transformer = build_transformer(FLUX, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(transformer, FluxTransformer2DModel)
    seen = []
    transformer.time_text_embed.register_forward_pre_hook(lambda _, given: seen.extend(given[:2]))
    velocity = Velocity(transformer, FLUX, 64)
    times, guidance = torch.tensor([0.3337, 0.9991]), torch.tensor([1.0, 3.337])
    with torch.autocast("cpu", torch.bfloat16):
        text = (torch.randn(2, 16), torch.randn(2, 32, 16))
        found = velocity(torch.randn(2, 64, 16), times, guidance, text)
    assert found.dtype == torch.float32
    assert not found.any()
    assert torch.equal(seen[0], times * 1000)
    assert torch.equal(seen[1], guidance * 1000)


def test_times_are_logit_normal_in_strata():
    times = spread_times(16, torch.Generator().manual_seed(0), 1.4)
    places = torch.special.ndtr(torch.logit(times) / 1.4) * 16
    assert sorted(places.floor().tolist()) == list(range(16))
    assert times.tolist() != sorted(times.tolist())


def test_the_student_learns_the_guided_velocity():
    """Whatever the teacher says with text (2) and without (1), the target is 1 + g (2 - 1)."""
    noisy, times = torch.zeros(4, 64, 16), torch.full((4,), 0.5)
    given: dict[str, torch.Tensor] = {}

    class Text:
        def ids(self, captions):
            return (torch.zeros(len(captions), 2), torch.zeros(len(captions), 2))

        def embed(self, ids):
            return (torch.ones(len(ids[0]), 3), torch.ones(len(ids[0]), 2, 3))

    def teacher(twice, times, guidance, text):
        assert len(twice) == len(times) == len(text[0]) == len(text[1]) == 8
        assert guidance.tolist() == [1.0] * 8
        return torch.cat([torch.full_like(noisy, 2.0), torch.full_like(noisy, 1.0)])

    def student(noisy, times, guidance, text):
        given["guidance"] = guidance
        return (1 + guidance)[:, None, None].expand_as(noisy)

    def draw(step, generator):
        return Examples(noisy, times, noisy, (torch.zeros(4, 2), torch.zeros(4, 2)))

    loss = guidance_loss(FLUX, draw, teacher, student, Text())
    assert float(loss(0, torch.Generator().manual_seed(0))) == pytest.approx(0.0, abs=1e-10)
    assert 1 <= float(given["guidance"].min()) < float(given["guidance"].max()) <= 5


def test_without_an_autoencoder_it_says_what_to_do(world, cache, tmp_path):
    with pytest.raises(UserError, match="lethe train --only autoencoder"):
        train_flux(world, FLUX, tmp_path, tmp_path / "none", cache, CPU)


def test_everything_by_one_call(world, tmp_path):
    """On the shipped autoencoder, since this folder has none."""
    assert parts(["mini-flux", "flux-card"]) == ["flux", "flux-card"]
    assert Job(tmp_path, tmp_path).vae.parent.name == "mini-sd"
    options = {"scale": 0.5, "threads": 1, "world": world, "flux": replace(FLUX, inference_steps=1)}
    train_all(["mini-flux", "flux-card"], tmp_path, **options)
    weights = tmp_path / "weights" / "mini-flux"
    card = json.loads((weights / "card.json").read_text())
    half = FLUX.scaled(0.5)
    assert card["diffusion"]["steps"] == half.steps + half.steps_again == 4
    assert card["autoencoder"]["unseen_rms"] <= 0.03
    assert card["measured"]["images"] == len(world)
    assert card["measured"]["sampler"]["scheduler"] == "flow-euler"
    rows = card["measured"]["by_steps"]
    assert [(row["steps"], row["guidance"]) for row in rows] == [
        (4, 1.0),
        (4, 3.0),
        (8, 1.0),
        (8, 3.0),
        (20, 1.0),
        (20, 3.0),
    ]
    text = (weights / "MODEL_CARD.md").read_text()
    assert text.startswith("# mini-flux\n")
    for heading in ("## Training", "## What it memorized", "## By number of copies", "## By number of steps"):
        assert heading in text
    assert (tmp_path / "sheets" / "mini-flux.png").stat().st_size > 1000
