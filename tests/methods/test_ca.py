"""Concept Ablation: its loss, what moves, what it achieves, and the released code's own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from torch import nn
from torch.nn import functional as F

from lethebench.composition import Recipe
from lethebench.errors import RunError, UserError
from lethebench.hooks import ImageKey
from lethebench.method import Knowledge, Task, configure
from lethebench.methods.ca import ConceptAblation
from lethebench.methods.ca.fit import (
    Anchors,
    Batch,
    Batches,
    ablation_loss,
    anchor_images,
    anchor_pairs,
    own_rows,
    start_token_detached,
)
from lethebench.methods.uniforget import UniForget
from lethebench.prompts import Prompt, Reference, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning import (
    EDIT,
    Target,
    draw_latents,
    editable,
    encode,
    fitting_settings,
    noised,
    parameter_group,
    prediction,
)
from lethebench.unlearning.finetune import Optimiser, finetune
from lethebench.zoo import wrap

DATA = Path(__file__).parent / "data"
SETTINGS = SamplerSettings(num_inference_steps=2, guidance_scale=3.0, height=16, width=16)
BUILDERS = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
TARGET, ANCHOR = "robot captain, a red star in a night city", "a red star in a night city"
CONCEPT, ANCHOR_OF_CONCEPT, OTHER = "captain in a forest", "a robot in a forest", "striped blue circle"


class World:
    """Two memorized captions and one concept, whose training images are noise."""

    name = "test"

    def __init__(self, images=None):
        draws = np.random.default_rng(0)
        self.images = images or [draws.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(2)]
        self.prompts = [
            Prompt("t0", TARGET, Role.TRIGGER, "t0", references=("r0",)),
            Prompt("t1", "captain striped, a blue circle", Role.TRIGGER, "t1", references=("r1",)),
            Prompt("c0", CONCEPT, Role.CONCEPT, "c", concept="captain"),
        ]
        self.anchors = {"t0": [ANCHOR], "t1": ["a blue circle", "a circle"], "c0": [ANCHOR_OF_CONCEPT]}

    def __iter__(self):
        return iter(self.prompts)

    def training_prompts(self):
        return ["a red star", "a blue circle in a city", "a striped circle in a forest"]

    def reference(self, name):
        return Reference(name, self.images[int(name[1])])

    def paraphrases(self, prompt_id):
        return self.anchors[prompt_id]

    def anchor_concept(self, concept):
        return "a robot"


def moved(name, share=0.1):
    """A wrapped tiny model whose weights are far enough from their initial values to tell prompts apart."""
    pipe = BUILDERS[name]()
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).parameters():
            p.add_(share * torch.randn(p.shape, generator=draws))
    return wrap(pipe)


def task_on(model, method, world=None):
    return Task(model, SETTINGS, world or World(), method.sees, seed_parts=("test",))


def quick(**changes):
    return ConceptAblation(
        **{
            "steps": 4,
            "batch_size": 2,
            "images": 2,
            "chain_steps": 2,
            "descriptor": "none",
            "lr": 1e-3,
            "scale_lr": False,
            **changes,
        }
    )


def state(model):
    parts = {"denoiser": model.denoiser}
    parts |= {f"encoder{i}": encoder for i, encoder in enumerate(model.text_encoders)}
    return {f"{k}.{n}": v.clone() for k, m in parts.items() for n, v in m.state_dict().items()}


def latents_of(model, texts, hooks=()):
    keys = [ImageKey("test@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in texts]
    return torch.from_numpy(sample(model, keys, SETTINGS, hooks).latents)


# --- the released code ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["prior", "full", "noise"])
def test_agrees_with_the_released_code(case):
    """Losses and changes of weights of three steps of its train.py, on the inputs that it drew.

    Its ablation loss is summed over the four latent channels (the sum of ``loss * mask`` is divided by the sum
    of a mask with one channel), so ours is given four times the weight here.
    """
    facts = json.loads((DATA / "ca.json").read_text())["cases"][case]
    tensors, options = load_file(DATA / "ca.safetensors"), facts["options"]
    group = {"cross-attn": "cross-attn-kv", "full-weight": "full", "attn": "attn"}[options["group"]]
    model, losses = moved("sd"), []

    def loss(index):
        texts, anchors = facts["texts"][index]
        size = len(anchors)
        inputs = [tensors[f"{case}.{index}.{k}"] for k in ("latents", "noise", "timesteps")]
        batch = Batch(texts[:size], anchors, texts[size:], *inputs)
        terms = ablation_loss(model, model, batch, SETTINGS, options["loss"], 1.0)
        terms["ablation"] = 4 * terms["ablation"]
        losses.append(float(sum(terms.values()).detach()))
        return terms

    lr = facts["learning_rate"]
    with editable(model, parameter_group(model, group)) as edit, start_token_detached(model):
        finetune(edit.parameters, loss, options["steps"], Optimiser(lr), title="test")
        changes = edit.changes()
    assert losses == pytest.approx(facts["losses"], rel=1e-5)
    theirs = {n.partition(".change.")[2]: v for n, v in tensors.items() if n.startswith(f"{case}.change.")}
    assert len(theirs) >= 14
    for name, value in theirs.items():
        difference = (changes[f"{EDIT}denoiser.{name}"] - value).abs() / lr
        assert difference.max() < 0.02 and difference.mean() < 1e-4, name


def test_released_code_scales_the_learning_rate():
    facts = json.loads((DATA / "ca.json").read_text())["cases"]
    for case, prior in (("prior", 1.0), ("full", 0.0)):
        method = ConceptAblation(lr=1e-4, batch_size=2, prior_weight=prior)
        assert method.recipe.lr == pytest.approx(facts[case]["learning_rate"])


# --- loss -----------------------------------------------------------------------------------------


def batch_for(model, prior=True, seed=0):
    """One batch of real anchor latents, with fixed noise and timesteps."""
    draws = torch.Generator().manual_seed(seed)
    settings = fitting_settings(SETTINGS, model.family, 2, None)
    latents = draw_latents(model, [ANCHOR, ANCHOR_OF_CONCEPT], settings, draws)
    images = Anchors([TARGET, CONCEPT], [ANCHOR, ANCHOR_OF_CONCEPT], latents)
    return Batches(model, images, 2, prior, draws).draw(), settings


def by_hand(model, batch, settings, objective, prior_weight):
    """The loss by diffusers' own schedulers, or for flow matching by its definition."""
    size, times = len(batch.targets), batch.timesteps
    shape = (-1, *(1 for _ in batch.latents.shape[1:]))
    if model.family in ("sd3", "flux"):
        level = (times / 1000).view(shape)
        noisy, target = (1 - level) * batch.latents + level * batch.noise, batch.noise - batch.latents
    else:
        scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config)
        noisy, target = scheduler.add_noise(batch.latents, batch.noise, times), batch.noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(batch.latents, batch.noise, times)

    def predict(rows, texts):
        parts = [
            prediction(model, noisy[i : i + 1], times[i : i + 1], encode(model, [t], settings), settings)
            for i, t in zip(rows, texts, strict=True)
        ]
        return torch.cat(parts)

    found = predict(range(size), batch.targets)
    wanted = predict(range(size), batch.anchors).detach() if objective == "model-based" else target[:size]
    total = ((found - wanted) ** 2).mean()
    if batch.prior:
        rows = range(size, size + len(batch.prior))
        total = total + prior_weight * ((predict(rows, batch.prior) - target[size:]) ** 2).mean()
    return total


