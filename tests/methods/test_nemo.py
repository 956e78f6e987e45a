"""NeMo: value neurons, its score, its search against the released code's own, and deactivation."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipelines import schedule, seeded, tiny_sd, tiny_sdxl, unet

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Artefact, Knowledge, Task, configure
from lethebench.methods.nemo import NeMo
from lethebench.methods.nemo.fit import common, localize
from lethebench.methods.nemo.neurons import (
    ValueNeurons,
    factors_of,
    mask_of,
    scaled_for_good,
    scaling,
    selected,
    z_scores,
)
from lethebench.methods.nemo.score import FirstStep, likeness, similarity
from lethebench.methods.nemo.search import Question, conduct, refine, search
from lethebench.metrics.first_step_ssim import pairwise_ssim, unit_range
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

REFERENCE = json.loads((Path(__file__).parent / "data" / "nemo.json").read_text())
SETTINGS = SamplerSettings(scheduler="ddim", num_inference_steps=2, guidance_scale=4.0, height=32, width=32)
TEXTS = {"t1": "a red star", "t2": "a blue robot in a forest"}
PROMPTS = {i: Prompt(i, text, Role.TRIGGER, i) for i, text in TEXTS.items()}
OTHER = Prompt("n", "a striped circle", Role.NEUTRAL, "n")


class Set:
    """Two memorized prompts and neutral ones."""

    name, version = "test", "1"

    def __iter__(self):
        return iter(PROMPTS.values())

    def paraphrases(self, prompt_id):
        return ["a circle"]

    def training_prompts(self):
        return [f"a {c} {t}" for c in ("red", "blue", "striped") for t in ("star", "circle", "captain")]


def strong(pipe):
    """Value layers that matter: random ones hardly move a prediction."""
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(20)
        for name, parameter in pipe.unet.named_parameters():
            if ".attn2.to_v" in name:
                parameter.mul_(10)
            if ".attn2.to_q" in name or ".attn2.to_k" in name:
                parameter.mul_(5)
    return pipe


@pytest.fixture(scope="module")
def model():
    return wrap(strong(tiny_sd()))


NEMO = NeMo(targets="triggers", seeds=3, threshold=0.0, stop_ssim=0.9, theta=2.0)


def task(model, method=NEMO):
    return Task(model, SETTINGS, Set(), method.sees, seed_parts=("test@1",))


@pytest.fixture(scope="module")
def artefact(model):
    return NEMO.fit(task(model))


def key(prompt, index=0):
    return ImageKey("test@1", prompt, index)


def drawn(model, method, artefact, keys, settings=SETTINGS, batch_size=8):
    with method.apply(model, artefact) as hooks:
        return sample(model, keys, settings, [hooks], batch_size=batch_size).latents


# --- neurons ----------------------------------------------------------------------------------------


def test_value_layers_are_those_of_down_and_mid_blocks_in_order(model):
    names = list(ValueNeurons(model).layers)
    assert [name.split(".")[0] for name in names] == ["down_blocks", "down_blocks", "mid_block"]
    more = list(ValueNeurons(model, up_blocks=True).layers)
    assert more[:3] == names and len(more) == 7 and more[-1].startswith("up_blocks.1")


def test_a_model_without_cross_attention_is_refused(make_model):
    with pytest.raises(UserError, match="no value layers"):
        ValueNeurons(make_model("sd3"))


def test_activations_are_the_mean_size_over_tokens(model):
    neurons, embeds = ValueNeurons(model), torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    found = neurons.split(neurons.activations(embeds))
    for name, layer in neurons.layers.items():
        wanted = (embeds.double() @ layer.weight.double().T).abs().mean(dim=1)
        torch.testing.assert_close(found[name].double(), wanted, atol=1e-6, rtol=0)


def test_z_scores_in_closed_form():
    neutral = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    found = z_scores(torch.tensor([[7.0, 5.0], [1.0, 5.0]]), neutral)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0], [1.0, 0.0]]))


def test_selection_is_unusual_neurons_then_the_most_active(model):
    neurons = ValueNeurons(model)
    first = neurons.sizes[0]
    scores, active = torch.zeros(neurons.total), torch.zeros(neurons.total)
    scores[[1, 4, first + 2]] = torch.tensor([3.0, 4.0, 5.0])
    active[[4, 6, first + 3]] = torch.tensor([9.0, 8.0, 7.0])
    assert [sorted(layer) for layer in selected(neurons, scores, active, 2.5, 0)][:2] == [[1, 4], [first + 2]]
    assert selected(neurons, scores, active, 2.5, 2)[0] == [1, 4, 6]
    assert selected(neurons, scores, active, 2.5, 2, rising=True)[0] == [6, 1, 4]
    assert len(selected(neurons, scores, active, 9.0, 1000)[0]) == first


# --- score ------------------------------------------------------------------------------------------


def test_similarity_and_likeness_are_the_metrics_ssim():
    deltas = unit_range(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    deltas[1] = unit_range(deltas[0] + 0.1 * deltas[1])
    pairs = torch.combinations(torch.arange(4), 2)
    wanted = pairwise_ssim(deltas)
    torch.testing.assert_close(similarity(deltas[pairs[:, 0]], deltas[pairs[:, 1]]), wanted)
    assert likeness(deltas)[0] == likeness(deltas)[1] == wanted.max() > 0.5
    assert likeness(deltas)[3] == wanted[(pairs == 3).any(dim=1)].max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_difference_is_the_predicted_noise_minus_the_noise(prediction_type):
    model = wrap(tiny_sd(prediction_type=prediction_type))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with scaling(ValueNeurons(model), "test") as scaler:
        step = FirstStep(model, SETTINGS, list(TEXTS.values()), noise, scaler, 3)
        found = step.unchanged()
    time = model.pipe.scheduler.__class__.from_config(model.pipe.scheduler.config)
    time.set_timesteps(SETTINGS.num_inference_steps)
    raw = model.denoiser(noise[1:], time.timesteps[0], step.embeds[:1], return_dict=False)[0]
    kept = model.pipe.scheduler.alphas_cumprod[time.timesteps[0]]
    predicted = raw if prediction_type == "epsilon" else kept.sqrt() * raw + (1 - kept).sqrt() * noise[1:]
    torch.testing.assert_close(found[0, 1], unit_range(predicted - noise[1:])[0], atol=1e-5, rtol=0)


# --- search -----------------------------------------------------------------------------------------


def replies(similar):
    """Answers every question by ``similar(off, seed)``; counts the answers."""

    def answer(asked):
        answer.count += sum(len(q.seeds) for _, q in asked)
        return [[similar(set(q.off), seed) for seed in q.seeds] for _, q in asked]

    answer.count = 0
    return answer


def one(dialogue, answer):
    return conduct({0: dialogue}, answer)[0]


def test_refinement_leaves_exactly_the_needed_neurons():
    needed = {2, 7}
    answer = replies(lambda off, seed: 0.2 if needed <= off else 0.8)
    found = one(search(lambda theta, k: [[1, 2, 3], [4, 5], [6, 7]], [0, 1, 2], 0.5), answer)
    assert found.initial == [1, 2, 3, 4, 5, 6, 7] and found.refined == [2, 7] and found.limit == 0.5
    rough = one(search(lambda theta, k: [[1, 2, 3], [4, 5], [6, 7]], [0, 1, 2], 0.5, group=2), answer)
    assert rough.refined == [1, 2, 6, 7], "a group stays off where one of it is needed"


def test_every_seed_must_be_below_the_limit():
    answer = replies(lambda off, seed: 0.2 if seed in off else 0.8)
    assert one(search(lambda theta, k: [[0, 1, 2, 3]], [0, 2], 0.5), answer).refined == [0, 2]


def test_theta_falls_and_k_grows_until_enough_is_off():
    tried = []

    def select(theta, k):
        tried.append((theta, k))
        return [list(range(k + 1))]

    found = one(search(select, [0], 0.5), replies(lambda off, seed: 0.9 if len(off) < 4 else 0.4))
    assert tried == [(5.0, 0), (4.75, 1), (4.5, 2), (4.25, 3)]
    assert len(found.initial) == 4
    tried.clear()
    one(search(select, [0], 0.5, top_k=False, theta_min=4.0), replies(lambda off, seed: 0.9))
    assert tried == [(5.0, 0), (4.75, 0), (4.5, 0), (4.25, 0)]


def test_where_the_limit_is_out_of_reach_the_ssim_reached_takes_its_place():
    answer = replies(lambda off, seed: 0.9 - 0.1 * len({1, 2} & off) - 0.01 * seed)
    found = one(search(lambda theta, k: [[1, 2, 3]], [0, 1], 0.5), answer)
    assert found.limit == pytest.approx(0.7)
    assert found.initial == [1, 2, 3] and found.refined == [1, 2], "3 has no effect"


def plain_refinement(selection, seeds, limit, similar):
    """The released code's loops as they read: every seed of every trial."""

    def below(layers):
        off = {n for layer in layers for n in layer}
        return max(similar(off, seed) for seed in seeds) < limit

    for place in reversed(range(len(selection))):
        trial = [[] if i == place else layer for i, layer in enumerate(selection)]
        if selection[place] and below(trial):
            selection = trial
    for place in reversed(range(len(selection))):
        for neuron in list(selection[place]):
            trial = [
                [n for n in layer if not (i == place and n == neuron)] for i, layer in enumerate(selection)
            ]
            if below(trial):
                selection = trial
    return selection


