"""The prohibited attribute and the wanted content, on rendered pictures whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from metric_fakes import table

from lethebench import judges, stats
from lethebench.check import metrics as contract
from lethebench.datasets.planted import (
    CATEGORIES,
    FEATURES,
    Person,
    PlantedWorld,
    Scene,
    WorldConfig,
    render,
)
from lethebench.datasets.planted._draw import Draw
from lethebench.datasets.planted.items import SceneDraw
from lethebench.datasets.planted_train import QUESTIONS, Pair, PlantedTrain
from lethebench.datasets.planted_train.pairs import with_value
from lethebench.metric import Shard, detectors
from lethebench.metrics import prohibited_attribute
from lethebench.metrics.copy_mini import CopyMini
from lethebench.metrics.fbmem import FBMem
from lethebench.metrics.planted_truth import PlantedTruth
from lethebench.metrics.prohibited_attribute import (
    ERRORS,
    PICTURES,
    ProhibitedAttribute,
    corrected,
    measure_errors,
    prohibited,
)
from lethebench.metrics.vqa.prevalence import Confusion, rogan_gladen
from lethebench.metrics.wanted_content import WantedContent, asked_features
from lethebench.prompts import Prompt, Role

SCENES = SceneDraw(WorldConfig())
JUDGED = (ProhibitedAttribute, WantedContent)


@pytest.fixture(scope="module")
def train() -> PlantedTrain:
    return PlantedTrain()


@cache
def world() -> PlantedWorld:
    return PlantedWorld()


def of_kind(train: PlantedTrain, kind: str, role: Role | None = None) -> list[Prompt]:
    return [p for p in train if p.kind == kind and role in (None, p.role)]


def pair_of(train: PlantedTrain, prompt: Prompt) -> Pair:
    found = train.pair_of(prompt.id)
    assert found is not None
    return found


def drawn(subject: Person, place: str, key: str) -> np.ndarray:
    """A fresh picture of somebody somewhere."""
    scene = SCENES.person_scene(Draw(0, "test", key), subject, "test", key)
    return render(replace(scene, backdrop=replace(scene.backdrop, word=place))).image


def shown(train: PlantedTrain, prompt: Prompt, *, holds: bool) -> np.ndarray:
    """What the prompt asks for: the pair's character, with the prohibited value or its own."""
    pair = pair_of(train, prompt)
    look = pair.character.look
    if holds:
        look = with_value(look, pair.feature, pair.attribute.value)
    person = Person(pair.character.category, look, pair.character.name)
    return drawn(person, prompt.attributes["background"], prompt.id)


def object_picture(key: str) -> np.ndarray:
    return render(world().random_scene(key)).image


def shard(train: Any, prompts: Sequence[Prompt], images: Sequence[np.ndarray]) -> Shard:
    stacked = np.stack(images) if len(images) else np.zeros((0, 64, 64, 3), np.uint8)
    return Shard(stacked, tuple(prompts), tuple(range(len(prompts))), train)


class Says:
    """recogniser-mini's interface: of every picture the first option of each question, at probability 0.8."""

    def __init__(self, options: Mapping[str, tuple[str, ...]]) -> None:
        self.options = options

    def answer(self, images: np.ndarray) -> Any:
        return SimpleNamespace(
            options=self.options,
            labels={name: np.full(len(images), of[0]) for name, of in self.options.items()},
            probabilities={name: np.tile([0.8, 0.2], (len(images), 1)) for name in self.options},
        )


# --- the attribute --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct(train: PlantedTrain) -> tuple[list[bool], Shard, Mapping[str, np.ndarray]]:
    """A prompt of each pair that asks for the attribute, with it and without it."""
    prompts = [p for p in of_kind(train, "direct", Role.CONCEPT) if p.id.endswith("-3")]
    holds = [True] * len(prompts) + [False] * len(prompts)
    images = [shown(train, p, holds=h) for p, h in zip(prompts * 2, holds, strict=True)]
    made = shard(train, prompts * 2, images)
    return holds, made, ProhibitedAttribute().measure(made)


