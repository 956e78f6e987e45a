"""The judges' errors on generated pictures, by rules that can be checked by hand.

Where a generated picture is a near-copy of a known reference (pixel RMS below
:data:`NEAR_COPY`), the reference's mask and attributes hold for it too. Nothing here depends on
another judge, but for the captions of neutral pictures, which the recogniser must have confirmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethebench import judges
from lethebench.datasets.planted import Backdrop, Placement, PlantedWorld, Scene, Thing
from lethebench.judges.base import Images
from lethebench.judges.clip import TextImageEncoder
from lethebench.judges.descriptor import CopyDescriptor
from lethebench.judges.recogniser import Recogniser
from lethebench.judges.segmenter import Segmenter
from lethebench.prompts import Prompt, Role
from lethebench.training.judge_data import write_captions
from lethebench.training.judge_measures import area_under_roc, iou

NEAR_COPY = 0.08
"""Pixel RMS (of the 0 to 1 range) below which a picture is a near-copy: ours, from a first trial."""

_PARTIAL = ("foreground", "background")
"""Kinds of items whose pictures share a part with the reference whatever their RMS."""


@dataclass(frozen=True)
class Nearest:
    """The reference of its prompt that is nearest to picture ``row``, and how near (pixel RMS)."""

    row: int
    reference: str
    rms: float


def generated_errors(
    images: Images, prompts: Sequence[Prompt], world: PlantedWorld, weights: Path | None = None
) -> dict[str, Any]:
    """Each judge's figures on generated pictures, uint8 ``[n, 64, 64, 3]``, one prompt a picture.

    Shares are None where no picture meets the rule; every figure stands beside its n. ``weights``
    holds a folder for each judge (by default those that the package ships).
    """
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images against {len(prompts)} prompts: one prompt a picture is needed"
        )
    nearest = [
        _nearest(row, images[row], prompt, world) for row, prompt in enumerate(prompts) if prompt.references
    ]
    copies = [found for found in nearest if found.rms < NEAR_COPY]
    sources = {name: weights / name if weights is not None else None for name in judges.JUDGES}
    recogniser = judges.load("recogniser-mini", sources["recogniser-mini"])
    encoder = judges.load("clip-mini", sources["clip-mini"])
    segmenter = judges.load("segmenter-mini", sources["segmenter-mini"])
    descriptor = judges.load("copy-mini", sources["copy-mini"])
    return {
        "segmenter-mini": _segmenter(segmenter, images, prompts, world, nearest),
        "recogniser-mini": _recogniser(recogniser, images, world, copies),
        "copy-mini": _copies(descriptor, images, prompts, world, nearest),
        "clip-mini": {
            "rule": f"near-copies (RMS below {NEAR_COPY}): their reference's caption is right; neutral "
            "pictures: the prompt is right where the recogniser finds all of it with a confidence of 0.9",
            "near_copies": _beaten(
                encoder,
                images,
                [(found.row, world.reference_scene(found.reference)) for found in copies],
                world,
            ),
            "neutral": _beaten(encoder, images, _confirmed(recogniser, images, prompts), world),
        },
    }


def _nearest(row: int, image: NDArray[np.uint8], prompt: Prompt, world: PlantedWorld) -> Nearest:
    distances = {reference: world.near_copy(image, reference) for reference in prompt.references}
    best = min(distances, key=distances.__getitem__)
    return Nearest(row, best, distances[best])


def _share(values: Sequence[bool] | NDArray[Any]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _segmenter(
    judge: Segmenter,
    images: Images,
    prompts: Sequence[Prompt],
    world: PlantedWorld,
    nearest: Sequence[Nearest],
) -> dict[str, Any]:
    """Intersection over union with the mask of the reference whose foreground the picture repeats."""

    def repeated(found: Nearest) -> bool:
        if found.rms < NEAR_COPY:
            return True
        inside, _ = world.region_rms(images[found.row], found.reference)
        return prompts[found.row].kind == "foreground" and inside < NEAR_COPY

    known = [found for found in nearest if repeated(found)]
    scores = np.zeros(0)
    if known:
        masks = judge.masks(images[[found.row for found in known]])
        covers = [world.reference(found.reference).mask for found in known]
        scores = iou(masks, np.stack([cover for cover in covers if cover is not None]))
    return {
        "rule": f"the picture, or a foreground item's foreground, is within RMS {NEAR_COPY} of its reference",
        "n": len(known),
        "iou": _share(scores),
        "iou_above_0.8": _share(scores > 0.8),
    }


def _recogniser(
    judge: Recogniser, images: Images, world: PlantedWorld, copies: Sequence[Nearest]
) -> dict[str, Any]:
    """Accuracy of each attribute on near-copies, whose attributes are their reference's."""
    right: dict[str, list[bool]] = {}
    if copies:
        answers = judge.answer(images[[found.row for found in copies]])
        for index, found in enumerate(copies):
            scene = world.reference_scene(found.reference)
            wanted = answers.comparable(scene.attributes())
            wanted["protected"] = "yes" if scene.foreground == "character" else "no"
            for name, value in wanted.items():
                right.setdefault(name, []).append(bool(answers.labels[name][index] == value))
    return {
        "rule": f"the picture is within RMS {NEAR_COPY} of its reference, whose attributes are known",
        "n": len(copies),
        "accuracy": {name: _share(values) for name, values in right.items()},
        "n_by_attribute": {name: len(values) for name, values in right.items()},
    }


