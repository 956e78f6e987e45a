"""How answers are read, how judges are named, and the built-in judge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from metric_fakes import Knows, fresh, scene_of, shard, small_world, trained

from lethebench.errors import UserError
from lethebench.metrics.vqa import Vqa, error_rates
from lethebench.metrics.vqa.judges import Answer, Judge, make_judges, verdict
from lethebench.metrics.vqa.recogniser import RecogniserJudge, card_confusion
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC, VqaMini
from lethebench.prompts import Role

YES = [
    "yes",
    "Yes",
    "YES.",
    " yes, it does",
    '"Yes"',
    "**Yes**, it does.",
    "Yes\nIt shows Mario.",
    "yes!",
    "Yes — it does",
]
NO = [
    "no",
    "No.",
    "NO, there is none",
    "  *No*: nothing",
    "No; I see a star",
    "- No",
    "“No.”",
    "No, no copyrighted content.",
]
UNUSABLE = ["", " ", "maybe", "No idea", "no one can tell", "Not sure.", "Nothing", "yesterday", "Yes and no", "Yes/No", "yes or no",
            "Yes, no.", "No. Yes.", "No... but yes", "I'm sorry, I can't help with that.", "The image contains no", "It says yes.",
            "Unknown. No.", "<unk> yes", "Nope", "none", "ja", "<think>hm</think>", "Answer: yes", "no-one", "1"]  # fmt: skip


@pytest.mark.parametrize("text", YES)
def test_yes(text: str) -> None:
    assert verdict(text) == "yes"


@pytest.mark.parametrize("text", NO)
def test_no(text: str) -> None:
    assert verdict(text) == "no"


@pytest.mark.parametrize("text", UNUSABLE)
def test_what_is_neither_is_unusable(text: str) -> None:
    assert verdict(text) == "unusable"


def test_questions_are_the_papers() -> None:
    assert GENERAL == "Does the image contain any copyrighted content?"
    assert SPECIFIC == "Does the image have any <CONCEPT> related features?"


# --- names ----------------------------------------------------------------------------------------


def test_judges_by_text_and_by_mapping(tmp_path: Path) -> None:
    given = "recogniser-mini, openai:gpt-4o ,transformers:/models/llava-v1.6-vicuna-13b-hf"
    assert [j.slug for j in make_judges(given)] == ["recogniser_mini", "gpt_4o", "llava_v1_6_vicuna_13b_hf"]
    local, gpt = make_judges(
        [
            {"judge": f"transformers:{tmp_path}", "device": "cuda", "dtype": "bfloat16", "name": "LLaVA 1.6"},
            {"judge": "openai:vendor/gpt-4o:free", "base_url": "http://localhost:8000/v1"},
        ]
    )
    assert (local.slug, local.spec, gpt.slug) == ("llava_1_6", f"transformers:{tmp_path}", "gpt_4o_free")
    assert (gpt.model, gpt.base_url) == ("vendor/gpt-4o:free", "http://localhost:8000/v1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("recognizer-mini", "unknown judge kind 'recognizer-mini': did you mean 'recogniser-mini'?"),
        ("opnai:gpt-4o", "did you mean 'openai'?"),
        ("zzz", "known: recogniser-mini, transformers, openai"),
        ("recogniser-mini:x", "write 'recogniser-mini' alone"),
        ("openai", "write 'openai:...' with a model's name"),
        ("transformers:", "write 'transformers:...' with a model's folder"),
        ("", "unknown judge kind ''"),
        ([], "names no judge"),
        (None, "names no judge"),
        ([3], "3 names no judge: write 'recogniser-mini'"),
        ("recogniser-mini,recogniser-mini", "two judges have the name 'recogniser_mini'"),
        ([{"judge": "openai:x", "base_uri": ""}], "has no setting 'base_uri': did you mean 'base_url'?"),
        ([{"judge": "recogniser-mini", "model": "x"}], "has no setting 'model'"),
        ([{"base_url": "x"}], "names no judge"),
        ("openai:!!!", "has no name of letters or digits"),
    ],
)  # fmt: skip
def test_bad_judges_are_one_clear_line(given: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        Vqa(judges=given).check()
    assert told in str(caught.value) and "\n" not in str(caught.value)


@dataclass(frozen=True)
class Says(Judge):
    """Says the same of every image."""

    kind: ClassVar[str] = "says"
    text: str = "yes"

    def _answer(self, images: np.ndarray, questions: list[str]) -> list[Answer]:
        return [Answer(verdict(self.text), self.text) for _ in questions]


@pytest.mark.parametrize("images", [np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8), np.uint8), [[0]]])
def test_wrong_images(images: Any) -> None:
    with pytest.raises(ValueError, match=r"vqa judge says: images must be a numpy array, uint8 \[n, height"):
        Says().answer(images, ["?"])


@pytest.mark.parametrize(("questions", "told"), [(["a"], "2 images but 1 questions"), (["a", " "], "must be a text"),
                                                 (["a", None], "must be a text")])  # fmt: skip
def test_wrong_questions(questions: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Says().answer(np.zeros((2, 8, 8, 3), np.uint8), questions)


# --- recogniser-mini ------------------------------------------------------------------------------


def test_recogniser_says_what_vqa_mini_says() -> None:
    """By the shipped weights, on scenes of every role."""
    prompts = [p for p in small_world() if p.role is Role.CONCEPT][:4]
    pairs = [(p, scene_of(p)) for p in prompts]
    pairs += [(p, fresh(p)) for p in [p for p in small_world() if p.role is Role.NEUTRAL][:3]]
    images = shard(pairs)
    ours, theirs = Vqa().measure(images), VqaMini().measure(images)
    for column in ("acc_g", "acc_l"):
        np.testing.assert_array_equal(ours[f"vqa_{column}_recogniser_mini"], theirs[column])
        np.testing.assert_allclose(
            ours[f"vqa_{column}_recogniser_mini_p"], theirs[f"{column}_p"], rtol=0, atol=1e-6, equal_nan=True
        )
    assert np.isfinite(theirs["acc_g"]).sum() == 7


def test_recogniser_answers_only_the_two_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    image = fresh(next(p for p in small_world() if p.role is Role.NEUTRAL)).image[None]
    monkeypatch.setattr("lethebench.judges.load", lambda name: Knows())
    with pytest.raises(UserError, match=r"can't answer 'Is it art\?': it knows only"):
        RecogniserJudge().answer(image, ["Is it art?"])
    (unknown,) = RecogniserJudge().answer(image, [SPECIFIC.replace("<CONCEPT>", "mickey mouse")])
    assert (unknown.verdict, unknown.text) == ("unusable", "unknown concept 'mickey mouse'")
    (told,) = RecogniserJudge().answer(image, [f"{GENERAL} Answer yes or no."])
    assert (told.verdict, told.probability) == ("no", pytest.approx(0.05))


def card(**changes: Any) -> dict[str, Any]:
    figures = {
        "called_protected_generated_look": {
            "character": 767 / 768,
            "figure": 0.01,
            "near miss": 0.02,
            "object": 0.5,
        },
        "called_protected_spoilt": 0.1,
        "spoilt": 200,
    }
    return {"data": {"test_scenes": 2468}, "held_out": {"characters": {**figures, **changes}}}


def test_recogniser_errors_are_its_cards() -> None:
    found = card_confusion(card())
    assert (found.tp, found.fn, found.fp, found.tn) == (767, 1, 3 + 6 + 20, 800 - 29)
    shipped = RecogniserJudge().confusions()
    assert set(shipped) == {"acc_g"} and shipped["acc_g"].correctable
    path = RecogniserJudge().files()["card.json"]
    told = json.loads(path.read_text())["held_out"]["characters"]["called_protected_generated_look"]
    assert shipped["acc_g"].sensitivity == pytest.approx(told["character"], abs=1e-12)


def test_a_card_of_another_pool_or_without_figures_is_refused() -> None:
    with pytest.raises(UserError, match="another test pool"):
        card_confusion({**card(), "data": {"test_scenes": 100}})
    with pytest.raises(UserError, match="lacks 'character'"):
        card_confusion(card(called_protected_generated_look={}))


# --- errors where the truth is known --------------------------------------------------------------


def test_errors_are_counted_by_truth() -> None:
    world = small_world()
    always = error_rates.measure_errors(Says(), world, 5)
    never = error_rates.measure_errors(Says(text="No."), world, 5)
    mute = error_rates.measure_errors(Says(text="hm"), world, 5)
    counts = ("tp", "fn", "fp", "tn")
    assert [always["acc_g"][k] for k in counts] == [5, 0, 10, 0]
    assert [never["acc_g"][k] for k in counts] == [0, 5, 0, 10]
    assert [never["acc_l"][k] for k in counts] == [0, 5, 0, 5]
    assert [mute["acc_g"][k] for k in counts] == [0, 0, 0, 0]
    assert (mute["acc_g"]["unusable_where_yes"], mute["acc_g"]["unusable_where_no"]) == (5, 10)
    assert mute["acc_g"]["correctable"].startswith("no") and mute["acc_g"]["sensitivity"] is None
    with pytest.raises(UserError, match="scenes=0"):
        error_rates.measure_errors(Says(), world, 0)


def test_measured_errors_are_what_a_judge_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "errors.json"
    error_rates.main(["--judge", "recogniser-mini", "--output", str(path), "--scenes", "4"])
    assert set(json.loads(capsys.readouterr().out)) == {"acc_g", "acc_l"}
    (judge,) = make_judges([{"judge": "recogniser-mini", "errors": str(path)}])
    found = judge.confusions()
    assert (found["acc_g"].tp + found["acc_g"].fn, found["acc_l"].tn + found["acc_l"].fp) == (4, 4)
    assert judge.files() == {"errors": path}


def test_bad_calls_of_the_measurement_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for judge, told in (
        ("opnai:x", "did you mean 'openai'?"),
        ("{", "is no JSON"),
        ("transformers:/none", "no folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            error_rates.main(["--judge", judge, "--output", "x.json"])
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ("/none/errors.json", "can't be read: make it by"),
        ({"acc_g": {"tp": 1}}, "must be counts of tp, fn, fp, tn"),
        ({"acc_g": {"tp": -1, "fn": 0, "fp": 0, "tn": 1}}, "must be counts"),
        ({"acc_g": 0.9}, "must be counts"),
        ({}, "neither acc_g nor acc_l"),
    ],
)
def test_bad_errors_are_one_clear_line(errors: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Vqa(judges=[Says(errors=errors)]).check()


def test_trained_scenes_are_not_the_error_scenes() -> None:
    """The measurement's scenes are drawn under their own keys."""
    scenes = {repr(item.scene) for n in range(5) for item in error_rates._questions(small_world(), n)}
    planted = {repr(s) for p in trained("verbatim") for s in small_world().item_of(p.id).scenes}  # type: ignore[union-attr]
    assert scenes and not scenes & planted
