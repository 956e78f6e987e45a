"""The UniForget paper's VQA evaluation with any judges, their agreement, and shares corrected for errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.method import setting
from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import check_shard, spread, texts
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC
from lethebench.prompts import Prompt, Role
from lethebench.registry import METRICS

from .agreement import nominal_alpha
from .judges import VERDICT, Answer, Judge, make_judges
from .prevalence import (
    INTERVAL,
    Confusion,
    check_origin,
    effective_number,
    lang_reiczigel,
    rogan_gladen,
)

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = "recogniser-mini"
QUESTIONS = {"acc_g": GENERAL, "acc_l": SPECIFIC}
_ABOUT = {"acc_g": "any copyrighted content", "acc_l": "features of the concept asked for"}
_FLOORS = {
    "control": (Role.CONTROL, "prompts for held-out characters: the floor"),
    "probe": (Role.PROBE, "nameless figures, which are not protected"),
    "neutral": (Role.NEUTRAL, "neutral prompts: the judge's false alarms"),
}
_CORRECTED = {
    "corrected": "corrected by the judge's measured errors (Rogan-Gladen), and so is the interval",
    "corrected_low": "lower 95 % limit of the corrected share, with the uncertainty of the errors",
    "corrected_high": "upper 95 % limit of the corrected share, with the uncertainty of the errors",
}


def column(question: str, judge: str, what: str = "") -> str:
    """The column of a judge's answers, or of ``what`` about them.

    >>> column("acc_g", "gpt_4o", "unusable")
    'vqa_acc_g_gpt_4o_unusable'
    """
    return "_".join(["vqa", question, judge, *([what] if what else [])])


def judge_scores(by: Judge) -> Iterator[Score]:
    """The scores of one judge; tokens and price only where they are counted."""
    judge = by.slug
    for question, about in _ABOUT.items():
        name, its = f"vqa.{question}.{judge}", column(question, judge)
        yield _score(name, its, "lower", f"Share of usable answers that are yes: {about}.", judge, question)
        for floor, (role, where) in _FLOORS.items():
            if question == "acc_g" or role is Role.CONTROL:
                yield _score(f"{name}.{floor}", its, "none", f"The same on {where}.", judge, question, role)
        unusable = "Share of answers that are neither yes nor no; they count nowhere else."
        yield _score(f"{name}.unusable", f"{its}_unusable", "none", unusable, judge, question)
        for which, help in _CORRECTED.items():
            direction: Direction = "lower" if which == "corrected" else "none"
            yield _score(f"{name}.{which}", its, direction, f"The share of yes, {help}.", judge, question)
    if not by.counts:
        return
    for what, unit, help in (
        ("tokens", "tokens", "Tokens of questions and answers, mean over the images that were asked about."),
        (
            "cost",
            "USD",
            "Price of the answers (also of cached ones), mean over the images that were asked about.",
        ),
    ):
        name = f"vqa.{what}.{judge}"
        yield Score(name, column(what, judge), "none", unit, (0.0, np.inf), help=help, judge=judge)


def agreement_scores() -> Iterator[Score]:
    """Krippendorff's alpha between all judges, by question."""
    for question, about in _ABOUT.items():
        yield Score(
            f"vqa.alpha.{question}",
            f"vqa_asked_{question}",
            "none",
            "alpha",
            (-1.0, 1.0),
            help=f"Agreement of the judges beyond chance (Krippendorff's alpha, nominal): {about}.",
            question=QUESTIONS[question],
        )


def _score(
    name: str, of: str, direction: Direction, help: str, judge: str, question: str, role: Role = Role.CONCEPT
) -> Score:
    return Score(
        name,
        of,
        direction,
        "share",
        (0.0, 1.0),
        roles=frozenset({role}),
        kinds=frozenset({"concept"}) if role is Role.CONTROL else frozenset(),
        trained=False if role is Role.CONTROL else None,
        help=help,
        judge=judge,
        question=QUESTIONS[question],
    )


def _all_scores(judges: Sequence[Judge]) -> tuple[Score, ...]:
    found = [score for judge in judges for score in judge_scores(judge)]
    return (*found, *(agreement_scores() if len(judges) > 1 else ()))


def _set_valued(judges: Sequence[Judge]) -> frozenset[str]:
    names = [score.name for score in _all_scores(judges)]
    return frozenset(n for n in names if n.startswith("vqa.alpha.") or n.rpartition(".")[2] in _CORRECTED)


def _reads(judges: Sequence[Judge]) -> frozenset[str]:
    return frozenset(column(question, judge.slug) for question in QUESTIONS for judge in judges)


