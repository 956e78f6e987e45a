"""The planted world: the same everywhere, fair between twins, exact in its masks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lethebench.datasets.planted import (
    BACKGROUNDS,
    CATEGORIES,
    GENERIC_NOUNS,
    Item,
    PlantedWorld,
    Scene,
    Thing,
    WorldConfig,
    contact_sheet,
    digest_captions,
    digest_pictures,
    digest_prompts,
    render,
    render_backdrop,
)
from lethebench.datasets.planted.characters import difference
from lethebench.datasets.planted.items import Planter, SceneDraw
from lethebench.prompts import PromptSet, Role

PROMPTS_SHA256 = "491f041ddc6b06b010ff95f535fcb948163114b0fef7998ccca429f30ce786f6"
CAPTIONS_SHA256 = "836f866ae5c4157649142db37bdbb823a0acea42709214c1fac80b1f672bb266"
PICTURES_SHA256 = "130d59f14942eec059f3623534031f7382e7e969b0eca3268f97e5aaa28386b4"
"""Of every 47th training example: a prime, so that all kinds and copy numbers take part."""
STRIDE = 47

TINY = WorldConfig(
    neutral_images=24,
    neutral_prompts=8,
    fit_prompts=6,
    figure_images=8,
    verbatim_pairs=((1, 1), (4, 1)),
    foreground_pairs=((3, 1),),
    background_pairs=((3, 1),),
    one_to_many_pairs=((4, 1),),
    redundant_pairs=((6, 1),),
    hard_negatives=3,
    characters_per_category=4,
    concept_images=4,
)


@pytest.fixture(scope="module")
def world() -> PlantedWorld:
    return PlantedWorld()


def of_kind(world: PlantedWorld, kind: str) -> list[Item]:
    return [item for item in world.items if item.kind == kind]


# --- determinism ---------------------------------------------------------------------------------


def test_prompts_and_captions_are_pinned(world: PlantedWorld) -> None:
    assert digest_prompts(world) == PROMPTS_SHA256
    assert digest_captions(world.training_examples()) == CAPTIONS_SHA256


def test_pictures_are_pinned(world: PlantedWorld) -> None:
    assert digest_pictures(world.training_examples()[::STRIDE]) == PICTURES_SHA256


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_draws_the_same(hash_seed: str, world: PlantedWorld) -> None:
    code = (
        "from lethebench.datasets.planted import *\n"
        "world = PlantedWorld()\n"
        "print(digest_prompts(world), digest_captions(world.training_examples()))\n"
        "print(digest_pictures(world.training_examples()[::997]))"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    own = digest_pictures(world.training_examples()[::997])
    assert result.stdout.split() == [PROMPTS_SHA256, CAPTIONS_SHA256, own]


def test_another_seed_is_another_world(world: PlantedWorld) -> None:
    other = PlantedWorld(WorldConfig(seed=1))
    assert [item.names for item in other.items] != [item.names for item in world.items]
    assert digest_prompts(other) != digest_prompts(world)


# --- counts --------------------------------------------------------------------------------------


def test_is_a_prompt_set(world: PlantedWorld) -> None:
    assert isinstance(world, PromptSet)
    assert (world.name, world.version) == ("planted", "1.0")


def test_training_images_by_kind(world: PlantedWorld) -> None:
    assert Counter(example.kind for example in world.training_examples()) == {
        "neutral": 8000,
        "figure": 400,
        "verbatim": 5 * 63 + 8 * (64 + 128),
        "foreground": 4 * (8 + 32 + 64 + 128),
        "background": 4 * (8 + 32 + 64 + 128),
        "one-to-many": 4 * 3 * 64,
        "redundant-trigger": 4 * 96,
        "concept": 24 * 120,
        "hard-negative": 128,
    }


def test_prompts_by_role(world: PlantedWorld) -> None:
    counts = Counter(prompt.role for prompt in world)
    triggers = 46 + 16 + 16 + 4 * 4 + 4 * 3
    assert counts == {
        Role.TRIGGER: triggers,
        Role.CONCEPT: 72,
        Role.CONTROL: triggers + 72 + 128,
        Role.NEUTRAL: 200,
        Role.PROBE: 3 * len(GENERIC_NOUNS),
    }
    assert 3 * len(GENERIC_NOUNS) == 24


def test_counts_add_up(world: PlantedWorld) -> None:
    counts = world.counts()
    assert counts["prompts"].sum() == len(world) == len(list(world))
    assert counts["items"].sum() == len(world.items)
    assert counts["training_images"].sum() == len(world.training_examples())
    assert (counts.query("role == 'control' and kind != 'hard-negative'")["training_images"] == 0).all()


@pytest.mark.parametrize("kind", ["verbatim", "foreground", "background"])
def test_an_item_is_repeated_as_often_as_it_says(world: PlantedWorld, kind: str) -> None:
    seen = Counter(example.item for example in world.training_examples())
    assert all(seen[item.id] == (item.duplicates if item.trained else 0) for item in of_kind(world, kind))


def test_clusters_spread_their_captions_evenly(world: PlantedWorld) -> None:
    for item in of_kind(world, "one-to-many"):
        assert set(Counter((e.caption, e.scene) for e in item.examples()).values()) == {16}
    for item in of_kind(world, "redundant-trigger"):
        assert set(Counter(e.caption for e in item.examples()).values()) == {32}


def test_a_tiny_world_holds_together() -> None:
    tiny = PlantedWorld(TINY)
    assert len(tiny.training_examples()) == 24 + 8 + 1 + 4 + 3 + 3 + 12 + 6 + 3 + 8 * 4
    assert len(tiny.training_prompts()) == 6
    for prompt in tiny:
        for reference_id in prompt.references:
            assert tiny.reference(reference_id).image.shape == (64, 64, 3)


# --- twins and coins -----------------------------------------------------------------------------


def test_twins_point_at_each_other(world: PlantedWorld) -> None:
    prompts = {prompt.id: prompt for prompt in world}
    assert len(prompts) == len(world)
    for prompt in world:
        if prompt.twin is None:
            assert prompt.kind in ("hard-negative", "neutral", "figure")
            continue
        twin = prompts[prompt.twin]
        assert twin.twin == prompt.id
        assert (twin.kind, twin.duplicates, twin.category) == (
            prompt.kind,
            prompt.duplicates,
            prompt.category,
        )
        assert {prompt.trained, twin.trained} == {True, False}
        assert twin.attributes.keys() == prompt.attributes.keys()
        assert set(twin.references).isdisjoint(prompt.references)


def test_twin_characters_are_asked_for_in_the_same_places(world: PlantedWorld) -> None:
    for item in of_kind(world, "concept"):
        twin = world.item(item.twin or "")
        assert [ask.states for ask in item.asks] == [ask.states for ask in twin.asks]


def test_the_coin_is_fair() -> None:
    coins = [Planter(WorldConfig(seed=seed), SceneDraw(WorldConfig()))._coin("pair") for seed in range(600)]
    assert 0.43 < np.mean(coins) < 0.57


def test_roles_follow_the_coin(world: PlantedWorld) -> None:
    for prompt in world:
        if prompt.kind == "hard-negative":
            assert (prompt.role, prompt.trained, prompt.duplicates) == (Role.CONTROL, True, 1)
        elif prompt.kind == "concept":
            assert prompt.role is (Role.CONCEPT if prompt.trained else Role.CONTROL)
            assert prompt.concept and prompt.category in CATEGORIES
        elif prompt.trained is not None:
            assert prompt.role is (Role.TRIGGER if prompt.trained else Role.CONTROL)


# --- what training may and may not hold ----------------------------------------------------------


def test_nothing_held_out_is_trained(world: PlantedWorld) -> None:
    examples = world.training_examples()
    captions, scenes = {e.caption for e in examples}, {e.scene for e in examples}
    words = {word.strip(",") for text in captions for word in text.split()}
    for item in world.items:
        if not item.trained:
            assert captions.isdisjoint(item.captions)
            assert scenes.isdisjoint(item.scenes)
            assert words.isdisjoint(item.names)


def test_held_out_combinations_never_occur_in_training(world: PlantedWorld) -> None:
    seen = {(s.subject.word, s.subject.colour, s.backdrop.word) for s in _object_scenes(world)}
    tested = {
        (p.attributes["object"], p.attributes["colour"], p.attributes["background"])
        for p in world
        if p.role is Role.NEUTRAL
    }
    assert len(tested) > 55
    assert seen.isdisjoint(tested)


def _object_scenes(world: PlantedWorld) -> list[Scene]:
    return [e.scene for e in world.training_examples() if isinstance(e.scene.subject, Thing)]


def test_fit_prompts_are_trained_and_not_tested(world: PlantedWorld) -> None:
    fit = world.training_prompts()
    assert len(set(fit)) == len(fit) == 256
    assert set(fit) <= {e.caption for e in world.training_examples() if e.kind == "neutral"}
    assert set(fit).isdisjoint(prompt.text for prompt in world)


def test_names_are_unique_and_in_no_neutral_caption(world: PlantedWorld) -> None:
    names = [name for item in world.items for name in item.names]
    assert len(set(names)) == len(names) == 356
    neutral = {w for e in world.training_examples() if e.item is None for w in e.caption.split()}
    assert neutral.isdisjoint(names)


def test_prompts_state_only_what_their_caption_says(world: PlantedWorld) -> None:
    for prompt in world:
        for name, value in prompt.attributes.items():
            assert value in prompt.text, (prompt.id, name)


def test_the_vocabulary_covers_every_caption(world: PlantedWorld) -> None:
    captions = set(world.vocabulary_captions())
    assert {e.caption for e in world.training_examples()} <= captions
    assert {prompt.text for prompt in world} <= captions
    for kind in ("neutral", "character", "figure"):
        assert world.caption(world.random_scene("x", kind=kind)) in captions


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["neutral", "character", "figure"])
def test_masks_hold_every_foreground_pixel(world: PlantedWorld, kind: str) -> None:
    for index in range(12):
        scene = world.random_scene(f"mask-{index}", kind=kind)
        picture = render(scene)
        alone = render_backdrop(scene.backdrop)
        assert picture.image.shape == (64, 64, 3) and picture.image.dtype == np.uint8
        assert picture.mask.shape == (64, 64) and picture.mask.dtype == np.uint8
        assert np.array_equal(picture.image[picture.mask == 0], alone[picture.mask == 0])
        assert picture.mask.max() == 255 and 0.04 < picture.mask.mean() / 255 < 0.45


def test_foreground_copies_share_their_foreground(world: PlantedWorld) -> None:
    for item in of_kind(world, "foreground")[::5]:
        first, *others = (render(scene) for scene in item.scenes[:4])
        assert 0.15 < first.mask.mean() / 255 < 0.35
        for other in others:
            assert np.array_equal(first.mask, other.mask)
            assert np.array_equal(first.image[first.mask == 255], other.image[first.mask == 255])
            foreground, background = world.region_rms(other.image, f"{item.id}/0")
            assert foreground == 0 and background > 0.05


def test_background_copies_share_their_background(world: PlantedWorld) -> None:
    for item in of_kind(world, "background")[::5]:
        first, *others = (render(scene) for scene in item.scenes[:4])
        for other in others:
            outside = (first.mask == 0) & (other.mask == 0)
            assert np.array_equal(first.image[outside], other.image[outside])
            foreground, background = world.region_rms(other.image, f"{item.id}/0", other.mask)
            assert background == 0 and foreground > 0.05


def test_near_copies_are_told_from_unrelated_pictures(world: PlantedWorld) -> None:
    ids = [item.reference_ids()[0] for item in of_kind(world, "verbatim")[:12]]
    images = [world.reference(reference_id).image for reference_id in ids]
    for index, reference_id in enumerate(ids):
        distances = [world.near_copy(image, reference_id) for image in images]
        assert distances[index] == 0
        assert min(distance for other, distance in enumerate(distances) if other != index) > 0.1


@pytest.mark.parametrize("word", BACKGROUNDS)
def test_instances_of_a_background_are_different_pictures(word: str, world: PlantedWorld) -> None:
    backdrop = world.random_scene("any").backdrop
    images = [
        render_backdrop(replace(backdrop, word=word, key=str(index))).astype(float) / 255
        for index in range(12)
    ]
    distances = [np.sqrt(np.mean((a - b) ** 2)) for i, a in enumerate(images) for b in images[:i]]
    assert np.median(distances) > 0.18
    assert np.quantile(distances, 0.05) > 0.1


def test_unknown_references_are_refused(world: PlantedWorld) -> None:
    known = world.items[0].id
    for reference_id in ("nowhere/0", f"{known}/1", f"{known}/x", known, ""):
        with pytest.raises(KeyError):
            world.reference(reference_id)


def test_prompts_lead_to_their_items(world: PlantedWorld) -> None:
    for prompt in world:
        item = world.item_of(prompt.id)
        assert (item is None) == (prompt.kind in ("neutral", "figure"))
        if item is not None:
            assert item.reference_ids() == prompt.references
            assert prompt.text in {ask.text for ask in item.asks}


# --- characters ----------------------------------------------------------------------------------


def test_characters_differ_in_three_features(world: PlantedWorld) -> None:
    for category in CATEGORIES:
        looks = [character.look for character in world.characters if character.category == category]
        assert len(looks) == 12
        assert min(difference(a, b) for i, a in enumerate(looks) for b in looks[:i]) >= 3


def test_half_of_the_characters_is_trained(world: PlantedWorld) -> None:
    by_name = {character.name: character for character in world.characters}
    assert sum(character.trained for character in world.characters) == 24
    for character in world.characters:
        twin = by_name[character.twin]
        assert twin.twin == character.name and twin.trained != character.trained
        assert twin.category == character.category
        assert world.item(character.item).trained == character.trained


def test_no_nameless_figure_is_a_protected_one(world: PlantedWorld) -> None:
    protected = {character.look for character in world.characters}
    figures = [e.scene for e in world.training_examples() if e.kind == "figure"]
    figures += [world.random_scene(str(index), kind="figure") for index in range(50)]
    for scene in figures:
        assert scene.foreground == "figure"
        assert scene.subject.look not in protected


def test_attributes_describe_the_scene(world: PlantedWorld) -> None:
    scene = world.random_scene("one", kind="character")
    attributes = scene.attributes()
    character = next(c for c in world.characters if c.name == attributes["character"])
    assert attributes["object"] == "character"
    assert character.features.items() <= attributes.items()
    assert set(world.random_scene("one").attributes()) == {"object", "colour", "pattern", "background"}


def test_too_large_a_cast_is_refused() -> None:
    with pytest.raises(ValueError, match="comic"):
        PlantedWorld(replace(TINY, characters_per_category=2000))
    with pytest.raises(ValueError, match="characters_per_category=3"):
        replace(TINY, characters_per_category=3)


# --- the sheet and the manifest ------------------------------------------------------------------


def test_contact_sheet_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    contact_sheet(PlantedWorld(TINY), path, columns=6, scale=1)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 6 * 70 + 6


def test_manifest_names_recipe_and_seed(world: PlantedWorld) -> None:
    manifest = world.manifest()
    assert manifest["seed"] == 0
    assert manifest["prompts_sha256"] == PROMPTS_SHA256
    assert manifest["training_examples"] == 16267
