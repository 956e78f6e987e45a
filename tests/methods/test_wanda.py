"""Wanda pruning: masks against an explicit sort and a naive loop, zeros against hooks."""

import pytest
import torch
from torch.nn import functional as F

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Knowledge, Task, configure
from lethebench.methods.wanda import Wanda
from lethebench.methods.wanda.masks import (
    ZERO,
    Layer,
    find_layers,
    joined,
    mask_of_step,
    token_squares,
    zeroed,
)
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning import NeutralBatches, find_targets, fitting_settings

SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=4.0, height=16, width=16)
QUICK = {"tau": 2, "chain_steps": 0, "ratio": 0.1, "batch_size": 2}


class Prompts:
    """Two memorized prompts of one item and one concept's."""

    name, version = "some", "1"

    def __iter__(self):
        yield Prompt("t1", "a red star", Role.TRIGGER, "item")
        yield Prompt("t2", "a red star in night", Role.TRIGGER, "item")
        yield Prompt("c1", "captain robot in a city", Role.CONCEPT, "robot", concept="robot")

    def training_prompts(self):
        return ["a blue circle", "a striped forest"]

    def paraphrases(self, _id):
        return ["a star"]

    def anchor_concept(self, _concept):
        return "a captain"


def task_for(method, model):
    return Task(model, SETTINGS, Prompts(), method.sees, seed_parts=("test",))


def quick(**changes):
    return Wanda(**{**QUICK, **changes})


def chosen(artefact, denoiser):
    """The artefact's boolean masks by parameter, its bits read one by one."""
    masks = {}
    for name, packed in artefact.tensors.items():
        shape = denoiser.get_parameter(name.removeprefix(ZERO)).shape
        bits = "".join(f"{byte:08b}" for byte in packed.tolist())[: shape.numel()]
        masks[name.removeprefix(ZERO)] = torch.tensor([bit == "1" for bit in bits]).view(shape)
    return masks


