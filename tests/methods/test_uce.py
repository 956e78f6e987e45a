"""UCE: its closed form against another solver, what it does to prompts, and the released code's own numbers."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import clip_text, clip_tokenizer, seeded, t5_text, t5_tokenizer, tiny_sd, tiny_sdxl, vae

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Knowledge, Task, configure
from lethebench.methods.uce import UCE
from lethebench.methods.uce.fit import POOLED, erased_texts, preserve_scale, rows_of, solve, wanted
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning import EDIT, find_targets, parameter_group
from lethebench.unlearning.closed_form import ClosedForm, stays
from lethebench.unlearning.tokens import align, aligned_tails, encode_texts
from lethebench.zoo import wrap

DATA = Path(__file__).parent / "data"
SETTINGS = SamplerSettings(num_inference_steps=2, guidance_scale=3.0, height=16, width=16)
FAMILIES = ("sd", "sdxl", "sd3", "flux")


class World:
    """Two memorized captions, two concepts, and neutral prompts."""

    name = "test"
    prompts = (
        Prompt("t0", "robot, a red star in a city", Role.TRIGGER, "t0"),
        Prompt("t1", "striped, a blue circle", Role.TRIGGER, "t1"),
        Prompt("c0", "captain in a forest", Role.CONCEPT, "c0", concept="captain"),
        Prompt("c1", "a striped robot captain in a city", Role.CONCEPT, "c0", concept="captain"),
        Prompt("c2", "robot in a city", Role.CONCEPT, "c2", concept="robot"),
    )
    anchors = {
        "t0": ["a red star in a city"],
        "t1": ["a blue circle"],
        "c0": ["a star in a forest"],
        "c1": ["a striped robot a star in a city"],
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


def task_on(model, method=None):
    return Task(model, SETTINGS, World(), (method or UCE()).sees, seed_parts=("test",))


def edited(model, **settings):
    """The weights after an edit by name, without the component, in float64."""
    artefact = UCE(**settings).fit(task_on(model, UCE(**settings)))
    return {
        name.removeprefix("denoiser."): (
            model.denoiser.get_parameter(name.removeprefix("denoiser.")).double()
            + artefact.tensors.get(EDIT + name, torch.zeros(1)).double()
        )
        for name in parameter_group(model, "text-projections")
    }


def latents_of(model, texts, hooks=()):
    keys = [ImageKey("test@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in texts]
    return torch.from_numpy(sample(model, keys, SETTINGS, hooks).latents)


# --- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("lamb", [0.5, 1e-3])
@pytest.mark.parametrize("kept", [0, 7])
def test_closed_form_is_the_ridge_solution(lamb, kept):
    """Against numpy's least squares on the stacked problem: one row of it for each wanted or kept output."""
    draws = np.random.default_rng(kept)
    base, keys, values = draws.normal(size=(6, 10)), draws.normal(size=(4, 10)), draws.normal(size=(4, 6))
    scales, preserved = draws.uniform(0.1, 2, 4), draws.normal(size=(kept, 10))
    rows = [np.sqrt(scales)[:, None] * keys, np.sqrt(0.7) * preserved, np.sqrt(lamb) * np.eye(10)]
    aims = [np.sqrt(scales)[:, None] * values, np.sqrt(0.7) * preserved @ base.T, np.sqrt(lamb) * base.T]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(aims), rcond=None)[0].T
    stay = stays(torch.from_numpy(preserved), 0.7, lamb)
    form = ClosedForm(torch.from_numpy(keys), torch.from_numpy(scales), stay)
    found = form.weight(torch.from_numpy(base), torch.from_numpy(values))
    assert np.abs(found.numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("rank", [4, 8, 9])
@pytest.mark.parametrize("seed", range(10))
def test_closed_form_without_lambda_is_the_smallest_change(rank, seed):
    """Also where the system lacks a single rank, which a Cholesky factorisation often doesn't notice."""
    draws = np.random.default_rng(seed)
    base, keys, values = (
        draws.normal(size=(3, 10)),
        draws.normal(size=(rank, 10)),
        draws.normal(size=(rank, 3)),
    )
    change = np.linalg.lstsq(keys, values - keys @ base.T, rcond=None)[0].T
    form = ClosedForm(*(torch.from_numpy(x) for x in (keys, np.ones(rank), np.zeros((10, 10)))))
    found = form.weight(torch.from_numpy(base), torch.from_numpy(values))
    assert np.abs(found.numpy() - base - change).max() < 1e-6 * max(1.0, np.abs(change).max())


@pytest.mark.parametrize("rule", ["current", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_is_the_ridge_solution(make_model, family, rule):
    """Every edited layer of every family, from the prompts' own embeddings, within 1e-6."""
    model = make_model(family)
    found = edited(model, rule=rule, guide="anchor", preserve=3, erase_scale=0.8)
    task = task_on(model, UCE(preserve=3))
    pairs = erased_texts(find_targets(task), "anchor", templates=False)
    texts = encode_texts(model, [x for pair in pairs for x in pair] + ["", *task.neutral_prompts()], SETTINGS)
    order = torch.randperm(4, generator=task.generator("preserved")).tolist()[:3]
    kept = [""] * (rule == "original") + [task.neutral_prompts()[i] for i in order]
    scale = 1.0 if rule == "current" else 1 / 4
    for name, weight in found.items():
        base = model.denoiser.get_parameter(name).detach().double().numpy()
        keys, guides, preserved = [], [], []
        if name.endswith(POOLED):
            keys, guides = ([texts[pair[i]].pooled[None] for pair in pairs] for i in (0, 1))
            preserved = [texts[t].pooled[None] for t in kept]
        elif rule == "current":
            keys, guides = ([texts[pair[i]].last() for pair in pairs] for i in (0, 1))
            preserved = [texts[t].last() for t in kept]
        else:
            both = [aligned_tails(texts[a], texts[b]) for a, b in pairs]
            keys, guides = [a for a, _ in both], [b for _, b in both]
            preserved = [texts[t].embeds for t in kept]
        k, g, p = (torch.cat(x).numpy() for x in (keys, guides, preserved))
        rows = [np.sqrt(0.8) * k, np.sqrt(scale) * p, np.sqrt(0.5) * np.eye(k.shape[1])]
        aims = [np.sqrt(0.8) * g @ base.T, np.sqrt(scale) * p @ base.T, np.sqrt(0.5) * base.T]
        expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(aims), rcond=None)[0].T
        assert np.abs(weight.detach().numpy() - expected).max() < 1e-6, name


# --- what it does ---------------------------------------------------------------------------------


def test_the_erased_embedding_goes_to_the_guides(make_model):
    """With a growing weight, in every edited layer; what is left falls to nothing."""
    model = make_model("sd")
    left = []
    for erase_scale in (0.01, 1.0, 100.0, 1e6):
        found = edited(model, targets="concepts", count=1, guide="anchor", erase_scale=erase_scale)
        erased = next(iter(erased_texts(find_targets(task_on(model), "concepts", 1), "anchor", False)))
        own, guide = (encode_texts(model, [t], SETTINGS)[t].last() for t in erased)
        gaps = []
        for name, weight in found.items():
            base = model.denoiser.get_parameter(name).detach().double()
            gaps.append(float((own @ weight.T - guide @ base.T).norm() / ((own - guide) @ base.T).norm()))
        left.append(max(gaps))
    assert left == sorted(left, reverse=True) and left[0] > 0.5 and left[-1] < 1e-4


def test_preserved_prompts_move_less_than_erased_ones(make_model):
    model = make_model("sd")
    method = UCE(rule="original", guide="anchor", targets="triggers", preserve=4, preserve_scale=10.0)
    task = task_on(model, method)
    artefact = method.fit(task)
    neutral, erased = list(task.neutral_prompts()), [p.text for p in World.prompts[:2]]
    before = latents_of(model, neutral + erased)
    with method.apply(model, artefact) as hooks:
        moved = (latents_of(model, neutral + erased, [hooks]) - before).flatten(1).norm(dim=1)
    assert moved[len(neutral) :].min() > 1.5 * moved[: len(neutral)].max()


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_is_the_identity(make_model, family):
    method = UCE(erase_scale=0.0, preserve=2)
    artefact = method.fit(task_on(make_model(family), method))
    assert artefact.tensors == {} and artefact.facts["parameters_changed"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_and_apply(make_model, family):
    """A fit of every family moves its images, and the model is restored bit for bit."""
    model = make_model(family)
    texts = ["robot, a red star in a city", "a circle"]
    state = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    before = latents_of(model, texts)
    method = UCE(guide="anchor")
    artefact, again = (method.fit(task_on(model)) for _ in range(2))
    assert {n.removeprefix(EDIT) for n in artefact.tensors} == set(parameter_group(model, "text-projections"))
    assert all(torch.equal(v, again.tensors[k]) for k, v in artefact.tensors.items())
    with method.apply(model, artefact) as hooks:
        assert (latents_of(model, texts, [hooks]) - before).abs().max() > 1e-3
    assert all(torch.equal(v, state[k]) for k, v in model.denoiser.state_dict().items())
    assert artefact.facts["targets"] == 5 and artefact.facts["clusters"] == 4
    assert artefact.facts["erased_texts"] == 4 and 0 < artefact.facts["left"] < 1


def test_more_targets_hold_fewer(make_model):
    task = task_on(make_model("sd"))
    lists = [erased_texts(find_targets(task, "all", n), "", False) for n in (1, 2, 3, 0)]
    assert all(set(fewer) < set(more) for fewer, more in pairwise(lists))


def test_what_is_erased(make_model):
    """A concept's name once whatever its prompts, and its templates; a caption as it is."""
    targets = find_targets(task_on(make_model("sd")))
    assert erased_texts(targets, "art", False) == [
        ("robot, a red star in a city", "art"),
        ("striped, a blue circle", "art"),
        ("captain", "art"),
        ("robot", "art"),
    ]
    anchored = dict(erased_texts(targets, "anchor", True))
    assert anchored["striped, a blue circle"] == "a blue circle" and anchored["captain"] == "a star"
    assert anchored["photo of robot"] == "photo of a circle" and len(anchored) == 2 + 2 * 6


def test_only_what_is_used_is_seen():
    assert UCE().sees == {Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES}
    assert UCE(targets="concepts").sees == {Knowledge.CONCEPT_NAMES}
    assert UCE(targets="triggers", preserve=1).sees == {
        Knowledge.MEMORIZED_PROMPTS,
        Knowledge.NEUTRAL_PROMPTS,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "old"}, "rule is current or original, not 'old'"),
        ({"technique": "x"}, "technique is replace or tensor"),
        ({"targets": "names"}, "targets is"),
        ({"count": -1}, "count must be a whole number"),
        ({"lamb": 0.0}, "lamb must be positive"),
        ({"lamb": "much"}, "lamb is a number, not 'much'"),
        ({"preserve": -1}, "preserve must not be negative"),
        ({"erase_scale": -1.0}, "erase_scale must not be negative"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(UCE, "weak", changes)


# --- rows of tokens -------------------------------------------------------------------------------


def test_last_content_tokens(make_model):
    """The token before the end token; of '' CLIP's begin token, T5's last padding."""
    sd = encode_texts(make_model("sd"), ["red star", ""], SETTINGS)
    assert sd["red star"].spans[0].last == 2 and sd[""].spans[0].last == 0
    sd3 = encode_texts(make_model("sd3"), ["red star", ""], SETTINGS)
    assert [span.last for span in sd3["red star"].spans] == [2, 16 + 1]
    assert [span.last for span in sd3[""].spans] == [0, 16 + 20 - 1]
    assert torch.equal(sd3["red star"].last(), sd3["red star"].embeds[[2, 17]])


def test_a_prompt_is_aligned_with_its_anchor(make_model):
    """Own tokens, begin, words before and after, end, padding."""
    found = encode_texts(make_model("sd"), ["a robot in a city", "a red star in a city"], SETTINGS)
    a, b = (found[t].spans[0] for t in found)
    aligned = align(a, b)
    assert aligned.own == (2,)
    assert aligned.shared[:6] == ((0, 0), (1, 1), (3, 4), (4, 5), (5, 6), (6, 7))
    assert aligned.shared[-1] == (14, 15) and len(aligned.shared) == 14


# --- the released code ----------------------------------------------------------------------------

EDITS = ["red star", "striped robot captain"]
GUIDED = (list(zip(EDITS, ["art", "a circle"], strict=True)), ["a blue circle in a city", "a star"])
CASES = {
    "current-sd": ([(e, "") for e in EDITS], []),
    "current-guide-sd": GUIDED,
    "current-guide-sdxl": GUIDED,
    "current-flux-no-bias": GUIDED,
    "original-sd": ([(e, "") for e in EDITS], [""]),
    "original-tensor-sd": (
        list(zip(EDITS, ["a circle", "a circle in a city"], strict=True)),
        ["", "a blue circle in a city", "night"],
    ),
}


def wide_flux():
    """A tiny FLUX whose pooled embedding has 768 entries, by which the released code knows it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with seeded(0):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=768,
            axes_dims_rope=(4, 4, 8),
        )
        config = clip_text(16).config.to_dict()
        config |= {"hidden_size": 768, "intermediate_size": 32, "projection_dim": 768}
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_text(),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
        )


def released(case):
    """The released code's weights (at most 48 columns) and the same model."""
    numbers = load_file(DATA / "uce.safetensors")
    own = {n.split("/")[1]: v for n, v in numbers.items() if n.split("/")[0] == case}
    builder = wide_flux if "flux" in case else tiny_sdxl if "sdxl" in case else tiny_sd
    return own, wrap(builder())


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_released_codes(case):
    """Within 1e-4, against changes of up to 0.9: it solves in float32."""
    (pairs, kept), (numbers, model) = CASES[case], released(case)
    rule = case.split("-")[0]
    technique = "tensor" if "tensor" in case else "replace"
    found = encode_texts(model, [x for pair in pairs for x in pair] + kept, SETTINGS)
    names = [n.removeprefix("denoiser.") for n in parameter_group(model, "text-projections")]
    assert set(names) == set(numbers)
    for name in names:
        base = model.denoiser.get_parameter(name).detach().double()
        rows = rows_of(rule, found, pairs, kept, pooled=name.endswith(POOLED))
        form = solve(rows, 0.5, 1.0, preserve_scale(UCE(rule=rule), len(kept)))
        ours = form.weight(base, wanted(base, rows, technique))[:, :48]
        assert (ours - base[:, :48]).abs().max() > 1e-3
        assert (ours - numbers[name]).abs().max() < 1e-4, name


def test_the_released_flux_edit_counts_the_bias_twice():
    """Its targets are the layers' whole outputs, bias included: with those, ours is its weight."""
    (pairs, kept), (numbers, model) = GUIDED, released("current-flux")
    found = encode_texts(model, [x for pair in pairs for x in pair] + kept, SETTINGS)
    apart = []
    for name, theirs in numbers.items():
        base = model.denoiser.get_parameter(name).detach().double()
        bias = model.denoiser.get_parameter(name.replace("weight", "bias")).detach().double()
        rows = rows_of("current", found, pairs, kept, pooled=name.endswith(POOLED))
        keys = torch.cat([*rows.erased, rows.preserved])
        form = ClosedForm(keys, torch.ones(len(keys), dtype=torch.float64), stays(keys[:0], 1.0, 0.5))
        outputs = torch.cat([*rows.guides, rows.preserved]) @ base.T
        assert (form.weight(base, outputs + bias)[:, :48] - theirs).abs().max() < 1e-4, name
        apart.append(float((form.weight(base, outputs)[:, :48] - theirs).abs().max()))
    assert max(apart) > 1e-2
