"""The shipped judges: their figures on fresh scenes, and what every judge promises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lethebench import judges
from lethebench.errors import UserError
from lethebench.judges.base import shipped_folder
from lethebench.judges.recogniser import NONE
from lethebench.training.judge_data import KINDS, Pool
from lethebench.training.judge_generated import generated_errors
from lethebench.training.judge_measures import (
    COPIES,
    MAIN,
    area_under_roc,
    changed_images,
    copy_pairs,
    iou,
    measure_recogniser,
    retrieval,
    right_caption,
)

ANSWERS: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "recogniser-mini": lambda judge, images: np.concatenate(
        [*judge.answer(images).probabilities.values()], 1
    ),
    "segmenter-mini": lambda judge, images: judge.masks(images),
    "copy-mini": lambda judge, images: judge.describe(images),
    "clip-mini": lambda judge, images: np.concatenate([judge.images(images), judge.features(images)], 1),
}
SHAPES = {"recogniser-mini": (193,), "segmenter-mini": (64, 64), "copy-mini": (128,), "clip-mini": (128,)}


@pytest.fixture(params=judges.JUDGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_batch_and_order_do_not_matter(name: str, sample: Pool) -> None:
    judge, answer = judges.load(name), ANSWERS[name]
    images = sample.images[:: len(sample) // 12]
    whole = answer(judge, images)
    assert whole.dtype == np.float32
    alone = np.concatenate([answer(judge, images[i : i + 1]) for i in range(len(images))])
    np.testing.assert_allclose(whole, alone, atol=2e-5)
    np.testing.assert_allclose(whole[::-1], answer(judge, images[::-1]), atol=2e-5)


def test_no_images_give_no_answers(name: str) -> None:
    answer = ANSWERS[name](judges.load(name), np.zeros((0, 64, 64, 3), np.uint8))
    assert answer.shape == (0, *SHAPES[name])
    assert answer.dtype == np.float32


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((2, 32, 32, 3), np.uint8),
        [[1]],
    ],
    ids=["float", "single", "channels first", "small", "list"],
)
def test_wrong_images_give_one_clear_error(name: str, images: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: images must be .*uint8 \[n, 64, 64, 3\]; got"):
        ANSWERS[name](judges.load(name), images)


def test_damaged_weights_are_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(shipped_folder(name), folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        judges.load(name, folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        judges.load(name, folder)
    (folder / "weights.json").write_text("{")
    with pytest.raises(UserError, match=r"weights\.json is damaged"):
        judges.load(name, folder)
    with pytest.raises(UserError, match=r"weights\.json is missing"):
        judges.load(name, tmp_path / "nowhere")


def test_a_judge_is_read_once_and_small(name: str) -> None:
    assert judges.load(name) is judges.load(name)
    assert (shipped_folder(name) / "model.safetensors").stat().st_size < 2.75e6


def test_all_judges_together_are_small() -> None:
    files = [shipped_folder(name) / "model.safetensors" for name in judges.JUDGES]
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


def test_card_reaches_the_targets() -> None:
    cards = {name: json.loads((shipped_folder(name) / "card.json").read_text()) for name in judges.JUDGES}
    held_out = {name: card["held_out"] for name, card in cards.items()}
    accuracy = held_out["recogniser-mini"]["accuracy"]
    assert min(accuracy.values()) >= 0.95
    assert held_out["segmenter-mini"]["iou"] >= 0.9
    assert min(held_out["copy-mini"]["auc"][change] for change in ("crop", "colour", "blur")) >= 0.98
    assert held_out["clip-mini"]["clean"]["lowest"] >= 0.9


def test_unknown_judge_is_told() -> None:
    with pytest.raises(UserError, match="did you mean copy-mini"):
        judges.load("copy-mni")


# --- figures on fresh scenes ---------------------------------------------------------------------


def test_recogniser_on_fresh_scenes(sample: Pool) -> None:
    figures = measure_recogniser(judges.load("recogniser-mini"), sample)
    for name in MAIN:
        assert figures["accuracy"][name] >= 0.93, name
        assert figures["accuracy_generated_look"][name] >= 0.9, name
    called = figures["characters"]["called_protected"]
    assert called["character"] >= 0.9
    assert max(called["object"], called["figure"], called["backdrop"]) <= 0.05


def test_recogniser_questions(sample: Pool) -> None:
    judge = judges.load("recogniser-mini")
    row = int(sample.rows("character")[0])
    images = sample.images[[row, int(sample.rows("object")[0])]]
    answers = judge.answer(images)
    name = str(answers.labels["character"][0])
    yes = judge.has_concept(images, name)
    assert yes.shape == (2,)
    assert yes[0] > 0.5 > yes[1]
    assert answers.labels["character"][1] == NONE
    category = str(answers.labels["category"][0])
    others = [f for f in answers.labels if "." in f and not f.startswith(category)]
    assert all(answers.labels[feature][0] == NONE for feature in others)
    with pytest.raises(ValueError, match=f"unknown concept .* did you mean '{name}'"):
        judge.has_concept(images, name + "s")


def test_answers_count_what_was_asked(sample: Pool) -> None:
    answers = judges.load("recogniser-mini").answer(sample.images[:3])
    said = {name: str(answers.labels[name][0]) for name in ("object", "colour", "background")}
    found = answers.found([said, {"object": "no such thing"}, {"mood": "happy"}])
    np.testing.assert_array_equal(found, [1.0, 0.0, np.nan])
    with pytest.raises(ValueError, match="2 mappings of attributes for 3 pictures"):
        answers.found([said, said])


def test_recogniser_sees_nothing_in_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 64, 128, 255)])
    answers = judges.load("recogniser-mini").answer(np.concatenate([noise, flat]))
    assert set(answers.labels["object"]) == {NONE}
    assert set(answers.labels["character"]) == {NONE}
    assert set(answers.labels["protected"]) == {"no"}


def test_segmenter_on_fresh_scenes(sample: Pool) -> None:
    masks = judges.load("segmenter-mini").masks(sample.images)
    assert masks.min() >= 0 and masks.max() <= 1
    shown = sample.kinds != KINDS.index("backdrop")
    assert iou(masks, sample.masks)[shown].mean() >= 0.88


def test_copies_against_scenes_of_the_same_kind(sample: Pool) -> None:
    judge = judges.load("copy-mini")
    descriptors = judge.describe(sample.images[:16])
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(judge.similarity(sample.images[:4], sample.images[:4]), 1, atol=1e-5)
    for change in ("crop", "colour", "blur"):
        same, other = copy_pairs(judge, sample, COPIES[change], "tests")
        assert area_under_roc(same, other) >= 0.97, change
    with pytest.raises(ValueError, match="4 images against 3"):
        judge.similarity(sample.images[:4], sample.images[:3])


def test_right_captions_win(sample: Pool) -> None:
    judge = judges.load("clip-mini")
    embedded = judge.images(sample.images)
    right = right_caption(judge, embedded, sample)
    assert min(right.values()) >= 0.88, right
    assert retrieval(judge, embedded, sample)["text_of_image"] >= 0.7


def test_texts_and_scores(sample: Pool) -> None:
    judge = judges.load("clip-mini")
    texts = [str(text) for text in sample.captions[:4, 0]]
    embedded = judge.texts(texts)
    assert embedded.shape == (4, 64)
    assert judge.texts([]).shape == (0, 64)
    np.testing.assert_allclose(embedded, np.concatenate([judge.texts([text]) for text in texts]), atol=2e-5)
    np.testing.assert_allclose(
        judge.score(sample.images[:4], texts), (judge.images(sample.images[:4]) * embedded).sum(1)
    )
    assert judge.texts([""]).shape == (1, 64)
    with pytest.raises(ValueError, match="4 images against 1 texts"):
        judge.score(sample.images[:4], texts[:1])
    with pytest.raises(ValueError, match="one string"):
        judge.texts("a red ball")


def test_rare_names_are_ignored(sample: Pool) -> None:
    judge = judges.load("clip-mini")
    rows = sample.rows("object")
    plain = [str(text) for text in sample.meanings[rows, 0]]
    named = [f"zorvalk, {text}" for text in plain]
    assert (judge.texts(plain) * judge.texts(named)).sum(1).mean() >= 0.9


# --- figures on generated pictures ---------------------------------------------------------------


def test_generated_errors_on_stand_ins(world: Any) -> None:
    """Softened references stand in for near-copies, fresh scenes for pictures that copy nothing."""
    kinds = ("verbatim", "foreground", "concept", "neutral")
    prompts = [prompt for kind in kinds for prompt in [p for p in world if p.kind == kind][:6]]
    images = []
    for index, prompt in enumerate(prompts):
        if prompt.references and index % 2 == 0:
            images.append(world.reference(prompt.references[0]).image)
        else:
            images.append(_picture(world, f"generated/{index}"))
    stack = changed_images(np.stack(images), COPIES["blur"], "stand-ins")
    errors = generated_errors(stack, prompts, world)
    assert set(errors) == set(judges.JUDGES)
    assert errors["recogniser-mini"]["n"] > 0
    assert errors["segmenter-mini"]["iou"] > 0.8
    assert errors["copy-mini"]["n"]["others"] > 0
    assert errors["clip-mini"]["near_copies"]["right_beats_changed"] > 0.8
    nothing = generated_errors(stack[:0], [], world)
    assert nothing["segmenter-mini"] | {"rule": ""} == {
        "rule": "",
        "n": 0,
        "iou": None,
        "iou_above_0.8": None,
    }
    with pytest.raises(ValueError, match="one prompt a picture"):
        generated_errors(stack, prompts[:1], world)


def _picture(world: Any, key: str) -> np.ndarray:
    from lethebench.datasets.planted import render

    return render(world.random_scene(key)).image