def test_mask_is_the_sorts():
    """Of every row the largest scores by Python's sort, where they exceed the base's."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 40, generator=draws).abs().double()
    target, base = torch.rand(2, 40, generator=draws, dtype=torch.float64)
    mask = mask_of_step(weight, target, base, 0.2)
    for row in range(7):
        order = sorted(range(40), key=lambda j: -float(weight[row, j] * target[j]))[:8]
        assert mask[row].nonzero()[:, 0].tolist() == sorted(j for j in order if target[j] > base[j])
    assert 0 < mask.sum() < 7 * 8


def test_equal_scores_take_the_first():
    ones = torch.ones(2, 10, dtype=torch.float64)
    assert mask_of_step(ones, ones[0], 0 * ones[0], 0.3).tolist() == [[True] * 3 + [False] * 7] * 2
    assert not mask_of_step(ones, ones[0], ones[0], 0.3).any()


def test_masks_are_joined_by_the_share_of_steps():
    """The union at 0, as released: more than ``union * steps`` masks must hold a weight."""
    weight = torch.ones(1, 4, dtype=torch.float64)
    target = torch.tensor([[2, 1, 1, 1], [2, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1]], dtype=torch.float64)
    base = torch.zeros(4, 4, dtype=torch.float64)
    shares = (0.0, 0.25, 0.5)
    found = [joined(weight, target, base, 0.25, share)[0].tolist() for share in shares]
    assert found == [[True, True, True, False], [True, False, False, False], [False] * 4]


def test_token_squares_are_of_unit_tokens():
    inputs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(5)
    for token in inputs.view(-1, 5):
        expected += (token / token.norm()) ** 2
    assert torch.allclose(token_squares(inputs), expected, atol=1e-6)
    assert float(token_squares(inputs).sum()) == pytest.approx(6, abs=1e-5)  # one for each token


@pytest.mark.parametrize("base", ["empty", "neutral"])
def test_fit_equals_a_naive_loop(make_model, base):
    """Prompt by prompt, token by token, from the activations themselves, in float64."""
    model = make_model("sd")
    method = quick(base=base, ratio=0.2)
    task = task_for(method, model)
    masks = chosen(method.fit(task), model.denoiser)
    names = [n for n, m in model.denoiser.named_modules() if n.endswith("ff.net.2")]
    assert list(masks) == [f"{n}.weight" for n in names]
    targets = [t.text for t in find_targets(task)]
    if base == "empty":
        against = ["", "", ""]
    else:
        order = torch.randperm(2, generator=task.generator("base")).tolist()
        against = [task.neutral_prompts()[i] for i in (*order, order[0])]
    norms = [naive_norms(model, texts, names, task) for texts in (targets, against)]
    for name in names:
        weight = model.denoiser.get_parameter(f"{name}.weight").abs().double()
        expected = torch.zeros(weight.shape, dtype=torch.bool)
        for step in range(2):
            of_target, of_base = (weight * n[step, name] for n in norms)
            for row in range(weight.shape[0]):
                places = of_target[row].argsort(descending=True)[: int(0.2 * weight.shape[1])]
                for place in places.tolist():
                    expected[row, place] |= bool(of_target[row, place] > of_base[row, place])
        assert torch.equal(masks[f"{name}.weight"], expected) and expected.any()


def naive_norms(model, texts, names, task):
    """By (step, layer) the norm of each input: one prompt at a time, both halves, token by token."""
    settings = fitting_settings(SETTINGS, "sd", 4, None)
    squares = {}
    batches = NeutralBatches(model, texts, settings, 2, task.generator("noise"))
    for number in range(len(batches)):
        batch = batches.chain(number)
        latents = batch.start
        for step in range(2):
            seen = {}
            handles = [
                model.denoiser.get_submodule(n).register_forward_hook(
                    lambda _m, args, _out, n=n, seen=seen: seen.__setitem__(n, args[0])
                )
                for n in names
            ]
            with torch.no_grad():
                latents = batch.chain.step(step, latents)
            for handle in handles:
                handle.remove()
            for name, inputs in seen.items():
                for token in inputs.double().reshape(-1, inputs.shape[-1]):
                    unit = token / token.norm()
                    squares[step, name] = squares.get((step, name), 0) + unit**2
    return {key: value.sqrt() for key, value in squares.items()}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_zeros_equal_hooks(make_model, name):
    """Every family: the zeroed model draws what one with masked layers does, and is restored after it."""
    model = make_model(name)
    method = quick()
    artefact = method.fit(task_for(method, model))
    keys = [ImageKey("test@1", next(iter(Prompts())), 0)]
    before = {n: p.clone() for n, p in model.denoiser.state_dict().items()}
    base = torch.from_numpy(sample(model, keys, SETTINGS).latents)
    with method.apply(model, artefact) as hooks:
        found = torch.from_numpy(sample(model, keys, SETTINGS, [hooks]).latents)
    assert all(torch.equal(p, before[n]) for n, p in model.denoiser.state_dict().items())
    handles = [
        model.denoiser.get_submodule(parameter.removesuffix(".weight")).register_forward_hook(
            lambda m, args, _out, mask=mask: F.linear(args[0], m.weight.masked_fill(mask, 0), m.bias)
        )
        for parameter, mask in chosen(artefact, model.denoiser).items()
    ]
    hooked = torch.from_numpy(sample(model, keys, SETTINGS).latents)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, hooked) and (found - base).abs().max() > 1e-4


def test_layers_of_a_family(make_model):
    sd = find_layers(make_model("sd").denoiser)
    assert all(x.module.endswith("transformer_blocks.0.ff.net.2") and x.first == 0 for x in sd)
    denoiser = make_model("flux").denoiser
    layers = {x.module: x for x in find_layers(denoiser)}
    assert set(layers) == {
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.0.proj_out",
    }
    single = denoiser.single_transformer_blocks[0]
    width = single.proj_mlp.out_features
    out = single.proj_out.in_features
    assert layers["single_transformer_blocks.0.proj_out"] == Layer(
        "single_transformer_blocks.0.proj_out", out - width, width
    )


def test_attention_columns_of_flux_stay(make_model):
    model = make_model("flux")
    method = quick(ratio=1.0)
    mask = chosen(method.fit(task_for(method, model)), model.denoiser)
    single = mask["single_transformer_blocks.0.proj_out.weight"]
    width = model.denoiser.single_transformer_blocks[0].proj_mlp.out_features
    assert not single[:, :-width].any() and single[:, -width:].any()


def test_facts_count_what_is_zeroed(make_model):
    model = make_model("sd")
    method = quick()
    artefact = method.fit(task_for(method, model))
    with zeroed(model.denoiser, artefact.tensors):
        zeros = sum(int((p == 0).sum()) for p in model.denoiser.parameters())
    total = sum(p.numel() for p in model.denoiser.parameters())
    assert zeros == artefact.facts["zeroed_weights"] > 0
    assert artefact.facts["parameters_changed"] == zeros / total
    assert (artefact.facts["targets"], artefact.facts["clusters"]) == (3, 2)
    assert 0 < artefact.facts["sparsity"] < 0.2


def test_larger_ratios_contain_smaller_ones(make_model):
    model = make_model("sd")
    small, large = (
        chosen(m.fit(task_for(m, model)), model.denoiser) for m in (quick(ratio=0.05), quick(ratio=0.2))
    )
    assert all(bool((large[n] | ~small[n]).all()) for n in small)
    assert sum(int(m.sum()) for m in large.values()) > sum(int(m.sum()) for m in small.values()) > 0


def test_sees_what_it_uses():
    memorized, concepts, neutral = (
        Knowledge.MEMORIZED_PROMPTS,
        Knowledge.CONCEPT_NAMES,
        Knowledge.NEUTRAL_PROMPTS,
    )
    assert Wanda().sees == {memorized, concepts}
    assert Wanda(targets="triggers").sees == {memorized}
    assert Wanda(targets="concepts", base="neutral").sees == {concepts, neutral}


def test_one_kind_of_target_needs_no_other_knowledge(make_model):
    """``task_for`` gives what ``sees`` says; anything else raises KnowledgeError."""
    model = make_model("sd")
    found = {}
    for which in ("triggers", "concepts"):
        method = quick(targets=which)
        found[which] = method.fit(task_for(method, model)).facts["targets"]
    assert found == {"triggers": 2, "concepts": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "some"}, "targets is triggers, concepts or all, not 'some'"),
        ({"base": "none"}, "base is empty or neutral"),
        ({"ratio": 0}, "ratio is a share above 0"),
        ({"union": 1}, "union is a share from 0 and below 1"),
        ({"tau": 0}, "tau must be at least 1, not 0"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(Wanda, "weak", changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 5}, "tau is 5, but the chain has 4 steps"),
        ({"ratio": 0.01}, "ratio 0.01 takes none of the 32 weights in a row of .* use at least 0.031"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_any_work(make_model, changes, message):
    method = quick(**changes)
    with pytest.raises(UserError, match=message):
        method.fit(task_for(method, make_model("sd")))