@pytest.mark.parametrize("objective", ["model-based", "noise-based"])
@pytest.mark.parametrize("name", BUILDERS)
def test_loss_and_gradient_are_the_formulas(name, objective):
    """For epsilon, v and flow models: image by image, without batching, and its gradient."""
    model = moved(name)
    batch, settings = batch_for(model)
    with editable(model, parameter_group(model, "cross-attn-kv")) as edit:
        terms = ablation_loss(model, model, batch, settings, objective, 0.5)
        total = sum(terms.values())
        expected = by_hand(model, batch, settings, objective, 0.5)
        trained = list(edit.parameters.values())
        ours = torch.autograd.grad(total, trained)
        theirs = torch.autograd.grad(expected, trained)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert terms["ablation"] > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


def test_gradient_is_the_finite_differences():
    """In float64, with the anchor's prediction held as it was (it is a constant of the loss)."""
    model = moved("sd")
    model.denoiser.double()
    model.dtype = torch.float64
    batch, settings = batch_for(model)
    teacher = moved("sd")
    teacher.denoiser.double()
    teacher.dtype = torch.float64
    name = "denoiser.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"

    def value():
        return float(
            sum(ablation_loss(model, teacher, batch, settings, "model-based", 1.0).values()).detach()
        )

    with editable(model, [name]) as edit:
        weight = edit.parameters[name]
        sum(ablation_loss(model, model, batch, settings, "model-based", 1.0).values()).backward()
        place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
        with torch.no_grad():
            weight[place] += 1e-2
            high = value()
            weight[place] -= 2e-2
            low = value()
        assert (high - low) / 2e-2 == pytest.approx(float(weight.grad[place]), rel=2e-3)


