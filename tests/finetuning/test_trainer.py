"""LoRA fine-tuning: the loss, the hooks, exactness of resuming, and that everything is put back."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from tiny_finetuning import (
    BUILDERS,
    CAPTIONS,
    SAMPLER,
    Captioned,
    equal,
    examples,
    model,
    train,
)
from tiny_pipelines import tiny_sd

from lethebench.errors import RunError, UserError
from lethebench.finetuning.hooks import TrainingHooks
from lethebench.finetuning.lora import applied_lora, lora_deltas, lora_targets, merged_lora
from lethebench.finetuning.settings import LoraSettings
from lethebench.finetuning.trainer import Training
from lethebench.methods._inserted_words import insert_words
from lethebench.sampler import encode_prompts, unpack_latents
from lethebench.unlearning import prediction
from lethebench.zoo import wrap


class Watching(TrainingHooks):
    """Keeps what it sees."""

    def __init__(self):
        self.batches, self.gradient_list = [], []

    def keep(self, batch):
        self.batches.append(batch)

    def gradients(self, lora, step):
        self.gradient_list.append({n: (m.A.grad.clone(), m.B.grad.clone()) for n, m in lora.items()})


class Dying(TrainingHooks):
    """Stops the training in the middle of a step."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def gradients(self, lora, step):
        if step == self.step:
            self.how()


class InterruptedByTest(Exception):
    pass


def stop():
    raise InterruptedByTest


# --- the loss ---


def encoded_images(found):
    pixels = torch.stack([torch.from_numpy(e.image) for e in examples()]).permute(0, 3, 1, 2) / 127.5 - 1
    vae = found.pipe.vae
    with torch.no_grad():
        z = vae.encode(pixels).latent_dist.mean
    return (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


@pytest.mark.parametrize("family", [*BUILDERS, "sd-v"])
def test_the_loss_is_the_one_written_by_hand(family):
    found = wrap(tiny_sd(prediction_type="v_prediction")) if family == "sd-v" else model(family)
    watching, given = Watching(), examples()
    facts = train(found, watching, given, steps=1, batch_size=4, caption_dropout=0.0).facts
    (batch,) = watching.batches
    order = [given.index(e) for e in batch.examples]
    assert sorted(order) == [0, 1, 2, 3]  # one pass over the examples
    clean, noisy, target = (
        encoded_images(found)[order],
        unpack_latents(found, batch.latents, SAMPLER),
        unpack_latents(found, batch.target, SAMPLER),
    )
    scheduler, times = found.pipe.scheduler, batch.timesteps
    if family in ("sd3", "flux"):
        noise, level = target + clean, (times / 1000).view(-1, 1, 1, 1)
        torch.testing.assert_close(noisy, (1 - level) * clean + level * noise)
    elif family == "sd-v":
        kept = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
        torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, times), atol=1e-4, rtol=1e-4)
    else:
        noise = target
        scheduler = DDPMScheduler.from_config(scheduler.config)  # the samplers' own scale latents otherwise
        torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, times))
    assert 0.7 < float(noise.std()) < 1.3
    conditioning = replace(encode_prompts(found, batch.captions, SAMPLER), negative=None)
    with torch.no_grad():
        expected = prediction(found, batch.latents, times, conditioning, SAMPLER)
    torch.testing.assert_close(batch.prediction, expected, atol=1e-5, rtol=1e-5)
    loss = torch.stack([torch.mean((p - t) ** 2) for p, t in zip(expected, batch.target, strict=True)])
    torch.testing.assert_close(batch.losses, loss, atol=1e-5, rtol=1e-5)
    assert facts["curve"][0]["loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights(kind):
    found = wrap(tiny_sd(prediction_type=kind))
    plain, weighted = Watching(), Watching()
    train(found, plain, steps=1, batch_size=4)
    train(found, weighted, steps=1, batch_size=4, min_snr=5.0)
    snr = compute_snr(found.pipe.scheduler, plain.batches[0].timesteps)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + (kind == "v_prediction"))
    torch.testing.assert_close(weighted.batches[0].losses, expected * plain.batches[0].losses)


