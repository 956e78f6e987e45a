"""EcoDiff: agreement with the release, masks by rank, fits on tiny models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lethebench.errors import UserError
from lethebench.method import Knowledge, configure
from lethebench.methods.ecodiff import EcoDiff
from lethebench.methods.ecodiff.rank import largest
from lethebench.methods.uniforget.gate import Gate
from lethebench.methods.uniforget.loss import size_by_layer
from lethebench.pruning import find_sites, gated, unpack, zeroed
from lethebench.unlearning import NeutralBatches, fitting_settings

REFERENCE = json.loads((Path(__file__).parent / "data" / "ecodiff.json").read_text())
"""Numbers of the release on the same inputs; the file says which commit and how."""
QUICK = {"steps": 4, "prompts": 6, "batch_size": 3, "chain_steps": 2, "dtype": "float32", "init": 1.0}


def quick(**changes):
    return EcoDiff(**{**QUICK, **changes})


# --- agreement with the release ---


@pytest.mark.parametrize("case", REFERENCE["gates"]["cases"], ids=lambda c: f"eps {c['delta_re']}")
def test_gates_are_the_releases(case):
    """``hard_concrete_distribution`` on the same mask and noise."""
    mask = torch.tensor(REFERENCE["gates"]["mask"], dtype=torch.float64)
    uniform = torch.tensor(REFERENCE["gates"]["uniform"], dtype=torch.float32)
    gate = Gate(temperature=case["temperature"], delta_re=case["delta_re"])
    expected = torch.tensor(case["gate"], dtype=torch.float64)
    assert torch.allclose(gate.sampled(mask, uniform), expected, rtol=0, atol=1e-12)
    assert 0 < ((expected > 0) & (expected < 1)).sum() < len(expected)


def test_the_masks_size_is_the_releases():
    """``calculate_reg_loss`` with p = 1, with and without ``lambda_reg``, summed over two kinds."""
    kinds = REFERENCE["size"]["layers"]
    layers = {k: [torch.tensor(v, dtype=torch.float64) for v in values] for k, values in kinds.items()}
    for bounded in (True, False):
        found = size_by_layer(layers, 0.4, 1.0, bounded=bounded)
        assert float(found) == pytest.approx(REFERENCE["size"]["bounded" if bounded else "raw"], abs=1e-12)


@pytest.mark.parametrize("case", REFERENCE["pruned"], ids=lambda c: c["scope"])
def test_masks_by_rank_are_the_releases(case):
    """``binarize``, on values with ties."""
    for kind, masks in REFERENCE["masks"].items():
        layers = [torch.tensor(v, dtype=torch.float64) for v in masks.values()]
        found = largest(layers, case["keep"], case["scope"])
        assert [m.int().tolist() for m in found] == list(case["kept"][kind].values())


@pytest.mark.parametrize("case", REFERENCE["pruned"], ids=lambda c: c["scope"])
def test_the_pruned_models_output_is_the_releases(make_tiny, case):
    """The UNet under the release's hooks on attention heads and neurons, and ours: gated, and zeroed."""
    tiny = make_tiny("sd")
    masks = {n: torch.tensor(m, dtype=torch.bool) for n, m in case["kept"]["attn"].items()}
    masks |= {f"{n}.net.0": torch.tensor(m, dtype=torch.bool) for n, m in case["kept"]["ffn"].items()}
    sites = find_sites(tiny.denoiser, ("attn", "ffn"))
    assert set(masks) == {s.name for s in sites}
    expected = torch.tensor(case["output"], dtype=torch.float64).view(2, 4, 8, 8)
    with gated(tiny.denoiser, sites, {n: m.double() for n, m in masks.items()}):
        assert torch.allclose(tiny.output(), expected, rtol=0, atol=1e-12)
    with zeroed(tiny.denoiser, masks):
        assert torch.allclose(tiny.output(), expected, rtol=0, atol=1e-12)
    assert (tiny.output() - expected).abs().max() > 0.1


# --- masks by rank ---


def test_largest_by_an_explicit_sort():
    draws = torch.Generator().manual_seed(0)
    layers = [torch.randn(n, generator=draws) for n in (7, 4, 9)]
    kept = torch.cat(largest(layers, 0.3, "global"))
    order = sorted(range(20), key=lambda i: -float(torch.cat(layers)[i]))
    assert kept.nonzero()[:, 0].tolist() == sorted(order[:6])
    assert [int(m.sum()) for m in largest(layers, 0.5, "local")] == [3, 2, 4]
    assert all(bool(m.all()) for m in largest(layers, 1.0, "local"))


