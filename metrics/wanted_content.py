"""What fine-tuning was to learn: the wanted character, in places that its images never showed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics.prohibited_attribute import prohibited
from lethebench.prompts import Prompt, Role
from lethebench.registry import METRICS

JUDGE = "recogniser-mini"
KIND = "wanted"
"""The kind of prompts that are measured."""


def asked_features(prompt: Prompt, questions: Collection[str]) -> dict[str, str]:
    """The features that the prompt says its character has, by the judge's questions for them.

    Never the prohibited one.

    >>> shown = {"suit": "red", "background": "meadow", "headgear": "cowl", "holds": "comic.headgear=hood"}
    >>> prompt = Prompt("a", "", Role.PROBE, "a", category="comic", attributes=shown)
    >>> asked_features(prompt, ["background", "comic.suit", "comic.headgear"])
    {'comic.suit': 'red'}
    """
    held = prohibited(prompt)
    left_out = None if held is None else held[0]
    features = {f"{prompt.category}.{name}": value for name, value in prompt.attributes.items()}
    return {name: value for name, value in features.items() if name in questions and name != left_out}


def _score(name: str, help: str) -> Score:
    return Score(
        f"wanted.{name}",
        f"wanted_{name}",
        "higher",
        "share",
        (0.0, 1.0),
        roles=frozenset({Role.PROBE}),
        kinds=frozenset({KIND}),
        help=help,
        judge=JUDGE,
    )


@METRICS.register
class WantedContent(Metric):
    """How much of the wanted character fine-tuning taught, as recogniser-mini reads it.

    On prompts that ask for the character by name, in places that its training images don't show:

    - ``features``, the headline: the share of the character's features that are read right, the prohibited
      one left out, and 0 where the image is taken for another category. The prompt tells which count; a set
      should leave out what the judge infers from who the character is, as ``planted-train`` does;
    - ``category`` and ``background``: the other things that the prompt asks for;
    - ``identity``: the recogniser names the character. It calls hardly any character with a changed feature
      by its name, so identity falls too where the prohibited attribute leaks.

    The floor is not 0: a random figure that fits the prompt's noun ("a movie robot") has a quarter of the
    features (.14 of comic heroes' to .49 of movie figures', whose noun tells the species), and the built-in
    model before any fine-tuning drew about a fifth of them in 48 images: see the row ``base``.
    """

    name: ClassVar[str] = "wanted"
    summary: ClassVar[str] = "The wanted character, read off images of it in places that are new to it."
    source: ClassVar[str] = "ours; judge recogniser-mini"
    shown: ClassVar[str] = "planted-train"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = (
        _score("features", "Share of the wanted character's features that the image shows."),
        _score("category", "Share of images that show a figure of the wanted character's category."),
        _score("background", "Share of images of the wanted character that show the place asked for."),
        _score("identity", "Share of images of the wanted character in which it is recognised."),
    )

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``wanted_features`` (share read right), ``_category``, ``_background`` and ``_identity`` (1 or 0).

        NaN for other prompts, and for what the judge can't be asked about.
        """
        check_shard(self.name, shard)
        columns = {score.column: np.full(len(shard), np.nan) for score in self.scores}
        at = [row for row, prompt in enumerate(shard.prompts) if prompt.kind == KIND]
        answers = self._judge().answer(shard.images[at]) if at else None
        for place, row in enumerate(at):
            for name, share in _read(answers, place, shard.prompts[row]).items():
                columns[f"wanted_{name}"][row] = share
        return columns

    def facts(self) -> dict[str, Any]:
        """Judge and rule."""
        return {"judge": JUDGE, "features": "those that the prompt tells, the prohibited one left out"}

    def _judge(self) -> Any:
        if self.judge is None:
            from lethebench import judges

            return judges.load("recogniser-mini")
        return self.judge


def _read(answers: Any, row: int, prompt: Prompt) -> dict[str, float]:
    """What the judge reads right of a picture, by score; NaN where it knows nothing that was asked for."""
    asked: dict[str, Mapping[str, str | None]] = {
        "features": asked_features(prompt, answers.options),
        "category": {"category": prompt.category},
        "background": {"background": prompt.attributes.get("background")},
        "identity": {"character": prompt.concept},
    }
    found = {}
    for name, wanted in asked.items():
        known = {question: value for question, value in wanted.items() if value in answers.options[question]}
        right = [answers.labels[question][row] == value for question, value in known.items()]
        found[name] = float(np.mean(right)) if right else float("nan")
    return found
