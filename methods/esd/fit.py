"""Fitting ESD: what is erased from what, the target of the prediction, and the two algorithms' x_t."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lethebench.errors import UserError
from lethebench.method import Artefact
from lethebench.methods.esd.chains import (
    Point,
    random_steps,
    rounds,
    sample_points,
    sampling_settings,
    unconditional,
)
from lethebench.methods.esd.recipe import EMBEDDED_GUIDANCE, Recipe, recipe, trained_parameters
from lethebench.unlearning import Target, editable, encode, find_targets, prediction, working_model
from lethebench.unlearning.finetune import Optimiser, finetune

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.esd import ESD
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


class Erasure(NamedTuple):
    """``erased`` is taken out of the text ``changed``, which is what the student is asked for."""

    erased: str
    changed: str


def erasures(targets: Sequence[Target], concept_text: str, erase_from: str) -> list[Erasure]:
    """What is erased from what, each pair once. Raises UserError where a target lacks a wanted anchor."""
    found = []
    for target in targets:
        named = target.concept is not None and concept_text == "name"
        erased = target.concept if named and target.concept else target.text
        if erase_from == "anchor" and not target.anchors:
            raise UserError(f"target '{target.text}' has no anchor to erase from: leave erase_from empty")
        changed = {"": erased, "prompt": target.text, "anchor": (*target.anchors, "")[0]}[erase_from]
        found.append(Erasure(erased, changed))
    return list(dict.fromkeys(found))


def erasing_target(erased: Tensor, null: Tensor, start: Tensor, negative_guidance: float) -> Tensor:
    """``start - ng (erased - null)``, predictions ``[B, ...]`` of the base model.

    ``start`` is ``null`` in the original algorithm (paper, eq. 7) and the prediction for the text that is
    changed in the current one.
    """
    return start - negative_guidance * (erased - null)


class Eraser:
    """The loss of one batch: how far the student is from the base model's erasing target."""

    def __init__(self, base: Model, student: Model, method: ESD, values: Recipe, settings: SamplerSettings):
        self.base, self.student, self.values, self.settings = base, student, values, settings
        self.original = method.algorithm == "original"

    def target(self, batch: Sequence[Erasure], point: Point) -> Tensor:
        """What the student is to predict at the point, ``[B, ...]``."""

        def base(texts: Sequence[str]) -> Tensor:
            return prediction(self.base, *point, encode(self.base, texts, self.settings), self.settings)

        with torch.no_grad():
            empty = unconditional(self.base, len(batch), self.settings)
            null = prediction(self.base, *point, empty, self.settings)
            erased = base([pair.erased for pair in batch])
            if self.original:
                start = null
            elif all(pair.changed == pair.erased for pair in batch):
                start = erased
            else:
                start = base([pair.changed for pair in batch])
        return erasing_target(erased, null, start, self.values.negative_guidance)

    def loss(self, batch: Sequence[Erasure], point: Point) -> Tensor:
        """Mean squared distance of the student's prediction from the target, a scalar."""
        target = self.target(batch, point)
        with torch.no_grad():
            asked = encode(self.student, [pair.changed for pair in batch], self.settings)
        return F.mse_loss(prediction(self.student, *point, asked, self.settings), target)


Batches = Iterator[tuple[list[Erasure], Point]]


def walked(
    model: Model,
    pairs: Sequence[Erasure],
    settings: SamplerSettings,
    batch_size: int,
    points: int,
    draws: torch.Generator,
) -> Batches:
    """Batches with points of chains that the model samples when they are asked for, without end.

    ``points`` batches in a row share their chains.
    """
    for batch in rounds(pairs, batch_size, draws):
        steps = random_steps(settings.num_inference_steps, points, len(batch), draws)
        seed = int(torch.randint(2**62, (1,), generator=draws))
        with torch.no_grad():
            conditioning = encode(model, [pair.changed for pair in batch], settings)
        for point in sample_points(model, conditioning, settings, steps, seed):
            yield batch, point


def shuffled(batches: Batches, count: int, points: int, draws: torch.Generator) -> Batches:
    """``count`` batches drawn ahead, their rows in random order (those of a chain no longer in a row)."""
    drawn = [next(batches) for _ in range(-(-count // points) * points)]
    rows = [(pair, point, i) for batch, point in drawn for i, pair in enumerate(batch)]
    order = torch.randperm(len(rows), generator=draws).tolist()
    size = len(drawn[0][0]) if drawn else 1
    for first in range(0, count * size, size):
        chosen = [rows[i] for i in order[first : first + size]]
        latents = torch.stack([point.latents[i] for _, point, i in chosen])
        timesteps = torch.stack([point.timesteps[i] for _, point, i in chosen])
        yield [pair for pair, _, _ in chosen], Point(latents, timesteps)


def fit(method: ESD, task: Task) -> Artefact:
    """The artefact: changes of the trained parameters, and facts."""
    targets = find_targets(task, method.targets, method.count)
    pairs = erasures(targets, method.concept_text, method.erase_from)
    values = recipe(method, task.model.family)
    if method.points > values.chain_steps:
        raise UserError(
            f"a chain of {values.chain_steps} steps has no {method.points} points: lower `points`"
        )
    student = working_model(task.model, torch.float32, own=True)
    names = trained_parameters(student, method.algorithm, method.group)
    sampling = sampling_settings(task.sampler, student.family, values.chain_steps, values.guidance)
    asking = sampling
    if student.family == "flux":
        asking = sampling.model_copy(update={"guidance_scale": EMBEDDED_GUIDANCE})
    eraser = Eraser(task.model, student, method, values, asking)
    draws = task.generator("batches")
    began = time.perf_counter()
    if method.algorithm == "original":
        batches = walked(student, pairs, sampling, method.batch_size, method.points, draws)
    else:
        ahead = walked(task.model, pairs, sampling, method.batch_size, method.points, draws)
        batches = shuffled(ahead, values.steps, method.points, draws)

    def loss(index: int) -> Mapping[str, Tensor]:
        return {"error": eraser.loss(*next(batches))}

    with editable(student, names) as edit:
        curve = finetune(
            edit.parameters,
            loss,
            values.steps,
            Optimiser(values.lr, weight_decay=0.0, clip=0.0),
            title=f"esd {method.algorithm} {method.group} ng {values.negative_guidance:g}",
            dtype=getattr(torch, method.dtype),
        )
        tensors, facts = edit.changes(), edit.facts()
    facts |= {
        "targets": len(targets),
        "clusters": len({t.cluster for t in targets}),
        "texts": len(pairs),
        "recipe": asdict(values),
        "curve": curve,
        "timing": {"seconds": round(time.perf_counter() - began, 1)},
    }
    return Artefact(tensors, facts)
