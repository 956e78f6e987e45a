"""Fitting and applying UniForget, on tiny models."""

import dataclasses
import json
import pkgutil
import subprocess
import sys

import pytest
import torch
from tiny_pipelines import tiny_sd

from lethebench import methods
from lethebench.errors import KnowledgeError, UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Knowledge, configure
from lethebench.methods.uniforget import UniForget
from lethebench.methods.uniforget.fit import fit
from lethebench.prompts import Prompt, Role
from lethebench.pruning import find_sites, shrink, unpack
from lethebench.sampler import Chain, encode_prompts, sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning.neutral import fitting_settings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
KEYS = [
    ImageKey("test@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in ("a red star", "a blue circle in a city")
]
QUICK = {"steps": 6, "batch_size": 3, "chain_steps": 2, "dtype": "float32", "init": 1.0, "adam_eps": 1e-12}
QUICK |= {f"lr_{kind}": 0.5 for kind in ("ffn", "norm", "residual", "attn")}


def quick(**changes):
    return UniForget(**{**QUICK, "beta": 5.0, **changes})


def latents(model, hooks=()):
    return torch.from_numpy(sample(model, KEYS, SETTINGS, hooks).latents)


def state(model):
    return {name: value.clone() for name, value in model.denoiser.state_dict().items()}


def stable(facts):
    """The facts without timings."""
    return {k: stable(v) if isinstance(v, dict) else v for k, v in facts.items() if k != "timing"}


def test_strengths_are_the_papers():
    betas = [configure(UniForget, name).beta for name in UniForget.strengths]
    assert list(UniForget.strengths) == ["weak", "medium", "strong"] and betas == [1.0, 2.0, 5.0]
    assert UniForget.knowledge == {Knowledge.NEUTRAL_PROMPTS}
    assert not UniForget().attn and UniForget().kinds == ("ffn", "norm", "residual")


def test_every_setting_has_help():
    assert all(f.metadata["help"] for f in dataclasses.fields(UniForget))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": False, "norm": False, "residual": False}, "no kind of mask"),
        ({"objective": "l0"}, "objective"),
        ({"dtype": "int8"}, "dtype"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"stretch_low": 0.1}, "must enclose 0 and 1"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(UniForget, "weak", changes)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_fit_and_apply(make_model, make_task, name):
    """Masks of every family are learnt, applied, equal the smaller model, and taken off again."""
    model = make_model(name)
    method = quick(beta=0.1)
    before, base = state(model), latents(model)
    artefact = method.fit(make_task(method, model))
    assert all(torch.equal(value, before[key]) for key, value in model.denoiser.state_dict().items())
    masks = unpack(artefact.tensors)
    assert set(masks) == {s.name for s in find_sites(model.denoiser, method.kinds)}
    assert 0 < artefact.facts["sparsity"] < 1 and 0 < artefact.facts["parameters_changed"] < 1
    json.dumps(artefact.facts)
    with method.apply(model, artefact) as hooks:
        mitigated = latents(model, [hooks])
    assert (mitigated - base).abs().max() > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in model.denoiser.state_dict().items())
    assert torch.equal(latents(model), base)
    smaller = wrap(shrink(model.pipe, masks))
    assert torch.allclose(latents(smaller), mitigated, rtol=0, atol=1e-5 * float(mitigated.abs().max()))