def test_cutting_questions_short_changes_no_answer():
    draws = torch.Generator().manual_seed(0)
    asked = 0
    for _ in range(20):
        effects = torch.randn(5, 12, generator=draws)

        def similar(off, seed, effects=effects):
            return float(torch.sigmoid(effects[seed, sorted(off)].sum() / 3)) if off else 0.5

        selection = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]]
        limit = max(similar(set(range(12)), s) for s in range(5)) + 0.05
        answer = replies(similar)

        def whole(selection=selection, limit=limit):
            return (yield from refine(selection, list(range(5)), limit))

        assert one(whole(), answer) == plain_refinement(selection, range(5), limit, similar)
        asked += answer.count
    assert asked < 0.7 * 20 * 5 * (3 + 12)


def test_searches_side_by_side_find_what_they_find_alone():
    def similar(number):
        return lambda off, seed: 0.2 if number in off else 0.8

    def made(number):
        return search(lambda theta, k: [[1, 2, 3, 4]], [0, 1], 0.5)

    def answer(asked):
        return [[similar(number)(set(q.off), s) for s in q.seeds] for number, q in asked]

    together = conduct({n: made(n) for n in (1, 2, 3)}, answer)
    assert {n: f.refined for n, f in together.items()} == {1: [1], 2: [2], 3: [3]}
    assert Question((1,), (0,)) == Question((1,), (0,))


