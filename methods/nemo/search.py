"""NeMo's search for a prompt's neurons (paper, algorithms 2 and 3), written as a dialogue.

A search yields questions and is sent the answers, so that many prompts' questions share a forward pass, and
a question may be cut short: whether *any* seed is still above a limit is mostly known after the first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

ROUNDING = 1e-6
"""What an SSIM may be above the limit by rounding: a neuron without any effect isn't needed."""

Selection = list[list[int]]
"""Neurons by layer."""


@dataclass(frozen=True)
class Question:
    """How like the unchanged model's are the differences of ``seeds`` with the neurons ``off``?"""

    off: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A prompt's neurons: the initial selection, what refinement left, and the limit it worked with."""

    initial: list[int]
    refined: list[int]
    limit: float


Search = Generator[Question, list[float], Found]
"""Answers are SSIM values, one a seed."""


def search(
    select: Callable[[float, int], Selection],
    seeds: Sequence[int],
    limit: float,
    *,
    theta: float = 5.0,
    theta_step: float = 0.25,
    theta_min: float = 1.0,
    top_k: bool = True,
    group: int = 1,
) -> Search:
    """Initial selection until every seed's SSIM is at most ``limit``, then refinement that keeps it below.

    ``select(theta, k)`` gives the selection. Where theta reaches ``theta_min`` first, the last selection
    stays (``theta_min`` itself isn't tried: released code), and refinement keeps to the SSIM reached.
    """
    order = list(seeds)
    tried = 0
    while True:
        selection = select(theta - tried * theta_step, tried if top_k else 0)
        if not (yield from _any(selection, order, operator.gt, limit)):
            break
        tried += 1
        if theta - tried * theta_step <= theta_min + 1e-9:
            limit = max((yield Question(_flat(selection), tuple(seeds))))
            break
    initial = _flat(selection)
    refined = yield from refine(selection, order, limit, group)
    return Found(list(initial), list(_flat(refined)), limit)


def refine(
    selection: Selection, order: list[int], limit: float, group: int = 1
) -> Generator[Question, list[float], Selection]:
    """Give back layers, then neurons, last layer first, as long as every SSIM stays below ``limit``.

    Neurons go back one by one (paper), or ``group`` at a time (ours: fewer questions, more neurons stay off).
    """
    for layer in reversed(range(len(selection))):
        if selection[layer]:
            selection = yield from _give_back(selection, selection[layer], order, limit)
    for layer in reversed(range(len(selection))):
        own = selection[layer]
        for start in range(0, len(own), group):
            selection = yield from _give_back(selection, own[start : start + group], order, limit)
    return selection


def _give_back(
    selection: Selection, neurons: list[int], order: list[int], limit: float
) -> Generator[Question, list[float], Selection]:
    """The selection without ``neurons`` where that keeps every SSIM below the limit, else as it was."""
    without = [[n for n in layer if n not in neurons] for layer in selection]
    needed = yield from _any(without, order, operator.ge, limit + ROUNDING)
    return selection if needed else without


def _any(
    selection: Selection, order: list[int], above: Callable[[float, float], bool], limit: float
) -> Generator[Question, list[float], bool]:
    """Whether any seed's SSIM is ``above`` the limit. The seed that last was is asked first, alone."""
    for part in (tuple(order[:1]), tuple(order[1:])):
        if not part:
            continue
        values = yield Question(_flat(selection), part)
        seed, value = max(zip(part, values, strict=True), key=lambda pair: pair[1])
        if above(value, limit):
            order.remove(seed)
            order.insert(0, seed)
            return True
    return False


def _flat(selection: Selection) -> tuple[int, ...]:
    return tuple(neuron for layer in selection for neuron in layer)


def conduct(
    searches: Mapping[int, Search],
    answer: Callable[[list[tuple[int, Question]]], list[list[float]]],
    finished: Callable[[int], None] = lambda number: None,
) -> dict[int, Found]:
    """Run searches side by side: ``answer`` gets the open questions with their numbers, round by round."""
    found: dict[int, Found] = {}
    open_questions: dict[int, Question] = {}

    def step(number: int, answers: list[float] | None) -> None:
        try:
            dialogue = searches[number]
            open_questions[number] = next(dialogue) if answers is None else dialogue.send(answers)
        except StopIteration as end:
            open_questions.pop(number, None)
            found[number] = end.value
            finished(number)

    for number in searches:
        step(number, None)
    while open_questions:
        asked = list(open_questions.items())
        for (number, _), answers in zip(asked, answer(asked), strict=True):
            step(number, answers)
    return found