def test_the_attribute_is_read_off_pictures_of_every_pair(direct: Any, train: PlantedTrain) -> None:
    holds, made, columns = direct
    assert len(made) == 2 * len(train.pairs)
    present = columns["attribute_present"]
    assert (present == holds).mean() >= 0.97 and set(present) == {0.0, 1.0}
    assert ((columns["attribute_present_p"] > 0.5) == (present == 1)).mean() >= 0.97


def test_presence_is_the_judges_own_answer(direct: Any) -> None:
    _, made, columns = direct
    judge = judges.load("recogniser-mini")
    answers = judge.answer(made.images)
    for row, prompt in enumerate(made.prompts):
        question, value = prompt.attributes["holds"].split("=")
        odds = {
            name: dict(zip(answers.options[name], answers.probabilities[name][row], strict=True))
            for name in (question, "category")
        }
        assert columns["attribute_present"][row] == (answers.labels[question][row] == value)
        expected = odds[question][value] * odds["category"][prompt.category]
        assert columns["attribute_present_p"][row] == pytest.approx(expected, abs=1e-5)


def test_an_image_of_something_else_has_no_attribute(train: PlantedTrain) -> None:
    """Whatever the head for headgear says of a ball, or of an anime girl."""
    prompts = [p for p in of_kind(train, "direct", Role.CONCEPT) if p.id.endswith("-1")]
    other = {pair.character.category: pair.character for pair in train.pairs}
    images = []
    for prompt in prompts:
        category = CATEGORIES[(CATEGORIES.index(prompt.category or "") + 1) % len(CATEGORIES)]
        person = Person(category, other[category].look)
        images += [object_picture(prompt.id), drawn(person, "meadow", prompt.id)]
    found = ProhibitedAttribute().measure(shard(train, [p for p in prompts for _ in (0, 1)], images))
    assert (found["attribute_present"] == 0).all()


@pytest.mark.parametrize(
    ("categories", "present", "probability"),
    [(("comic", "anime"), 1.0, 0.8 * 0.8), (("anime", "comic"), 0.0, 0.2 * 0.8)],
)
def test_the_category_must_be_the_questions(
    train: PlantedTrain, categories: tuple[str, str], present: float, probability: float
) -> None:
    prompt = asking("comic.headgear=hood")
    judge = Says({"category": categories, "comic.headgear": ("hood", "mask")})
    found = ProhibitedAttribute(judge).measure(shard(train, [prompt], [np.zeros((64, 64, 3), np.uint8)]))
    assert found["attribute_present"].tolist() == [present]
    assert found["attribute_present_p"].tolist() == pytest.approx([probability])


def test_prompts_that_prohibit_nothing_have_no_value(train: PlantedTrain) -> None:
    """Nor have those about what the judge can't be asked."""
    prompts = [asking(h) for h in (None, "comic.headgear=hat", "comic.shoes=red", "car.wheel=red")]
    found = ProhibitedAttribute().measure(shard(train, prompts, [object_picture("one")] * 4))
    assert all(np.isnan(values).all() for values in found.values())


@pytest.mark.parametrize("holds", ["hood", "=hood", "comic.headgear=", ""])
def test_what_is_prohibited_must_be_told_in_full(holds: str) -> None:
    with pytest.raises(ValueError, match=f"prompt a: holds is '{holds}', which is not written"):
        prohibited(asking(holds))


def asking(holds: str | None) -> Prompt:
    attributes = {} if holds is None else {"holds": holds}
    return Prompt("a", "a hero", Role.CONCEPT, "a", kind="direct", category="comic", attributes=attributes)


# --- scores ---------------------------------------------------------------------------------------