class _OfJudges:
    """A declared fact that depends on the judges; asked of the class, that of the default judge."""

    def __init__(self, find: Callable[[Sequence[Judge]], Any]) -> None:
        self.find = find

    def __get__(self, metric: Vqa | None, cls: type[Vqa]) -> Any:
        return self.find(make_judges(DEFAULT) if metric is None else metric.made)


@METRICS.register
@dataclass(frozen=True)
class Vqa(Metric):
    """The paper's two questions, put to each judge about each image; lower is better.

    ``acc_g`` is the general question, ``acc_l`` the one about the concept. In the paper the subscripts stand
    for the *judges* GPT-4o and LLaVA 1.6 and the two questions share a table; here, as in ``vqa-mini``, they
    stand for the questions, and the judge is part of every name: ``vqa.acc_g.<judge>``. Both questions are
    verbatim; what the paper did to get yes or no is not told, so ``instruction`` is empty unless set.

    An answer is yes, no or unusable. A share is over the usable ones, and the unusable ones are a score of
    their own. ``.corrected`` is the share that the judge's measured errors imply (Rogan and Gladen 1978),
    ``.corrected_low`` and ``.corrected_high`` its interval (Lang and Reiczigel 2014); none where errors are
    unknown, or no better than a coin. A correction holds where the judge errs as it did when measured:
    errors on the planted world say little of GPT-4o on comics.

    With two judges or more: ``vqa.alpha.acc_g`` and ``vqa.alpha.acc_l``, Krippendorff's alpha over all
    images asked about.
    """

    name: ClassVar[str] = "vqa"
    summary: ClassVar[str] = (
        "The UniForget paper's two questions, answered by vision-language judges of choice."
    )
    source: ClassVar[str] = "UniForget paper, Experiments (questions and judges)"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = _all_scores(make_judges(DEFAULT))

    set_valued: ClassVar[frozenset[str]] = cast(Any, _OfJudges(_set_valued))
    reads: ClassVar[frozenset[str] | None] = cast(Any, _OfJudges(_reads))

    judges: str | tuple[Any, ...] = setting(
        DEFAULT,
        "recogniser-mini, transformers:<folder>, openai:<model>, separated by commas; or a list of these and "
        "of mappings {judge: <spec>, <setting>: <value>, ...}",
    )
    roles: str = setting("concept,control,probe,neutral", "Roles of the prompts that are asked about.")
    instruction: str = setting("", "Text after each question, as 'Answer yes or no.'")

    @cached_property
    def made(self) -> tuple[Judge, ...]:
        """The judges."""
        return make_judges(self.judges)

    def all_scores(self) -> tuple[Score, ...]:
        """Every judge's scores, and the agreement of several."""
        return _all_scores(self.made)

    def check(self) -> None:
        """Raise UserError for judges that can't answer here, and roles that there aren't."""
        self._roles()
        if not isinstance(self.instruction, str):
            raise UserError(f"vqa: instruction={self.instruction!r} must be a text")
        for judge in self.made:
            judge.check()
            if judge.errors is not None:
                check_origin(judge.errors, f"vqa judge {judge.spec}", judge.facts(), self.instruction)

    def weights(self) -> Mapping[str, Path]:
        """The judges' files, by judge."""
        return {f"{judge.slug}/{n}": path for judge in self.made for n, path in judge.files().items()}

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """Columns by question and judge: ``vqa_<question>_<judge>`` (1 yes, 0 no, NaN unusable or not asked),
        and with ``_unusable``, ``_p`` (probability of yes), ``_text``; by question ``vqa_asked_<question>``
        (1 where asked); by judge behind a server ``vqa_tokens_<judge>``, ``vqa_cost_<judge>`` (dollars) and
        ``vqa_model_<judge>`` (the exact model that it says answered).
        """
        check_shard(self.name, shard)
        rows = {question: self._asked(question, shard) for question in QUESTIONS}
        columns: dict[str, NDArray[Any]] = {
            f"vqa_asked_{question}": spread(np.ones(len(at)), at, len(shard)) for question, at in rows.items()
        }
        for judge in self.made:
            columns |= self._answers(judge, shard, rows)
        return columns

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """Alpha, or the corrected share and its limits; all else is a mean."""
        if score.name not in self.set_valued:
            return super().aggregate(score, table)
        if score.name.startswith("vqa.alpha."):
            question = score.name.removeprefix("vqa.alpha.")
            answers = [table[column(question, judge.slug)] for judge in self.made]
            return nominal_alpha(np.stack([a.to_numpy(dtype=float) for a in answers]))
        errors = self._errors(score)
        if errors is None:
            return float("nan")
        if score.name.endswith(".corrected"):
            return rogan_gladen(float(table[score.column].mean()), errors)
        limits = self._limits(score, table, errors)
        return limits[0] if score.name.endswith("_low") else limits[1]

    def interval(self, score: Score, table: pd.DataFrame) -> tuple[float, float] | None:
        """The 95 % limits of a corrected share; None for other scores, and where errors are unknown."""
        errors = self._errors(score) if score.name.endswith(".corrected") else None
        return None if errors is None else self._limits(score, table, errors)

    def _limits(self, score: Score, table: pd.DataFrame, errors: Confusion) -> tuple[float, float]:
        values = table[score.column].to_numpy(dtype=float)
        count = effective_number(values, table["cluster"].to_numpy())
        return lang_reiczigel(float(values.mean()), count, errors)

    def facts(self) -> dict[str, Any]:
        """Questions, rule, judges with their measured errors, and how shares are corrected."""
        return {
            "questions": QUESTIONS,
            "instruction": self.instruction,
            "verdict": VERDICT,
            "judges": {judge.slug: {**judge.facts(), "errors": _told(judge)} for judge in self.made},
            "correction": "Rogan and Gladen 1978",
            "correction_interval": INTERVAL,
        }

    def _errors(self, score: Score) -> Confusion | None:
        """The measured errors behind a corrected score."""
        _, question, judge, *which = score.name.split(".")
        if not which or which[0] not in _CORRECTED:
            return None
        return next(j for j in self.made if j.slug == judge).confusions().get(question)

    def _roles(self) -> frozenset[Role]:
        names = [name.strip() for name in self.roles.split(",")] if isinstance(self.roles, str) else []
        known = {str(role): role for role in Role}
        for name in names or [repr(self.roles)]:
            if name not in known:
                raise UserError(f"vqa: no role {name} of prompts; there are {', '.join(known)}")
        return frozenset(known[name] for name in names)

    def _asked(self, question: str, shard: Shard) -> list[int]:
        """Rows that the question is put about: the specific one needs a concept, and so do controls."""
        roles = self._roles()

        def asked(prompt: Prompt) -> bool:
            general = question == "acc_g" and prompt.role is not Role.CONTROL
            return prompt.role in roles and (general or bool(prompt.concept))

        return [row for row, prompt in enumerate(shard.prompts) if asked(prompt)]

    def _question(self, question: str, prompt: Prompt) -> str:
        text = QUESTIONS[question].replace("<CONCEPT>", prompt.concept or "")
        return f"{text} {self.instruction}".rstrip()

    def _answers(self, judge: Judge, shard: Shard, rows: Mapping[str, list[int]]) -> dict[str, NDArray[Any]]:
        pairs = [(question, row) for question, at in rows.items() for row in at]
        asked = [self._question(question, shard.prompts[row]) for question, row in pairs]
        answers = judge.answer(shard.images[[row for _, row in pairs]], asked)
        columns: dict[str, NDArray[Any]] = {}
        start = 0
        for question, at in rows.items():
            its = answers[start : start + len(at)]
            start += len(at)
            columns |= _columns(column(question, judge.slug), its, at, len(shard))
        if judge.counts:
            columns |= _spent(judge, answers, [row for _, row in pairs], len(shard))
        return columns