def test_nothing_to_keep_is_nothing_kept():
    """The release then keeps all but the smallest: its threshold becomes the last value's."""
    assert [m.tolist() for m in largest([torch.tensor([1.0, 2.0])], 0.4, "local")] == [[False, False]]


# --- the method ---


def test_defaults_are_the_releases_for_flux():
    method = EcoDiff()
    found = (method.beta, method.init, method.delta_re, method.temperature, method.lr_attn, method.lr_ffn)
    assert found == (0.01, 3.0, 0.1, 0.83, 0.5, 0.1)
    learner = method.learner
    assert (learner.objective, learner.cosine, learner.kinds) == ("ecodiff", False, ("ffn", "attn"))
    assert (learner.gamma, learner.delta, learner.chain_steps) == (0.4, 1.0, 5)
    assert method.knowledge == {Knowledge.NEUTRAL_PROMPTS}
    assert [configure(EcoDiff, s).keep for s in EcoDiff.strengths] == [0.8, 0.6, 0.5]
    assert EcoDiff(bounded=False).learner.objective == "ecodiff-raw"


def test_every_shared_setting_reaches_the_learner():
    changed = {"beta": 3.0, "steps": 7, "lr_norm": 0.3, "norm": True, "dtype": "float32", "guidance": 2.0}
    learner = EcoDiff(**changed).learner
    assert {name: getattr(learner, name) for name in changed} == changed


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_fit_keeps_the_stated_share(make_model, make_task, name):
    """In every family, whatever the learning did; the model is restored."""
    model = make_model(name)
    method = quick(keep=0.75, norm=True, residual=True)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    artefact = method.fit(make_task(method, model))
    sites = find_sites(model.denoiser)
    assert set(unpack(artefact.tensors)) == {s.name for s in sites}
    for kind, off in artefact.facts["deactivated"].items():
        total = sum(s.size for s in sites if s.kind == kind)
        assert round(off * total) == total - int(0.75 * total)
    with method.apply(model, artefact):
        assert any(not torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


def test_strengths_are_nested(make_model, make_task):
    """What a larger share keeps holds what a smaller one keeps: the learning doesn't know the share."""
    model = make_model("sd")
    kept = [unpack(m.fit(make_task(m, model)).tensors) for m in (quick(keep=0.4), quick(keep=0.8))]
    assert all(bool((kept[1][n] | ~kept[0][n]).all()) for n in kept[0])


def test_the_loss_starts_at_its_two_terms(make_model, make_task):
    """Wide open gates give no error; the size is one mean for each kind (bounded) or the masks' (raw)."""
    model = make_model("sd")
    sizes = {}
    for bounded in (True, False):
        method = quick(init=50.0, steps=1, bounded=bounded, norm=True)
        point = method.fit(make_task(method, model)).facts["learning"]["curve"][0]
        assert point["error"] == 0.0
        sizes[bounded] = point["size"]
    assert sizes[True] == pytest.approx(3.0, abs=1e-5) and sizes[False] == pytest.approx(150.0)


def test_learning_decides_which_stay(make_model, make_task):
    """The largest stay; and the neutral prompts' latents move less than under random masks as many."""
    model = make_model("sd")
    method = quick(keep=0.6, steps=30, batch_size=9, prompts=9, beta=0.01, attn=False, delta_re=0.5)
    task = make_task(method, model)
    artefact = method.fit(task)
    masks, values = unpack(artefact.tensors), artefact.tensors["mask.ffn"]
    kept = torch.cat([masks[s.name] for s in find_sites(model.denoiser, ("ffn",))])
    assert values.std() > 0.01 and values[kept].min() >= values[~kept].max()
    settings = fitting_settings(task.sampler, "sd", 2, None)
    batches = NeutralBatches(model, task.neutral_prompts(), settings, 9, task.generator("noise"))
    base = batches.final(0)

    def error(masks):
        with zeroed(model.denoiser, masks), torch.no_grad():
            return float((batches.chain(0).chain.run(batches.chain(0).start) - base).square().mean())

    random = []
    for seed in range(8):
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        parts = kept[order].split([len(m) for m in masks.values()])
        random.append(error(dict(zip(masks, parts, strict=True))))
    assert error(masks) < 0.3 * min(random)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "keep is a share above 0"),
        ({"keep": 1.2}, "keep is a share above 0 and up to 1, not 1.2"),
        ({"scope": "layer"}, "scope is 'global' or 'local', not 'layer'"),
        ({"attn": False, "ffn": False}, "no kind of mask is on"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"dtype": "int8"}, "dtype is"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(EcoDiff, "weak", changes)


def test_every_setting_has_help():
    assert all(f.metadata["help"] for f in dataclasses.fields(EcoDiff))