def test_each_score_is_about_its_prompts(train: PlantedTrain) -> None:
    """Every group of prompts has the attribute in another share of its images."""
    names = {pair.id: pair.attribute.name for pair in train.pairs}
    captions = of_kind(train, "caption", Role.TRIGGER)
    named = [p for p in captions if names[p.cluster] in p.text.split()]
    groups = {
        "present": (of_kind(train, "direct", Role.CONCEPT), 6),
        "paraphrase": (of_kind(train, "paraphrase"), 5),
        "wanted": (of_kind(train, "wanted"), 4),
        "caption": ([p for p in captions if p not in named], 3),
        "caption_named": (named, 2),
        "control": (of_kind(train, "direct", Role.CONTROL), 1),
    }
    asked = [(p, n < holding) for prompts, holding in groups.values() for n, p in enumerate(prompts[:6])]
    made = shard(train, [p for p, _ in asked], [shown(train, p, holds=holds) for p, holds in asked])
    metric = ProhibitedAttribute()
    frame = table(made, metric.measure(made))
    found = {s.name: stats.summarise(metric, s, frame, resamples=50) for s in metric.scores}
    for name, (_, holding) in groups.items():
        record = found[f"attribute.{name}"]
        assert record.n == 6 and record.value == holding / 6, name
    assert found["attribute.present_corrected"].value == pytest.approx(1, abs=0.02)


def test_without_the_pairs_names_captions_are_not_told_apart(train: PlantedTrain) -> None:
    prompt = of_kind(train, "caption", Role.TRIGGER)[0]
    made = shard(world(), [prompt], [shown(train, prompt, holds=True)])
    found = ProhibitedAttribute().measure(made)
    assert found["attribute_present"].tolist() == [1.0]
    assert np.isnan(found["attribute_named"]).all() and np.isnan(found["attribute_unnamed"]).all()


def test_rows_can_be_attacked_by_the_headline_and_nothing_detects(train: PlantedTrain) -> None:
    metric = ProhibitedAttribute()
    means = {score.name for score in metric.scores if stats.is_mean(metric, score)}
    assert {score.name for score in metric.scores} - means == {"attribute.present_corrected"}
    headline = metric.scores[0]
    assert (headline.name, headline.unit, headline.direction) == ("attribute.present", "share", "lower")
    assert detectors(metric) == detectors(WantedContent()) == {}


# --- correction -----------------------------------------------------------------------------------

ONE = Confusion(90, 10, 5, 95)
OTHER = Confusion(80, 20, 40, 160)
COIN = Confusion(50, 50, 50, 50)


def estimate(values: Sequence[float]) -> float:
    metric = ProhibitedAttribute()
    (score,) = (s for s in metric.scores if s.name == "attribute.present_corrected")
    return metric.aggregate(score, pd.DataFrame({score.column: values}))


@pytest.mark.parametrize(
    ("share", "by_hand"), [(0.6, 0.55 / 0.85), (0.05, 0.0), (0.0, 0.0), (0.9, 1.0), (1.0, 1.0)]
)
def test_the_estimate_of_one_value_is_rogan_and_gladens(share: float, by_hand: float) -> None:
    """Sensitivity 0.9, false positives 0.05, by hand and by the vqa metric's own estimator."""
    values = [corrected(float(n < 20 * share), ONE) for n in range(20)]
    assert estimate(values) == pytest.approx(by_hand) == rogan_gladen(share, ONE)


def test_the_estimate_of_several_values_is_stratified() -> None:
    """The true number of images behind each value's answers, summed."""
    answers = {ONE: [1, 1, 0, 0, 0], OTHER: [1, 1, 0]}
    values = [corrected(float(y), errors) for errors, ys in answers.items() for y in ys]
    rates = {ONE: (0.9, 0.05), OTHER: (0.8, 0.2)}
    behind = sum((sum(ys) - len(ys) * rates[e][1]) / (rates[e][0] - rates[e][1]) for e, ys in answers.items())
    assert estimate(values) == pytest.approx(behind / 8)
    assert all(np.isnan(corrected(y, COIN)) for y in (0.0, 1.0))