def test_learns_an_image():
    found, given = model(), examples(["a red star"])
    curves = [train(found, None, given, steps=30, rank=4, lr=lr).facts["curve"] for lr in (1e-9, 0.02)]
    still, learnt = ([point["loss"] for point in curve] for curve in curves)
    assert len(learnt) == 15 and learnt[0] == pytest.approx(still[0], rel=0.1)
    assert np.mean(learnt[-5:]) < 0.95 * np.mean(still[-5:])


def test_learning_rates():
    rates = LoraSettings(steps=10, lr=2.0, warmup=2, schedule="linear")
    assert [rates.rate(s) for s in range(4)] == pytest.approx([1.0, 2.0, 2.0, 1.75])
    assert rates.rate(9) == pytest.approx(0.25)
    cosine = LoraSettings(steps=10, lr=2.0, schedule="cosine")
    assert [cosine.rate(s) for s in (0, 5)] == pytest.approx([2.0, 1.0])


# --- order, batches, precision ---


def test_each_pass_sees_every_example_as_often_as_it_stands_in_the_set():
    watching = Watching()
    given = examples(CAPTIONS[:2], duplicates=2) + examples(["a robot"])
    facts = train(model(), watching, given, steps=5, batch_size=2).facts
    seen = [given.index(e) for b in watching.batches for e in b.examples]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 0, 1, 1, 2]
    assert seen[:5] != seen[5:]
    assert facts["examples"] == 3 and facts["images_seen"] == 10


class Odd(Watching):
    """Keeps examples whose caption names no city: unequal numbers in the micro-batches."""

    def keep(self, batch):
        super().keep(batch)
        return torch.tensor(["city" not in e.caption for e in batch.examples])


@pytest.mark.parametrize("hooks", [Watching, Odd])
def test_accumulated_gradients_equal_the_larger_batch(hooks):
    found, whole, parts = model(), hooks(), hooks()
    one = train(found, whole, batch_size=4, accumulate=1, steps=2, clip=0.0)
    other = train(found, parts, batch_size=1, accumulate=4, steps=2, clip=0.0)
    assert len(whole.batches) == 2 and len(parts.batches) == 8
    for a, b in zip(whole.gradient_list, parts.gradient_list, strict=True):
        scale = max(float(x[1].abs().max()) for x in a.values())
        for name in a:
            torch.testing.assert_close(a[name][0], b[name][0], rtol=0, atol=2e-4 * scale)
            torch.testing.assert_close(a[name][1], b[name][1], rtol=0, atol=2e-4 * scale)
    assert one.facts["curve"][0]["loss"] == pytest.approx(other.facts["curve"][0]["loss"], rel=1e-5)
    assert one.facts["kept"] == other.facts["kept"] == (1.0 if hooks is Watching else 0.5)


def test_bf16_keeps_the_lora_float32():
    found = model()
    plain, mixed = train(found), train(found, precision="bf16")
    assert all(t.dtype == torch.float32 for t in mixed.tensors.values())
    assert not equal(plain.tensors, mixed.tensors)
    a, b = lora_deltas(plain.tensors), lora_deltas(mixed.tensors)
    close = [float((a[n] - b[n]).norm() / a[n].norm()) for n in a if a[n].norm() > 0]
    assert np.median(close) < 0.3


def test_gradient_checkpointing_changes_nothing():
    found = model()
    assert equal(train(found).tensors, train(found, gradient_checkpointing=True).tensors)
    assert not found.denoiser.is_gradient_checkpointing


def test_the_text_encoder_can_be_adapted():
    found = model("sd")
    tensors = train(found, steps=2, text_encoder=True, targets=["attn2.to_k"]).tensors
    moved = {n.split(".")[1] for n, t in tensors.items() if n.endswith(".B") and bool(t.any())}
    assert moved == {"denoiser", "text_encoder"}
    before = encode_prompts(found, ["a red star"], SAMPLER).embeds
    with applied_lora(found, tensors):
        assert not torch.equal(encode_prompts(found, ["a red star"], SAMPLER).embeds, before)
    assert torch.equal(encode_prompts(found, ["a red star"], SAMPLER).embeds, before)


# --- exact resume ---

