"""MACE: its closed forms against another solver, its LoRAs, and what the whole does."""

import json

import numpy as np
import pytest
import torch

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Knowledge, Task, configure
from lethebench.methods.mace import MACE
from lethebench.methods.mace.fit import draw_subjects, foreground, fused, refined
from lethebench.methods.mace.loras import Loras, Subject, attention_mass, importance
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.sampler.attention import CrossAttention, cross_attention
from lethebench.specs import SamplerSettings
from lethebench.unlearning import (
    EDIT,
    encode,
    find_targets,
    parameter_group,
    prediction,
)
from lethebench.unlearning.closed_form import stays
from lethebench.unlearning.tokens import align, encode_texts

SETTINGS = SamplerSettings(scheduler="ddim", num_inference_steps=2, guidance_scale=3.0, height=16, width=16)
FAMILIES = ("sd", "sdxl")


class World:
    """Two memorized captions, one with an anchor that holds all its tokens; two concepts; neutral prompts."""

    name = "test"
    prompts = (
        Prompt("t0", "robot, a red star in a city", Role.TRIGGER, "t0"),
        Prompt("t1", "a blue circle", Role.TRIGGER, "t1"),
        Prompt("c0", "captain in a forest", Role.CONCEPT, "c0", concept="captain"),
        Prompt("c1", "a striped captain in a city", Role.CONCEPT, "c0", concept="captain"),
        Prompt("c2", "a robot in a city", Role.CONCEPT, "c2", concept="robot"),
    )
    anchors = {
        "t0": ["a red star in a city"],
        "t1": ["a blue circle"],
        "c0": ["a star in a forest"],
        "c1": ["a striped red star in a city"],
        "c2": ["a circle in a city"],
    }

    def __iter__(self):
        return iter(self.prompts)

    def paraphrases(self, prompt_id):
        return self.anchors[prompt_id]

    def anchor_concept(self, concept):
        return {"captain": "a star", "robot": "a circle"}[concept]

    def training_prompts(self):
        return [
            f"a {colour} {thing} in a night city" for colour in ("red", "blue") for thing in ("star", "city")
        ]


def quick(**changes):
    return MACE(**{"steps": 3, "images": 2, "chain_steps": 2, "preserve": 4, "lr": 0.05, **changes})


def task_on(model, method=None):
    return Task(model, SETTINGS, World(), (method or MACE()).sees, seed_parts=("test",))


def base_weights(model):
    return {
        n.removeprefix("denoiser."): model.denoiser.get_parameter(n.removeprefix("denoiser."))
        .detach()
        .double()
        for n in parameter_group(model, "cross-attn-kv")
    }


def encoded(model):
    targets = find_targets(task_on(model))
    texts = [x for t in targets for x in (t.text, t.anchors[0])]
    return targets, encode_texts(model, texts + World().training_prompts(), SETTINGS)


def solved(rows, aims):
    """numpy's least squares on stacked rows."""
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(aims), rcond=None)[0].T