def _copies(
    judge: CopyDescriptor,
    images: Images,
    prompts: Sequence[Prompt],
    world: PlantedWorld,
    nearest: Sequence[Nearest],
) -> dict[str, Any]:
    """Similarity to the nearest reference of near-copies against that of all other pictures."""
    whole = [found for found in nearest if prompts[found.row].kind not in _PARTIAL]
    near = np.array([found.rms < NEAR_COPY for found in whole], dtype=bool)
    threshold = float(judge.config["threshold"])
    similarity = np.zeros(0, np.float32)
    if whole:
        references = np.stack([world.reference(found.reference).image for found in whole])
        similarity = judge.similarity(images[[found.row for found in whole]], references)
    auc = area_under_roc(similarity[near], similarity[~near])
    return {
        "rule": f"copies are within RMS {NEAR_COPY} of the reference, others are not "
        "(foreground and background items, which copy a part, left out)",
        "n": {"copies": int(near.sum()), "others": int((~near).sum())},
        "auc": None if np.isnan(auc) else auc,
        "threshold": threshold,
        "recall_at_threshold": _share(similarity[near] > threshold),
        "false_at_threshold": _share(similarity[~near] > threshold),
    }


def _beaten(
    judge: TextImageEncoder, images: Images, scenes: Sequence[tuple[int, Scene]], world: PlantedWorld
) -> dict[str, Any]:
    wins: list[bool] = []
    if scenes:
        texts = [
            write_captions(world, scene, scene.foreground, f"generated/{row}")[1] for row, scene in scenes
        ]
        embedded = judge.images(images[[row for row, _ in scenes]])
        scores = np.stack(
            [(embedded * judge.texts(list(column))).sum(1) for column in zip(*texts, strict=True)], 1
        )
        wins = (scores[:, :1] > scores[:, 1:]).reshape(-1).tolist()
    return {"n": len(scenes), "right_beats_changed": _share(wins)}


def _confirmed(judge: Recogniser, images: Images, prompts: Sequence[Prompt]) -> list[tuple[int, Scene]]:
    """Rows of neutral pictures that surely show what was asked, and a scene that says it."""
    rows = [row for row, prompt in enumerate(prompts) if prompt.role is Role.NEUTRAL]
    if not rows:
        return []
    answers = judge.answer(images[rows])
    shown = []
    for index, row in enumerate(rows):
        asked = prompts[row].attributes
        sure = all(
            answers.labels[name][index] == value and answers.confidence[name][index] >= 0.9
            for name, value in asked.items()
        )
        if sure:
            thing = Thing(asked["object"], asked["colour"], asked["pattern"])
            shown.append((row, Scene(Backdrop(asked["background"], ""), thing, Placement(128, 128, 100))))
    return shown