# --- against the released code ------------------------------------------------------------------------


def reference_model():
    """The pipeline that the released code was run on: the layout of Stable Diffusion 1.4's value layers."""
    pipe = tiny_sd()
    with seeded(3):
        pipe.unet = unet(
            16,
            sample_size=48,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    return wrap(strong(pipe))


@pytest.fixture(scope="module")
def reference_step():
    """The released code's prompts, noise and (second) timestep, on our side."""
    model = reference_model()
    settings = SamplerSettings(
        scheduler="ddim", num_inference_steps=50, guidance_scale=1.0, height=96, width=96
    )
    with seeded(1):
        noise = torch.randn(REFERENCE["seeds"], 4, 48, 48)
    neurons = ValueNeurons(model)
    with scaling(neurons, "test") as scaler:
        step = FirstStep(model, settings, REFERENCE["targets"], noise, scaler, 16)
        neutral = FirstStep(model, settings, REFERENCE["neutral"], noise, scaler, 16)
        schedule_ = schedule(DDIMScheduler)
        schedule_.set_timesteps(50)
        assert step.timestep == schedule_.timesteps[0] == 981
        step.timestep = schedule_.timesteps[1]  # what the released loop's missing step comes to
        usual = neurons.activations(neutral.embeds)
        yield neurons, step, neurons.activations(step.embeds), usual, step.unchanged()


def test_activations_and_z_scores_are_the_released_codes(reference_step):
    _, _, activations, usual, _ = reference_step
    for own, z, wanted in zip(activations, z_scores(activations, usual), REFERENCE["found"], strict=True):
        torch.testing.assert_close(own, torch.tensor(wanted["activations"]), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(z, torch.tensor(wanted["z"]), atol=1e-3, rtol=1e-3)


def released_ssim(first, second):
    """Without a data range, as the released code calls it (``similarity`` has a range of 1)."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ssim

    return ssim(first, second, reduction="none", kernel_size=11, betas=(0.33, 0.33, 0.33))


def released_likeness(differences):
    pairs = torch.combinations(torch.arange(len(differences)), 2)
    found = released_ssim(differences[pairs[:, 0]], differences[pairs[:, 1]])
    return torch.stack([found[(pairs == i).any(dim=1)].max() for i in range(len(differences))])


def kept_seeds(differences):
    return (released_likeness(differences) > REFERENCE["pair_limit"]).nonzero().flatten().tolist()


def by_number(neurons, layers):
    starts = [sum(neurons.sizes[:i]) for i in range(len(neurons.sizes))]
    return {start + n for start, layer in zip(starts, layers, strict=True) for n in layer}


def test_differences_and_scores_are_the_released_codes(reference_step):
    *_, clean = reference_step
    for own, wanted in zip(clean, REFERENCE["found"], strict=True):
        assert float(own.double().mean()) == pytest.approx(wanted["difference_mean"], abs=1e-6)
        assert float(own.double().std()) == pytest.approx(wanted["difference_std"], abs=1e-6)
        torch.testing.assert_close(
            released_likeness(own), torch.tensor(wanted["likeness"]), atol=1e-5, rtol=0
        )
    assert [len(kept_seeds(own)) for own in clean] == [3, 0, 2]


def test_selection_and_refinement_are_the_released_codes(reference_step):
    """The third prompt's search; the second has no seed above the threshold."""
    neurons, step, activations, usual, clean = reference_step
    scores, seeds, wanted = z_scores(activations, usual), kept_seeds(clean[2]), REFERENCE["found"][2]

    def answer(asked):
        (number, question) = asked[0]
        factors = factors_of(mask_of(neurons.total, question.off), 0.0).expand(len(seeds), -1)
        values = released_ssim(clean[number][seeds], step.differences([number] * len(seeds), seeds, factors))
        return [[float(values[seeds.index(seed)]) for seed in question.seeds]]

    select = partial(selected, neurons, scores[2], activations[2])
    found = conduct({2: search(select, seeds, REFERENCE["limit"])}, answer)[2]
    assert set(found.initial) == by_number(neurons, wanted["initial"])
    assert set(found.refined) == by_number(neurons, wanted["refined"])
    assert found.limit == REFERENCE["limit"]
    for off, ssim in ((found.initial, "initial_ssim"), (found.refined, "refined_ssim")):
        reached = max(answer([(2, Question(tuple(off), tuple(seeds)))])[0])
        assert reached == pytest.approx(wanted[ssim], abs=1e-5)
    assert not any(REFERENCE["found"][1]["refined"])


def test_a_limit_out_of_reach_is_the_released_codes(reference_step):
    """The first prompt's: the last selection is that of theta 1.25, and its SSIM the limit of refinement."""
    neurons, step, activations, usual, clean = reference_step
    wanted = REFERENCE["found"][0]
    off = selected(neurons, z_scores(activations, usual)[0], activations[0], 1.25, 15)
    assert {n for layer in off for n in layer} == by_number(neurons, wanted["initial"])
    for layers, ssim in ((wanted["initial"], "initial_ssim"), (wanted["refined"], "refined_ssim")):
        mask = mask_of(neurons.total, sorted(by_number(neurons, layers)))
        changed = step.differences([0] * 3, [0, 1, 2], factors_of(mask, 0.0).expand(3, -1))
        assert float(released_ssim(clean[0], changed).max()) == pytest.approx(wanted[ssim], abs=1e-5)


# --- fit and apply ------------------------------------------------------------------------------------


def test_the_fit_finds_neurons_and_says_what_it_found(model, artefact):
    facts = artefact.facts
    found = localize(NEMO, task(model))
    assert facts["neurons_by_prompt"] == dict(zip(TEXTS, found.masks.sum(dim=1).tolist(), strict=True))
    assert 0 < facts["neurons_of_union"] <= facts["neurons"] == found.neurons.total
    assert bool((found.masks <= found.initial).all()) and bool(found.masks.any())
    changed = sum(v["union"] * 16 for v in facts["neurons_by_layer"].values())
    total = sum(p.numel() for p in model.denoiser.parameters())
    assert facts["parameters_changed"] == pytest.approx(changed / total)
    assert facts["targets"] == facts["clusters"] == 2


def test_a_prompt_below_the_threshold_keeps_its_neurons(model):
    method = replace(NEMO, threshold=1.0)
    found = method.fit(task(model, method))
    assert found.facts["neurons_of_union"] == 0 and found.facts["prompts_without_neurons"] == 2
    plain = sample(model, [key(PROMPTS["t1"])], SETTINGS).latents
    for changes in ({}, {"mode": "union"}):
        assert (drawn(model, replace(method, **changes), found, [key(PROMPTS["t1"])]) == plain).all()


def test_the_threshold_is_mean_plus_deviation_over_neutral_prompts(model):
    method = replace(NEMO, threshold=None, calibration_prompts=5)
    found = method.fit(task(model, method)).facts["threshold"]
    noise = torch.randn(3, 4, 16, 16, generator=task(model).generator("nemo", "noise"))
    with scaling(ValueNeurons(model), "test") as scaler:
        step = FirstStep(model, SETTINGS, Set().training_prompts()[:5], noise, scaler, 64)
        best = torch.stack([likeness(own).max() for own in step.unchanged()]).double()
    assert found == pytest.approx(float(best.mean() + best.std()), abs=1e-6)


def test_up_blocks_and_bfloat16(model):
    method = replace(NEMO, up_blocks=True, dtype="bfloat16", group=3)
    found = method.fit(task(model, method))
    assert found.facts["neurons"] > 2 * ValueNeurons(model).total - 1
    assert model.denoiser.dtype == torch.float32
    keys = [key(PROMPTS["t1"])]
    assert (drawn(model, method, found, keys) != sample(model, keys, SETTINGS).latents).any()


@pytest.mark.parametrize("builder", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_scaling_neurons_equals_scaled_value_rows(builder, guidance):
    model = wrap(strong(builder()))
    neurons = ValueNeurons(model)
    mask = torch.rand(neurons.total, generator=torch.Generator().manual_seed(0)) < 0.4
    settings = SETTINGS.model_copy(update={"guidance_scale": guidance})
    keys = [key(PROMPTS["t1"]), key(OTHER)]
    tensors = {f"refined.{name}": part[None] for name, part in neurons.split(mask).items()}
    digest = Artefact(NEMO.fit(task(model)).tensors).tensors["prompts"][:1]
    made = Artefact({**tensors, "prompts": digest})
    for scale in (0.0, 0.5):
        method = NeMo(scale=scale)
        hooked = drawn(model, method, made, keys, settings)
        for_good = drawn(model, replace(method, mode="union"), made, keys, settings)
        plain = sample(model, keys, settings).latents
        torch.testing.assert_close(torch.tensor(hooked[0]), torch.tensor(for_good[0]), atol=1e-4, rtol=1e-4)
        assert abs(hooked[0] - plain[0]).max() > 1e-2, "the fitted prompt is moved"
        assert (hooked[1] == plain[1]).all(), "a prompt that wasn't fitted is not"
        assert abs(for_good[1] - plain[1]).max() > 1e-2, "the union acts on every prompt"


def test_value_rows_are_zeroed_for_good_and_restored(model):
    neurons = ValueNeurons(model)
    mask = mask_of(neurons.total, [0, 3, neurons.total - 1])
    layers = list(neurons.layers.values())
    before = [layer.weight.clone() for layer in layers]
    with scaled_for_good(neurons, factors_of(mask, 0.0)):
        assert not layers[0].weight[[0, 3]].any() and not layers[-1].weight[-1].any()
        assert torch.equal(layers[0].weight[1], before[0][1])
    assert all(torch.equal(layer.weight, saved) for layer, saved in zip(layers, before, strict=True))


def test_scale_one_is_the_identity(model, artefact):
    keys = [key(PROMPTS["t1"]), key(OTHER)]
    plain = sample(model, keys, SETTINGS).latents
    for mode in NeMo.modes:
        assert (drawn(model, replace(NEMO, scale=1.0, mode=mode), artefact, keys) == plain).all()


def test_an_image_does_not_depend_on_its_neighbours(model, artefact):
    keys = [key(PROMPTS["t1"]), key(OTHER), key(PROMPTS["t2"]), key(PROMPTS["t1"], 1)]
    together = drawn(model, NEMO, artefact, keys)
    alone = drawn(model, NEMO, artefact, keys, batch_size=1)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=2e-3, rtol=0)


def test_a_recorder_may_ask_for_some_rows(model, artefact):
    """The factors travel with the rows: first-step-ssim asks for one row a prompt, without guidance."""
    from lethebench.metrics.first_step_ssim import FirstStepSSIM

    keys = [key(PROMPTS["t1"]), key(PROMPTS["t1"], 1), key(OTHER)]

    def recorded(some):
        with NEMO.apply(model, artefact) as hooks:
            made = sample(model, some, SETTINGS, [hooks], recorders=[FirstStepSSIM(seeds=3).recorder()])
        return torch.tensor(made.recorded["first_step_ssim"])

    torch.testing.assert_close(recorded(keys)[[0, 2]], recorded(keys[::2]), atol=1e-4, rtol=0)


def test_common_neurons():
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert common(masks, 0.0).tolist() == [True, True, True, False]
    assert common(masks, 0.5).tolist() == [True, True, False, False]
    assert common(masks, 1.0).tolist() == [True, False, False, False]
    assert not common(masks[3:], 0.0).any()


# --- the class ----------------------------------------------------------------------------------------


def test_what_it_sees_follows_from_the_targets():
    assert NeMo().sees == NeMo.knowledge
    assert NeMo(targets="triggers").sees == {Knowledge.NEUTRAL_PROMPTS, Knowledge.MEMORIZED_PROMPTS}
    assert NeMo(targets="concepts").sees == {Knowledge.NEUTRAL_PROMPTS, Knowledge.CONCEPT_NAMES}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": "everything"}, "not 'everything'"),
        ({"mode": "gated"}, "mode is per-prompt or union, not 'gated'"),
        ({"selection": "best"}, "selection is refined or initial, not 'best'"),
        ({"dtype": "int8"}, "dtype is model or bfloat16, not 'int8'"),
        ({"seeds": 1}, "seeds must be at least 2, not 1"),
        ({"group": 0}, "group must be at least 1, not 0"),
        ({"theta_step": 0.0}, "theta_step must be above 0, not 0.0"),
        ({"scale": 2.0}, "scale is between 0 and 1, not 2.0"),
        ({"common": -0.1}, "common is between 0 and 1, not -0.1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, words):
    with pytest.raises(UserError) as error:
        configure(NeMo, "per-prompt", settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_too_few_neutral_prompts_are_refused(model):
    class Bare(Set):
        def training_prompts(self):
            return ["a star"]

    with pytest.raises(UserError, match="at least 2 neutral prompts; the prompt set has 1"):
        NEMO.fit(Task(model, SETTINGS, Bare(), NEMO.sees, seed_parts=("test@1",)))


@pytest.mark.parametrize(
    "changes", [{}, {"selection": "initial"}, {"common": 1.0}, {"selection": "initial", "common": 1.0}]
)
def test_facts_are_of_the_neurons_that_the_settings_take(model, artefact, changes):
    """Strengths share the fit, not what is off: counted on the weights of the union."""
    stored = Artefact(artefact.tensors, json.loads(json.dumps(artefact.facts, sort_keys=True)))
    method = replace(NEMO, mode="union", **changes)
    before = {n: p.detach().clone() for n, p in model.denoiser.named_parameters()}
    with method.apply(model, stored):
        rows = sum(
            int((p == 0).all(dim=1).sum())
            for n, p in model.denoiser.named_parameters()
            if n.endswith("attn2.to_v.weight")
        )
        moved = sum(int((p != before[n]).sum()) for n, p in model.denoiser.named_parameters())
    facts = method.facts(stored)
    total = sum(p.numel() for p in before.values())
    assert facts["neurons_of_union"] == rows == sum(v["union"] for v in facts["neurons_by_layer"].values())
    assert facts["parameters_changed"] == pytest.approx(moved / total)
    assert facts["targets"] == stored.facts["targets"]
