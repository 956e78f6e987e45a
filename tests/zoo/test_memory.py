"""Memory estimates against what is really allocated, and against known sizes."""

from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_pipelines import CLIP_LENGTH, T5_LENGTH, seeded, tiny_flux, tiny_sd
from torch.profiler import ProfilerActivity, profile

from lethebench.finetuning import LoraSettings
from lethebench.finetuning.lora import injected
from lethebench.memory import (
    GB,
    DryRun,
    Estimate,
    Outline,
    _empty,
    lora,
    outline,
    sampling,
    stored_parameters,
    uniforget,
    weights,
)
from lethebench.methods.uniforget import UniForget
from lethebench.methods.uniforget.fit import backward, gate_of
from lethebench.methods.uniforget.masks import MaskParameters, NoisyGates
from lethebench.pruning import find_sites
from lethebench.registry import MODELS
from lethebench.sampler import Chain, encode_prompts
from lethebench.specs import SamplerSettings
from lethebench.unlearning import NeutralBatches
from lethebench.zoo import LoadSettings, find_model, wrap

SETTINGS = SamplerSettings(num_inference_steps=2, guidance_scale=0.0, height=64, width=64)
FACTOR = 1.05
"""How far the estimate may be from what is measured, either way."""


def scaled_flux():
    """FLUX with 2 + 4 blocks of 4 heads, 256 image tokens."""
    pipe = tiny_flux()
    with seeded(3):
        pipe.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
    return pipe


def outline_of(model):
    parts = {k: v for k, v in model.pipe.components.items() if isinstance(v, torch.nn.Module)}
    counts = {k: sum(p.numel() for p in v.parameters()) for k, v in parts.items()}
    return Outline(
        model.entry, counts, model.denoiser.config, model.vae.config, CLIP_LENGTH, T5_LENGTH, embedding=0
    )


def allocated(work):
    """The most bytes that torch's allocator held at a time beyond what it held before.

    With one thread: convolutions take room for each of several.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
    finally:
        torch.set_num_threads(threads)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_uniforget_takes_what_was_told(checkpointing):
    method = UniForget(batch_size=3, chain_steps=2, prompts=3, dtype="model")
    model = wrap(scaled_flux(), loading=LoadSettings(checkpointing=checkpointing))
    dry = partial(DryRun, outline_of(model), SETTINGS)
    estimate = uniforget(dry, "float32", model.loading, method=method)
    batches = NeutralBatches(model, ["a red star"] * 3, SETTINGS, 3, torch.Generator().manual_seed(0))
    masks = MaskParameters(find_sites(model.denoiser, method.kinds), method.init, model.device)
    batches.final(0)
    gates = NoisyGates(model.denoiser, masks, gate_of(method), 0, images=3)
    measured = allocated(lambda: backward(method, masks, gates, batches, 0))
    told = estimate.at(3) - sum(estimate.weights.values())
    print(
        f"\nUniForget, checkpointing {checkpointing}: told {told / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB"
    )
    assert measured / FACTOR < told < measured * FACTOR


def test_a_prediction_and_a_decoding_take_what_was_told():
    model = wrap(scaled_flux())
    estimate = sampling(DryRun(outline_of(model), SETTINGS, "float32"), batch=2)
    with torch.no_grad():
        chain = Chain(model, encode_prompts(model, ["a red star"] * 2, SETTINGS), SETTINGS)
        start = chain.initial(torch.zeros(2, 256, 16))
        predicted = allocated(lambda: chain.predict(0, start))
        decoded = allocated(lambda: model.pipe.vae.decode(torch.zeros(2, 4, 32, 32)))
    print(f"\nprediction: told {2 * estimate.image / 1e6:.2f} MB, measured {predicted / 1e6:.2f} MB")
    assert predicted / FACTOR < 2 * estimate.image < predicted * FACTOR
    assert decoded / FACTOR < estimate.once < decoded * FACTOR


def test_a_step_of_fine_tuning_takes_what_was_told():
    settings = LoraSettings(batch_size=2, rank=4)
    model = wrap(scaled_flux())
    estimate = lora(outline_of(model), SETTINGS, "float32", settings)
    chain = Chain(model, encode_prompts(model, ["a red star"] * 2, SETTINGS), SETTINGS)
    start = chain.initial(torch.zeros(2, 256, 16))
    with torch.enable_grad(), injected(model, settings, lambda _: torch.Generator()) as layers:
        measured = allocated(lambda: chain.predict(0, start).combined.square().mean().backward())
        trained = sum(t.nbytes for layer in layers.values() for t in (layer.A, layer.B))
    told = 2 * estimate.image
    print(f"\nLoRA: told {told / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert estimate.state == 4 * trained
    assert measured / FACTOR < told < measured * FACTOR


@pytest.mark.parametrize("name", ["sd-2.1", "sdxl", "sd3.5-medium", "flux-schnell"])
def test_tables_are_those_of_the_configurations(name):
    found = outline(find_model(name))
    assert (
        sum(p.numel() for p in _empty(found).parameters())
        == found.parameters[DryRun(found, SETTINGS, "float32").name]
    )


def test_weights_by_type_and_packing():
    found = outline(find_model("flux-schnell"))
    half = weights(found, "bfloat16")
    assert half["transformer"] == 23_782_357_120 and half["vae"] == 4 * 83_819_683
    small = weights(found, "bfloat16", LoadSettings(quantise="int8"))
    least = weights(found, "bfloat16", LoadSettings(quantise="nf4"))
    assert 0.5 < small["transformer"] / half["transformer"] < 0.51
    assert 0.28 < least["text_encoder_2"] / half["text_encoder_2"] < 0.31
    assert small["text_encoder"] == half["text_encoder"] and small["vae"] == half["vae"]


def test_flux_on_one_80_gb_gpu():
    """12 billion parameters: the fit has room for a batch of one, and for many with recomputed activations."""
    entry = find_model("flux-schnell")
    dry = partial(DryRun, outline(entry), entry.sampler)
    estimate = uniforget(dry, "bfloat16", LoadSettings(checkpointing=True))
    assert estimate.total < 60 * GB and estimate.largest_batch(79 * GB) >= 16
    assert set(estimate.weights) == {"transformer", "text_encoder", "text_encoder_2", "vae"}


def test_headers_are_read_and_nothing_else(tmp_path):
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "tiny")
    file = tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    assert stored_parameters(file) == sum(p.numel() for p in pipe.unet.parameters())
    found = outline(find_model(str(tmp_path / "tiny")))
    assert set(found.parameters) == {"unet", "text_encoder", "vae"} and found.clip == CLIP_LENGTH


def test_the_largest_batch():
    estimate = Estimate("x", 2, {"a": 10}, 5, 20, once=50)
    assert (estimate.total, estimate.at(3)) == (65, 75)
    assert [estimate.largest_batch(room) for room in (64, 65, 74, 75, 116)] == [0, 2, 2, 3, 5]


def test_a_batch_that_doctor_names_fits_and_one_more_does_not():
    from lethebench.memory import DryRun, largest_batch, outline, sampling
    from lethebench.specs import SamplerSettings

    dry = DryRun(outline(find_model("sd-1.4")), SamplerSettings(height=512, width=512), "bfloat16")
    for room in (4 * GB, 5 * GB, 6 * GB, 20 * GB):
        most = largest_batch(dry, room)
        assert most >= 1 and sampling(dry, batch=most).total <= room < sampling(dry, batch=most + 1).total


def test_every_published_model_has_its_table():
    for _, entry in MODELS.items():
        assert entry.builtin or {"text_encoder", "vae"} < set(entry.parameters)
