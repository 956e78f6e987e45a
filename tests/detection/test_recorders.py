"""Metrics that watch the sampling: against explicit attention, naive formulas and direct denoiser calls."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from metric_fakes import shard, trained
from scipy.ndimage import gaussian_filter
from tiny_pipelines import PIPELINES, tiny_sd

from lethebench.errors import RunError, UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.metric import configure_metric, detectors
from lethebench.metrics.attention_entropy import AttentionEntropy, final_steps, layer_of
from lethebench.metrics.bright_ending import BrightEnding, grid
from lethebench.metrics.first_step_ssim import RECORD, FirstStepSSIM, pairwise_ssim, threshold
from lethebench.metrics.noise_magnitude import NoiseMagnitude
from lethebench.prompts import Prompt, Role
from lethebench.sampler import encode_prompts, initial_latents, sample
from lethebench.sampler.attention import CrossAttention, cross_attention, prompt_lengths
from lethebench.seeding import generator
from lethebench.specs import SamplerSettings
from lethebench.zoo import load_model, wrap

SETTINGS = SamplerSettings(num_inference_steps=5, guidance_scale=4.0, height=32, width=32)
PROMPTS = [
    Prompt("one", "a red star", Role.NEUTRAL, "one"),
    Prompt("two", "a blue circle in a city", Role.NEUTRAL, "two"),
]
KEYS = [ImageKey("test@1", p, i) for p in PROMPTS for i in range(2)]
LENGTHS = [5, 8]
"""Begin, words, end."""
TOKENS = 16
WATCHERS = (AttentionEntropy(), BrightEnding(), FirstStepSSIM(seeds=4))


def watched(model, keys=KEYS, settings=SETTINGS, hooks=(), metrics=WATCHERS, **more):
    return sample(model, keys, settings, hooks, recorders=[m.recorder() for m in metrics], **more)


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_sd())


@contextmanager
def explicit(unet):
    """diffusers' own explicit attention: every module's probabilities, by name, one entry a call."""
    before, seen = unet.attn_processors, {}
    unet.set_attn_processor(AttnProcessor())
    modules = {n: m for n, m in unet.named_modules() if n.endswith("attn2")}

    def spy(name, original):
        def scores(query, key, mask=None):
            found = original(query, key, mask)
            seen.setdefault(name, []).append(found.unflatten(0, (-1, modules[name].heads)).double().numpy())
            return found

        return scores

    for name, module in modules.items():
        module.get_attention_scores = spy(name, module.get_attention_scores)
    try:
        yield seen
    finally:
        for module in modules.values():
            del module.get_attention_scores
        unet.set_attn_processor(before)


class Differences(SamplerHooks):
    """Conditional minus unconditional prediction of each step."""

    def __init__(self):
        self.seen = []

    def guidance(self, combined, unconditional, conditional, step):
        self.seen.append((conditional - unconditional).double().numpy())
        return combined


# --- the capture ----------------------------------------------------------------------------------


def test_modules_are_in_the_order_of_calls(model):
    called = []
    modules = cross_attention(model.denoiser)
    handles = [m.register_forward_hook(lambda *_, n=n: called.append(n)) for n, m in modules.items()]
    sample(model, KEYS[:1], SETTINGS.model_copy(update={"num_inference_steps": 1}))
    for handle in handles:
        handle.remove()
    assert called == list(modules) and len(modules) == 7  # 2 down, 1 middle, 4 up
    assert cross_attention(PIPELINES["flux-schnell"]().transformer) == {}
    assert cross_attention(PIPELINES["sd3"]().transformer) == {}


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_equal_the_explicit_processors(model, masked):
    unet, generated = model.denoiser, torch.Generator().manual_seed(0)
    x, c = (torch.randn(*s, generator=generated) for s in ((4, 4, 8, 8), (4, TOKENS, 16)))
    mask = torch.arange(TOKENS) < torch.tensor([[3], [7], [16], [9]]) if masked else None
    given = {"encoder_hidden_states": c, "encoder_attention_mask": mask}
    watcher = CrossAttention(cross_attention(unet), 3, lambda p: p)
    with torch.no_grad(), watcher.watch():
        unet(x, 500, **given)
    with torch.no_grad(), explicit(unet) as seen:
        unet(x, 500, **given)
    assert set(watcher.seen) == set(seen)
    worst = max(np.abs(watcher.seen[n].numpy() - seen[n][0][1:]).max() for n in seen)
    assert worst < 1e-6
    assert all(np.allclose(p.sum(-1), 1) for p in watcher.seen.values())


def test_hooks_are_gone_and_processors_stay(model):
    modules = cross_attention(model.denoiser)
    processors = dict(model.denoiser.attn_processors)
    with pytest.raises(ZeroDivisionError), CrossAttention(modules, 1, lambda p: p).watch():
        assert all(len(m._forward_hooks) == 1 for m in modules.values())
        raise ZeroDivisionError
    watched(model)
    for module in modules.values():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module.to_q._forward_hooks and not module.to_k._forward_hooks
    assert model.denoiser.attn_processors == processors


def test_fused_projections_are_one_clear_error():
    model = wrap(tiny_sd())
    model.denoiser.fuse_qkv_projections()
    with pytest.raises(RunError, match=r"attn2 doesn't call its to_q and to_k: unfuse its projections"):
        watched(model, metrics=WATCHERS[:1])


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd-euler", "sdxl", "sd3", "flux-schnell", "flux-dev"])
def test_watching_changes_no_bit_and_batches_do_not_matter(name):
    model = wrap(PIPELINES[name]())
    together, singly = watched(model, batch_size=4), watched(model, batch_size=1)
    bare = sample(model, KEYS, SETTINGS)
    assert np.array_equal(together.images, bare.images) and np.array_equal(together.latents, bare.latents)
    unets = {"attention_entropy", "bright_ending", "bright_ending_mask"} if name.startswith("sd") else set()
    assert set(together.recorded) == (unets if name != "sd3" else set()) | {RECORD}
    for which, values in together.recorded.items():
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values, singly.recorded[which], atol=1e-5, rtol=1e-5)


def test_the_built_in_model():
    model = load_model("mini-sd")
    settings = SamplerSettings(num_inference_steps=6, guidance_scale=3.0)
    keys = [ImageKey("test@1", p, i) for p in trained_prompts() for i in range(2)]
    together, singly = (watched(model, keys, settings, batch_size=n) for n in (4, 1))
    assert np.array_equal(together.images, sample(model, keys, settings).images)
    assert together.recorded["bright_ending_mask"].shape == (4, 16, 16)
    assert (together.recorded[RECORD][:, 2] == 1).all()
    for which, values in together.recorded.items():
        # Guidance magnifies how float32 rounds with the batch: 1.2e-5 of the value was seen.
        np.testing.assert_allclose(values, singly.recorded[which], rtol=5e-5, atol=1e-5)


def trained_prompts():
    from lethebench.plan import prompt_set

    return [p for p in prompt_set("planted") if p.kind == "verbatim" and p.trained][:2]


def test_what_a_method_changes_is_seen(model):
    """Keys of zero attend to every token alike, with a hook that was there first."""
    modules = cross_attention(model.denoiser)
    handles = [m.to_k.register_forward_hook(lambda _m, _a, out: out * 0) for m in modules.values()]
    try:
        found = watched(model, metrics=WATCHERS[:2]).recorded
    finally:
        for handle in handles:
            handle.remove()
    np.testing.assert_allclose(found["attention_entropy"], np.log(TOKENS), atol=1e-5)
    np.testing.assert_allclose(found["bright_ending_mask"], 1 / TOKENS, atol=1e-6)


def test_a_method_that_asks_the_denoiser_itself_is_not_taken_for_the_sampler(model):
    class Asks(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            with torch.no_grad():
                model.denoiser(step.latents[:1] * 3, 10, torch.ones(1, TOKENS, 16))
            return combined

    bare, asked = watched(model, metrics=WATCHERS[:2]), watched(model, hooks=[Asks()], metrics=WATCHERS[:2])
    for name, values in bare.recorded.items():
        assert np.array_equal(values, asked.recorded[name])


def test_prompt_lengths_count_begin_and_end(model):
    assert prompt_lengths(model, [p.text for p in PROMPTS]).tolist() == LENGTHS
    assert prompt_lengths(model, ["", "star " * 50]).tolist() == [2, TOKENS]


# --- attention entropy ----------------------------------------------------------------------------


def naive_entropy(seen, rows, layer):
    """Metrics D and E from explicit probabilities, in the words of Ren et al.'s script."""
    steps = len(next(iter(seen.values())))
    averaged = np.array([[p[rows].mean(axis=(1, 2)) for p in seen[n]] for n in seen])  # layer, step, image
    found = []
    for image, length in enumerate(np.repeat(LENGTHS, 2)):
        a = averaged[:, :, image].mean(axis=0)
        whole = [-(x * np.log(x)).sum() for x in a]
        padding = [-(x[length - 1 :] * np.log(x[length - 1 :])).sum() for x in a]
        last = slice(steps - steps // 5, steps)
        d = np.mean(whole[last]) + np.mean(padding[last]) - padding[0]
        one = averaged[layer, 0, image]
        found.append((d, -(one * np.log(one)).sum()))
    return np.array(found)


@pytest.mark.parametrize("tokens", [TOKENS, 2 * TOKENS])
@pytest.mark.parametrize("layer", [None, 5])
def test_entropy_equals_a_naive_one_from_explicit_attention(model, tokens, layer):
    """With more conditional tokens the sampler asks for the halves one after the other."""
    hook = SamplerHooks()
    if tokens != TOKENS:
        hook.conditioning = lambda c, keys: c.with_embeds(torch.cat([c.embeds, c.embeds], dim=1))
    settings = SETTINGS.model_copy(update={"num_inference_steps": 10})
    found = watched(model, settings=settings, hooks=[hook], metrics=[AttentionEntropy(layer)]).recorded
    with explicit(model.denoiser) as seen:
        sample(model, KEYS, settings, [hook])
    order = {n: seen[n] for n in cross_attention(model.denoiser)}
    if tokens != TOKENS:
        order = {n: calls[1::2] for n, calls in order.items()}
    wanted = naive_entropy(order, slice(-4, None), layer_of(7) if layer is None else layer)
    np.testing.assert_allclose(found["attention_entropy"], wanted, atol=1e-5)


def test_final_steps_are_the_last_fifth():
    assert [list(final_steps(n)) for n in (1, 4, 10)] == [[0], [3], [8, 9]]


def test_a_layer_that_is_not_there(model):
    with pytest.raises(UserError, match=r"layer=7, but .* has 7 cross-attention layers: choose 0 to 6"):
        watched(model, metrics=[AttentionEntropy(7)])


# --- bright ending --------------------------------------------------------------------------------


def test_masked_norms_equal_naive_ones_from_explicit_attention(model):
    found = watched(model, metrics=[BrightEnding()]).recorded
    hook = Differences()
    with explicit(model.denoiser) as seen:
        sample(model, KEYS, SETTINGS, [hook])
    maps = seen["down_blocks.0.attentions.0.transformer_blocks.0.attn2"][-1][-4:]  # the only one at 16 x 16
    ends = np.repeat(LENGTHS, 2) - 1
    masks = np.stack([m[:, :, end].mean(axis=0).reshape(16, 16) for m, end in zip(maps, ends, strict=True)])
    np.testing.assert_allclose(found["bright_ending_mask"], masks, atol=1e-6)
    for step, differences in enumerate(hook.seen):
        wanted = [np.linalg.norm(d * m) / m.mean() for d, m in zip(differences, masks, strict=True)]
        np.testing.assert_allclose(found["bright_ending"][:, step], wanted, rtol=1e-5)
    prompts = tuple(k.prompt for k in KEYS)
    columns = BrightEnding(first=2).measure(shard_of(prompts, recorded=found))
    np.testing.assert_allclose(columns["bright_ending_window"], found["bright_ending"][:, :2].mean(axis=1))
    np.testing.assert_allclose(columns["bright_ending_first"], found["bright_ending"][:, 0])
    np.testing.assert_allclose(columns["bright_ending_mean"], found["bright_ending"].mean(axis=1), rtol=1e-6)


def test_a_flat_mask_gives_wens_magnitude(model):
    modules = cross_attention(model.denoiser)
    handles = [m.to_k.register_forward_hook(lambda _m, _a, out: out * 0) for m in modules.values()]
    try:
        found = watched(model, metrics=[BrightEnding()])
    finally:
        for handle in handles:
            handle.remove()
    np.testing.assert_allclose(found.recorded["bright_ending"], found.noise_norm, rtol=1e-5)


def test_without_guidance_there_is_a_mask_and_no_value(model):
    found = watched(model, settings=SETTINGS.model_copy(update={"guidance_scale": 1.0}))
    assert np.isnan(found.recorded["bright_ending"]).all()
    assert np.isfinite(found.recorded["bright_ending_mask"]).all()
    assert np.isfinite(found.recorded["attention_entropy"]).all()


def test_an_attention_that_fits_no_grid():
    with pytest.raises(ValueError, match="60 places don't fit latents of 16 x 16"):
        grid(60, 16, 16)


# --- first-step SSIM ------------------------------------------------------------------------------


def naive_ssim(x, y, scales):
    """Multi-scale SSIM of [c, h, w] by scipy's Gaussian filter, exponents of NeMo's sum."""
    product = 1.0
    for scale in range(scales):
        a, b, aa, bb, ab = (
            gaussian_filter(v, (0, 1.5, 1.5), radius=(0, 5, 5), mode="mirror")
            for v in (x, y, x * x, y * y, x * y)
        )
        contrast = (2 * (ab - a * b) + 0.03**2) / (aa - a * a + bb - b * b + 0.03**2)
        luminance = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
        last = scale == scales - 1
        mean = (contrast * luminance).mean() if last else contrast[:, 5:-5, 5:-5].mean()
        product *= max(mean, 0) ** (0.99 / scales)
        x, y = (v.reshape(len(v), v.shape[1] // 2, 2, -1, 2).mean(axis=(2, 4)) for v in (x, y))
    return product


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (24, 2), (48, 3), (64, 3)])
def test_pairwise_ssim_equals_a_naive_one(side, scales):
    rng = np.random.default_rng(side)
    common = gaussian_filter(rng.normal(size=(4, side, side)), (0, 3, 3))
    deltas = common + 0.05 * rng.normal(size=(4, 4, side, side)) * np.arange(4)[:, None, None, None]
    found = pairwise_ssim(torch.from_numpy(deltas).float()).numpy()
    low, high = (f(deltas, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    scaled = (deltas - low) / (high - low)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    wanted = [naive_ssim(scaled[i], scaled[j], scales) for i, j in pairs]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found[0] > found[-1]


@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_score_equals_direct_calls_of_the_denoiser(name):
    model = wrap(PIPELINES[name]())
    found = watched(model, metrics=[FirstStepSSIM(seeds=3)]).recorded[RECORD]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[2], found[3])
    scheduler = type(model.pipe.scheduler).from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(5)
    time = scheduler.timesteps[0]
    kept = scheduler.alphas_cumprod[time]
    for row, prompt in ((0, PROMPTS[0]), (2, PROMPTS[1])):
        embeds = encode_prompts(model, [prompt.text], SETTINGS).embeds
        deltas = []
        for seed in range(3):
            noise = torch.randn(4, 16, 16, generator=generator("first_step_ssim", prompt.id, seed))
            with torch.no_grad():
                out = model.denoiser(noise[None], time, embeds).sample[0]
            epsilon = out if name == "sd" else kept.sqrt() * out + (1 - kept).sqrt() * noise
            deltas.append(epsilon - noise)
        ssim = pairwise_ssim(torch.stack(deltas))
        assert found[row].tolist() == pytest.approx([float(ssim.max()), float(ssim.mean()), 1.0], abs=1e-5)


def test_one_prompt_is_asked_once_a_seed(model):
    """And again only where a method gives its images different conditionings."""
    calls = []
    handle = model.denoiser.register_forward_pre_hook(
        lambda _m, args, kwargs: calls.append(len(kwargs["sample"])), with_kwargs=True
    )
    hook = SamplerHooks()
    hook.conditioning = lambda c, keys: c.with_embeds(c.embeds * torch.tensor([1.0, 2, 1, 1])[:, None, None])
    one = SETTINGS.model_copy(update={"num_inference_steps": 1})
    try:
        watched(model, settings=one, metrics=[FirstStepSSIM(seeds=3)])
        found = watched(model, settings=one, hooks=[hook], metrics=[FirstStepSSIM(seeds=3)]).recorded[RECORD]
    finally:
        handle.remove()
    assert calls == [8, 2, 2, 2, 8, 3, 3, 3]
    assert found[0, 0] != found[1, 0] and found[2, 0] == found[3, 0]


def test_the_noise_is_not_the_images_own(model):
    own = initial_latents(model, KEYS[:1], SETTINGS)[0]
    drawn = torch.randn(own.shape, generator=generator("first_step_ssim", "one", 0))
    assert not torch.allclose(own, drawn, atol=0.1)


def test_latents_smaller_than_the_window_have_no_score(model):
    small = SETTINGS.model_copy(update={"height": 16, "width": 16})
    found = watched(model, settings=small).recorded[RECORD]
    assert np.isnan(found[:, :2]).all() and (found[:, 2] == 0).all()
    with pytest.raises(ValueError, match="smaller than the window of 11"):
        pairwise_ssim(torch.zeros(2, 4, 8, 8))


def test_threshold_is_mean_plus_one_deviation():
    values = np.random.default_rng(0).random(50)
    assert threshold(np.append(values, np.nan)) == pytest.approx(values.mean() + values.std(ddof=1))
    with pytest.raises(ValueError, match="at least 2 prompts; got 1"):
        threshold(np.array([0.3, np.nan]))


# --- measuring ------------------------------------------------------------------------------------


def shard_of(prompts, **extra):
    return shard([(p, np.zeros((64, 64, 3), np.uint8)) for p in prompts], **extra)


ALL = (AttentionEntropy, BrightEnding, FirstStepSSIM, NoiseMagnitude)


@pytest.mark.parametrize("cls", ALL)
def test_nothing_recorded_is_no_value(cls):
    columns = cls().measure(shard_of(trained("verbatim")[:2]))
    assert all(np.isnan(v).all() and len(v) == 2 for v in columns.values())
    assert set(detectors(cls())) <= set(columns) and {s.column for s in cls.scores} <= set(columns)


@pytest.mark.parametrize("cls", ALL[:3])
def test_records_of_a_wrong_shape_are_one_clear_error(cls):
    for name in cls.records:
        for wrong in (np.zeros(2), np.zeros((1, 3))):
            with pytest.raises(ValueError, match=rf"{cls.name}: recorded '{name}' must have . axes"):
                cls().measure(shard_of(trained("verbatim")[:2], recorded={name: wrong}))


def test_noise_windows():
    norms = np.arange(20, dtype=np.float32).reshape(2, 10)
    shown = shard_of(trained("verbatim")[:2], noise_norm=norms)
    columns = NoiseMagnitude(first=3).measure(shown)
    assert columns["noise_magnitude_window"].tolist() == [1.0, 11.0]
    assert columns["noise_magnitude_first"].tolist() == [0.0, 10.0]
    assert columns["noise_magnitude_mean"].tolist() == [4.5, 14.5]
    many = NoiseMagnitude(first=50).measure(shown)
    assert np.array_equal(many["noise_magnitude_window"], many["noise_magnitude_mean"])


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (
            NoiseMagnitude,
            {"first": 0},
            "metric 'noise-magnitude': first=0 must be a whole number of at least 1",
        ),
        (BrightEnding, {"first": 2.5}, "metric 'bright-ending': first=2.5 must be a whole number"),
        (
            FirstStepSSIM,
            {"seeds": 1},
            "metric 'first-step-ssim': seeds=1 must be a whole number of at least 2",
        ),
        (AttentionEntropy, {"layer": -1}, "metric 'attention-entropy': layer=-1 must be a whole number"),
        (AttentionEntropy, {"layers": 1}, "has no setting 'layers': did you mean 'layer'"),
    ],
)
def test_bad_settings_are_one_clear_error(cls, given, message):
    with pytest.raises(UserError, match=message):
        configure_metric(cls, given)
