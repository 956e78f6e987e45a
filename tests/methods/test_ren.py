"""Ren: attention against a softmax by hand, masks against cut prompts, identities, the released numbers."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, configure
from lethebench.methods.ren import Ren
from lethebench.methods.ren.attention import FACTOR, FORMS, changed_attention
from lethebench.methods.ren.hooks import kept_tokens
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.sampler.attention import CrossAttention, cross_attention
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

DATA = Path(__file__).parent / "data"
SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
BEGIN = ("sd", "sdxl", "sd3")
"""Families with a begin token."""
TEXTS = ("a red star in a night city", "robot")
CLIP = (9, 3)
"""Tokens of each, begin and end included; T5's: one less, it has no begin token."""
FORM = pytest.mark.parametrize("form", FORMS)


def keys_of(texts, suite="test@1"):
    return [ImageKey(suite, Prompt(str(i), t, Role.NEUTRAL, cluster=""), 0) for i, t in enumerate(texts)]


KEYS = keys_of(TEXTS)


def sharper(family):
    """A tiny model whose attention isn't flat, and in which about half of the begin logits are negative."""
    model = wrap(BUILDERS[family]())
    for name, parameter in model.denoiser.named_parameters():
        if name.endswith("to_q.weight") and ("attn2" in name or "transformer_blocks" in name):
            parameter.data.mul_(20)
    return model


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, sharper(family))


def draw(model, method=None, hooks=(), batch_size=8, **more):
    if method is None:
        return sample(model, KEYS, SETTINGS, hooks, batch_size=batch_size, **more)
    with method.apply(model, Artefact()) as ours:
        return sample(model, KEYS, SETTINGS, [ours, *hooks], batch_size=batch_size, **more)


class Batches(SamplerHooks):
    """Keeps the batch as ren left it, and what the denoiser says of the initial latents."""

    def start(self, batch):
        self.batch = batch
        self.latents = batch.scale(batch.noise * batch.init_noise_sigma, batch.timesteps[0])
        self.predicted = batch.predict(self.latents, batch.timesteps[0], batch.conditioning)
        plain = replace(batch.conditioning, extra=without(batch.conditioning.extra), negative=None)
        self.plain = batch.predict(self.latents, batch.timesteps[0], plain).conditional
        return batch


def without(extra):
    ours = (FACTOR, "encoder_attention_mask", "joint_attention_kwargs")
    return {name: value for name, value in extra.items() if name not in ours}


def first_step(model, method=None):
    found = Batches()
    draw(model, method, [found])
    return found


# --- identities ---


@pytest.mark.parametrize("family", BUILDERS)
def test_off_draws_what_base_draws_and_base_is_restored(models, family):
    model = models(family)
    base = draw(model)
    assert (draw(model, Ren(c1=1.0, mask="none")).latents == base.latents).all()
    changed = draw(model, Ren())
    assert abs(changed.latents - base.latents).max() > 1e-3
    assert (draw(model).latents == base.latents).all()


@pytest.mark.parametrize("family", BEGIN)
@FORM
def test_a_factor_near_one_changes_little(models, family, form):
    model = models(family)
    base = draw(model).latents
    apart = [
        abs(draw(model, Ren(c1=c1, mask="none", form=form)).latents - base).max() for c1 in (1 + 1e-5, 1.25)
    ]
    assert 100 * apart[0] < apart[1]


def test_flux_has_no_begin_token(models):
    model = models("flux")
    assert (draw(model, Ren(c1=1.5, mask="none")).latents == draw(model).latents).all()
    assert (draw(model, Ren(c1=1.5)).latents == draw(model, Ren(c1=1.0)).latents).all()


@pytest.mark.parametrize("family", BUILDERS)
def test_a_call_without_the_arguments_is_left_alone(models, family):
    model = models(family)
    assert torch.equal(first_step(model, Ren()).plain, first_step(model).plain)


@pytest.mark.parametrize("family", BUILDERS)
def test_images_dont_depend_on_their_batch(models, family):
    together, alone = (draw(models(family), Ren(), batch_size=size).latents for size in (2, 1))
    assert abs(together - alone).max() < 1e-4 * abs(alone).max()


