"""Fitting EAP: the two terms of the loss, and model and adversary in turns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.method import Artefact
from lethebench.methods.eap import GROUPS
from lethebench.methods.eap.adversary import Adversary, Vocabulary, vocabulary
from lethebench.methods.esd.chains import (
    Point,
    random_steps,
    rounds,
    sample_points,
    sampling_settings,
    unconditional,
)
from lethebench.methods.esd.fit import erasing_target, erasures
from lethebench.methods.esd.recipe import trained_parameters
from lethebench.unlearning import editable, encode, find_targets, noised, prediction, working_model
from lethebench.unlearning.diffusion import FLOW
from lethebench.unlearning.finetune import Optimiser, finetune

if TYPE_CHECKING:
    from lethebench.hooks import Conditioning
    from lethebench.method import Task
    from lethebench.methods.eap import EAP
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


def clean_distance(model: Model, found: Tensor, wanted: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared distance of the clean images that two predictions ``[B, ...]`` imply, a scalar.

    At the same latents these differ by ``sqrt(1 - a_t) / sqrt(a_t)`` of the predictions' difference
    (epsilon) or ``sqrt(1 - a_t)`` of it (v). For flow matching it is the velocities' distance.
    """
    difference = found - wanted
    if model.family not in FLOW:
        one, zero = torch.ones_like(difference), torch.zeros_like(difference)
        factor = noised(model, zero, one, timesteps)
        if model.pipe.scheduler.config.get("prediction_type", "epsilon") == "epsilon":
            factor = factor / noised(model, one, zero, timesteps)
        difference = factor * difference
    return difference.square().mean()


class Fitting:
    """Student, base model and adversary, and what is asked of them."""

    def __init__(self, method: EAP, task: Task, student: Model, texts: Sequence[str]) -> None:
        self.method, self.base, self.student, self.texts = method, task.model, student, list(texts)
        self.settings: SamplerSettings = sampling_settings(
            task.sampler, student.family, method.chain_steps, method.guidance
        )
        words = Vocabulary(self.base, vocabulary(task, method.vocabulary), self.settings)
        erased = Vocabulary(self.base, self.texts, self.settings)
        candidates = [
            words.candidates(erased.embeds[i], text, method.k_closest, method.centers)
            for i, text in enumerate(self.texts)
        ]
        self.adversary = Adversary(
            words,
            candidates,
            lr=method.gumbel_lr,
            temperature=method.temperature,
            hard=method.hard,
            draws=task.generator("gumbel"),
        )
        self._draws = task.generator("batches")

    def batches(self) -> Iterator[tuple[Conditioning, Point, Conditioning, Point]]:
        """Erased texts and adversarial ones with their points, without end; before each chain the search."""
        method = self.method
        for numbers in rounds(range(len(self.texts)), method.batch_size, self._draws):
            asked = self._asked(numbers)
            for _ in range(method.search_steps):
                self._search(numbers, asked)
            with torch.no_grad():
                weights = [self.adversary.draw(n) for n in numbers]
                other = self.adversary.mixed(asked, numbers, weights)
            steps, seed = self._places(len(numbers), method.points)
            erased = sample_points(self.student, asked, self.settings, steps, seed)
            kept = sample_points(self.student, other, self.settings, steps, seed)
            for point, second in zip(erased, kept, strict=True):
                yield asked, point, other, second

    def loss(
        self, asked: Conditioning, point: Point, other: Conditioning, second: Point
    ) -> Mapping[str, Tensor]:
        """The two terms at a batch of B points, scalars."""
        with torch.no_grad():
            empty = unconditional(self.base, len(point.latents), self.settings)
            null = prediction(self.base, *point, empty, self.settings)
            erased = prediction(self.base, *point, asked, self.settings)
        target = erasing_target(erased, null, null, self.method.negative_guidance)
        found = prediction(self.student, *point, asked, self.settings)
        return {
            "erasing": clean_distance(self.base, found, target, point.timesteps),
            "preservation": self.method.preservation * self.change(other, second),
        }

    def change(self, asked: Conditioning, point: Point) -> Tensor:
        """How much the student's clean image differs from the base model's, a scalar."""
        found = prediction(self.student, *point, asked, self.settings)
        wanted = prediction(self.base, *point, asked, self.settings)
        return clean_distance(self.base, found, wanted, point.timesteps)

    def _search(self, numbers: Sequence[int], asked: Conditioning) -> None:
        def change(weights: list[Tensor]) -> Tensor:
            other = self.adversary.mixed(asked, numbers, weights)
            point = sample_points(self.student, other, self.settings, *self._places(len(numbers), 1))[0]
            return self.change(other, point)

        self.adversary.ascend(change, numbers)

    def _asked(self, numbers: Sequence[int]) -> Conditioning:
        with torch.no_grad():
            return encode(self.base, [self.texts[n] for n in numbers], self.settings)

    def _places(self, rows: int, points: int) -> tuple[Tensor, int]:
        steps = random_steps(self.settings.num_inference_steps, points, rows, self._draws)
        return steps, int(torch.randint(2**62, (1,), generator=self._draws))


def fit(method: EAP, task: Task) -> Artefact:
    """The artefact: changes of the trained parameters, and facts."""
    targets = find_targets(task, method.targets, method.count)
    texts = [pair.erased for pair in erasures(targets, method.concept_text, "")]
    student = working_model(task.model, torch.float32, own=True)
    names = trained_parameters(student, "original", GROUPS[method.group])
    began = time.perf_counter()
    fitting = Fitting(method, task, student, texts)
    batches = fitting.batches()

    def loss(index: int) -> Mapping[str, Tensor]:
        return fitting.loss(*next(batches))

    with editable(student, names) as edit:
        curve = finetune(
            edit.parameters,
            loss,
            method.steps,
            Optimiser(method.lr, weight_decay=0.0, clip=0.0),
            title=f"eap {method.group} ng {method.negative_guidance:g}",
            dtype=getattr(torch, method.dtype),
        )
        tensors, facts = edit.changes(), edit.facts()
    facts |= {
        "targets": len(targets),
        "clusters": len({t.cluster for t in targets}),
        "texts": len(texts),
        "adversarial": most_found(fitting.adversary),
        "curve": curve,
        "timing": {"seconds": round(time.perf_counter() - began, 1)},
    }
    return Artefact(tensors, facts)


def most_found(adversary: Adversary, count: int = 10) -> list[dict[str, Any]]:
    """The texts that the search has come to most often, and for how many erased texts each."""
    found = Counter(adversary.found(n) for n in range(len(adversary.logits)))
    return [{"text": text, "erased_texts": n} for text, n in found.most_common(count)]
