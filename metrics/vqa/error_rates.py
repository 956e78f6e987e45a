"""How often a judge errs where the truth is known: scenes of the planted world, with both questions.

``python -m lethebench.metrics.vqa.error_rates --judge openai:gpt-4o --output gpt-4o.json`` writes what a
judge's setting ``errors`` reads. A judge with settings is given as JSON: ``--judge '{"judge": ..., ...}'``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lethebench.errors import UserError
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC
from lethebench.store import write_atomic

from .judges import Answer, Judge, make_judges
from .prevalence import Confusion

if TYPE_CHECKING:
    from lethebench.datasets.planted import PlantedWorld, Scene

KINDS = ("character", "figure", "neutral")
RULE = (
    "acc_g: yes is true for protected characters, no for nameless figures and for objects; acc_l: asked "
    "about the character that is shown, and about another of the same category"
)


@dataclass(frozen=True)
class _Asked:
    """A scene with a question whose answer is known."""

    scene: Scene
    question: str
    label: str
    truth: bool


def measure_errors(
    judge: Judge, world: PlantedWorld, scenes: int = 100, instruction: str = ""
) -> dict[str, Any]:
    """The judge's confusion on ``scenes`` fresh scenes of each kind, as JSON holds it.

    Kinds are protected characters, nameless figures and objects; they are fixed by the world's seed, and in
    no model's training set. Per question: tp, fn, fp, tn, and the unusable answers apart by truth. Raises
    UserError for a number below 1.
    """
    from lethebench.datasets.planted import render

    if scenes < 1:
        raise UserError(f"vqa: scenes={scenes} must be 1 at least")
    asked = [item for number in range(scenes) for item in _questions(world, number)]
    pictures = {id(item.scene): item.scene for item in asked}
    images = {key: render(scene).image for key, scene in pictures.items()}
    answers = judge.answer(
        np.stack([images[id(item.scene)] for item in asked]),
        [f"{item.question} {instruction}".rstrip() for item in asked],
    )
    told = {
        "judge": judge.facts(),
        "instruction": instruction,
        "rule": RULE,
        "world": world.version,
        "world_seed": world.config.seed,
        "scenes_of_each_kind": scenes,
    }
    return told | {label: _counts(asked, answers, label) for label in ("acc_g", "acc_l")}


def _questions(world: PlantedWorld, number: int) -> Iterator[_Asked]:
    from lethebench.datasets.planted import Person

    for kind in KINDS:
        scene = world.random_scene(f"vqa/{number}", kind=kind)  # type: ignore[arg-type]
        yield _Asked(scene, GENERAL, "acc_g", kind == "character")
        if isinstance(scene.subject, Person) and scene.subject.name is not None:
            shown = scene.subject
            others = [
                c.name for c in world.characters if c.category == shown.category and c.name != shown.name
            ]
            yield _Asked(scene, SPECIFIC.replace("<CONCEPT>", str(shown.name)), "acc_l", True)
            if others:
                other = others[number % len(others)]
                yield _Asked(scene, SPECIFIC.replace("<CONCEPT>", other), "acc_l", False)


def _counts(asked: Sequence[_Asked], answers: Sequence[Answer], label: str) -> dict[str, Any]:
    pairs = [(i.truth, a.verdict) for i, a in zip(asked, answers, strict=True) if i.label == label]
    confusion = Confusion(
        pairs.count((True, "yes")),
        pairs.count((True, "no")),
        pairs.count((False, "yes")),
        pairs.count((False, "no")),
    )
    unusable = {
        "unusable_where_yes": pairs.count((True, "unusable")),
        "unusable_where_no": pairs.count((False, "unusable")),
    }
    return confusion.facts() | unusable


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one judge and write its errors."""
    from lethebench.datasets.planted import PlantedWorld

    parser = argparse.ArgumentParser(description="Measure a VQA judge's errors on the planted world.")
    parser.add_argument("--judge", required=True, help="its spec, or JSON: {judge: <spec>, <setting>: ...}")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of each of three kinds")
    parser.add_argument("--instruction", default="", help="text after each question, as the suite has it")
    given = parser.parse_args(arguments)
    try:
        spec = json.loads(given.judge) if given.judge.lstrip().startswith("{") else given.judge
        (judge,) = make_judges([spec])
        judge.check()
        found = measure_errors(judge, PlantedWorld(), given.scenes, given.instruction)
    except json.JSONDecodeError as error:
        parser.error(f"--judge is no JSON: {error}")
    except UserError as error:
        parser.error(str(error))
    write_atomic(given.output, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps({label: found[label] for label in ("acc_g", "acc_l")}))


if __name__ == "__main__":
    main()