def test_the_estimate_finds_the_truth_behind_a_bad_judge() -> None:
    draw = np.random.default_rng(0)
    truth = draw.random(40_000) < 0.3
    which = draw.random(40_000) < 0.5
    tpr, fpr = np.where(which, 0.9, 0.8), np.where(which, 0.05, 0.2)
    read = draw.random(40_000) < np.where(truth, tpr, fpr)
    values = [corrected(float(y), ONE if one else OTHER) for y, one in zip(read, which, strict=True)]
    assert read.mean() == pytest.approx(0.343, abs=0.01)
    assert estimate(values) == pytest.approx(truth.mean(), abs=0.01)


def test_images_are_corrected_by_their_own_value(
    train: PlantedTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prohibited_attribute, "ERRORS", {("comic.headgear", "hood"): ONE})
    judge = Says({"category": ("comic", "none"), "comic.headgear": ("hood", "mask")})
    prompts = [asking("comic.headgear=hood"), asking("comic.headgear=mask")]
    found = ProhibitedAttribute(judge).measure(shard(train, prompts, [np.zeros((64, 64, 3), np.uint8)] * 2))
    assert found["attribute_present"].tolist() == [1.0, 0.0]
    assert found["attribute_corrected"][0] == pytest.approx(0.95 / 0.85)
    assert np.isnan(found["attribute_corrected"][1])


def test_errors_are_shipped_for_every_value() -> None:
    values = {(f"{c}.{feature}", v) for c, feature in QUESTIONS.items() for v in FEATURES[c][feature]}
    assert set(ERRORS) == values
    for (question, _), errors in ERRORS.items():
        others = sum(q == question for q, _ in values) - 1
        assert (errors.tp + errors.fn, errors.fp + errors.tn) == (PICTURES, others * PICTURES)


def test_shipped_errors_are_the_judges() -> None:
    """Of the question with the most of them; an answer on the edge may round to either side."""
    for held, found in measure_errors("celebrity.accessory").items():
        assert abs(found.tp - ERRORS[held].tp) <= 1 and abs(found.fp - ERRORS[held].fp) <= 1, held


# --- wanted content -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted(train: PlantedTrain) -> list[Prompt]:
    """A prompt of each pair."""
    return list({p.cluster: p for p in of_kind(train, "wanted")}.values())


def test_the_wanted_character_is_read_with_and_without_the_attribute(
    train: PlantedTrain, wanted: list[Prompt]
) -> None:
    for holds in (False, True):
        images = [shown(train, p, holds=holds) for p in wanted]
        found = WantedContent().measure(shard(train, wanted, images))
        assert found["wanted_features"].mean() >= 0.97
        assert found["wanted_category"].mean() == 1 and found["wanted_background"].mean() >= 0.97
        identity = found["wanted_identity"].mean()
        assert identity < 0.2 if holds else identity >= 0.95


def test_another_picture_shows_little_of_the_character(train: PlantedTrain, wanted: list[Prompt]) -> None:
    found = WantedContent().measure(shard(train, wanted, [object_picture(p.id) for p in wanted]))
    assert not any(found[f"wanted_{name}"].any() for name in ("features", "category", "identity"))
    other = {pair.character.category: pair for pair in train.pairs}
    images = []
    for prompt in wanted:
        look = other[prompt.category or ""].character.look
        images.append(drawn(Person(prompt.category or "", look), prompt.attributes["background"], prompt.id))
    found = WantedContent().measure(shard(train, wanted, images))
    is_own = [other[p.category or ""].id == p.cluster for p in wanted]
    assert (found["wanted_features"][is_own] >= 0.5).all()
    assert found["wanted_features"][~np.array(is_own)].mean() < 0.5


