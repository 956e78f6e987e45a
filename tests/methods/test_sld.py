"""Safe latent diffusion."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import clip_tokenizer, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Knowledge, Task, configure
from lethebench.methods.sld import SLD
from lethebench.methods.sld.guidance import SafetyGuidance, safety_term
from lethebench.methods.sld.words import concept_of, distinguishing_words, fitting_text
from lethebench.plan import prompt_set
from lethebench.prompts import Prompt, Role
from lethebench.sampler import encode_prompts, sample
from lethebench.specs import SamplerSettings
from lethebench.unlearning import Target
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=5, guidance_scale=4.0, height=16, width=16)
BUILDERS = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux-schnell": tiny_flux,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
}
TEXTS = ("a red star", "a striped blue circle in a night city", "a robot in a forest")
DATA = json.loads((Path(__file__).parent / "data" / "sld.json").read_text())


def keys(texts=TEXTS, suite="test@1"):
    return [ImageKey(suite, Prompt(f"p{i}", t, Role.NEUTRAL, f"p{i}"), 0) for i, t in enumerate(texts)]


def drawn(model, method, wanted=None, given=SETTINGS, **more):
    with method.apply(model, method.fit(None)) as hooks:
        return sample(model, wanted or keys(), given, [hooks], **more).latents


def worst(found, wanted):
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max())


# --- the formulas ----------------------------------------------------------------------------------


def test_the_safety_term_element_by_element():
    """p - c below the threshold counts, with min(1, scale |p - c|) of (c - u); momentum comes on top."""
    prompt = torch.tensor([0.50, 0.50, 0.50, 0.50], dtype=torch.float64)
    concept = torch.tensor([0.49, 0.50, 0.60, 1.50], dtype=torch.float64)
    unconditional = torch.tensor([0.0, 0.0, 0.1, 0.5], dtype=torch.float64)
    nu = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    settings = SLD(scale=5.0, threshold=0.005, momentum=0.1)
    found = safety_term(prompt, unconditional, concept, nu, settings)
    wanted = [0.0 + 0.1, 0.0 + 0.2, 0.5 * 0.5 + 0.3, 1.0 * 1.0 + 0.4]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


class Alone(SamplerHooks):
    """Keeps what the guidance before it changed, at each step, as gamma."""

    def start(self, batch):
        self.terms = []
        return batch

    def guidance(self, combined, unconditional, conditional, step):
        plain = conditional
        if unconditional is not None:
            plain = unconditional + step.guidance_scale * (conditional - unconditional)
        self.terms.append((plain - combined) / step.guidance_scale)
        return plain


def terms(method, steps, model=None):
    """gamma of each step after the warm-up (0 before) on base's own trajectory, ``[steps, B, ...]``."""
    given, alone = SETTINGS.model_copy(update={"num_inference_steps": steps}), Alone()
    model = model or wrap(tiny_sd())
    with method.apply(model, method.fit(None)) as hooks:
        sample(model, keys(), given, [hooks, alone])
    return torch.stack(alone.terms)


@pytest.mark.parametrize(("steps", "first"), [(50, 10), (20, 4), (8, 2), (1, 1)])
def test_the_warm_up_is_a_share_of_the_steps(steps, first):
    found = terms(SLD(concept="robot", momentum=0.0), steps).flatten(1).abs().amax(dim=1)
    assert (found[:first] < 1e-6).all() and (found[first:] > 1e-3).all()


def test_the_momentum_builds_up_as_written_and_forgets_alike_in_a_share_of_the_steps():
    """gamma - gamma without momentum is momentum * nu; nu' = b nu + (1 - b) gamma, b = beta^(50 / steps)."""
    for steps in (50, 20):
        with_it = terms(SLD(concept="robot", warmup=0, momentum=0.5, beta=0.7), steps).double()
        without = terms(SLD(concept="robot", warmup=0, momentum=0.0), steps).double()
        nu, keep = torch.zeros_like(without[0]), 0.7 ** (50 / steps)
        for index in range(steps):
            gamma = without[index] + 0.5 * nu
            assert torch.allclose(with_it[index], gamma, atol=1e-5)
            nu = keep * nu + (1 - keep) * gamma


