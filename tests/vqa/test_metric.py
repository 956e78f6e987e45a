"""The metric: columns, scores and facts, with judges whose answers are known."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import krippendorff
import numpy as np
import pandas as pd
import pytest
from metric_fakes import fresh, scene_of, shard, small_world

from lethebench import stats
from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import settings_of
from lethebench.metric import Shard, configure_metric, detectors
from lethebench.metrics.vqa import Vqa
from lethebench.metrics.vqa.judges import Answer, Judge, verdict
from lethebench.metrics.vqa.prevalence import Confusion, effective_number, lang_reiczigel, rogan_gladen
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC
from lethebench.prompts import Prompt, Role
from lethebench.work import columns_frame, known_frame

ERRORS = {"acc_g": {"tp": 90, "fn": 10, "fp": 20, "tn": 80}}


@dataclass(frozen=True)
class Scripted(Judge):
    """Says of each image and question what it was told, else ``no``."""

    kind: ClassVar[str] = "scripted"
    counts: ClassVar[bool] = True
    told: dict[tuple[bytes, str], str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def _answer(self, images: np.ndarray, questions: list[str]) -> list[Answer]:
        self.seen.extend(questions)
        texts = [self.told.get((i.tobytes(), q), "no") for i, q in zip(images, questions, strict=True)]
        return [Answer(verdict(t), t, 0.25, (30, 2), "exact-1") for t in texts]

    def cost(self, answer: Answer) -> float:
        return 0.001

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind}


def of_role(role: Role, count: int, kind: str | None = None) -> list[Prompt]:
    return [p for p in small_world() if p.role is role and kind in (None, p.kind)][:count]


@pytest.fixture(scope="module")
def mixed() -> Shard:
    concepts = of_role(Role.CONCEPT, 4)
    pairs = [(p, scene_of(p, number)) for number in (0, 1) for p in concepts]
    pairs += [(p, scene_of(p)) for p in of_role(Role.CONTROL, 2, "concept")]
    pairs += [(p, fresh(p)) for p in of_role(Role.CONTROL, 1, "hard-negative") + of_role(Role.NEUTRAL, 2)]
    pairs += [(of_role(Role.PROBE, 1)[0], fresh(of_role(Role.NEUTRAL, 4)[3]))]
    pairs += [(p, scene_of(p)) for p in of_role(Role.TRIGGER, 1, "verbatim")]
    return shard(pairs)


def specific(prompt: Prompt) -> str:
    return SPECIFIC.replace("<CONCEPT>", str(prompt.concept))


def script(mixed: Shard, texts: Sequence[str], name: str, **more: Any) -> Scripted:
    """The texts are the answers to the general question on the first images."""
    told = {(i.tobytes(), GENERAL): t for i, t in zip(mixed.images, texts, strict=False)}
    told |= {
        (mixed.images[0].tobytes(), specific(mixed.prompts[0])): "Yes, it has.",
        (mixed.images[1].tobytes(), specific(mixed.prompts[1])): "Hard to say.",
    }
    return Scripted(name=name, told=told, **more)


def table(mixed: Shard, metric: Vqa) -> pd.DataFrame:
    keys = [ImageKey("t@1", p, i) for p, i in zip(mixed.prompts, mixed.indices, strict=True)]
    return pd.concat([known_frame(keys), columns_frame(metric.measure(mixed), len(mixed), "vqa")], axis=1)


FIRST = ["Yes.", "No.", "Yes, it does.", "I can't tell.", "yes", "no", "no", "yes"]
SECOND = ["Yes.", "No.", "No.", "Yes.", "maybe", "no", "no", "yes"]


def test_answers_become_columns(mixed: Shard) -> None:
    judge = script(mixed, FIRST, "first")
    columns = Vqa(judges=(judge,)).measure(mixed)
    assert columns["vqa_acc_g_first"][:8].tolist() == pytest.approx(
        [1, 0, 1, np.nan, 1, 0, 0, 1], nan_ok=True
    )
    assert columns["vqa_acc_g_first_unusable"][:8].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert columns["vqa_acc_l_first"][:3].tolist() == pytest.approx([1, np.nan, 0], nan_ok=True)
    assert columns["vqa_acc_g_first_text"][3] == "I can't tell."
    roles = [p.role for p in mixed.prompts]
    for row, prompt in enumerate(mixed.prompts):
        general = prompt.role in (Role.CONCEPT, Role.PROBE, Role.NEUTRAL) or prompt.kind == "concept"
        assert columns["vqa_asked_acc_g"][row] == pytest.approx(1 if general else np.nan, nan_ok=True)
        assert columns["vqa_asked_acc_l"][row] == pytest.approx(1 if prompt.concept else np.nan, nan_ok=True)
        if not general:
            assert (
                np.isnan(columns["vqa_acc_g_first_unusable"][row])
                and columns["vqa_acc_g_first_text"][row] == ""
            )
    assert {Role.TRIGGER, Role.PROBE, Role.NEUTRAL, Role.CONTROL} <= set(roles)
    assert columns["vqa_tokens_first"][[0, -2, -1]].tolist() == pytest.approx([64, 32, np.nan], nan_ok=True)
    assert columns["vqa_cost_first"][[0, -2]].tolist() == pytest.approx([0.002, 0.001])
    assert columns["vqa_model_first"][[0, -1]].tolist() == ["exact-1", ""]


def test_questions_are_verbatim_and_the_instruction_is_added(mixed: Shard) -> None:
    judge = Scripted(name="x")
    Vqa(judges=(judge,), roles="concept").measure(mixed)
    assert judge.seen == [GENERAL] * 8 + [specific(p) for p in mixed.prompts[:8]]
    other = Scripted(name="x")
    Vqa(judges=(other,), roles="neutral", instruction="Answer yes or no.").measure(mixed)
    assert other.seen == [f"{GENERAL} Answer yes or no."] * 2


def test_unusable_counts_apart(mixed: Shard) -> None:
    metric = Vqa(judges=(script(mixed, FIRST, "first"),))
    frame = table(mixed, metric)
    found = {s.name: stats.summarise(metric, s, frame, resamples=50) for s in metric.all_scores()}
    assert found["vqa.acc_g.first"].value == pytest.approx(4 / 7)
    assert found["vqa.acc_g.first"].n == 7
    assert found["vqa.acc_g.first.unusable"].value == pytest.approx(1 / 8)
    assert found["vqa.acc_l.first.unusable"].value == pytest.approx(1 / 8)
    assert found["vqa.acc_l.first"].value == pytest.approx(1 / 7)
    assert found["vqa.acc_g.first.neutral"].value == 0
    assert found["vqa.acc_g.first.corrected"].value is None  # nothing is known of its errors
    assert (found["vqa.acc_g.first"].judge, found["vqa.acc_g.first"].question) == ("first", GENERAL)


def test_corrected_share_and_its_interval(mixed: Shard) -> None:
    metric = Vqa(judges=(script(mixed, FIRST, "first", errors=ERRORS),))
    frame = table(mixed, metric)
    found = {s.name: stats.summarise(metric, s, frame, resamples=50) for s in metric.all_scores()}
    errors = Confusion(90, 10, 20, 80)
    values = np.array([1.0, 0, 1, 1, 0, 0, 1])
    clusters = [p.cluster for k, p in enumerate(mixed.prompts[:8]) if k != 3]
    count = effective_number(values, np.array(clusters))
    low, high = lang_reiczigel(4 / 7, count, errors)
    assert found["vqa.acc_g.first.corrected"].value == pytest.approx(rogan_gladen(4 / 7, errors))
    assert found["vqa.acc_g.first.corrected_low"].value == pytest.approx(low)
    assert found["vqa.acc_g.first.corrected_high"].value == pytest.approx(high)
    assert low < rogan_gladen(4 / 7, errors) < high
    scores = {s.name: s for s in metric.all_scores()}
    usable = frame[frame["role"].eq("concept") & frame["vqa_acc_g_first"].notna()]
    assert metric.interval(scores["vqa.acc_g.first.corrected"], usable) == pytest.approx((low, high))
    assert metric.interval(scores["vqa.acc_g.first"], usable) is None
    assert metric.interval(scores["vqa.acc_l.first.corrected"], usable) is None
    assert found["vqa.acc_l.first.corrected"].value is None


def test_agreement_of_judges(mixed: Shard) -> None:
    one, two = script(mixed, FIRST, "first"), script(mixed, SECOND, "second")
    metric = Vqa(judges=(one, two))
    frame = table(mixed, metric)
    found = {s.name: stats.summarise(metric, s, frame, resamples=50) for s in metric.all_scores()}
    ratings = frame[["vqa_acc_g_first", "vqa_acc_g_second"]].to_numpy(dtype=float).T
    expected = krippendorff.alpha(reliability_data=ratings, level_of_measurement="nominal")
    assert found["vqa.alpha.acc_g"].value == pytest.approx(expected, abs=1e-12)
    assert -1 < found["vqa.alpha.acc_g"].value < 1  # type: ignore[operator]
    assert found["vqa.alpha.acc_g"].n == 13  # every image asked about, also those with one usable answer
    base = stats.summarise(metric, metric.all_scores()[-2], frame, frame, resamples=20)
    assert base.base_difference is not None and base.base_difference.value == 0


def test_scores_follow_the_judges(mixed: Shard) -> None:
    one, two = Scripted(name="One"), Scripted(name="two")
    names = [s.name for s in Vqa(judges=(one, two)).all_scores()]
    assert len(names) == len(set(names)) == 2 * 16 + 2
    assert {"vqa.acc_g.one", "vqa.acc_l.two.control", "vqa.cost.one", "vqa.alpha.acc_l"} <= set(names)
    assert not any("alpha" in s.name or "cost" in s.name for s in Vqa.scores)
    assert detectors(Vqa(judges=(one,))) == {"vqa_acc_g_one": "high", "vqa_acc_l_one": "high"}
    metric = Vqa(judges=(one, two))
    assert "vqa.alpha.acc_g" in metric.set_valued and "vqa.alpha.acc_g" not in Vqa.set_valued
    assert metric.reads is not None and metric.reads <= set(metric.measure(mixed))
    assert {s.column for s in metric.all_scores()} <= set(metric.measure(mixed))


def test_records_hold_what_made_the_scores(mixed: Shard) -> None:
    metric = Vqa(judges=(script(mixed, FIRST, "first", errors=ERRORS), "recogniser-mini"))
    facts = json.loads(json.dumps(metric.facts(), default=str))
    assert facts["questions"] == {"acc_g": GENERAL, "acc_l": SPECIFIC}
    assert facts["judges"]["first"]["errors"]["acc_g"]["sensitivity"] == 0.9
    assert facts["judges"]["first"]["errors"]["acc_l"] == "unknown: no correction"
    assert facts["judges"]["recogniser_mini"]["errors"]["acc_g"]["correctable"] == "yes"
    assert "Lang and Reiczigel 2014" in facts["correction_interval"]
    assert list(metric.weights()) == ["recogniser_mini/card.json"]
    assert all(path.is_file() for path in metric.weights().values())


def test_settings_travel(tmp_path: Path) -> None:
    given = {"judges": [{"judge": "openai:gpt-4o", "price_in": 2.5}], "roles": "concept"}
    metric = configure_metric(Vqa, given)
    assert settings_of(metric) == {**given, "instruction": ""}
    assert pickle.loads(pickle.dumps(metric)).all_scores() == metric.all_scores()
    with pytest.raises(UserError, match="did you mean 'judges'"):
        configure_metric(Vqa, {"judge": "x"})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"roles": "concept,bystander"}, "no role bystander of prompts; there are trigger"),
        ({"roles": ""}, "no role  of prompts"),
        ({"roles": ["concept"]}, "no role"),
        ({"instruction": 3}, "instruction=3 must be a text"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Vqa(**settings).check()