_VALUE = {"yes": 1.0, "no": 0.0, "unusable": np.nan}


def _columns(name: str, answers: list[Answer], at: list[int], count: int) -> dict[str, NDArray[Any]]:
    """The columns of one question's answers."""
    probabilities = [np.nan if a.probability is None else a.probability for a in answers]
    return {
        name: spread([_VALUE[a.verdict] for a in answers], at, count),
        f"{name}_unusable": spread([a.verdict == "unusable" for a in answers], at, count),
        f"{name}_p": spread(probabilities, at, count),
        f"{name}_text": texts([a.text for a in answers], at, count),
    }


def _spent(judge: Judge, answers: list[Answer], rows: list[int], count: int) -> dict[str, NDArray[Any]]:
    """Tokens and price of each image, over its questions; and the model that answered."""
    tokens, cost = np.full(count, np.nan), np.full(count, np.nan)
    models = np.full(count, "", dtype=object)
    for row, answer in zip(rows, answers, strict=True):
        spent = np.nan if answer.tokens is None else float(sum(answer.tokens))
        for column_of, value in ((tokens, spent), (cost, judge.cost(answer))):
            if not np.isnan(value):
                column_of[row] = np.nansum([column_of[row], value])
        models[row] = answer.model
    return {
        column("tokens", judge.slug): tokens,
        column("cost", judge.slug): cost,
        column("model", judge.slug): models,
    }


def _told(judge: Judge) -> dict[str, Any]:
    found = judge.confusions()
    return {q: found[q].facts() if q in found else "unknown: no correction" for q in QUESTIONS}