def test_fit_is_deterministic(make_model, make_task):
    """The same task gives the same artefact, whatever the global random state; another seed another one."""
    model, method = make_model("sd"), quick(dtype="bfloat16", attn=True)
    torch.manual_seed(1)
    first = method.fit(make_task(method, model))
    torch.manual_seed(2)
    second = method.fit(make_task(method, model))
    other = method.fit(make_task(method, model, seed="other"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())
    assert stable(first.facts) == stable(second.facts)
    assert not torch.equal(first.tensors["mask.ffn"], other.tensors["mask.ffn"])


def test_recomputation_changes_nothing(make_model, make_task):
    model = make_model("sd")
    artefacts = [quick(recompute=r).fit(make_task(quick(), model)) for r in (True, False)]
    a, b = (artefact.tensors["mask.ffn"] for artefact in artefacts)
    assert torch.allclose(a, b, atol=1e-3)


def test_more_beta_more_off(make_model, make_task):
    """Where the loss is all sparsity everything goes off; where it is all error nothing does."""
    model = make_model("sd")
    shares = [quick(beta=b).fit(make_task(quick(), model)).facts["sparsity"] for b in (0.0, 1e6)]
    assert shares[0] < 0.5 and shares[1] == 1.0


def test_kinds_that_are_off_stay_whole(make_model, make_task):
    method = quick(ffn=False, residual=False, attn=True)
    model = make_model("sd")
    artefact = method.fit(make_task(method, model))
    assert set(artefact.facts["deactivated"]) == {"norm", "attn"}
    kinds = {s.name: s.kind for s in find_sites(model.denoiser)}
    assert {kinds[name] for name in unpack(artefact.tensors)} == {"norm", "attn"}


def test_objective_of_ecodiff(make_model, make_task):
    method = quick(objective="ecodiff")
    facts = method.fit(make_task(method, make_model("sd"))).facts
    assert facts["learning"]["curve"][0]["size"] == pytest.approx(
        3 * torch.sigmoid(torch.tensor(1.4)).item(), abs=1e-5
    )


def test_only_neutral_prompts_are_seen(make_task):
    """The task refuses without the declared knowledge; nothing else is asked for (see ``Neutral``)."""

    class Ignorant(UniForget):
        knowledge = frozenset()

    with pytest.raises(KnowledgeError, match="neutral-prompts"):
        fit(Ignorant(**QUICK), make_task(Ignorant))


def test_target_is_the_base_models(make_model, make_task):
    """With all masks far open the chain is the base model's own: no error at the first step."""
    method = quick(init=50.0, steps=1)
    facts = method.fit(make_task(method, make_model("sd"))).facts
    assert facts["learning"]["curve"][0]["error"] == 0.0


def test_fitting_settings():
    sampler = SamplerSettings(scheduler="model", num_inference_steps=20, guidance_scale=5.0)
    found = fitting_settings(sampler, "sd", 5, None)
    assert (found.scheduler, found.num_inference_steps, found.guidance_scale) == ("ddim", 5, 5.0)
    assert fitting_settings(sampler, "flux", 5, 1.0).scheduler == "model"
    assert fitting_settings(sampler, "flux", 5, 1.0).guidance_scale == 1.0


def test_masked_chain_is_differentiable_in_its_own_chain(make_model):
    """The real ``Chain`` under soft gates: step by step equals the whole graph in float32."""
    from lethebench.methods.uniforget.backprop import backward_through_chain
    from lethebench.methods.uniforget.gate import Gate
    from lethebench.methods.uniforget.masks import MaskParameters, NoisyGates

    model = make_model("flux")
    chain = Chain(model, encode_prompts(model, ["a red star"], SETTINGS), SETTINGS, KEYS[:1])
    found = []
    for recompute in (True, False):
        masks = MaskParameters(find_sites(model.denoiser), 0.5, model.device)
        gates = NoisyGates(model.denoiser, masks, Gate(), 3)
        backward_through_chain(
            chain, chain.initial(), gates, lambda z: z.square().mean(), recompute=recompute
        )
        found.append(masks.by_kind["norm"].grad)
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1], atol=1e-5 * float(found[1].abs().max()), rtol=1e-4)


def test_importing_the_methods_is_light():
    """``lethe list`` must stay quick: no torch, no diffusers."""
    modules = sorted(m.name for m in pkgutil.iter_modules(methods.__path__))
    assert {"uniforget", "nemo_c", "magnitude_pruning"} <= set(modules)
    code = "import sys\n" + "".join(f"import lethebench.methods.{m}\n" for m in modules)
    code += "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hooks_do_nothing_while_sampling():
    model = wrap(tiny_sd())
    with UniForget().apply(model, Artefact()) as hooks:
        assert type(hooks) is SamplerHooks