def latents_of(model, texts, hooks=()):
    keys = [ImageKey("test@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in texts]
    return torch.from_numpy(sample(model, keys, SETTINGS, hooks).latents)


# --- the closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refinement_is_least_squares(make_model, family):
    """Within 1e-6: rows beside the target's to the anchor's outputs, neutral tokens to their own."""
    model = make_model(family)
    targets, found = encoded(model)
    neutral = torch.cat([found[t].embeds for t in World().training_prompts()]).numpy()
    keys, aims = [], []
    for target in targets:
        text, anchor = found[target.text], found[target.anchors[0]]
        for i, j in align(text.spans[0], anchor.spans[0]).shared:
            keys.append(text.embeds[i].numpy())
            aims.append(anchor.embeds[j].numpy())
    base = base_weights(model)
    weights = refined(base, targets, found, stays(torch.from_numpy(neutral), 0.3, 0.01))
    for name, weight in weights.items():
        w = base[name].numpy()
        eye = 0.1 * np.eye(w.shape[1])
        expected = solved(
            [np.stack(keys), np.sqrt(0.3) * neutral, eye],
            [np.stack(aims) @ w.T, np.sqrt(0.3) * neutral @ w.T, eye @ w.T],
        )
        assert np.abs(weight.numpy() - expected).max() < 1e-6, name


def test_the_fusion_is_least_squares(make_model):
    """Within 1e-6: each subject's rows, from its first own token on, to what its LoRA gives."""
    model = make_model("sd")
    _, found = encoded(model)
    neutral = torch.cat([found[t].embeds for t in World().training_prompts()]).numpy()
    draws = torch.Generator().manual_seed(0)
    base = base_weights(model)
    start = {n: w + 0.1 * torch.randn(w.shape, generator=draws).double() for n, w in base.items()}
    asked = [(("robot, a red star in a city",), ((1, 2),)), (("captain in a forest",), ((1, 2),))]
    nothing = torch.zeros(0)
    subjects = [Subject(str(i), texts, own, nothing, nothing) for i, (texts, own) in enumerate(asked)]
    loras = [
        {
            n: tuple(torch.randn(s, generator=draws).double() for s in ((w.shape[0], 1), (1, w.shape[1])))
            for n, w in base.items()
        }
        for _ in asked
    ]
    weights = fused(base, start, subjects, loras, found, stays(torch.from_numpy(neutral), 0.3, 0.01))
    rows = [found[texts[0]].embeds[own[0][0] :].numpy() for texts, own in asked]
    for name, weight in weights.items():
        w = base[name].numpy()
        eye = 0.1 * np.eye(w.shape[1])
        own = [
            r @ (start[name] + lora[name][0] @ lora[name][1]).numpy().T
            for r, lora in zip(rows, loras, strict=True)
        ]
        expected = solved(
            [*rows, np.sqrt(0.3) * neutral, eye], [*own, np.sqrt(0.3) * neutral @ w.T, eye @ w.T]
        )
        assert np.abs(weight.numpy() - expected).max() < 1e-6, name


# --- the LoRAs ------------------------------------------------------------------------------------


def test_the_loss_is_the_attention_to_the_targets_tokens(make_model):
    """Against the attention that a recorder sees, squared and summed under the masks by hand."""
    model = make_model("sd")
    modules = cross_attention(model.denoiser)
    texts = ["captain in a forest", "a red star in a city"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    masks, marks = torch.zeros(2, 1, 8, 8), torch.zeros(2, 16)
    masks[0, :, :4], masks[1, :, :, 2:] = 1.0, 1.0
    marks[0, 1], marks[1, 2:4] = 1.0, 1.0
    watch = CrossAttention(modules, 2, lambda found: found)
    with torch.no_grad(), watch.watch(), attention_mass(modules, marks, masks) as found:
        prediction(model, latents, torch.tensor([300, 300]), encode(model, texts, SETTINGS), SETTINGS)
    expected = []
    for seen in watch.seen.values():
        side = round(seen.shape[2] ** 0.5)
        small = masks.reshape(2, side, 8 // side, side, 8 // side).mean(dim=(2, 4)).flatten(1)
        first = (seen[0, :, :, 1] * small[0]).square().sum()
        second = (seen[1, :, :, 2:4] * small[1][:, None]).square().sum()
        expected.append(torch.stack([first, second]))
    assert len(found) == len(modules) > 0
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_the_targets_tokens_falls(make_model, family):
    """In training, and under the fused edit; the model is restored bit for bit."""
    model = make_model(family)
    state = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    method = quick(steps=25, images=1)
    artefact = method.fit(task_on(model))
    assert all(torch.equal(v, state[k]) for k, v in model.denoiser.state_dict().items())
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    curve = [point["attention"] for point in artefact.facts["curve"]]
    assert curve[-1] < 0.5 * curve[0] and len(curve) <= 20
    text, modules = "captain in a forest", cross_attention(model.denoiser)
    marks = torch.zeros(1, encode(model, [text], SETTINGS).embeds.shape[1])
    marks[0, 1:3] = 1.0
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def mass():
        with torch.no_grad(), attention_mass(modules, marks, torch.ones(1, 1, 8, 8)) as found:
            prediction(model, latents, torch.tensor([300]), encode(model, [text], SETTINGS), SETTINGS)
        return float(torch.stack(found).sum())

    before = mass()
    with method.apply(model, artefact):
        assert mass() < before


def test_a_lora_acts_on_its_own_row(make_model):
    """Row i of a batch is what the weight with LoRA i's change gives; other rows don't see it."""
    model = make_model("sd")
    modules = cross_attention(model.denoiser)
    loras = Loras(modules, 2, [torch.Generator().manual_seed(i) for i in range(3)], model.device)
    for up in loras.up.values():
        up.data.normal_(generator=torch.Generator().manual_seed(9))
    name, layer = next(iter(loras.layers.items()))
    inputs = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    with loras.applied():
        found = layer(inputs)
    for i in range(3):
        up, down = loras.factors(i)[f"{name}.weight"]
        weight = layer.weight.double() + up @ down
        torch.testing.assert_close(found[i], (inputs[i].double() @ weight.T).float())
    assert torch.equal(layer(inputs), inputs @ layer.weight.T)


def test_timesteps_are_drawn_where_the_paper_says():
    """Between 200 and 400, by the difference of two sigmoids."""
    density = importance(1000)
    assert int(density.argmax()) == 300 and float(density.min()) >= 0
    assert float(density[180:421].sum() / density.sum()) > 0.93
    assert float(density[100] + density[500]) < 0.02


def test_batches_change_nothing(make_model):
    """LoRAs trained side by side are those trained alone, within rounding."""
    model = make_model("sd")
    together, alone = (quick(batch_size=n).fit(task_on(model)) for n in (8, 1))
    for name, value in together.tensors.items():
        torch.testing.assert_close(value, alone.tensors[name], atol=1e-4, rtol=1e-3)


def test_subjects_and_their_own_tokens(make_model):
    """Prompts of a cluster are one subject; a caption that its anchor holds whole is none."""
    model, method = make_model("sd"), quick(images=3)
    targets, found = encoded(model)
    subjects = draw_subjects(method, task_on(model), targets, found, SETTINGS)
    assert [(s.cluster, s.own) for s in subjects] == [
        ("t0", ((1, 2),)),
        ("c0", ((1, 2), (3, 4))),
        ("c2", ((2,),)),
    ]
    assert all(s.latents.shape == (3, 4, 8, 8) and s.masks.shape == (3, 1, 8, 8) for s in subjects)
    assert all(bool((s.masks == 1).all()) for s in subjects)


def test_masks_are_the_foreground():
    """The built-in segmenter's on pictures of 64 pixels, brought to the latents' size."""
    from lethebench.zoo import load_model

    model, method = load_model("mini-sd"), MACE(segmenter="segmenter-mini")
    settings = SamplerSettings(scheduler="ddim", num_inference_steps=4, guidance_scale=3.0)
    task = Task(model, settings, World(), MACE().sees, seed_parts=("test",))
    from lethebench.unlearning import draw_latents

    latents = draw_latents(model, ["a plain red ball on a beach"], settings, task.generator("x"))
    masks = foreground(method, task, latents)
    assert masks.shape == (1, 1, *latents.shape[-2:])
    assert 0 <= float(masks.min()) < 0.1 and 0.5 < float(masks.max()) <= 1


def test_a_segmenter_that_cannot_work_is_refused_before_any_work(make_model):
    model = make_model("sd")
    with pytest.raises(UserError, match=r"segmenter-mini reads 64 x 64 pictures, .* draws 16 x 16"):
        quick(segmenter="segmenter-mini").fit(task_on(model))
    with pytest.raises(UserError, match="birefnet"):
        quick(segmenter="birefnet").fit(task_on(model))


# --- the whole ------------------------------------------------------------------------------------


def test_strength_zero_is_the_identity(make_model):
    """With no refinement and no training there is no change; at scale 0 none is put on."""
    model = make_model("sd")
    nothing = quick(steps=0, refine=False)
    assert nothing.fit(task_on(model)).tensors == {}
    method = quick(scale=0.0)
    artefact, texts = method.fit(task_on(model)), ["captain in a forest"]
    before = latents_of(model, texts)
    with method.apply(model, artefact) as hooks:
        assert torch.equal(latents_of(model, texts, [hooks]), before)
    with quick(scale=1.0).apply(model, artefact) as hooks:
        assert (latents_of(model, texts, [hooks]) - before).abs().max() > 1e-3


def test_fits_are_the_same_and_the_facts_are_json(make_model):
    model, method = make_model("sd"), quick()
    first, second = (method.fit(task_on(model)) for _ in range(2))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())
    assert {n.removeprefix(EDIT) for n in first.tensors} == set(parameter_group(model, "cross-attn-kv"))
    facts = json.loads(json.dumps(first.facts))
    assert (facts["targets"], facts["clusters"], facts["loras"]) == (5, 4, 3)
    assert 0 < facts["parameters_changed"] < 1


def test_strengths_share_one_fit():
    from lethebench.method import fitted_settings

    fitted = [fitted_settings(configure(MACE, name)) for name in MACE.strengths]
    assert fitted[0] == fitted[1] == fitted[2]


def test_only_what_is_used_is_seen():
    names, captions, neutral = (
        Knowledge.CONCEPT_NAMES,
        Knowledge.MEMORIZED_PROMPTS,
        Knowledge.NEUTRAL_PROMPTS,
    )
    assert MACE().sees == {names, captions, neutral}
    assert MACE(targets="concepts").sees == {names, neutral}
    assert MACE(targets="triggers").sees == {captions, neutral}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmenter": "eye"}, "segmenter is none, segmenter-mini, birefnet, sam, not 'eye'"),
        ({"targets": "names"}, "targets is"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"preserve": 0}, "preserve must be at least 1, not 0"),
        ({"lr": "low"}, "lr is a number, not 'low'"),
        ({"lamb": -1.0}, "lamb must not be negative"),
        ({"steps": -1}, "steps must not be negative"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(MACE, "weak", changes)
