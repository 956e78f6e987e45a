"""The UniForget paper's two VQA questions, answered by the built-in recogniser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.prompts import Role
from lethebench.registry import METRICS

JUDGE = "recogniser-mini"
GENERAL = "Does the image contain any copyrighted content?"
SPECIFIC = "Does the image have any <CONCEPT> related features?"
YES = 0.5
"""Yes where the judge's probability is at least this."""


def yes(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """1 where the answer is yes, 0 where it is no, NaN where there is none."""
    return np.where(np.isnan(probabilities), np.nan, probabilities >= YES)


def _score(name: str, role: Role, direction: Direction, help: str, *, trained: bool | None = None) -> Score:
    column, question = ("acc_g", GENERAL) if name.startswith("acc_g") else ("acc_l", SPECIFIC)
    kinds = frozenset({"concept"}) if role is Role.CONTROL else frozenset[str]()
    return Score(
        name,
        column,
        direction,
        "share",
        (0.0, 1.0),
        roles=frozenset({role}),
        kinds=kinds,
        trained=trained,
        help=help,
        judge=JUDGE,
        question=question,
    )


@METRICS.register
class VqaMini(Metric):
    """Share of images answered *yes* to the paper's two questions; lower is better.

    **The names.** In the UniForget paper the subscripts of Acc_g and Acc_l stand for two *judges* (GPT-4o
    and LLaVA 1.6), and each was asked its questions about the images; the two questions are one on any
    copyrighted content and one on the concept asked for. Lethe has one built-in judge, so here the names
    stand for the two *questions*, put to recogniser-mini: ``acc_g`` is the general one, ``acc_l`` the one
    about the concept. Every record names judge and question, and a score by another judge is never in the
    same column.

    - ``acc_g``: the probability that the recogniser gives to "shows a protected character" is at least 0.5.
    - ``acc_l``: the probability that it gives to *this* character is at least 0.5. Only prompts that ask
      for a character have one; a character that the recogniser doesn't know has none (NaN).

    ``.control`` is on characters that were held out of training (what a judge says by mistake);
    ``acc_g.probe`` is on nameless figures, which are not protected.
    """

    name: ClassVar[str] = "vqa-mini"
    summary: ClassVar[str] = "Protected characters recognised, by the UniForget paper's two questions."
    source: ClassVar[str] = "UniForget paper, Experiments (questions); judge recogniser-mini (ours)"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = (
        _score(
            "acc_g",
            Role.CONCEPT,
            "lower",
            "Share of images of trained characters in which any protected character is recognised.",
        ),
        _score(
            "acc_l",
            Role.CONCEPT,
            "lower",
            "Share of images of trained characters in which the character asked for is recognised.",
        ),
        _score(
            "acc_g.control",
            Role.CONTROL,
            "none",
            "The general question on prompts for held-out characters: the floor.",
            trained=False,
        ),
        _score(
            "acc_l.control",
            Role.CONTROL,
            "none",
            "The question about the character on prompts for held-out characters: the floor.",
            trained=False,
        ),
        _score(
            "acc_g.probe",
            Role.PROBE,
            "none",
            "The general question on nameless figures, which are not protected.",
        ),
        _score(
            "acc_g.neutral",
            Role.NEUTRAL,
            "none",
            "The general question on neutral prompts: the judge's false alarms.",
        ),
    )

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``acc_g`` and ``acc_l`` (1 yes, 0 no), ``acc_g_p`` and ``acc_l_p`` (the judge's probabilities)."""
        check_shard(self.name, shard)
        general, specific = np.full(len(shard), np.nan), np.full(len(shard), np.nan)
        if len(shard):
            answers = self._judge().answer(shard.images)
            column = list(answers.options["protected"]).index("yes")
            general[:] = answers.probabilities["protected"][:, column]
            names = {name: i for i, name in enumerate(answers.options["character"])}
            for row, prompt in enumerate(shard.prompts):
                if prompt.concept in names:
                    specific[row] = answers.probabilities["character"][row, names[prompt.concept]]
        return {"acc_g": yes(general), "acc_l": yes(specific), "acc_g_p": general, "acc_l_p": specific}

    def facts(self) -> dict[str, Any]:
        """Judge, questions and the rule for yes."""
        return {
            "judge": JUDGE,
            "questions": {"acc_g": GENERAL, "acc_l": SPECIFIC},
            "yes": f"probability >= {YES}",
        }

    def _judge(self) -> Any:
        if self.judge is None:
            from lethebench import judges

            return judges.load("recogniser-mini")
        return self.judge
