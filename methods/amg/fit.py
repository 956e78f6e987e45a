"""AMG's fit: the index, and how like neutral images are to its references at each step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.hooks import Batch, ImageKey, Step
from lethebench.method import Artefact, Task
from lethebench.methods.amg.guidance import (
    AMGHooks,
    Scales,
    Threshold,
    Watching,
    calibrated,
    exponential,
    parabolic,
)
from lethebench.methods.amg.index import ReferenceIndex, build, load, require_made_by
from lethebench.methods.amg.similarity import Describer, Similarity, make_describer
from lethebench.prompts import Prompt, Role
from lethebench.sampler import image_size, sample, unpack_latents
from lethebench.unlearning import chosen_prompts

if TYPE_CHECKING:
    from lethebench.methods.amg import AMG
    from lethebench.zoo import Model

_BATCH = 16


def fit(method: AMG, task: Task) -> Artefact:
    """The index's tensors, and sigma of neutral images where thresholds are relative to them."""
    size = image_size(task.model, task.sampler)
    describer = make_describer(
        method.descriptor, task.model, sscd=method.sscd, preset=method.preset, size=size
    )
    index = _index(method, task, describer)
    tensors = {"descriptors": index.descriptors, "duplicates": torch.tensor(index.duplicates)}
    if method.schedule == "neutral":
        tensors["neutral_sigma"], tensors["timesteps"] = _neutral_sigma(method, task, describer, index)
    return Artefact(tensors, {"captions": list(index.captions), "references": len(index)})


def hooks(method: AMG, model: Model, artefact: Artefact) -> AMGHooks:
    """The hooks that draw with what was fitted."""
    describer = make_describer(method.descriptor, model, sscd=method.sscd, preset=method.preset)
    threshold: Threshold
    if method.schedule == "neutral":
        tensors = artefact.tensors
        threshold = calibrated(tensors["neutral_sigma"], tensors["timesteps"], method.quantile)
    else:
        schedule = exponential if method.schedule == "exponential" else parabolic
        threshold = schedule(method.low, method.high)
    return AMGHooks(
        _Measure(method, describer, artefact.tensors["descriptors"]),
        threshold,
        Scales(
            method.c1, method.c2, method.c3, method.ramp, method.min_duplicates, method.gradient == "denoiser"
        ),
        artefact.facts["captions"],
        artefact.tensors["duplicates"].tolist(),
    )


class _Measure:
    """Makes the similarity of a batch."""

    def __init__(self, method: AMG, describer: Describer, references: Tensor) -> None:
        self._method, self._describer = method, describer
        self._references = references.to(describer.device)

    def __call__(self, batch: Batch) -> Similarity:
        def unpack(latents: Tensor) -> Tensor:
            return unpack_latents(batch.model, latents, batch.settings)

        return Similarity(
            self._describer, self._references, unpack, self._method.alpha, self._method.neighbours
        )


# --- the index ------------------------------------------------------------------------------------


def _index(method: AMG, task: Task, describer: Describer) -> ReferenceIndex:
    if method.index:
        index = load(Path(method.index).expanduser())
        require_made_by(index, describer, method.index)
        return index
    references = task.training_images()
    if not references:
        raise UserError("the prompt set names no training images: give an index of your own (setting index)")
    captions, duplicates = _known_captions(task) if method.captions else ({}, {})
    return build(
        [reference.image for reference in references.values()],
        describer,
        [captions.get(name, "") for name in references],
        [duplicates.get(name, 0) for name in references],
    )


def _known_captions(task: Task) -> tuple[dict[str, str], dict[str, int]]:
    """The first prompt that reproduces each reference, and how often it was in the training data."""
    captions: dict[str, str] = {}
    duplicates: dict[str, int] = {}
    for prompt in [*task.memorized_prompts(), *(p for asked in task.concepts().values() for p in asked)]:
        for name in prompt.references:
            captions.setdefault(name, prompt.text)
            duplicates.setdefault(name, prompt.duplicates or 0)
    return captions, duplicates


# --- calibration ----------------------------------------------------------------------------------


class _Recording(Watching):
    """Keeps sigma of every image at every step, ``[B, steps]`` for each batch."""

    def __init__(self, measure: _Measure) -> None:
        super().__init__(measure)
        self.seen: list[list[Tensor]] = []
        self.timesteps = torch.empty(0)

    def start(self, batch: Batch) -> Batch:
        self.seen.append([])
        self.timesteps = batch.timesteps.double().cpu()
        return super().start(batch)

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        self.seen[-1].append(self.sigma(combined, step)[0].cpu())
        return combined


def _neutral_sigma(
    method: AMG, task: Task, describer: Describer, index: ReferenceIndex
) -> tuple[Tensor, Tensor]:
    """Sigma ``[n, steps]`` of neutral images while the model draws them, and the timesteps ``[steps]``."""
    draws = task.generator("calibration")
    texts = chosen_prompts(task.neutral_prompts(), method.calibration_prompts, draws)
    suite = f"amg-{int(torch.randint(2**62, (1,), generator=draws))}"
    keys = [ImageKey(suite, Prompt(str(i), text, Role.NEUTRAL, str(i)), 0) for i, text in enumerate(texts)]
    recording = _Recording(_Measure(method, describer, index.descriptors))
    sample(task.model, keys, task.sampler, [recording], batch_size=_BATCH)
    return torch.cat([torch.stack(steps, dim=1) for steps in recording.seen]), recording.timesteps
