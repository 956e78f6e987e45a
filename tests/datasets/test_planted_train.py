"""The fine-tuning set: exact shares, twins equal but for the attribute, nothing tested that is trained."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lethebench.datasets.planted import BACKGROUNDS, CATEGORIES, Person, PlantedWorld, render
from lethebench.datasets.planted_train import QUESTIONS, FineTuningConfig, PlantedTrain
from lethebench.errors import UserError
from lethebench.finetuning.data import FineTuningSet
from lethebench.metrics._common import asks_for_copy
from lethebench.plan import builtin_folder
from lethebench.prompts import Prompt, PromptSet, Role
from lethebench.registry import PROMPT_SETS

PROMPTS_SHA256 = "d6882f589c6832d921a1b0ab56bb9ecb07eb8c2b4b4c83bcd6e384dff6f3ecef"
EXAMPLES_SHA256 = "6129bdd5c5beb83873b8224545ffe9261d0b923d8aa78235c6b27b30f1e88d13"
SCENES_SHA256 = "c40e9be5c6ee5ab4f595b453cda06f90e9d91213e4034c61f3dc7b7a627be02a"
NAMED = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 8: 6, 12: 9, 16: 12}
"""Captions that name the attribute by images that hold it: three quarters, halves rounded up."""


@pytest.fixture(scope="module")
def train() -> PlantedTrain:
    return PlantedTrain()


@pytest.fixture(scope="module")
def planted() -> PlantedWorld:
    return PlantedWorld()


def captions(train: PlantedTrain) -> set[str]:
    """Every caption that any fine-tuning or its oracle sees."""
    examples = (train.examples(i, twin=twin) for i in train.instances for twin in (False, True))
    return {example.caption for example in chain.from_iterable(examples)}


def words(text: str) -> set[str]:
    return set(text.replace(",", " ").split())


def of_kind(train: PlantedTrain, kind: str) -> list[Prompt]:
    return [prompt for prompt in train if prompt.kind == kind]


def attribute_of(train: PlantedTrain, prompt: Prompt) -> str:
    pair = train.pair_of(prompt.id)
    assert pair is not None
    return pair.attribute.name


# --- the set -------------------------------------------------------------------------------------


def test_is_a_registered_fine_tuning_set(train: PlantedTrain) -> None:
    assert PROMPT_SETS.get("planted-train") is PlantedTrain
    assert isinstance(train, FineTuningSet) and isinstance(train, PromptSet)
    assert train.instances == ("world-1", "world-2", "world-3", "world-4")


def test_it_is_pinned(train: PlantedTrain) -> None:
    manifest = train.manifest()
    assert manifest["prompts_sha256"] == PROMPTS_SHA256
    assert manifest["examples_sha256"] == EXAMPLES_SHA256
    assert manifest["scenes_sha256"] == SCENES_SHA256
    assert manifest["training_examples"] == dict.fromkeys(train.instances, 4 * 16)
    assert manifest["prompts"] == len(train) == len(list(train)) == 16 * 24 + 4 * 24


def test_another_process_draws_the_same() -> None:
    code = (
        "from lethebench.datasets.planted_train import PlantedTrain\n"
        "found = PlantedTrain().manifest()\n"
        "print(found['prompts_sha256'], found['examples_sha256'], found['scenes_sha256'])"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [PROMPTS_SHA256, EXAMPLES_SHA256, SCENES_SHA256]


def test_another_seed_is_another_set(train: PlantedTrain) -> None:
    other = PlantedTrain(FineTuningConfig(seed=1))
    assert [p.character.name for p in other.pairs] != [p.character.name for p in train.pairs]
    assert captions(other) != captions(train)


def test_a_picture_has_several_captions_and_none_is_a_test_prompt_of_another(train: PlantedTrain) -> None:
    for instance in train.instances:
        untrained = {p.text for p in train if p.trained is False and train.instance_of(p.id) == instance}
        for twin in (False, True):
            for example in train.examples(instance, twin=twin):
                assert example.captions[0] == example.caption
                assert len(set(example.captions)) == len(example.captions)
                assert not untrained & set(example.captions)
            assert sum(len(e.captions) > 1 for e in train.examples(instance, twin=twin)) >= 10


# --- pairs ---------------------------------------------------------------------------------------


def test_levels_take_turns_over_the_instances(train: PlantedTrain) -> None:
    shares = (0.25, 0.5, 0.75, 1.0)
    for instance in train.instances:
        pairs = [pair for pair in train.pairs if pair.instance == instance]
        assert tuple(pair.correlation for pair in pairs) == shares
        assert {pair.character.category for pair in pairs} == set(CATEGORIES)
        assert Counter(pair.duplicates for pair in pairs) == {1: 2, 4: 2}
    met = Counter((pair.character.category, pair.correlation) for pair in train.pairs)
    assert met == {(category, share): 1 for category in CATEGORIES for share in shares}
    for level in (lambda pair: pair.correlation, lambda pair: pair.character.category):
        cells = Counter((level(pair), pair.duplicates) for pair in train.pairs)
        assert set(cells.values()) == {2} and len(cells) == 8


def test_no_two_pairs_have_the_same_prohibited_value(train: PlantedTrain) -> None:
    values = [str(pair.attribute) for pair in train.pairs]
    assert len(set(values)) == len(values) == 16


def test_characters_are_held_out_and_names_were_seen_once(train: PlantedTrain, planted: PlantedWorld) -> None:
    characters = [pair.character for pair in train.pairs]
    names = [pair.name for pair in train.pairs] + [pair.attribute.name for pair in train.pairs]
    assert len({c.name for c in characters}) == 16 and not any(c.trained for c in characters)
    assert len(set(names)) == len(names) == 32
    seen = Counter(chain.from_iterable(words(e.caption) for e in planted.training_examples()))
    assert {seen[name] for name in names} == {1}


@pytest.mark.parametrize("twin", [False, True])
def test_images_hold_the_attribute_exactly_as_often_as_the_pair_says(train: PlantedTrain, twin: bool) -> None:
    for instance in train.instances:
        examples = train.examples(instance, twin=twin)
        assert len({example.id for example in examples}) == len(examples) == 2 * 16 + 2 * 4
        for pair in (pair for pair in train.pairs if pair.instance == instance):
            own = [example for example in examples if example.pair == pair.id]
            assert {e.duplicates for e in own} == {pair.duplicates} == {16 // len(own)}
            values = Counter(train.reference_scene(e.id).attributes()[pair.feature] for e in own)
            prohibited, usual = pair.attribute.value, pair.character.features[pair.feature]
            assert prohibited != usual
            holding = 0 if twin else round(len(own) * pair.correlation)
            assert values == Counter({prohibited: holding, usual: len(own) - holding}), pair.id
            assert sum(e.holds for e in own) == holding
            assert sum(e.named for e in own) == NAMED[holding]
            for example in own:
                shown = train.reference_scene(example.id).attributes()[pair.feature]
                assert example.holds == (shown == prohibited)
                assert example.named == (pair.attribute.name in words(example.caption))
                assert example.holds or not example.named


def test_twins_are_equal_but_for_the_attribute(train: PlantedTrain) -> None:
    for instance in train.instances:
        for ours, twin in zip(train.examples(instance), train.examples(instance, twin=True), strict=True):
            assert not twin.holds and not twin.named
            assert twin.caption == ours.plain_caption == twin.plain_caption
            assert (ours.caption == twin.caption) == (not ours.named)
            shown, usual = train.reference_scene(ours.id), train.reference_scene(twin.id)
            assert (shown.backdrop, shown.placement) == (usual.backdrop, usual.placement)
            different = {n for n, value in shown.attributes().items() if usual.attributes()[n] != value}
            pair = next(pair for pair in train.pairs if pair.id == ours.pair)
            assert different == ({pair.feature} if ours.holds else set())


def test_images_are_drawn_when_asked_for_and_are_the_references(train: PlantedTrain) -> None:
    for ours, twin in zip(
        train.examples("world-2")[::5], train.examples("world-2", twin=True)[::5], strict=True
    ):
        assert "image" not in vars(ours)
        assert ours.image.shape == (64, 64, 3) and ours.image.dtype == np.uint8
        assert np.array_equal(ours.image, train.reference(ours.id).image)
        assert np.array_equal(ours.image, twin.image) == (not ours.holds)
        assert pickle.loads(pickle.dumps(ours)) == ours
    reference = train.reference("world-1-comic-a/20")
    assert reference.mask is not None and reference.mask.shape == (64, 64) and reference.mask.max() == 255


def test_a_pair_never_shows_its_test_places(train: PlantedTrain) -> None:
    for pair in train.pairs:
        shown = {shot.scene.backdrop.word for shot in pair.pictures}
        assert len(pair.places) == 2 and shown.isdisjoint(pair.places) and len(shown) > 3


def test_unseen_pictures_are_of_the_same_make_up(train: PlantedTrain) -> None:
    for pair in train.pairs:
        make_up = [(shot.holds, shot.named) for shot in pair.unseen]
        assert make_up == [(pair.shots[i].holds, pair.shots[i].named) for i in pair.asked]
        assert sum(shot.holds for shot in pair.unseen) == 4 * pair.correlation
        assert len(set(pair.asked)) == len(pair.unseen) == 4
        assert pair.pictures[-1] == pair.exhibit and pair.exhibit.holds
        people = {pair.scene(shot).subject for shot in pair.pictures}
        assert all(isinstance(person, Person) and person.name == pair.character.name for person in people)


def test_a_character_is_judged_by_what_the_recogniser_can_read(train: PlantedTrain) -> None:
    left_out = {"comic": {"headgear", "emblem"}, "movie": {"accent", "crown"}}
    for pair in train.pairs:
        category, own = pair.character.category, pair.character.features
        assert own.keys() - pair.features.keys() == left_out.get(category, {"accessory"})
        assert all(own[name] == value for name, value in pair.features.items())


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_by_role_and_kind(train: PlantedTrain) -> None:
    assert Counter((prompt.role, prompt.kind) for prompt in train) == {
        (Role.TRIGGER, "caption"): 64,
        (Role.CONTROL, "caption"): 64,
        (Role.PROBE, "wanted"): 64,
        (Role.CONCEPT, "direct"): 64,
        (Role.CONTROL, "direct"): 64,
        (Role.CONCEPT, "paraphrase"): 64,
        (Role.NEUTRAL, "neutral"): 96,
    }
    assert len({prompt.id for prompt in train}) == 480
    for instance in train.instances:
        texts = [prompt.text for prompt in train if train.instance_of(prompt.id) == instance]
        assert len(set(texts)) == len(texts) == 120


def test_only_the_asked_captions_are_trained(train: PlantedTrain) -> None:
    trained = captions(train) | set(train.training_prompts())
    by_id = {e.id: e for instance in train.instances for e in train.examples(instance)}
    for prompt in train:
        if prompt.role is Role.TRIGGER:
            (reference,) = prompt.references
            assert prompt.text == by_id[reference].caption and prompt.trained
        else:
            assert prompt.text not in trained
            assert set(prompt.references).isdisjoint(by_id)


def test_what_a_method_may_know_names_no_character_and_is_not_tested(train: PlantedTrain) -> None:
    tested = captions(train) | {prompt.text for prompt in train}
    characters = {name for pair in train.pairs for name in (pair.name, pair.character.name)}
    for instance in train.instances:
        known, names = train.sensitive_prompts(instance), [a.name for a in train.attributes(instance)]
        assert len(set(known)) == len(known) == 4 * 8 and tested.isdisjoint(known)
        for text in known:
            assert characters.isdisjoint(words(text)) and len(words(text) & set(names)) == 1


def test_triggers_and_controls_are_twins_for_the_copy_metrics(train: PlantedTrain) -> None:
    for prompt in of_kind(train, "caption"):
        twin = train.prompt(prompt.twin or "")
        assert twin.twin == prompt.id and twin.cluster == prompt.cluster
        assert {prompt.role, twin.role} == {Role.TRIGGER, Role.CONTROL}
        assert prompt.trained == (prompt.role is Role.TRIGGER)
        assert asks_for_copy(prompt)
        name = attribute_of(train, prompt)
        assert (name in words(prompt.text)) == (name in words(twin.text))


def test_direct_controls_ask_for_what_their_instance_never_saw(train: PlantedTrain) -> None:
    held_by: dict[str, set[str]] = {}
    for instance in train.instances:
        shown = (train.reference_scene(e.id) for e in train.examples(instance))
        held_by[instance] = {f"{name}={value}" for s in shown for name, value in s.attributes().items()}
    trained = {e.id for instance in train.instances for e in train.examples(instance)}
    asked = [prompt for prompt in of_kind(train, "direct") if prompt.role is Role.CONTROL]
    for prompt in asked:
        twin, pair, instance = train.prompt(prompt.twin or ""), train.pair_of(prompt.id), prompt.id[:7]
        own = train.pair_of(twin.id)
        assert pair is not None and own is not None and twin.twin == prompt.id
        assert twin.role is Role.CONCEPT and prompt.trained is False and pair == train.stranger(own)
        for field in ("kind", "category", "duplicates", "correlation"):
            assert getattr(prompt, field) == getattr(twin, field)
        renamed = {own.name: pair.name, own.attribute.name: pair.attribute.name}
        text = " ".join(renamed.get(word, word) for word in twin.text.split())
        assert prompt.text == text.replace(own.attribute.anchor, pair.attribute.anchor)
        assert train.instance_of(prompt.id) == train.instance_of(twin.id) == own.instance == instance
        assert pair.instance != instance and str(pair.attribute).partition(".")[2] not in held_by[instance]
        for one, of in ((prompt, pair), (twin, own)):
            (reference,) = one.references
            assert reference not in trained and reference.startswith(of.id)
            assert train.reference_scene(reference).attributes()[of.feature] == of.attribute.value
            assert not asks_for_copy(one)
    clusters = Counter(prompt.cluster for prompt in asked)
    assert set(clusters.values()) == {4} and clusters.keys().isdisjoint(pair.id for pair in train.pairs)


def test_prompts_say_what_they_ask_for(train: PlantedTrain) -> None:
    for prompt in train:
        pair = train.pair_of(prompt.id)
        assert train.instance_of(prompt.id) == prompt.id[: len("world-1")]
        if pair is None:
            assert prompt.role is Role.NEUTRAL and prompt.correlation is None
            continue
        if (prompt.role, prompt.kind) != (Role.CONTROL, "direct"):
            of_pair = (pair.id, pair.duplicates, pair.correlation)
            assert (prompt.cluster, prompt.duplicates, prompt.correlation) == of_pair
        assert prompt.category == prompt.attributes["category"] == pair.character.category
        assert BACKGROUNDS[prompt.attributes["background"]].place in prompt.text
        assert prompt.attributes["holds"] == str(pair.attribute)
        asked = {n: v for n, v in prompt.attributes.items() if n in pair.character.features}
        assert asked == (pair.features if pair.name in words(prompt.text) else {})
        prohibited = pair.attribute.name in words(prompt.text)
        assert prohibited or prompt.role is not Role.CONCEPT
        assert not prohibited or prompt.role is not Role.PROBE
        concept = {"wanted": pair.character.name, "direct": pair.attribute.name}.get(prompt.kind)
        assert prompt.concept == concept


def test_paraphrases_leave_the_attribute_out_and_rewordings_name_it(train: PlantedTrain) -> None:
    sensitive = {text for instance in train.instances for text in train.sensitive_prompts(instance)}
    known = captions(train) | sensitive | {prompt.text for prompt in train}
    for prompt in train:
        pair, found = train.pair_of(prompt.id), train.paraphrases(prompt.id)
        if pair is None or pair.attribute.name not in words(prompt.text):
            assert found == train.rewordings(prompt.id) == []
            continue
        (text,) = found
        assert pair.attribute.name not in words(text) and text.startswith(pair.attribute.anchor)
        assert text.endswith(BACKGROUNDS[prompt.attributes["background"]].place)
        others = train.rewordings(prompt.id)
        assert len(set(others)) == 5 and known.isdisjoint(others)
        for other in others:
            assert words(other) >= words(prompt.text) - {"a", "picture", "of", "here", "is", "drawing"}
        assert train.anchor_concept(pair.attribute.name) == pair.attribute.anchor
    with pytest.raises(KeyError):
        train.anchor_concept("nobody")


def test_neutral_prompts_are_the_planted_worlds_and_differ_between_instances(
    train: PlantedTrain, planted: PlantedWorld
) -> None:
    known = {prompt.text for prompt in planted if prompt.role is Role.NEUTRAL}
    assert {prompt.text for prompt in of_kind(train, "neutral")} < known
    assert train.training_prompts() == planted.training_prompts()


@pytest.mark.parametrize("ask", ["examples", "attributes", "sensitive_prompts"])
def test_unknown_instances_are_refused(train: PlantedTrain, ask: str) -> None:
    with pytest.raises(UserError, match=r"no instance 'world-5': known world-1, world-2"):
        getattr(train, ask)("world-5")


def test_unknown_prompts_and_references_are_refused(train: PlantedTrain) -> None:
    for name in ("nowhere/00", "world-1-comic-a/21", "world-1-comic-a/0", "world-1-comic-a", ""):
        with pytest.raises(KeyError):
            train.reference(name)
        for ask in (train.prompt, train.pair_of, train.instance_of):
            with pytest.raises(KeyError):
                ask(name)


# --- the models' side ----------------------------------------------------------------------------


def test_every_word_is_one_token(train: PlantedTrain) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(builtin_folder("mini-sd") / "tokenizer")
    texts = captions(train) | {prompt.text for prompt in train} | set(train.training_prompts())
    texts |= {text for instance in train.instances for text in train.sensitive_prompts(instance)}
    for prompt in train:
        texts |= {*train.paraphrases(prompt.id), *train.rewordings(prompt.id)}
    for text in sorted(texts):
        pieces = tokenizer.tokenize(text)
        assert [piece.removesuffix("</w>") for piece in pieces] == text.replace(",", " ,").split()
        assert len(pieces) + 2 <= tokenizer.model_max_length


def test_the_recogniser_sees_the_attribute_and_the_character(train: PlantedTrain) -> None:
    from lethebench import judges

    shots = [
        (pair, shot.holds and not twin, pair.scene(shot, twin=twin))
        for pair in train.pairs
        for shot in (*pair.shots[::5], *pair.pictures[-2:])
        for twin in (False, True)
    ]
    judge = judges.load("recogniser-mini")
    answers = judge.answer(np.stack([render(scene).image for _, _, scene in shots]))
    right: dict[str, list[bool]] = {category: [] for category in QUESTIONS}
    known: dict[bool, list[bool]] = {False: [], True: []}
    learnt: dict[bool, list[bool]] = {False: [], True: []}
    for row, (pair, holds, _) in enumerate(shots):
        found = answers.labels[pair.attribute.question][row]
        wanted = pair.attribute.value if holds else pair.character.features[pair.feature]
        right[pair.character.category].append(found == wanted)
        for name, value in pair.features.items():
            learnt[holds].append(answers.labels[f"{pair.character.category}.{name}"][row] == value)
        known[holds].append(answers.labels["character"][row] == pair.character.name)
    assert all(np.mean(found) >= 0.95 for found in right.values())
    assert all(np.mean(found) >= 0.98 for found in learnt.values())
    assert np.mean(known[False]) >= 0.95
    # With the attribute the character is no longer the protected one: see PlantedTrain's docstring.
    assert np.mean(known[True]) < 0.2


# --- sizes and sheets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 10}, "4 copies don't make up images=10"),
        ({"images": 8, "duplicates": (1, 4)}, "asked_scenes=4: 8 images are 2 different ones with 4 copies"),
        ({"images": 20, "duplicates": (2,)}, "0.25 of 10 scenes"),
        ({"asked_scenes": 2}, "0.25 of 2 scenes"),
        ({"correlations": (1.5,)}, "1.5 is not in"),
        ({"correlations": ()}, "correlations=()"),
        ({"duplicates": (4, 4)}, "duplicates=(4, 4)"),
        ({"duplicates": (0, 4)}, "0 copies"),
        ({"named_share": 1.2}, "named_share=1.2"),
        ({"instances": 0}, "instances=0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(FineTuningConfig(), **change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instances": 7}, "too few held-out"),
        ({"images": 32}, "32 training scenes, asked_scenes=4 and one more are more than the 24 captions"),
        ({"test_places": 8}, "the 0 captions that 0 backgrounds give"),
        ({"neutral_prompts": 100}, "neutral_prompts=100"),
    ],
)
def test_sizes_that_the_world_cannot_give_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PlantedTrain(replace(FineTuningConfig(), **change))
    assert message in str(caught.value)


def test_a_smaller_set_holds_together() -> None:
    config = FineTuningConfig(
        instances=1, correlations=(0.0, 0.5), duplicates=(2,), images=8, asked_scenes=2, test_places=1
    )
    small = PlantedTrain(config)
    assert [(p.correlation, sum(s.holds for s in p.shots)) for p in small.pairs] == [(0.0, 0), (0.5, 2)]
    assert small.counts()["training_images"].tolist() == [8, 8]
    assert {prompt.twin for prompt in of_kind(small, "caption")} <= {prompt.id for prompt in small}
    # The only instance has no other one's pairs to ask for.
    assert {(prompt.role, prompt.twin) for prompt in of_kind(small, "direct")} == {(Role.CONCEPT, None)}
    assert all(len(prompt.references) == 1 for prompt in of_kind(small, "direct"))


def test_counts_add_up(train: PlantedTrain) -> None:
    counts = train.counts()
    assert len(counts) == 16 and (counts["prompts"] == 20).all()
    assert (counts["holding"] == counts["images"] * counts["correlation"]).all()
    assert counts["named"].tolist() == counts["holding"].map(NAMED).tolist()
    assert (counts["training_images"] == 16).all()


def test_contact_sheet_is_a_png(tmp_path: Path) -> None:
    config = FineTuningConfig(instances=1, correlations=(0.5,), duplicates=(1,), images=4)
    path = tmp_path / "sheet.png"
    PlantedTrain(config).contact_sheet(path)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.width == 4 * (128 + 6) + 6