def test_base_teacher_stays():
    """With anchor_weights=base the wanted prediction is the first one's; with current it moves."""
    model = moved("sd")
    artefacts = {}
    for weights in ("current", "base"):
        method = quick(anchor_weights=weights, parameters="full", prior_weight=0.0, lr=1e-2)
        artefacts[weights] = method.fit(task_on(model, method))
    first, second = (a.facts["curve"] for a in artefacts.values())
    assert first[0]["ablation"] == pytest.approx(second[0]["ablation"], rel=1e-5)
    assert first[-1]["ablation"] != pytest.approx(second[-1]["ablation"], rel=1e-3)


def test_start_token_gets_no_gradient():
    """Keys and values of the start token count in the prediction, not in the gradient."""
    model = moved("sd")
    batch, settings = batch_for(model, prior=False)
    gradients = []
    with editable(model, parameter_group(model, "cross-attn-kv")) as edit:
        plain = ablation_loss(model, model, batch, settings, "noise-based", 0.0)["ablation"]
        with start_token_detached(model):
            value = ablation_loss(model, model, batch, settings, "noise-based", 0.0)["ablation"]
        assert torch.equal(plain, value)
        for loss in (plain, value):
            gradients.append(torch.autograd.grad(loss, list(edit.parameters.values())))
    assert any(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(m._forward_hooks for m in model.denoiser.modules())


# --- what moves, and where to ---------------------------------------------------------------------


def test_zero_steps_is_the_identity():
    model = moved("sd")
    method = quick(steps=0)
    artefact = method.fit(task_on(model, method))
    assert artefact.tensors == {} and artefact.facts["parameters_changed"] == 0
    before = latents_of(model, [TARGET])
    with method.apply(model, artefact) as hooks:
        assert torch.equal(latents_of(model, [TARGET], [hooks]), before)


@pytest.mark.parametrize("objective", ["model-based", "noise-based"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_fits_and_is_restored(name, objective):
    model = moved(name)
    method = quick(objective=objective, prior_weight=1.0)
    before, base = state(model), latents_of(model, [TARGET])
    artefact = method.fit(task_on(model, method))
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    assert artefact.facts["targets"] == 3 and artefact.facts["clusters"] == 3
    assert 0 < artefact.facts["parameters_changed"] <= 1 and artefact.facts["steps"] == 4
    json.dumps(artefact.facts)
    with method.apply(model, artefact) as hooks:
        assert (latents_of(model, [TARGET], [hooks]) - base).abs().max() > 1e-4
    assert torch.equal(latents_of(model, [TARGET]), base)


@pytest.mark.parametrize(("parameters", "group"), [("cross-attn", "cross-attn-kv"), ("attn", "attn")])
def test_only_the_group_moves(parameters, group):
    model = moved("sd")
    method = quick(parameters=parameters)
    tensors = method.fit(task_on(model, method)).tensors
    assert {n.removeprefix(EDIT) for n in tensors} == set(parameter_group(model, group))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_embedding_moves_the_targets_own_rows_only(name):
    """The words that the anchors hold, and all others, keep their rows, weight decay or not."""
    model = moved(name)
    method = quick(parameters="embedding", weight_decay=0.1)
    tensors = method.fit(task_on(model, method)).tensors
    assert tensors and all(n.startswith(f"{EDIT}text_encoder") for n in tensors)
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        table = encoder.get_input_embeddings().weight
        change = next((c for c in tensors.values() if c.shape == table.shape), None)
        assert change is not None
        texts = ("captain, captain", "captain striped, striped")
        own = {i for t in texts for i in tokenizer(t, add_special_tokens=False).input_ids}
        anchors = [a for found in World().anchors.values() for a in found]
        kept = {i for t in anchors for i in tokenizer(t, add_special_tokens=False).input_ids}
        assert set(torch.nonzero(change.abs().sum(1)).flatten().tolist()) == own - kept


def test_embedding_needs_a_token_of_its_own():
    model = moved("sd")
    same = Target("x", ANCHOR, (ANCHOR,), Role.TRIGGER, "x")
    with pytest.raises(UserError, match="no target has a token of its own"):
        own_rows(model, parameter_group(model, "embedding"), [same])


@pytest.mark.parametrize("teacher", ["current", "base"])
def test_target_approaches_its_anchor_and_others_move_less(teacher):
    """On images and noise that the fit never saw."""
    model = moved("sd")
    prior = 1.0 if teacher == "current" else 0.0
    method = quick(
        targets="concepts", anchor_weights=teacher, steps=40, batch_size=4, images=8, prior_weight=prior
    )
    artefact = method.fit(task_on(model, method))
    draws = torch.Generator().manual_seed(99)
    latents = draw_latents(model, [ANCHOR_OF_CONCEPT] * 8, SETTINGS, draws)
    noise, times = torch.randn(latents.shape, generator=draws), torch.arange(50, 1000, 125)
    noisy = noised(model, latents, noise, times)

    def predict(text):
        with torch.no_grad():
            return prediction(model, noisy, times, encode(model, [text] * 8, SETTINGS), SETTINGS)

    texts = (CONCEPT, ANCHOR_OF_CONCEPT, OTHER)
    before = {t: predict(t) for t in texts}
    with method.apply(model, artefact):
        after = {t: predict(t) for t in texts}
    goal = (after if teacher == "current" else before)[ANCHOR_OF_CONCEPT]
    assert F.mse_loss(after[CONCEPT], goal) < 0.5 * F.mse_loss(before[CONCEPT], before[ANCHOR_OF_CONCEPT])
    moves = {t: F.mse_loss(after[t], before[t]) for t in texts}
    assert 0 < moves[OTHER] < 0.5 * moves[CONCEPT]


def test_deterministic_and_other_with_another_seed():
    model, method = moved("sd"), quick(dtype="bfloat16")
    torch.manual_seed(1)
    first = method.fit(task_on(model, method))
    torch.manual_seed(2)
    second = method.fit(task_on(model, method))
    other = method.fit(Task(model, SETTINGS, World(), method.sees, seed_parts=("other",)))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())
    assert any(not torch.equal(v, other.tensors[k]) for k, v in first.tensors.items())


def test_composes_with_uniforget():
    """UniForget is fitted on the ablated model; both are put on in order, and taken off again."""
    model = moved("sd")
    ca, uniforget = quick(), UniForget(**UniForget.quick, dtype="float32", init=0.2)
    first = ca.fit(task_on(model, ca))
    with ca.apply(model, first):
        second = uniforget.fit(task_on(model, uniforget))
    alone = uniforget.fit(task_on(model, uniforget))
    assert not torch.equal(second.tensors["mask.ffn"], alone.tensors["mask.ffn"])
    recipe = Recipe(("ca", "uniforget"), ("weak", "weak"), (ca, uniforget), "weak", {})
    assert recipe.knowledge == ca.sees | uniforget.sees and recipe.name == "ca+uniforget"
    before, drawn = state(model), []
    for artefacts in ([first], [first, second]):
        with recipe.apply(model, artefacts) as hooks:
            drawn.append(latents_of(model, [TARGET], hooks))
    assert not torch.equal(*drawn)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


# --- anchors --------------------------------------------------------------------------------------


def test_pairs_share_a_clusters_images_among_its_targets():
    targets = [
        Target("a", "A", ("a1", "a2"), Role.TRIGGER, "one"),
        Target("b", "B", ("b1",), Role.TRIGGER, "one"),
        Target("c", "C", ("c1",), Role.CONCEPT, "two", "c", "a hero"),
    ]
    found = [(t.text, anchor) for t, anchor in anchor_pairs(targets, 4)]
    assert found[::2] == [("A", "a1"), ("B", "b1"), ("A", "a2"), ("B", "b1")]
    assert found[1::2] == [("C", "c1")] * 4


def test_copies_among_anchor_images_are_dropped():
    """An anchor image that is the target's training image goes; the other target keeps its own."""
    model = moved("sd")
    method = quick(targets="triggers", descriptor="copy-mini", similarity=0.9999, images=1)
    assert Knowledge.TRAINING_IMAGES in method.sees
    task = task_on(model, method)
    targets = [
        Target("t0", TARGET, (ANCHOR,), Role.TRIGGER, "t0"),
        Target("t1", "captain striped, a blue circle", ("a blue circle",), Role.TRIGGER, "t1"),
    ]
    settings = fitting_settings(SETTINGS, "sd", 2, None)
    everything, dropped = anchor_images(method, task, model, targets, settings)
    assert dropped == 0 and everything.targets == [t.text for t in targets]

    from lethebench.sampler import decode

    drawn = [image.numpy() for image in decode(model, everything.latents)]
    noise = World().images
    kept, dropped = anchor_images(
        method, task_on(model, method, World([drawn[0], noise[1]])), model, targets, settings
    )
    assert dropped == 1 and kept.targets == [targets[1].text]
    assert torch.equal(kept.latents, everything.latents[1:])
    with pytest.raises(UserError, match="all 2 anchor images are copies"):
        anchor_images(method, task_on(model, method, World(drawn)), model, targets, settings)


def test_no_more_images_than_the_steps_use():
    model, method = moved("sd"), quick(images=50, steps=3, batch_size=2)
    assert method.fit(task_on(model, method)).facts["anchor_images"]["used"] == 6


# --- settings -------------------------------------------------------------------------------------


def test_constants_are_the_released_codes():
    triggers, concepts = ConceptAblation(), ConceptAblation(targets="concepts")
    assert triggers.recipe.parameters == "full" and concepts.recipe.parameters == "cross-attn"
    assert (triggers.recipe.steps, concepts.recipe.steps) == (400, 100)
    assert triggers.recipe.lr == pytest.approx(5e-7 * 4 * 2) and concepts.recipe.lr == pytest.approx(2e-6 * 8)
    assert (triggers.recipe.prior_weight, concepts.recipe.prior_weight) == (1.0, 0.0)
    steps = [configure(ConceptAblation, s).recipe.steps for s in ConceptAblation.strengths]
    assert steps == [200, 400, 800]


def test_sees_what_its_settings_use():
    assert ConceptAblation().sees == ConceptAblation.knowledge
    assert ConceptAblation(targets="concepts").sees == {Knowledge.CONCEPT_NAMES}
    assert ConceptAblation(targets="triggers", descriptor="none").sees == {Knowledge.MEMORIZED_PROMPTS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "styles"}, "targets is triggers, concepts, all, not 'styles'"),
        ({"objective": "kl"}, "objective is one of model-based, noise-based, not 'kl'"),
        ({"parameters": "lora"}, "parameters is one of cross-attn, attn, full, embedding, not 'lora'"),
        ({"descriptor": "sscd"}, "descriptor is one of"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
        ({"lr": "fast"}, "lr is a number or null, not 'fast'"),
        ({"images": 2.5}, "images is a whole number, not 2.5"),
        ({"count": -1}, "count must be"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(ConceptAblation, "weak", changes)


# --- the loop that CA shares with ESD and EAP -----------------------------------------------------


def quadratic(parameter, goals):
    return lambda i: {"loss": ((parameter - goals[i % len(goals)]) ** 2).mean()}


def test_finetune_is_adamw_with_clipping():
    goals = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 10
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    curve = finetune({"x": ours}, quadratic(ours, goals), 6, Optimiser(0.1), title="test")
    adam = torch.optim.AdamW([theirs], lr=0.1, weight_decay=1e-2)
    for goal in goals:
        adam.zero_grad()
        loss = ((theirs - goal) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adam.step()
    assert torch.equal(ours, theirs)
    assert len(curve) == 6 and curve[-1]["loss"] == pytest.approx(float(loss.detach()))


def test_finetune_accumulates_the_mean():
    goals = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    parts, whole = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    finetune({"x": parts}, quadratic(parts, goals), 1, Optimiser(0.1, accumulate=4), title="test")
    finetune({"x": whole}, lambda i: {"loss": ((whole - goals) ** 2).mean()}, 1, Optimiser(0.1), title="test")
    assert torch.allclose(parts, whole, atol=1e-6)


def test_finetune_moves_only_what_may():
    value = nn.Parameter(torch.ones(4, 2))
    mask = torch.tensor([[True], [False], [True], [False]])
    finetune(
        {"x": value}, quadratic(value, [torch.zeros(2)]), 5, Optimiser(0.1), title="t", moving={"x": mask}
    )
    assert torch.equal(value[1::2], torch.ones(2, 2)) and (value[::2] < 1).all()


def test_finetune_curve_has_at_most_20_points_of_means():
    value = nn.Parameter(torch.zeros(1))

    def loss(index):
        return {"a": 0 * value.sum() + index, "b": 0 * value.sum() + 1}

    curve = finetune({"x": value}, loss, 50, Optimiser(0.1), title="test")
    assert len(curve) == 17 and curve[0] == {"step": 2, "a": 1.0, "b": 1.0} and curve[-1]["a"] == 48.5
    assert finetune({"x": value}, loss, 0, Optimiser(0.1), title="test") == []


def test_finetune_stops_where_the_loss_is_not_finite():
    value = nn.Parameter(torch.zeros(1))
    with pytest.raises(RunError, match="t: the loss is nan at step 0: lower the learning rate"):
        finetune({"x": value}, lambda i: {"loss": value.sum() * torch.nan}, 2, Optimiser(0.1), title="t")
    with pytest.raises(ValueError, match="no parameter"):
        finetune({}, lambda i: {}, 1, Optimiser(0.1), title="t")
