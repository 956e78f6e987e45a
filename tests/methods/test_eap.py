"""EAP: the loss in clean images, the candidates, the search for the adversarial concept, and the fit."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import WORDS, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.method import Knowledge, Task, configure
from lethebench.methods.eap import EAP
from lethebench.methods.eap.adversary import Adversary, Vocabulary, nearest_to_centers, vocabulary
from lethebench.methods.eap.fit import Fitting, clean_distance
from lethebench.methods.esd.chains import sample_points, sampling_settings
from lethebench.methods.esd.recipe import trained_parameters
from lethebench.prompts import Prompt, Role
from lethebench.specs import SamplerSettings
from lethebench.unlearning import EDIT, applied, encode, noised, prediction, training_target, working_model
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=3.0, height=16, width=16)
BUILDERS = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
ERASED = "robot captain, a red star in a night city"
NEUTRAL = ["a blue circle in a city", "a striped star in a forest", "A red circle, in a night city"]


class World:
    """A memorized caption, a concept, and neutral prompts."""

    name = "world"

    def __iter__(self):
        yield Prompt("t", ERASED, Role.TRIGGER, "item")
        yield Prompt("c", "captain in a forest", Role.CONCEPT, "captain", concept="captain")

    def training_prompts(self):
        return NEUTRAL

    def paraphrases(self, prompt_id):
        return ["a red star"]


def task_for(method, model=None, seed="test"):
    return Task(model or wrap(tiny_sd()), SETTINGS, World(), method.sees, seed_parts=(seed,))


def quick(**settings):
    given = {"steps": 3, "batch_size": 2, "chain_steps": 3, "lr": 1e-3, "centers": 4, **settings}
    return EAP(**given)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_distance_is_that_of_the_clean_images(kind: str) -> None:
    model = wrap(tiny_sd(prediction_type=kind))
    draws = torch.Generator().manual_seed(0)
    latents, first, second = (torch.randn(3, 4, 8, 8, generator=draws).double() for _ in range(3))
    times = torch.tensor([20, 400, 900])
    kept = model.pipe.scheduler.alphas_cumprod.double()[times].view(-1, 1, 1, 1)

    def clean(predicted):
        if kind == "epsilon":
            return (latents - (1 - kept).sqrt() * predicted) / kept.sqrt()
        return kept.sqrt() * latents - (1 - kept).sqrt() * predicted

    wanted = (clean(first) - clean(second)).square().mean()
    torch.testing.assert_close(clean_distance(model, first, second, times), wanted, rtol=1e-6, atol=0)
    image, noise = first, second
    latents = noised(model, image, noise, times)
    torch.testing.assert_close(
        clean(training_target(model, image, noise, times)), image, rtol=1e-4, atol=1e-4
    )


def test_flow_matching_compares_velocities() -> None:
    model = wrap(tiny_sd3())
    first, second = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    assert float(clean_distance(model, first, second, torch.tensor([100.0, 900.0]))) == 1.0


def test_the_terms_are_the_papers() -> None:
    method = quick(negative_guidance=1.5, preservation=0.25)
    task = task_for(method)
    student = moved(task.model)
    fitting = Fitting(method, task, student, [ERASED, "captain"])
    asked, point, other, second = next(fitting.batches())
    with torch.no_grad():
        terms = fitting.loss(asked, point, other, second)

        def clean(model, where, conditioning):
            kept = model.pipe.scheduler.alphas_cumprod[where.timesteps].view(-1, 1, 1, 1)
            noise = prediction(model, *where, conditioning, fitting.settings)
            return (where.latents - (1 - kept).sqrt() * noise) / kept.sqrt()

        base, null = task.model, asked.negative
        target = clean(base, point, null) - 1.5 * (clean(base, point, asked) - clean(base, point, null))
        erasing = (clean(student, point, asked) - target).square().mean()
        change = (clean(student, second, other) - clean(base, second, other)).square().mean()
    torch.testing.assert_close(terms["erasing"], erasing, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["preservation"], 0.25 * change, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(point.timesteps, second.timesteps)


# --- the candidates -------------------------------------------------------------------------------


def test_vocabularies() -> None:
    task = task_for(EAP())
    assert vocabulary(task, "words") == sorted(
        {"a", "blue", "circle", "in", "city", "striped", "star", "forest", "red", "night"}
    )
    assert vocabulary(task, "prompts") == NEUTRAL
    found = vocabulary(task_for(EAP(vocabulary="tokenizer")), "tokenizer")
    assert set(WORDS) <= set(found) and "3" not in found and "blu" not in found
    task._prompts.training_prompts = list
    with pytest.raises(UserError, match="the vocabulary 'words' is empty"):
        vocabulary(task, "words")


def test_candidates_are_the_closest_without_the_text_itself() -> None:
    model = wrap(tiny_sd())
    words = Vocabulary(model, WORDS, SETTINGS, size=5)
    own = Vocabulary(model, ["red"], SETTINGS)
    found = words.candidates(own.embeds[0], "red", 4, 0).tolist()
    far = {w: float((encode(model, [w], SETTINGS).embeds - own.embeds).norm()) for w in WORDS if w != "red"}
    assert [WORDS[i] for i in found] == sorted(far, key=far.get)[:4]
    thinned = words.candidates(own.embeds[0], "red", 8, 3).tolist()
    assert len(thinned) == 3 and set(thinned) <= set(words.candidates(own.embeds[0], "red", 8, 0).tolist())
    with pytest.raises(UserError, match="holds nothing but 'red'"):
        Vocabulary(model, ["red"], SETTINGS).candidates(own.embeds[0], "red", 4, 0)


def test_centres_are_those_of_separate_groups() -> None:
    draws = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = places.repeat_interleave(7, 0) + 0.5 * torch.randn(21, 2, generator=draws)
    chosen = nearest_to_centers(points, 3)
    for group, number in enumerate(chosen):
        members = points[7 * group : 7 * group + 7]
        assert number == 7 * group + int((members - members.mean(0)).norm(dim=1).argmin())
    assert nearest_to_centers(points, 21) == list(range(21))


# --- the search -----------------------------------------------------------------------------------


def moved(model, share=0.05, seed=0):
    """A student: the model with its cross-attention moved at random."""
    student = working_model(model, torch.float32, own=True)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in trained_parameters(student, "original", "esd-x"):
            parameter = student.denoiser.get_parameter(name.removeprefix("denoiser."))
            parameter.add_(share * torch.randn(parameter.shape, generator=draws))
    return student


def adversary_of(model, texts, **settings):
    given = {
        "lr": 0.2,
        "temperature": 2.0,
        "hard": True,
        "draws": torch.Generator().manual_seed(0),
        **settings,
    }
    words = Vocabulary(model, texts, SETTINGS)
    return Adversary(words, [torch.arange(len(texts))], **given)


def test_a_hard_draw_is_one_candidate_and_follows_the_logits() -> None:
    model = wrap(tiny_sd())
    adversary = adversary_of(model, WORDS[:4])
    with torch.no_grad():
        adversary.logits[0].copy_(torch.tensor([0.5, 0.1, 0.25, 0.15]).log())
    counts = torch.zeros(4)
    for _ in range(4000):
        weights = adversary.draw(0).detach()
        assert sorted(weights.tolist()) == pytest.approx([0.0, 0.0, 0.0, 1.0], abs=1e-6)
        counts += weights
    torch.testing.assert_close(counts / 4000, torch.tensor([0.5, 0.1, 0.25, 0.15]), atol=0.03, rtol=0)
    soft = adversary_of(model, WORDS[:4], hard=False).draw(0).detach()
    assert float(soft.sum()) == pytest.approx(1.0) and float(soft.max()) < 1


@pytest.mark.parametrize("name", BUILDERS)
def test_a_candidate_in_the_place_of_the_text_is_asked_as_itself(name: str) -> None:
    model = wrap(BUILDERS[name]())
    adversary = adversary_of(model, WORDS[:4])
    asked = encode(model, [ERASED], SETTINGS)
    mixed = adversary.mixed(asked, [0], [torch.tensor([0.0, 0.0, 1.0, 0.0])])
    own = encode(model, [WORDS[2]], SETTINGS)
    settings = sampling_settings(SETTINGS, model.family, 3, 3.0)
    point = sample_points(model, own, settings, torch.tensor([[1]]), seed=0)[0]
    with torch.no_grad():
        found, wanted = (prediction(model, *point, c, settings) for c in (mixed, own))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_comes_to_the_candidate_that_changes_most(seed: int) -> None:
    """Against the change of every candidate, computed one by one at the same latents."""
    base = wrap(tiny_sd())
    student = moved(base, share=0.1, seed=seed)
    texts = ["red", "a blue circle", "captain", "striped robot", "night city", "a star in a forest"]
    adversary = adversary_of(base, texts)
    settings = sampling_settings(SETTINGS, "sd", 3, 3.0)
    asked = encode(base, [ERASED] * 4, settings)
    point = sample_points(base, asked, settings, torch.tensor([[0], [1], [2], [2]]), seed=seed)[0]

    def change(conditioning):
        both = [prediction(m, *point, conditioning, settings) for m in (student, base)]
        return clean_distance(base, both[0], both[1], point.timesteps)

    with torch.no_grad():
        changes = [float(change(encode(base, [text] * 4, settings))) for text in texts]
    for _ in range(40):
        adversary.ascend(lambda w: change(adversary.mixed(asked, [0] * 4, w)), [0] * 4)
    assert adversary.found(0) == texts[max(range(len(texts)), key=changes.__getitem__)], changes


def test_only_the_searched_texts_logits_move() -> None:
    base = wrap(tiny_sd())
    words = Vocabulary(base, WORDS, SETTINGS)
    adversary = Adversary(
        words,
        [torch.arange(3), torch.arange(3, 6)],
        lr=0.1,
        temperature=2.0,
        hard=True,
        draws=torch.Generator().manual_seed(0),
    )
    before = [x.detach().clone() for x in adversary.logits]
    adversary.ascend(lambda weights: (weights[0] * torch.tensor([1.0, 5.0, 2.0])).sum(), [1])
    assert torch.equal(adversary.logits[0], before[0]) and not torch.equal(adversary.logits[1], before[1])
    for _ in range(60):
        adversary.ascend(lambda weights: (weights[0] * torch.tensor([1.0, 5.0, 2.0])).sum(), [1])
    assert adversary.found(1) == WORDS[4]


# --- settings and fits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group": "esd-x"}, "group is one of xattn, noxattn, not 'esd-x'"),
        ({"vocabulary": "english"}, "vocabulary is one of words, prompts, tokenizer"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"centers": -1}, "centers must be at least 0"),
        ({"points": 60}, "a chain of 50 steps has no 60 points"),
        ({"preservation": -0.5}, "preservation must be at least 0"),
        ({"count": -1}, "count"),
    ],
)
def test_bad_settings_are_refused(settings, words: str) -> None:
    with pytest.raises(UserError, match=words):
        configure(EAP, "weak", settings)


def test_only_the_knowledge_that_is_used_is_seen() -> None:
    assert EAP(targets="triggers").sees == {Knowledge.MEMORIZED_PROMPTS, Knowledge.NEUTRAL_PROMPTS}
    assert EAP(targets="concepts", vocabulary="tokenizer").sees == {Knowledge.CONCEPT_NAMES}
    assert EAP().sees == EAP.knowledge


@pytest.mark.parametrize("name", BUILDERS)
def test_only_the_groups_parameters_move_on_every_family(name: str) -> None:
    model = wrap(BUILDERS[name]())
    method = quick(steps=1)
    artefact = method.fit(task_for(method, model))
    moved_names = {n.removeprefix(EDIT) for n in artefact.tensors}
    assert moved_names and moved_names <= set(trained_parameters(model, "original", "esd-x"))
    assert artefact.facts["targets"] == artefact.facts["texts"] == 2
    assert sum(x["erased_texts"] for x in artefact.facts["adversarial"]) == 2


def test_no_steps_are_the_identity() -> None:
    method = quick(steps=0)
    assert method.fit(task_for(method)).tensors == {}


def test_the_fit_is_deterministic_and_depends_on_the_seed() -> None:
    method = quick(points=2)
    first, second, other = (method.fit(task_for(method, seed=s)) for s in ("test", "test", "other"))
    assert all(torch.equal(t, second.tensors[n]) for n, t in first.tensors.items())
    assert first.facts["adversarial"] == second.facts["adversarial"]
    assert any(not torch.equal(t, other.tensors[n]) for n, t in first.tensors.items())


def test_the_erased_prompt_moves_to_no_text_and_preserving_keeps_the_neutral_ones() -> None:
    model = wrap(tiny_sd())
    draws = torch.Generator().manual_seed(5)
    latents, times = torch.randn(4, 4, 8, 8, generator=draws), torch.tensor([100, 400, 700, 950])

    def outputs(artefact, text):
        asked = encode(model, [text] * 4, SETTINGS)
        with torch.no_grad(), applied(model, artefact.tensors):
            return prediction(model, latents, times, asked, SETTINGS)

    method = quick(
        steps=30, lr=5e-3, targets="triggers", vocabulary="prompts", negative_guidance=0.0, points=3
    )
    kept = method.fit(task_for(method, model))
    without = replace(method, preservation=0.0)
    lost = without.fit(task_for(without, model))
    nothing = replace(method, steps=0).fit(task_for(method, model))
    before, after = outputs(nothing, ERASED), outputs(kept, ERASED)
    null = outputs(nothing, "")
    assert (after - null).norm() < 0.8 * (before - null).norm()
    moves = [
        sum(float((outputs(a, text) - outputs(nothing, text)).norm()) for text in NEUTRAL)
        for a in (kept, lost)
    ]
    assert moves[0] < 0.7 * moves[1], moves
