"""The built-in judge: recogniser-mini, which knows the planted world and these two questions only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from lethebench.errors import UserError
from lethebench.metrics._common import Images
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC, YES

from .judges import Answer, Judge
from .prevalence import Confusion

_CONCEPT = re.compile(re.escape(SPECIFIC).replace("<CONCEPT>", "(.+?)"))
CARD_RULE = (
    "card.json, test scenes with a generated look: characters against nameless figures and near misses; "
    "and spoilt characters as they are"
)


@dataclass(frozen=True)
class RecogniserJudge(Judge):
    """recogniser-mini: yes where its probability is at least 0.5; unusable where it doesn't know the concept.

    Its errors are those of its card, unless ``errors`` gives others. The card tells how often it calls
    characters and other pictures protected (``acc_g``), and nothing of false yes about one concept.
    """

    kind: ClassVar[str] = "recogniser-mini"

    def _answer(self, images: Images, questions: list[str]) -> list[Answer]:
        from lethebench import judges

        concepts = [_asked_concept(question) for question in questions]
        found = judges.load("recogniser-mini").answer(images)
        names = {name: i for i, name in enumerate(found.options["character"])}
        protected = list(found.options["protected"]).index("yes")
        answers = []
        for row, concept in enumerate(concepts):
            if concept is None:
                answers.append(_answer(float(found.probabilities["protected"][row, protected])))
            elif concept in names:
                answers.append(_answer(float(found.probabilities["character"][row, names[concept]])))
            else:
                answers.append(Answer("unusable", f"unknown concept '{concept}'"))
        return answers

    def check(self) -> None:
        """Raise UserError if the weights or the card are missing."""
        from lethebench import judges

        judges.load("recogniser-mini")
        super().check()

    def files(self) -> dict[str, Path]:
        """The card: the weights' own sums are part of every key already."""
        return super().files() if self.errors is not None else {"card.json": _card_path()}

    def confusions(self) -> dict[str, Confusion]:
        """Those of ``errors``, else of the card. Raises UserError for a card that tells none."""
        return super().confusions() if self.errors is not None else {"acc_g": card_confusion(_card())}

    def facts(self) -> dict[str, Any]:
        """With the rule for yes and where the errors are from."""
        errors = CARD_RULE if self.errors is None else "given"
        return {**super().facts(), "yes": f"probability >= {YES}", "errors_from": errors}


def _asked_concept(question: str) -> str | None:
    """The concept of the specific question, None for the general one; an instruction may follow either."""
    if question.startswith(GENERAL):
        return None
    asked = _CONCEPT.match(question)
    if asked is None:
        raise UserError(
            f"vqa judge recogniser-mini can't answer {question!r}: it knows only {GENERAL!r} and {SPECIFIC!r}"
        )
    return asked[1]


def _answer(probability: float) -> Answer:
    return Answer("yes", "yes", probability) if probability >= YES else Answer("no", "no", probability)


def _card_path() -> Path:
    from lethebench.judges.base import shipped_folder

    return shipped_folder("recogniser-mini") / "card.json"


def _card() -> dict[str, Any]:
    path = _card_path()
    try:
        return dict(_read(path, path.stat().st_mtime_ns))
    except (OSError, ValueError) as error:
        raise UserError(f"recogniser-mini: {path} can't be read: restore it") from error


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def card_confusion(card: dict[str, Any]) -> Confusion:
    """The general question's confusion from the shares of a card and the sizes of its test pool.

    Yes is true for characters. No is true for what a mitigated model may draw instead, the hard cases (ours):
    nameless figures, near misses, and characters that were spoilt until they were none. Objects and bare
    backdrops, where the judge hardly errs, would flatter it.

    Raises UserError where the card is of another pool or lacks a figure.
    """
    from lethebench.training.judge_data import TEST

    scenes = (TEST.object_families + TEST.character_families) * TEST.family
    if card.get("data", {}).get("test_scenes") != scenes + TEST.figures + TEST.near_misses + TEST.backdrops:
        raise UserError("recogniser-mini: card.json is of another test pool: train and measure it again")
    try:
        figures = card["held_out"]["characters"]
        looked = figures["called_protected_generated_look"]
        positives, spoilt = TEST.character_families * TEST.family, int(figures["spoilt"])
        tp = round(looked["character"] * positives)
        wrong = {
            "figure": round(looked["figure"] * TEST.figures),
            "near miss": round(looked["near miss"] * TEST.near_misses),
            "spoilt": round(figures["called_protected_spoilt"] * spoilt),
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"recogniser-mini: card.json lacks {error}: train and measure it again") from error
    fp, negatives = sum(wrong.values()), TEST.figures + TEST.near_misses + spoilt
    return Confusion(tp, positives - tp, fp, negatives - fp)