@pytest.mark.parametrize("strength", DATA["latents"])
def test_latents_are_those_of_the_diffusers_pipeline(strength):
    """To 2e-5 of the latents' size, in float32; the strengths are diffusers' SafetyConfig."""
    given = SETTINGS.model_copy(
        update={
            "num_inference_steps": DATA["steps"],
            "guidance_scale": DATA["guidance_scale"],
            "scheduler": "model",
        }
    )
    method = configure(SLD, strength, {"concept": DATA["concept"]})
    theirs = DATA["settings"][strength]
    assert theirs == {
        "sld_guidance_scale": method.scale,
        "sld_warmup_steps": method.warmup,
        "sld_threshold": method.threshold,
        "sld_momentum_scale": method.momentum,
        "sld_mom_beta": method.beta,
    }
    wanted, reference = keys(DATA["prompts"], DATA["suite"]), np.array(DATA["latents"][strength])
    model = wrap(tiny_sd())
    found = drawn(model, method, wanted, given).reshape(2, -1)
    assert worst(found, reference) < 2e-5 * np.abs(reference).max()
    assert worst(sample(model, wanted, given).latents.reshape(2, -1), reference) > 0.1


# --- on every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_a_family_is_guided_away_and_not_at_scale_zero(name):
    model = wrap(BUILDERS[name]())
    base = sample(model, keys(), SETTINGS).latents
    assert worst(drawn(model, configure(SLD, "max", {"concept": "robot"})), base) > 1e-2
    assert (drawn(model, configure(SLD, "max", {"concept": "robot", "scale": 0.0})) == base).all()
    nearly = drawn(model, configure(SLD, "max", {"concept": "robot", "scale": 1e-4}))
    assert 0 < worst(nearly, base) < 1e-2


@pytest.mark.parametrize("name", BUILDERS)
def test_the_concepts_prediction_is_taken_where_the_sampler_stands(name):
    """A concept that is the prompt has the prompt's own prediction at every step: nothing to subtract."""
    found = terms(SLD(concept=TEXTS[0], warmup=0, threshold=1.0), 5, wrap(BUILDERS[name]()))
    assert float(found[:, 0].abs().max()) < 1e-3 < float(found[:, 1:].abs().max())


def test_momentum_is_begun_anew_in_each_batch():
    model, method = wrap(tiny_sd()), configure(SLD, "max", {"concept": "robot"})
    together = drawn(model, method, batch_size=3)
    assert worst(drawn(model, method, batch_size=1), together) < 1e-4 * np.abs(together).max()


class Asked(SamplerHooks):
    """Checks each step's prediction against the formulas, with predictions of its own."""

    def __init__(self, concept, scale, method):
        self.concept, self.scale, self.method, self.steps = concept, scale, method, 0

    def start(self, batch):
        embed = partial(encode_prompts, batch.model, settings=batch.settings)
        self.texts = embed([""] * len(batch.keys)), embed([self.concept] * len(batch.keys))
        self.nu = torch.zeros_like(batch.noise)
        return batch

    def guidance(self, combined, unconditional, conditional, step):
        assert unconditional is None
        asked = (step.batch.predict(step.latents, step.timestep, x).conditional for x in self.texts)
        empty, concept = (x / self.scale for x in asked)
        gamma = safety_term(conditional / self.scale, empty, concept, self.nu, self.method)
        keep = self.method.beta ** (50 / step.total)
        self.nu = keep * self.nu + (1 - keep) * gamma
        started = step.index >= self.method.warmup * step.total / 50
        wanted = conditional - self.scale * gamma if started else conditional
        assert torch.allclose(combined, wanted, atol=1e-5) and bool((gamma != 0).any())
        self.steps += 1
        return combined


@pytest.mark.parametrize(("name", "scale"), [("flux-schnell", 1.0), ("flux-dev", 4.0)])
def test_flux_is_asked_for_the_empty_prompt(name, scale):
    """e = p - g gamma; dev's predictions hold the guidance scale g of 4, schnell's none."""
    method = configure(SLD, "strong", {"concept": "robot", "warmup": 20})
    model, asked = wrap(BUILDERS[name]()), Asked("robot", scale, method)
    with method.apply(model, method.fit(None)) as hooks:
        found = sample(model, keys(), SETTINGS, [hooks, asked]).latents
    assert asked.steps == 5 and worst(found, sample(model, keys(), SETTINGS).latents) > 1e-3
    least = SETTINGS.model_copy(update={"guidance_scale": 0.0})  # not divided by
    assert np.isfinite(drawn(model, method, given=least)).all()


