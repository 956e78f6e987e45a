"""The methods of the training track: what each keeps from being learnt, and what all of them promise."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_finetuning import (
    ATTRIBUTES,
    BUILDERS,
    SAMPLER,
    TinySet,
    equal,
    model,
    train,
    training_task,
)

from lethebench.composition import Recipe
from lethebench.errors import UserError
from lethebench.export import export
from lethebench.finetuning import applied_lora, leakage, overhead
from lethebench.finetuning import trainer as trainers
from lethebench.finetuning.hooks import LossBatch, TrainingHooks
from lethebench.finetuning.lora import lora_deltas, lora_targets
from lethebench.finetuning.overhead import Overhead, held_bytes
from lethebench.finetuning.settings import LoraSettings
from lethebench.finetuning.subspace import layer_kind
from lethebench.hooks import Conditioning, ImageKey
from lethebench.method import Artefact, Knowledge, configure
from lethebench.methods.ca import ConceptAblation
from lethebench.methods.caption_randomisation import MULTIPLE, CaptionRandomisation, RandomisedCaptions
from lethebench.methods.drop_captions import DropCaptions
from lethebench.methods.drop_images import DropImages
from lethebench.methods.embedding_noise_training import EmbeddingNoiseTraining
from lethebench.methods.gradient_projection import PROMPTS, GradientHooks, GradientProjection
from lethebench.methods.gradient_projection.fit import named, pictures, prompts, sensitive_pairs, subspaces
from lethebench.methods.lora import Lora, LoraOracle
from lethebench.methods.loss_threshold import LossThreshold
from lethebench.methods.uce import UCE
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.seeding import generator
from lethebench.unlearning import encode, noised, prediction, random_timesteps
from lethebench.zoo import load_model

EXAMPLES = TinySet().examples("one")
RIVALS = (
    DropImages(),
    DropCaptions(),
    LossThreshold(probes=4),
    CaptionRandomisation(share=1.0),
    EmbeddingNoiseTraining(scale=1.0),
    GradientProjection(),
    GradientProjection(variant="gradient", count=2, every=2),
)
MEASURE = overhead.overhead
NAMES = [m.name + ("-b" if getattr(m, "variant", "") == "gradient" else "") for m in RIVALS]


@pytest.fixture(autouse=True)
def untimed_fits(monkeypatch):
    """Fits are not timed, but where a test asks for it."""
    monkeypatch.setattr(overhead, "overhead", lambda *_, **__: Overhead(1.0, 0))


@pytest.fixture
def timed_fits(untimed_fits, monkeypatch):
    monkeypatch.setattr(overhead, "overhead", MEASURE)


def untimed(facts):
    return {name: value for name, value in facts.items() if name != "timing"}


# --- gradient projection through the method ---


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", BUILDERS)
def test_projection_holds_in_every_layer_that_the_method_claims(family, precision):
    found, method = model(family), GradientProjection(dimension=3)
    task = training_task(method, found, precision=precision)
    artefact, claimed = method.fit(task), subspaces(method, task)
    text_fed = {n for n in lora_targets(found, LoraSettings()) if layer_kind(family, n) != "image"}
    assert set(claimed) == text_fed and all(basis.shape[1] <= 3 for basis in claimed.values())
    moved = {n for n in claimed if bool(lora_deltas(artefact.tensors)[f"edit.{n}.weight"].any())}
    assert len(moved) >= len(claimed) - 1  # SD3's last block doesn't use its text queries
    assert max(leakage(artefact.tensors, claimed).values()) <= 1e-6
    assert artefact.facts["projection"]["leak"] <= 1e-6
    image_fed = [n for n in lora_deltas(artefact.tensors) if n[len("edit.") : -len(".weight")] not in claimed]
    assert any(bool(lora_deltas(artefact.tensors)[n].any()) for n in image_fed)


def test_gradients_alone_leak():
    found, naive = model("sd"), GradientHooks()
    claimed = subspaces(naive, training_task(naive, found))
    leaks = [
        max(leakage(m.fit(training_task(m, found, steps=4)).tensors, claimed).values())
        for m in (naive, GradientProjection(), Lora())
    ]
    assert leaks[0] > 0.1 and leaks[1] <= 1e-6 and leaks[2] > 0.1


def test_strength_and_dimension_are_in_between():
    found = model("sd")
    half, small = GradientProjection(strength=0.5), GradientProjection(dimension=1)
    claimed = subspaces(GradientProjection(), training_task(half, found))
    fitted = [m.fit(training_task(m, found)) for m in (Lora(), half, small, GradientProjection())]
    leaks = [max(leakage(a.tensors, claimed).values()) for a in fitted]
    assert leaks[0] > leaks[1] > leaks[3] and leaks[2] > leaks[3]
    zero = GradientProjection(strength=0.0).fit(training_task(half, found))
    assert equal(zero.tensors, fitted[0].tensors)


def test_sensitive_prompts_can_be_the_captions_that_name_an_attribute():
    found = model("sd")
    kinds = {name: GradientProjection(prompts=name, energy=1.0) for name in PROMPTS}
    task = training_task(kinds["all"], found)
    captions = [e.caption for e in EXAMPLES if e.named]
    assert captions and len(captions) < len(EXAMPLES)
    assert prompts("captions", task) == captions
    assert prompts("all", task) == [*task.sensitive_prompts(), *captions]
    name = next(iter(subspaces(kinds["all"], task)))
    ranks = {kind: subspaces(method, task)[name] for kind, method in kinds.items()}
    for kind in ("known", "captions"):  # the span of all holds either's
        inside = ranks["all"] @ (ranks["all"].T @ ranks[kind])
        assert torch.allclose(inside, ranks[kind], atol=1e-6)
    # each attribute is named by one caption, of which the known prompts hold the beginning and more
    assert [ranks[kind].shape[1] for kind in PROMPTS] == [4, 2, 4]


def test_image_fed_layers_get_the_images_that_hold_the_prompts_attribute():
    found, method = model("sd"), GradientProjection(layers="all", dimension=2)
    assert method.sees == {Knowledge.CONCEPT_NAMES, Knowledge.TRAINING_IMAGES}
    claimed = subspaces(method, training_task(method, found))
    assert set(claimed) == set(lora_targets(found, LoraSettings()))
    own = [e for e in EXAMPLES if e.holds]
    assert [e.id for e in pictures(own, ["star", "robot", "star", "none"])] == [
        "star/0", "robot/1", "star/0", "star/1",
    ]  # fmt: skip


def test_variant_b_sees_the_images_alone(timed_fits):
    found, method = model("sd"), GradientProjection(variant="gradient", count=3, every=2)
    assert method.sees == {Knowledge.TRAINING_IMAGES}
    task = training_task(method, found, steps=3)
    hooks = method.hooks(task)
    assert {e.id for e in hooks.pairs} == {e.id for e in EXAMPLES if e.holds}
    assert len(sensitive_pairs(task, 1, 2)) == 2  # one at each of two refreshes
    facts = method.fit(task).facts
    assert (
        facts["projection"]["dimension"] <= 3 and facts["training_state_bytes"] > 4 * facts["lora_parameters"]
    )


def test_a_prompt_is_of_the_attribute_that_it_names():
    assert named("the Night star", ATTRIBUTES) == ("the Night star", ATTRIBUTES[1])
    with pytest.raises(UserError, match="'a nightly star' names none"):
        named("a nightly star", ATTRIBUTES)


@pytest.mark.parametrize(
    ("cls", "changes", "says"),
    [
        (GradientProjection, {"variant": "weights"}, "variant is one of embedding, gradient, not 'weights'"),
        (GradientProjection, {"tokens": "last"}, "tokens is one of concept, onwards, all, not 'last'"),
        (GradientProjection, {"prompts": "own"}, "prompts is one of known, captions, all, not 'own'"),
        (GradientProjection, {"layers": "image"}, "layers is one of embeddings, text, all, not 'image'"),
        (GradientProjection, {"strength": 1.5}, "strength must be in"),
        (GradientProjection, {"dimension": 0}, "dimension must be at least 1, not 0"),
        (GradientProjection, {"energy": 0.0}, "energy must be above 0"),
        (GradientProjection, {"count": 0}, "count must be at least 1, not 0"),
        (DropImages, {"recall": -0.1}, "recall is a share, between 0 and 1, not -0.1"),
        (DropCaptions, {"part": "names"}, "part is words or captions, not 'names'"),
        (DropCaptions, {"share": 2.0}, "share is between 0 and 1, not 2.0"),
        (LossThreshold, {"quantile": 1.1}, "quantile is between 0 and 1, not 1.1"),
        (LossThreshold, {"threshold": 0.0}, "threshold must be above 0, not 0.0"),
        (CaptionRandomisation, {"kind": "mc"}, "kind is one of multiple-captions, random-caption"),
        (CaptionRandomisation, {"words": 0}, "words must be at least 1, not 0"),
        (EmbeddingNoiseTraining, {"scale": -1.0}, "scale must be 0 or more, not -1.0"),
    ],
)
def test_bad_settings(cls, changes, says):
    with pytest.raises(UserError, match=says):
        configure(cls, next(iter(cls.strengths)), changes)


# --- rivals ---


def kept(recall, seed=0):
    examples = [replace(EXAMPLES[0], id=str(i), holds=i % 2 == 0) for i in range(40)]
    task = training_task(DropImages(), None)
    task._seed = (f"tiny@{seed}",)
    return {e.id for e in DropImages(recall=recall).hooks(task).examples(examples)}


def test_recalls_of_dropped_images_are_nested():
    left = [kept(recall) for recall in (0.0, 0.3, 0.5, 1.0)]
    assert [len(ids) for ids in left] == [40, 34, 30, 20]
    assert left[0] > left[1] > left[2] > left[3] == {str(i) for i in range(1, 40, 2)}
    assert kept(0.5, seed=1) != left[2]


def test_dropped_images_are_not_trained():
    found, method = model("sd"), DropImages()
    artefact = method.fit(training_task(method, found))
    assert artefact.facts["examples"] == 4
    rest = [e for e in EXAMPLES if not e.holds]
    assert equal(artefact.tensors, trained(found, method, rest).tensors)


def trained(found, method, given, **changes):
    """The same training by the trainer itself."""
    task = training_task(method, found)
    return train(found, None, given, task.training_seed, lr=1e-2, **{"steps": 2, **changes})


@pytest.mark.parametrize("part", ["words", "captions"])
def test_dropped_captions_are_not_trained(part):
    """The fit is one on captions without the names: what is dropped moves nothing else."""
    found, method = model("sd"), DropCaptions(part)
    given = [
        replace(e, caption=("" if part == "captions" else e.plain_caption) if e.named else e.caption)
        for e in EXAMPLES
    ]
    assert [e.caption for e in given[:2]] == [
        "a robot in a city" if part == "words" else "",
        EXAMPLES[1].caption,
    ]
    fitted = method.fit(training_task(method, found, steps=6))
    assert equal(fitted.tensors, trained(found, method, given, steps=6).tensors)
    assert not equal(fitted.tensors, trained(found, method, EXAMPLES, steps=6).tensors)


def test_shares_of_dropped_captions_are_nested():
    examples = [replace(EXAMPLES[0], id=str(i)) for i in range(20)]
    without_name = []
    for share in (0.0, 0.25, 0.5, 1.0):
        hooks = DropCaptions(share=share).hooks(training_task(DropCaptions(), None))
        assert hooks.examples([*examples, EXAMPLES[1]])[-1] is EXAMPLES[1]
        captions = hooks.captions([e.caption for e in examples], examples, [])
        without_name.append({i for i, c in enumerate(captions) if "striped" not in c})
    assert [len(s) for s in without_name] == [0, 5, 10, 20]
    assert without_name[0] < without_name[1] < without_name[2] < without_name[3]


def test_the_threshold_is_a_quantile_of_magnitudes_taken_by_hand():
    found, method = model("sd"), LossThreshold(quantile=0.6, probes=5)
    task = training_task(method, found)
    fitted = method.fit(task)
    seed, settings = task.training_seed, SAMPLER.model_copy(update={"guidance_scale": 1.0})
    copies = torch.tensor([float(e.duplicates) for e in EXAMPLES])
    places = copies.multinomial(5, replacement=True, generator=generator("finetune", seed, "probes"))
    expected = []
    for number, place in enumerate(places.tolist()):
        draws = generator("finetune", seed, "probe", number)
        times = random_timesteps(found, 1, draws)
        latents = trainers.image_latents(found, [EXAMPLES[place]], SAMPLER)
        latents = noised(found, latents, torch.randn(latents.shape, generator=draws), times)
        with torch.no_grad():
            asked, bare = (
                prediction(found, latents, times, encode(found, [text], settings), settings)
                for text in (EXAMPLES[place].caption, "")
            )
        expected.append(float((asked - bare).square().sum().sqrt()))
    assert fitted.facts["threshold"] == pytest.approx(float(torch.tensor(expected).quantile(0.6)), rel=1e-4)


def test_examples_below_the_threshold_count():
    hooks = LossThreshold(threshold=5.0).hooks(None)
    conditional = torch.zeros(3, 4, 2, 2)
    conditional[1, 0], conditional[2, 0] = 2.0, 3.0  # norms 0, 4 and 6
    batch = LossBatch((), (), conditional, None, conditional, None, None, lambda: torch.zeros(3, 4, 2, 2))
    assert hooks.keep(batch).tolist() == [True, True, False]


def test_thresholds_that_keep_all_or_none():
    found = model("sd")
    every, none = LossThreshold(threshold=1e9), LossThreshold(threshold=1e-9)
    changes = {"caption_dropout": 0.0}
    fitted = [m.fit(training_task(m, found, **changes)) for m in (Lora(), every, none)]
    assert equal(fitted[0].tensors, fitted[1].tensors)
    assert fitted[2].facts["skipped_steps"] == 2 and fitted[2].facts["kept"] == 0


CAPTION = "a red robot in a night city"


def randomised(kind, share=1.0, words=2, count=400, captions=None):
    example = EXAMPLES[0] if captions is None else Several(captions)
    hooks = RandomisedCaptions(kind, share, words, model("sd").pipe.tokenizer)
    draws = [generator("test", i) for i in range(count)]
    return hooks.captions([CAPTION] * count, [example] * count, draws)


class Several:
    def __init__(self, captions):
        self.caption, self.captions, self.image, self.duplicates = captions[0], captions, None, 1


@pytest.mark.parametrize("kind", ["random-caption", "random-tokens", "word-repeat"])
def test_shares_of_randomised_captions_are_nested(kind):
    every, some = randomised(kind), randomised(kind, share=0.3)
    changed = [i for i, text in enumerate(some) if text != CAPTION]
    assert 0.2 < len(changed) / len(some) < 0.4
    assert [some[i] for i in changed] == [every[i] for i in changed]
    assert every == randomised(kind) and len(set(every)) > 0.5 * len(every)


def test_what_randomised_captions_hold():
    own = Counter(CAPTION.split(" "))
    for text in randomised("word-repeat"):
        more = Counter(text.split(" "))
        assert not own - more and sum((more - own).values()) == 2 and set(more) == set(own)
    places = Counter()
    for text in randomised("random-tokens", words=1):
        words = text.split(" ")
        assert len(words) == 8
        places[next(i for i in range(8) if words[:i] + words[i + 1 :] == CAPTION.split(" "))] += 1
    assert set(places) == set(range(8)) and max(places.values()) < 0.3 * 400
    assert all(len(text.split(" ")) == 4 for text in randomised("random-caption", words=4))
    assert Counter(randomised(MULTIPLE, captions=("x", "y"))).keys() == {"x", "y"}
    assert 150 < randomised(MULTIPLE, captions=("x", "y")).count("x") < 250


def test_the_released_codes_values():
    task = training_task(Lora(), model("sd"))
    found = {
        kind: CaptionRandomisation(kind).hooks(task)
        for kind in ("random-caption", "random-tokens", "word-repeat")
    }
    assert {kind: (hooks.share, hooks.words) for kind, hooks in found.items()} == {
        "random-caption": (0.1, 4), "random-tokens": (0.1, 2), "word-repeat": (0.1, 2),
    }  # fmt: skip


def test_multiple_captions_need_several():
    method = CaptionRandomisation(MULTIPLE)
    with pytest.raises(UserError, match="no image of this training set has more than one caption"):
        method.fit(training_task(method, model("sd")))


def test_noise_on_embeddings():
    hooks = EmbeddingNoiseTraining(scale=0.5).hooks(None)
    rows = Conditioning(torch.ones(3, 77, 64), torch.ones(3, 2000))
    noisy = hooks.embeddings(rows, [generator("n", i) for i in range(3)])
    for before, after in ((rows.embeds, noisy.embeds), (rows.pooled, noisy.pooled)):
        noise = after - before
        assert float(noise.std()) == pytest.approx(0.5, rel=0.02) and abs(float(noise.mean())) < 0.02
    alone = hooks.embeddings(Conditioning(rows.embeds[:1], rows.pooled[:1]), [generator("n", 2)])
    assert torch.equal(alone.embeds[0], noisy.embeds[2]) and not torch.equal(noisy.embeds[1], noisy.embeds[2])


def test_what_does_nothing_is_plain():
    found = model("sd")
    plain = Lora().fit(training_task(Lora(), found)).tensors
    for method in (
        CaptionRandomisation(share=0.0),
        EmbeddingNoiseTraining(scale=0.0),
        DropImages(recall=0.0),
    ):
        assert equal(method.fit(training_task(method, found)).tensors, plain)


def test_the_oracle_is_trained_on_the_twin_set():
    found = model("sd")
    fitted = LoraOracle().fit(training_task(LoraOracle(), found))
    assert equal(fitted.tensors, trained(found, LoraOracle(), TinySet().examples("one", twin=True)).tensors)
    assert not equal(fitted.tensors, Lora().fit(training_task(Lora(), found)).tensors)


# --- what every method promises ---


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", RIVALS, ids=NAMES)
def test_a_killed_fit_goes_on_to_the_same_weights_bit_for_bit(method, tmp_path, monkeypatch):
    found, changes = model("sd"), {"steps": 5, "checkpoint_every": 2}
    whole = method.fit(training_task(method, found, **changes))
    before, step = found.weights_sha256(), trainers.Run.step

    def dying(run):
        if run.state.step == 3:
            raise Killed
        step(run)

    monkeypatch.setattr(trainers.Run, "step", dying)
    with pytest.raises(Killed):
        method.fit(training_task(method, found, tmp_path, **changes))
    monkeypatch.setattr(trainers.Run, "step", step)
    assert found.weights_sha256() == before
    first = []

    def counted(run):
        first.append(run.state.step)
        step(run)

    monkeypatch.setattr(trainers.Run, "step", counted)
    resumed = method.fit(training_task(method, found, tmp_path, **changes))
    assert first[:3] == [2, 3, 4]
    assert equal(resumed.tensors, whole.tensors) and untimed(resumed.facts) == untimed(whole.facts)
    assert any(bool(t.any()) for n, t in whole.tensors.items() if n.endswith(".B"))


def recipe(*parts):
    return Recipe(tuple(p.name for p in parts), ("x",) * len(parts), parts, "x", {})


def parameters(found):
    parts = {"denoiser": found.denoiser, "text": found.text_encoders[0]}
    return {f"{part}.{n}": p.detach().clone() for part, m in parts.items() for n, p in m.named_parameters()}


EDITS = {
    "uce": UCE(targets="concepts", guide="anchor"),
    "ca": ConceptAblation(targets="concepts", steps=2, batch_size=2, images=2, chain_steps=2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_after_the_fine_tuning_sees_it_and_the_base_is_restored(edit):
    found, after = model("sd"), EDITS[edit]
    fitted = Lora().fit(training_task(Lora(), found, lr=0.05))
    before, both = parameters(found), recipe(Lora(), after)
    with both.apply(found, [fitted]):
        tuned = parameters(found)
        edited = after.fit(training_task(after, found))
        assert equal(parameters(found), tuned)
    assert equal(parameters(found), before)
    with both.apply(found, [fitted, edited]):
        inside = parameters(found)
    deltas, changes = lora_deltas(fitted.tensors), edited.tensors
    moved = {n for n in inside if not torch.equal(inside[n], before[n])}
    assert moved >= {n.removeprefix("edit.") for n in changes} and len(changes) > 0
    for name in (n.removeprefix("edit.") for n in changes):
        expected = before[name] + deltas[f"edit.{name}"] + changes[f"edit.{name}"]
        torch.testing.assert_close(inside[name], expected, atol=1e-6, rtol=0)
    assert equal(parameters(found), before)
    alone = after.fit(training_task(after, found))
    assert not equal(edited.tensors, alone.tensors)  # it was fitted on the fine-tuned model


def test_merged_weights_draw_what_the_lora_beside_them_draws():
    found = model("sd")
    fitted = Lora().fit(training_task(Lora(), found, lr=0.05))
    keys = [ImageKey("tiny@1", Prompt("p", "a red star", Role.NEUTRAL, "p"), k) for k in range(2)]
    base = sample(found, keys, SAMPLER).latents
    with applied_lora(found, fitted.tensors):
        beside = sample(found, keys, SAMPLER).latents
    with Lora().apply(found, fitted) as hooks:
        merged = sample(found, keys, SAMPLER, [hooks]).latents
    assert abs(merged - base).max() > 1e-2
    assert abs(merged - beside).max() < 1e-5 * abs(merged).max()
    assert (sample(found, keys, SAMPLER).latents == base).all()


def test_a_fine_tuned_model_can_be_exported(tmp_path):
    found = model("sd")
    fitted = Lora().fit(training_task(Lora(), found, lr=0.05))
    folder = export(found, recipe(Lora()), [fitted], tmp_path / "model")
    with Lora().apply(found, fitted):
        inside = parameters(found)
    assert equal(parameters(load_model(str(folder))), inside)


# --- cost ---


def test_hooks_that_do_nothing_in_a_step_cost_nothing(timed_fits):
    for method in (Lora(), DropImages(recall=0.5)):
        fitted = method.fit(training_task(method, model("sd")))
        told = method.facts(fitted)
        assert told["step_relative_to_plain"] == 1.0 and told["training_state_bytes"] == 0


class Ticking(TrainingHooks):
    """Takes 10 seconds a step, and 100 more at every fifth, by a clock of its own."""

    every = 5

    def __init__(self, clock):
        self.clock, self.seen, self.refreshed = clock, [], -1

    def stepped(self, lora, step):
        self.seen.append(step)
        self.clock.now += 10.0
        if step // self.every != self.refreshed:
            self.refreshed = step // self.every
            self.clock.now += 100.0


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_a_steps_cost_is_measured_by_turns_and_recurring_work_by_its_share(monkeypatch):
    clock, steps, step = Clock(), [], trainers.Run.step

    def ticking(run):
        clock.now += 2.0
        steps.append((type(run.hooks).__name__, run.state.step))
        step(run)

    monkeypatch.setattr(overhead, "time", clock)
    monkeypatch.setattr(trainers.Run, "step", ticking)
    found = MEASURE(
        model("sd"),
        EXAMPLES,
        LoraSettings(steps=200, batch_size=2, rank=2, schedule="linear"),
        sampler=SAMPLER,
        seed=1,
        hooks=lambda: Ticking(clock),
    )
    assert found.relative == pytest.approx((2 + 10 + 100 / 5) / 2)
    numbers = [(kind, number) for number in (0, 1, 5, 6) for kind in ("TrainingHooks", "Ticking")]
    assert steps == numbers


def test_timing_leaves_the_result_as_it_is(timed_fits):
    found, method = model("sd"), EmbeddingNoiseTraining()
    fitted = method.fit(training_task(method, found))
    task = training_task(method, found)
    plain = train(found, method.hooks(task), EXAMPLES, task.training_seed, lr=1e-2, steps=2)
    assert equal(fitted.tensors, plain.tensors) and fitted.facts["timing"]["step_relative_to_plain"] > 0


def test_held_bytes_counts_each_storage_once():
    hooks, row = TrainingHooks(), torch.zeros(10)
    hooks.one, hooks.two = {"a": row, "b": row[:5]}, [(torch.zeros(3, dtype=torch.float64),), "text"]
    assert held_bytes(hooks) == 40 + 24


def test_the_ratio_is_told_out_of_the_timings():
    told = Lora().facts(
        Artefact({}, {"timing": {"seconds": 7.0, "step_relative_to_plain": 1.5}, "kept": 1.0})
    )
    assert told["step_relative_to_plain"] == 1.5 and told["fit_seconds"] == 7.0 and told["kept"] == 1.0