# --- which rows, which tokens ---


@pytest.mark.parametrize("family", BEGIN)
def test_the_factor_is_for_conditional_rows(models, family):
    base, ours = first_step(models(family)), first_step(models(family), Ren(c1=1.5, mask="none"))
    torch.testing.assert_close(ours.predicted.unconditional, base.predicted.unconditional)
    assert (ours.predicted.conditional - base.predicted.conditional).abs().max() > 1e-4


@pytest.mark.parametrize("mask", ["padding", "summary"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_mask_is_the_prompt_cut_off(models, family, mask):
    model, ours = models(family), first_step(models(family), Ren(c1=1.0, mask=mask))
    kept = kept_tokens(ours.batch, mask == "summary")
    cut = int(mask == "summary")
    expected = {
        "flux": [n - 1 - cut for n in CLIP],
        "sd3": [2 * n - 1 - 2 * cut for n in CLIP],
    }.get(family, [n - cut for n in CLIP])
    assert kept.sum(dim=1).tolist() == expected
    conditioning = ours.batch.conditioning
    parts = {"conditional": conditioning, "unconditional": conditioning.negative}
    if conditioning.negative is None:
        del parts["unconditional"]
    for i in range(len(KEYS)):
        for name, part in parts.items():
            rows = {
                k: {n: v[i : i + 1] for n, v in x.items()}
                for k, x in part.extra.items()
                if isinstance(x, dict)
            }
            shared = {k: x for k, x in part.extra.items() if k in ("img_ids", "txt_ids")}
            short = replace(
                part,
                embeds=part.embeds[i : i + 1, kept[i]],
                pooled=None if part.pooled is None else part.pooled[i : i + 1],
                extra=without({**rows, **shared}),
                negative=None,
            )
            found = ours.batch.predict(ours.latents[i : i + 1], ours.batch.timesteps[0], short).conditional
            torch.testing.assert_close(found, getattr(ours.predicted, name)[i : i + 1], atol=2e-5, rtol=1e-4)
    assert (ours.predicted.conditional - first_step(model).predicted.conditional).abs().max() > 1e-3


def test_true_guidance_of_flux_masks_both_halves(models):
    class Guided(SamplerHooks):
        def conditioning(self, conditioning, keys):
            return replace(conditioning, negative=replace(conditioning, embeds=conditioning.embeds.flip(0)))

    model, found = models("flux"), Batches()
    with Ren().apply(model, Artefact()) as ours:
        sample(model, KEYS, SETTINGS, [Guided(), ours, found])
    both = [found.batch.conditioning, found.batch.conditioning.negative]
    masks = [part.extra["joint_attention_kwargs"]["attention_mask"] for part in both]
    assert torch.equal(*masks) and not masks[0].all()


# --- the attention itself, float64 ---


@contextmanager
def calls_of(modules):
    """Inputs, keyword arguments and output of each module's last call, by the module's name."""
    seen, handles = {}, []
    for name, module in modules.items():

        def keep(_module, args, kwargs, output, name=name):
            seen[name] = (args, kwargs, output)

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    yield seen
    for handle in handles:
        handle.remove()


def split(x, module):
    return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)


def changed_by_hand(logits, factor, form):
    return factor * logits if form == "multiply" else logits + (factor - 1) * logits.abs()


@FORM
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_the_softmax_by_hand(make_tiny, form, masked):
    tiny = make_tiny("sd")
    model = replace(wrap(tiny.pipe), dtype=torch.float64)
    modules = cross_attention(tiny.denoiser)
    for module in modules.values():
        module.to_q.weight.data.mul_(20)
    factor = torch.tensor([1.0, 1.4], dtype=torch.float64)
    keep = torch.arange(16) < torch.tensor([[16], [5]])
    given = {**tiny.inputs, FACTOR: factor, **({"encoder_attention_mask": keep} if masked else {})}
    with changed_attention(model, FORMS[form]), calls_of(modules) as seen, torch.no_grad():
        tiny.denoiser(**given)
    text = tiny.inputs["encoder_hidden_states"]
    negative = 0
    for name, module in modules.items():
        args, _, output = seen[name]
        q, k, v = (
            split(f(x), module) for f, x in ((module.to_q, args[0]), (module.to_k, text), (module.to_v, text))
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        negative += int((logits[1, :, :, 0] < 0).sum())
        logits[..., 0] = changed_by_hand(logits[..., 0], factor[:, None, None], form)
        if masked:
            logits = logits.masked_fill(~keep[:, None, None], -torch.inf)
        expected = module.to_out[0]((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    assert negative > 0


@FORM
@pytest.mark.parametrize("masked", [False, True])
def test_joint_attention_is_the_softmax_by_hand(make_tiny, form, masked):
    tiny = make_tiny("sd3")
    model = replace(wrap(tiny.pipe), dtype=torch.float64)
    modules = {f"{i}": block.attn for i, block in enumerate(tiny.denoiser.transformer_blocks)}
    factor = torch.tensor([1.0, 1.4], dtype=torch.float64)
    keep = torch.arange(16) < torch.tensor([[16], [5]])
    given = {
        **tiny.inputs,
        FACTOR: factor,
        **({"joint_attention_kwargs": {"attention_mask": keep}} if masked else {}),
    }
    with changed_attention(model, FORMS[form]), calls_of(modules) as seen, torch.no_grad():
        tiny.denoiser(**given)
    for name, module in modules.items():
        _, kwargs, (image, text) = seen[name]
        h, t = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        images = h.shape[1]
        q, k, v = (
            torch.cat([split(own(h), module), split(added(t), module)], dim=2)
            for own, added in (
                (module.to_q, module.add_q_proj),
                (module.to_k, module.add_k_proj),
                (module.to_v, module.add_v_proj),
            )
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        begin = logits[:, :, :images, images]
        logits[:, :, :images, images] = changed_by_hand(begin, factor[:, None, None], form)
        if masked:
            logits[..., images:] = logits[..., images:].masked_fill(~keep[:, None, None], -torch.inf)
        found = (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(image, module.to_out[0](found[:, :images]), atol=1e-12, rtol=1e-12)
        if not module.context_pre_only:
            torch.testing.assert_close(text, module.to_add_out(found[:, images:]), atol=1e-12, rtol=1e-12)


def attention_to_begin(model, method=None):
    """Of the conditional rows at the first step, ``[layers, images, heads, places]`` flattened by layer."""
    watch = CrossAttention(cross_attention(model.denoiser), len(KEYS), lambda p: p[..., 0])
    hooks = Batches()
    with (method or Ren(c1=1.0, mask="none")).apply(model, Artefact()) as ours, watch.watch():
        sample(model, KEYS, SETTINGS.model_copy(update={"num_inference_steps": 1}), [ours, hooks])
    first = next(iter(watch.modules))  # its input is base's: nothing was changed before it
    return watch.seen[first]


def test_only_our_form_never_lowers_the_attention(models):
    model = models("sd")
    base = attention_to_begin(model)
    ours, released = (
        attention_to_begin(model, Ren(c1=1.5, mask="none", form=f)) for f in ("raise", "multiply")
    )
    assert (ours >= base - 1e-6).all() and (ours > base + 1e-3).any()
    assert (released < base - 1e-3).any()
    higher = released > base + 1e-6  # where the logit is positive the two forms are the same
    torch.testing.assert_close(ours[higher], released[higher])


# --- processors, recorders, fit, reference ---


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=["explicit", "sliced"])
def test_other_processors_draw_the_same(processor):
    model = sharper("sd")
    expected = draw(model, Ren(c1=1.5)).latents
    model.denoiser.set_attn_processor(processor)
    found = draw(model, Ren(c1=1.5)).latents
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
    assert all(m.processor is processor for m in cross_attention(model.denoiser).values())


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_recorders_see_the_attention_that_was_used(mask):
    model = sharper("sd")
    model.denoiser.set_attn_processor(AttnProcessor())
    modules, used = cross_attention(model.denoiser), {}
    for name, module in modules.items():

        def scores(query, key, given=None, name=name, original=module.get_attention_scores):
            used[name] = original(query, key, given)
            return used[name]

        module.get_attention_scores = scores
    watch = CrossAttention(modules, len(KEYS), lambda p: p)
    with Ren(c1=1.5, mask=mask).apply(model, Artefact()) as ours, watch.watch():
        sample(model, KEYS, SETTINGS, [ours])
    for name, module in modules.items():
        conditional = used[name].unflatten(0, (-1, module.heads))[-len(KEYS) :]
        torch.testing.assert_close(watch.seen[name], conditional)


def test_fit_measures_the_begin_logit(models, make_task):
    model, seen = models("sd"), {}
    modules, handles = cross_attention(model.denoiser), []
    for name, module in modules.items():
        seen[name] = []

        def keep(module, args, kwargs, _output, name=name):
            q, k = (
                split(module.to_q(args[0]), module),
                split(module.to_k(kwargs["encoder_hidden_states"]), module),
            )
            seen[name].append((q @ k.mT * module.scale)[2:, :, :, 0].double())  # two images: rows 2 and 3

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    method = Ren(prompts=2)
    artefact = method.fit(make_task(method, model))
    for handle in handles:
        handle.remove()
    assert not artefact.tensors and artefact.facts["begin_logit"].keys() == modules.keys()
    for name, found in artefact.facts["begin_logit"].items():
        logits = torch.stack(seen[name])
        assert len(logits) == SETTINGS.num_inference_steps
        assert found["mean"] == pytest.approx(float(logits.mean()), rel=1e-4, abs=1e-5)
        assert found["absolute"] == pytest.approx(float(logits.abs().mean()), rel=1e-4)
        assert found["negative"] == pytest.approx(float((logits < 0).double().mean()), abs=1e-3)


@pytest.mark.parametrize(("family", "layers"), [("sdxl", 11), ("sd3", 2), ("flux", 0)])
def test_fit_on_other_families(models, make_task, family, layers):
    method = Ren(prompts=1)
    facts = method.fit(make_task(method, models(family))).facts["begin_logit"]
    assert len(facts) == layers
    assert all(0 < f["negative"] < 1 and f["absolute"] > abs(f["mean"]) for f in facts.values())


RELEASED = json.loads((DATA / "ren.json").read_text())


@pytest.mark.parametrize("number", range(len(RELEASED["cases"])))
def test_the_released_code_gives_the_same(number):
    case, expected = RELEASED["cases"][number], load_file(DATA / "ren.safetensors")[f"case{number}"]
    mask = "none" if not case["cross_attn_mask"] else "summary" if case["mask_length_minis1"] else "padding"
    model = wrap(tiny_sd())
    for module in cross_attention(model.denoiser).values():
        module.to_q.weight.data.mul_(20)
    with Ren(c1=case["c1"], mask=mask, form="multiply").apply(model, Artefact()) as hooks:
        found = sample(model, keys_of(RELEASED["texts"], RELEASED["suite"]), SETTINGS, [hooks]).latents
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c1": 0.9}, "c1 is 1 or more, not 0.9"),
        ({"mask": "end"}, "mask is none, padding or summary, not 'end'"),
        ({"form": "add"}, "form is raise or multiply, not 'add'"),
        ({"prompts": 0}, "prompts must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        configure(Ren, "medium", settings)


def test_on_flux_only_the_masks_apply():
    for strength in Ren.strengths:
        reason = configure(Ren, strength, {}).unsupported("flux")
        assert (reason is None) == (strength == "mask")
        assert reason is None or "T5's tokens, which have none" in reason
        assert configure(Ren, strength, {"c1": 1.0}).unsupported("flux") is None
        assert configure(Ren, strength, {}).unsupported("sd3") is None


def test_fused_joint_attention_is_refused_and_put_back():
    model = wrap(tiny_sd3())
    model.denoiser.fuse_qkv_projections()
    before = model.denoiser.attn_processors
    with pytest.raises(UserError, match="unfuse_qkv_projections"), Ren().apply(model, Artefact()):
        pass
    assert model.denoiser.attn_processors == before
    assert not model.denoiser._forward_pre_hooks