def test_models_without_guidance_are_refused():
    given = SETTINGS.model_copy(update={"guidance_scale": 1.0})
    with pytest.raises(UserError, match="set the sampler's guidance_scale above 1"):
        drawn(wrap(tiny_sd()), SLD(concept="robot"), given=given)


# --- what is avoided -------------------------------------------------------------------------------

TARGETS = [
    Target("a", "Zor, a red star", ("a red star",), Role.TRIGGER, "a"),
    Target("b", "in the forest of mub", ("a robot in a forest", "a star in the forest"), Role.TRIGGER, "b"),
    Target("c", "a picture of captain wex", ("a picture of a hero",), Role.CONCEPT, "c", "captain wex"),
    Target("d", "unheard words", (), Role.TRIGGER, "d"),
]


def test_words_that_no_anchor_has_are_the_targets_own():
    assert distinguishing_words(TARGETS) == ["zor", "mub", "captain", "wex"]


def test_a_prompt_is_guided_away_from_its_own_words_or_from_all():
    words = distinguishing_words(TARGETS)
    assert concept_of("Captain Wex in a forest.", words, "all") == "captain wex"
    assert concept_of("wex, wex and (zor)", words, "all") == "wex zor"
    assert concept_of("a red star", words, "all") == "all"


def test_as_many_words_as_fit_the_tokenizer():
    """14 tokens besides start and end: a word and a comma each."""
    tokenizer = clip_tokenizer()
    text = fitting_text(["robot"] * 20, tokenizer)
    assert text == ", ".join(["robot"] * 7) and len(tokenizer(text).input_ids) <= 16
    assert len(tokenizer(text + ", robot").input_ids) > 16


def task(method, prompts=None):
    return Task(
        wrap(tiny_sd()), SETTINGS, prompts or prompt_set("planted"), method.sees, seed_parts=("test",)
    )


def test_the_planted_worlds_triggers_and_names_are_found():
    planted = prompt_set("planted")
    artefact = SLD().fit(task(SLD()))
    words = set(artefact.facts["words"])
    assert {p.concept for p in planted if p.role is Role.CONCEPT} <= words
    held_out = " ".join(p.text for p in planted if p.role in (Role.CONTROL, Role.NEUTRAL, Role.PROBE))
    assert not words & set(held_out.replace(",", "").split())
    for prompt in planted:
        own = concept_of(prompt.text, artefact.facts["words"], "")
        assert bool(own) == (prompt.role in (Role.TRIGGER, Role.CONCEPT)), prompt.text
    assert set(artefact.facts["text"].split(", ")) <= words


def test_only_what_is_unlearnt_is_seen():
    names, triggers = Knowledge.CONCEPT_NAMES, Knowledge.MEMORIZED_PROMPTS
    assert SLD().sees == {names, triggers} and SLD(targets="concepts").sees == {names}
    assert SLD(targets="triggers").sees == {triggers} and SLD(concept="zor").sees == frozenset()
    few = SLD(targets="concepts", count=2)
    assert len(few.fit(task(few)).facts["words"]) == 2


def test_each_image_gets_the_concept_of_its_own_prompt():
    model, seen = wrap(tiny_sd()), []

    class Look(SafetyGuidance):
        def start(self, batch):
            found = super().start(batch)
            seen.append(self._concept.embeds)
            return found

    sample(model, keys(), SETTINGS, [Look(SLD(), ["robot", "red"], "night city")])
    embeds, _ = model.pipe.encode_prompt(["red", "night city", "robot"], "cpu", 1, False)
    assert torch.allclose(seen[0], embeds, atol=1e-5)


def test_a_set_without_paraphrases_needs_a_concept():
    class Bare:
        def __iter__(self):
            return iter([Prompt("t", "zor", Role.TRIGGER, "t"), Prompt("n", "a star", Role.NEUTRAL, "n")])

    with pytest.raises(UserError, match="set `concept` to what is to be avoided"):
        SLD(targets="triggers").fit(task(SLD(targets="triggers"), Bare()))
    assert SLD(concept=" zor ").fit(task(SLD(concept="zor"), Bare())) == Artefact(
        facts={"words": [], "text": "zor"}
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": "faces"}, "targets is triggers, concepts, all, not 'faces'"),
        ({"scale": -1.0}, "scale must be 0 or more, not -1.0"),
        ({"warmup": 51}, "warmup must be between 0 and 50, not 51"),
        ({"beta": 1.5}, "beta must be between 0 and 1, not 1.5"),
        ({"concept": 7}, "concept is a text, not 7"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        configure(SLD, "weak", settings)