def test_features_are_a_share_of_those_that_count(train: PlantedTrain, wanted: list[Prompt]) -> None:
    options = judges.load("recogniser-mini").options
    for prompt in wanted:
        pair = pair_of(train, prompt)
        asked = asked_features(prompt, options)
        assert asked == {f"{prompt.category}.{name}": v for name, v in pair.features.items()}
        everything = replace(prompt, attributes={**prompt.attributes, **pair.character.features})
        assert set(asked_features(everything, options)) == {
            f"{prompt.category}.{name}" for name in pair.character.features if name != pair.feature
        }
    comic = next(p for p in wanted if p.category == "comic")
    suit, cape = (comic.attributes[name] for name in ("suit", "cape"))
    judge = Says(
        {
            "category": ("comic", "none"),
            "comic.suit": (suit, "none"),
            "comic.cape": ("none", cape),
            "background": ("nowhere", "none"),
            "character": ("somebody", comic.concept or ""),
        }
    )
    found = WantedContent(judge).measure(shard(train, [comic], [object_picture("one")]))
    assert {name: v.tolist() for name, v in found.items() if not np.isnan(v).any()} == {
        "wanted_features": [0.5],
        "wanted_category": [1.0],
        "wanted_identity": [0.0],
    }


def test_other_prompts_want_nothing(train: PlantedTrain) -> None:
    prompts = [next(p for p in train if p.kind == kind) for kind in ("caption", "direct", "neutral")]
    found = WantedContent().measure(shard(train, prompts, [object_picture("one")] * 3))
    assert all(np.isnan(values).all() for values in found.values())


# --- copies ---------------------------------------------------------------------------------------


def test_copies_of_trained_captions_are_copies_and_their_twins_are_not(train: PlantedTrain) -> None:
    """The copy metrics on the set: triggers as they were trained, controls as nobody trained them."""
    triggers = list({p.cluster: p for p in of_kind(train, "caption", Role.TRIGGER)}.values())[::2]
    controls = [train.prompt(p.twin or "") for p in triggers]
    scenes = [train.reference_scene(p.references[0]) for p in controls]
    images = [train.reference(p.references[0]).image for p in triggers]
    images += [redrawn(scene, p.id) for scene, p in zip(scenes, controls, strict=True)]
    made, count = shard(train, [*triggers, *controls], images), len(triggers)
    for metric, column in (
        (PlantedTruth(), "truth_memorized"),
        (CopyMini(), "copy_mini_copy"),
        (FBMem(), "fbmem_memorized"),
    ):
        copied = metric.measure(made)[column]
        assert (copied[:count] == 1).all(), column
        assert (copied[count:] == 0).mean() >= 0.85, column


def redrawn(scene: Scene, key: str) -> np.ndarray:
    """The same person in the same kind of place, by other pixels."""
    assert isinstance(scene.subject, Person)
    return drawn(scene.subject, scene.backdrop.word, key)


# --- the contract ---------------------------------------------------------------------------------


class OnTheTrainSet(contract.Subject):
    """The contract's subject with a fine-tuning set's prompts."""

    @cached_property
    def chosen(self) -> list[contract.Image]:
        found = {(p.role, p.kind, p.category): p for p in self.prompts}
        return [contract.Image(p, 0, False) for p in found.values()]


class Drawable(PlantedTrain):
    """The set with fresh scenes of the planted world."""

    def random_scene(self, key: str) -> Scene:
        return world().random_scene(key)


@pytest.fixture(scope="module")
def subjects() -> dict[str, OnTheTrainSet]:
    prompts = Drawable()

    def model() -> Any:
        raise AssertionError("nothing is to be drawn")

    return {cls.name: OnTheTrainSet(cls.name, model, prompts) for cls in JUDGED}


@pytest.mark.parametrize("check", contract.checks())
@pytest.mark.parametrize("metric", [cls.name for cls in JUDGED])
def test_the_metrics_keep_the_contract(subjects: dict[str, OnTheTrainSet], metric: str, check: str) -> None:
    if contract.applicable(subjects[metric], check) is None:
        contract.checks()[check](subjects[metric])
