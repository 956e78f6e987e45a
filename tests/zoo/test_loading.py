"""How a model is loaded: each setting changes memory or time, and no result; or one line says why not."""

import importlib.util

import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES, tiny_flux, tiny_sd

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Family
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain, encode_prompts, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import LoadSettings, load_model, wrap

SETTINGS = SamplerSettings(num_inference_steps=2, guidance_scale=4.0, height=16, width=16)
TEXTS = ("a red star", "a robot in a forest")


KEYS = [ImageKey("test@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in TEXTS]


def drawn(model):
    return sample(model, KEYS, SETTINGS).latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    for name in ("sd", "flux-dev"):
        PIPELINES[name]().save_pretrained(root / name)
    return root


def test_attention_slicing_changes_nothing(folder):
    sliced = load_model(str(folder / "sd"), loading=LoadSettings(attention_slicing=True))
    kinds = {type(p).__name__ for p in sliced.denoiser.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    np.testing.assert_allclose(drawn(sliced), drawn(load_model(str(folder / "sd"))), atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "flux-dev"])
def test_recomputed_activations_give_the_same_gradient(name):
    found = []
    for checkpointing in (False, True):
        model = wrap(PIPELINES[name](), loading=LoadSettings(checkpointing=checkpointing))
        with torch.no_grad():
            chain = Chain(model, encode_prompts(model, TEXTS, SETTINGS), SETTINGS, KEYS)
            start = chain.initial()
        start.requires_grad_()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: held.append(t.nbytes) or t, lambda t: t
        ):
            out = chain.step(0, start)
        out.square().mean().backward()
        found.append((start.grad, sum(held)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-7)
    assert found[1][1] < 0.5 * found[0][1], "the graph holds less"


@pytest.mark.parametrize("name", ["sd", "sd3", "flux-dev"])
def test_the_sampler_works_with_offloaded_components(name):
    """The hooks that move whole components, with the CPU as the place to compute: they run without a GPU.

    (Those of single layers don't: accelerate refuses weights that stay where they are.)
    """
    expected = drawn(wrap(PIPELINES[name]()))
    model = wrap(PIPELINES[name](), loading=LoadSettings(offload="model"))
    for module in (model.denoiser, model.vae, *model.text_encoders):
        assert type(module._hf_hook).__name__ == "CpuOffload"
    for _ in range(2):  # a second batch finds the components where the first left them
        np.testing.assert_allclose(drawn(model), expected, atol=1e-5)


def test_a_compiled_denoiser_sees_hooks_that_come_later():
    model, plain = wrap(tiny_flux(), loading=LoadSettings(compile=True)), wrap(tiny_flux())
    assert model.denoiser._compiled_call_impl is not None
    model.denoiser.compile(
        backend="eager"
    )  # traced and guarded the same, without a minute of code generation
    assert type(model.denoiser) is type(plain.denoiser)
    assert list(model.denoiser.state_dict()) == list(plain.denoiser.state_dict())
    np.testing.assert_allclose(drawn(model), drawn(plain), atol=1e-4)

    def gated(of):
        module = of.denoiser.transformer_blocks[0].ff.net[0]
        return module.register_forward_hook(lambda _m, _a, out: out * 0.5)

    handles = [gated(model), gated(plain)]
    halved = drawn(plain)
    np.testing.assert_allclose(drawn(model), halved, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert np.abs(halved - drawn(plain)).max() > 1e-3
    np.testing.assert_allclose(drawn(model), drawn(plain), atol=1e-4)
    with torch.no_grad():  # a permanent edit
        for one in (model, plain):
            one.denoiser.transformer_blocks[0].ff.net[2].weight.mul_(0.5)
    np.testing.assert_allclose(drawn(model), drawn(plain), atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8_weights_draw_nearly_the_same(folder):
    full = load_model(str(folder / "flux-dev"), dtype="bfloat16")
    small = load_model(str(folder / "flux-dev"), dtype="bfloat16", loading=LoadSettings(quantise="int8"))
    packed = small.denoiser.transformer_blocks[0].attn.to_q.weight
    assert "Int8" in type(packed).__name__ and small.dtype is torch.bfloat16
    assert small.vae.dtype is torch.float32
    expected = drawn(full)
    assert 0 < np.abs(drawn(small) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("loading", "family", "dtype", "message"),
    [
        ({"offload": "model"}, "sd", "float32", "offload=model moves weights .* give --device cuda"),
        ({"offload": "sequential"}, "sd", "float32", "offload=sequential moves weights"),
        ({"attention_slicing": True}, "flux-dev", "float32", "attention_slicing is for UNets"),
        ({"quantise": "nf4"}, "sd", "bfloat16", "nf4 needs a CUDA device, not cpu: use quantise=int8"),
        ({"quantise": "int8"}, "sd", "float32", "quantise=int8 computes in bfloat16: give --dtype bfloat16"),
    ],
)
def test_what_cannot_be_had_here(folder, loading, family, dtype, message):
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder / family), dtype=dtype, loading=LoadSettings(**loading))
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package torchao: `pip install torchao`"):
        load_model(str(folder / "sd"), dtype="bfloat16", loading=LoadSettings(quantise="int8"))


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="offload is one of none, model, sequential, not 'disk'"):
        LoadSettings(offload="disk")
    with pytest.raises(UserError, match="compile=true doesn't go with offload=model"):
        LoadSettings(compile=True, offload="model")
    with pytest.raises(UserError, match="no setting 'quantize': did you mean quantise"):
        LoadSettings.of({"quantize": "int8"})


def test_methods_that_need_the_weights_are_refused():
    assert LoadSettings(compile=True).refusal("uce", Family.WEIGHTS) is None
    packed = LoadSettings(quantise="nf4", offload="model")
    assert packed.refusal("wen", Family.SAMPLING) is None
    for family in (Family.WEIGHTS, Family.TRAINING):
        message = packed.refusal("uce", family)
        assert message is not None and message.startswith("uce reads or changes the model's weights")
        assert "quantise=nf4 and offload=model" in message


def test_a_pruned_folder_is_not_quantised(folder, tmp_path, monkeypatch):
    from lethebench.zoo import _load

    tiny_sd().save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned" / "pruning.json").write_text("{}")
    monkeypatch.setattr(_load, "lacking_package", lambda loading: None)
    with pytest.raises(UserError, match="a pruned model, which can't be quantised"):
        load_model(str(tmp_path / "pruned"), dtype="bfloat16", loading=LoadSettings(quantise="int8"))