KILLED = """
import os, signal
from pathlib import Path
from test_trainer import Dying
from tiny_finetuning import model, train
train(model(), Dying(3, lambda: os.kill(os.getpid(), signal.SIGKILL)), steps=5, checkpoint_every=2,
      schedule="cosine", checkpoint=Path({!r}))
"""


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    died = subprocess.run(
        [sys.executable, "-c", KILLED.format(str(tmp_path))],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    changes = {"steps": 5, "checkpoint_every": 2, "schedule": "cosine"}
    seen = Watching()
    resumed = train(model(), seen, checkpoint=tmp_path, **changes)
    whole = train(model(), **changes)
    assert len(seen.batches) == 3  # steps 2, 3 and 4
    assert equal(resumed.tensors, whole.tensors)
    assert all(bool(t.any()) for n, t in resumed.tensors.items() if n.endswith("to_q.B"))
    drop = lambda facts: {n: v for n, v in facts.items() if n != "timing"}  # noqa: E731
    assert drop(resumed.facts) == drop(whole.facts)


def test_a_finished_run_is_read_back(tmp_path):
    once, again = train(model(), checkpoint=tmp_path), Watching()
    assert equal(train(model(), again, checkpoint=tmp_path).tensors, once.tensors)
    assert not again.batches


@pytest.mark.parametrize("spoil", ["seed", "settings", "examples", "key", "damage"])
def test_a_checkpoint_of_another_training_is_not_gone_on_with(tmp_path, spoil):
    changes = {
        "seed": {"seed": 2},
        "settings": {"lr": 2e-3},
        "examples": {"given": examples(CAPTIONS[1:])},
        "key": {"key": "another"},
        "damage": {},
    }[spoil]
    train(model(), steps=2, checkpoint=tmp_path)
    if spoil == "damage":
        path = tmp_path / "checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="starting anew"):
        resumed = train(model(), steps=2, checkpoint=tmp_path, **changes)
    assert equal(resumed.tensors, train(model(), steps=2, **changes).tensors)


def test_a_checkpoint_of_other_weights_is_not_gone_on_with(tmp_path):
    """What a composition did to the weights in memory counts, though no file changed."""
    found = model()
    train(found, steps=2, checkpoint=tmp_path)
    with torch.no_grad():
        next(found.denoiser.parameters()).flatten()[0] *= 1.01
    with pytest.warns(UserWarning, match="starting anew"):
        resumed = train(found, steps=2, checkpoint=tmp_path)
    assert equal(resumed.tensors, train(found, steps=2).tensors)


# --- everything is put back ---


def state_of(found):
    parts = {"denoiser": found.denoiser, "text": found.text_encoders[0]}
    return {
        f"{part}.{name}": (type(module), module, dict(module._forward_hooks), module.training)
        for part, whole in parts.items()
        for name, module in whole.named_modules()
    }


@pytest.mark.parametrize(("family", "interrupted"), [*((f, False) for f in BUILDERS), ("sd3", True)])
def test_model_and_global_state_are_left_alone(family, interrupted):
    found = model(family)
    encode_prompts(found, ["a"], SAMPLER)  # transformers puts hooks on a text encoder when it is first called
    modules, weights = state_of(found), found.weights_sha256()
    wanted = [p.requires_grad for p in found.denoiser.parameters()]
    accelerator = [dict(c._shared_state) for c in (PartialState, AcceleratorState, GradientState)]
    environment = dict(os.environ)
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try:
        train(found, Dying(0, stop if interrupted else lambda: None), steps=1, text_encoder=family == "sd")
        assert not interrupted
    except InterruptedByTest:
        assert interrupted
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == randomness[1:]
    assert dict(os.environ) == environment
    assert [dict(c._shared_state) for c in (PartialState, AcceleratorState, GradientState)] == accelerator
    assert state_of(found) == modules and found.weights_sha256() == weights
    assert [p.requires_grad for p in found.denoiser.parameters()] == wanted
    assert all(p.grad is None for p in found.denoiser.parameters())
    assert not hasattr(found.denoiser, "peft_config")


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    one = train(model())
    torch.manual_seed(2)
    assert equal(train(model()).tensors, one.tensors)
    assert not equal(train(model(), seed=2).tensors, one.tensors)


# --- the trained LoRA on a model ---


@pytest.mark.parametrize("family", BUILDERS)
def test_applied_equals_merged(family):
    found = model(family)
    tensors = train(found, steps=2, lr=0.05, alpha=3.0).tensors
    conditioning = replace(encode_prompts(found, CAPTIONS[:2], SAMPLER), negative=None)
    watching = Watching()
    train(found, watching, steps=1)
    latents, times = watching.batches[0].latents, watching.batches[0].timesteps

    @torch.no_grad()
    def output():
        return prediction(found, latents, times, conditioning, SAMPLER)

    base, weights = output(), found.weights_sha256()
    for scale in (1.0, 0.5):
        with applied_lora(found, tensors, scale):
            hooked = output()
        with merged_lora(found, tensors, scale):
            merged = output()
        assert float((merged - base).abs().max()) > 1e-2
        torch.testing.assert_close(hooked, merged, atol=2e-5, rtol=1e-4)
    with applied_lora(found, tensors, 0.0):
        torch.testing.assert_close(output(), base, atol=0, rtol=0)
    assert torch.equal(output(), base) and found.weights_sha256() == weights


def test_what_is_applied_is_what_was_trained():
    """With the LoRA of two steps on, the model predicts what the third step of the training saw."""
    found, longer = model(), Watching()
    train(found, longer, steps=3, lr=0.05, caption_dropout=0.0)
    trained = train(found, steps=2, lr=0.05, caption_dropout=0.0).tensors
    batch = longer.batches[2]
    conditioning = replace(encode_prompts(found, batch.captions, SAMPLER), negative=None)
    with torch.no_grad(), applied_lora(found, trained):
        again = prediction(found, batch.latents, batch.timesteps, conditioning, SAMPLER)
    torch.testing.assert_close(again, batch.prediction, atol=1e-4, rtol=1e-4)


def test_targets():
    assert {n.rpartition(".")[2] for n in lora_targets(model("sd"), LoraSettings())} == {
        "to_q", "to_k", "to_v", "0",
    }  # fmt: skip
    assert "denoiser.transformer_blocks.0.attn.add_k_proj" in lora_targets(model("sd3"), LoraSettings())
    flux = lora_targets(model("flux"), LoraSettings(targets=("context_embedder", "add_k_proj")))
    assert flux == ["denoiser.context_embedder", "denoiser.transformer_blocks.0.attn.add_k_proj"]


# --- hooks ---


class Dropping(Watching):
    def examples(self, given):
        return [e for e in given if "city" not in e.caption]


def test_images_can_be_dropped():
    hooks = Dropping()
    facts = train(model(), hooks).facts
    assert facts["examples"] == 2
    assert not any("city" in e.caption for b in hooks.batches for e in b.examples)


class WithoutCaptions(TrainingHooks):
    def __init__(self):
        self.seen = []

    def keep(self, batch):
        self.seen.append((batch, batch.unconditional()))

    def captions(self, captions, given, draws):
        return ["" if "city" in c else c for c in captions]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_captions_can_be_dropped(family):
    found, hooks = model(family), WithoutCaptions()
    train(found, hooks, steps=1, batch_size=4, caption_dropout=0.0)
    ((batch, unconditional),) = hooks.seen
    without = torch.tensor([c == "" for c in batch.captions])
    assert without.tolist() == ["city" in e.caption for e in batch.examples] and int(without.sum()) == 2
    difference = (batch.prediction - unconditional).flatten(1).abs().amax(1)
    assert bool((difference[without] < 1e-5).all()) and bool((difference[~without] > 1e-4).all())


def test_caption_dropout_leaves_a_share_out():
    hooks = Watching()
    train(model(), hooks, steps=10, batch_size=16, caption_dropout=0.3, targets=["add_k_proj"])
    captions = [c for b in hooks.batches for c in b.captions]
    assert 0.2 < captions.count("") / len(captions) < 0.4


class Threshold(TrainingHooks):
    """Wen et al. 2024: an example counts where its prompt moves the prediction by less than tau."""

    def __init__(self, tau):
        self.tau, self.updates, self.norms = tau, 0, []

    def keep(self, batch):
        norms = (batch.prediction - batch.unconditional()).flatten(1).norm(dim=1)
        self.norms += norms.tolist()
        return norms < self.tau

    def stepped(self, lora, step):
        self.updates += 1


def test_a_loss_threshold_skips_examples_and_steps():
    every, none = Threshold(1e9), Threshold(0.0)
    assert equal(train(model(), every).tensors, train(model()).tensors)
    skipped = train(model(), none)
    assert skipped.facts["skipped_steps"] == 3 and skipped.facts["kept"] == 0.0 and none.updates == 0
    assert not any(bool(t.any()) for n, t in skipped.tensors.items() if n.endswith(".B"))
    assert skipped.facts["curve"] == []
    some = Threshold(float(np.median(every.norms)))
    assert 0 < train(model(), some).facts["kept"] < 1


class RandomWords(Watching):
    """Somepalli et al. 2023: with some probability a caption's own word comes again, at a random place."""

    def captions(self, captions, given, draws):
        found = []
        for caption, g in zip(captions, draws, strict=True):
            words = caption.split(" ")
            repeated = [words[int(torch.randint(len(words), (1,), generator=g))]]
            found.append(insert_words(caption, repeated, g) if torch.rand((), generator=g) < 0.5 else caption)
        return found


class Noise(Watching):
    def embeddings(self, conditioning, draws):
        drawn = [torch.randn(conditioning.embeds.shape[1:], generator=g) for g in draws]
        return conditioning.with_embeds(conditioning.embeds + torch.stack(drawn))


@pytest.mark.parametrize("hooks", [RandomWords, Noise])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_what_hooks_draw_moves_nothing_else(hooks, family):
    found, plain, changed, split = model(family), Watching(), hooks(), hooks()
    train(found, plain, steps=1, batch_size=4)
    train(found, changed, steps=1, batch_size=4)
    train(found, split, steps=1, batch_size=2, accumulate=2)
    (a,), (b,) = plain.batches, changed.batches
    assert a.examples[0].caption == b.examples[0].caption
    assert torch.equal(a.latents, b.latents) and torch.equal(a.timesteps, b.timesteps)
    assert not torch.equal(a.prediction, b.prediction)
    assert [c == "" for c in a.captions] == [c == "" for c in b.captions]
    halves = torch.cat([x.prediction for x in split.batches])
    torch.testing.assert_close(b.prediction, halves, atol=1e-5, rtol=1e-4)


def test_hooks_are_called_in_order():
    called = []

    class Calls(TrainingHooks):
        def started(self, training):
            assert isinstance(training, Training) and all(not m.B.any() for m in training.lora.values())
            called.append("started")

        def gradients(self, lora, step):
            called.append(f"gradients {step}")

        def stepped(self, lora, step):
            assert any(bool(m.B.any()) for m in lora.values())
            called.append(f"stepped {step}")

        def finished(self, lora):
            return {"called": list(called)}

    facts = train(model(), Calls(), steps=2, accumulate=2).facts
    assert facts["called"] == ["started", "gradients 0", "stepped 0", "gradients 1", "stepped 1"]


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"lr": float("nan")}, "lr is a number, not nan"),
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\)"),
        ({"schedule": "step"}, "schedule is one of constant, linear, cosine, not 'step'"),
        ({"precision": "bfloat16"}, "precision is one of no, bf16, fp16"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"min_snr": 5.0}, "min_snr weights models that predict epsilon or v, not sd3"),
        ({"targets": "to_k"}, "targets is a list"),
        ({"targets": ["to_z"]}, "no linear layer 'to_z' in its denoiser"),
        ({"text_encoder": True}, "text_encoder is for Stable Diffusion 1.x and 2.x, not for sd3"),
        ({"given": []}, "no example is left"),
        ({"given": [Captioned("a", np.zeros((8, 8, 3), np.uint8))]}, r"an image is uint8 \(8, 8, 3\)"),
        ({"given": [Captioned("a", np.zeros((16, 16, 3)))]}, "an image is float64"),
    ],
)
def test_bad_input(changes, says):
    with pytest.raises(UserError, match=says):
        train(model(), **changes)


def test_a_loss_that_is_not_finite():
    class Broken(TrainingHooks):
        def embeddings(self, conditioning, draws):
            return conditioning.with_embeds(conditioning.embeds * float("nan"))

    with pytest.raises(RunError, match="the loss is nan at step 0"):
        train(model(), Broken())


def test_another_models_lora():
    tensors = train(model("sd"), steps=1, targets=["attn2.to_k"]).tensors
    for context in (applied_lora, merged_lora):
        with pytest.raises(UserError, match="the LoRA is another model's"), context(model("sd3"), tensors):
            pass
        with pytest.raises(UserError, match="is for weights"), context(model("sdxl"), tensors):
            pass
