"""Distilling the base model's predictions into an edited one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lethebench.method import Artefact
from lethebench.progress import progress
from lethebench.unlearning import NeutralBatches, autocast, chosen_prompts, fitting_settings, working_model
from lethebench.unlearning.edits import EDIT

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.retrain import Retrain

CURVE_POINTS = 20
"""Points of the loss curve that the facts keep."""


@dataclass(frozen=True)
class Lesson:
    """One denoising step of one batch: the latents ``[B, ...]`` and the base model's predictions there."""

    batch: int
    step: int
    latents: Tensor
    predictions: tuple[Tensor, ...]


def fit(method: Retrain, task: Task) -> Artefact:
    """What fine-tuning adds to each parameter of the denoiser, and facts.

    A float32 copy of the edited denoiser is trained (AdamW without weight decay, cosine), under autocast
    where the arithmetic is smaller. Entries that the edit set to zero are set to zero after every step.
    """
    began = time.perf_counter()
    base, student = task.base(), working_model(task.model, torch.float32, own=True)
    dtype = getattr(torch, method.dtype)
    texts = chosen_prompts(task.neutral_prompts(), method.prompts, task.generator("prompts"))
    steps = task.sampler.num_inference_steps
    settings = fitting_settings(task.sampler, task.model.family, steps, method.guidance)
    taught, learning = (
        NeutralBatches(m, texts, settings, method.batch_size, task.generator("noise"))
        for m in (base, student)
    )
    lessons = teach(taught, dtype, method.steps)
    denoiser = student.denoiser
    removed = removed_entries(denoiser, base.denoiser)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    denoiser.requires_grad_(True)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=method.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=method.steps)
    curve: list[dict[str, float]] = []
    order = torch.randint(len(lessons), (method.steps,), generator=task.generator("order")).tolist()
    with torch.enable_grad(), progress("retrain", total=method.steps) as bar:
        for step, number in enumerate(order):
            optimiser.zero_grad()
            error = lesson_error(learning, lessons[number], dtype)
            error.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            remove_(denoiser, removed)
            if step % max(1, method.steps // CURVE_POINTS) == 0 or step == method.steps - 1:
                curve.append({"step": step, "error": float(error.detach())})
            bar.advance(note=f"error {float(error.detach()):.4f}")
    tensors = {f"{EDIT}denoiser.{n}": p.detach() - before[n] for n, p in denoiser.named_parameters()}
    total = sum(p.numel() for p in denoiser.parameters())
    moved = sum(int((change != 0).sum()) for change in tensors.values())
    facts: dict[str, Any] = {
        "parameters_changed": moved / total,
        "retraining": {
            "curve": curve,
            "lessons": len(lessons),
            "kept_removed": sum(int(entries.sum()) for entries in removed.values()) / total,
            "timing": {"seconds": round(time.perf_counter() - began, 1)},
        },
    }
    return Artefact(tensors, facts)


def removed_entries(edited: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """By parameter, which entries are zero in the edited model and weren't in the base; others left out."""
    originals = dict(base.named_parameters())
    found = {}
    for name, parameter in edited.named_parameters():
        zero = (parameter.detach() == 0) & (originals[name].detach() != 0)
        if bool(zero.any()):
            found[name] = zero
    return found


@torch.no_grad()
def remove_(denoiser: nn.Module, removed: dict[str, Tensor]) -> None:
    """Set the entries to zero, in place."""
    for name, entries in removed.items():
        denoiser.get_parameter(name).masked_fill_(entries, 0.0)


def teach(batches: NeutralBatches, dtype: torch.dtype, enough: int) -> list[Lesson]:
    """Lessons from every step of the base model's chains, over as many batches as give ``enough``."""
    lessons: list[Lesson] = []
    with torch.no_grad(), autocast(batches.model.device, dtype):
        for number in range(len(batches)):
            if len(lessons) >= enough:
                break
            batch = batches.chain(number)
            latents = batch.start
            for step in range(batch.chain.steps):
                predicted = batch.chain.predict(step, latents)
                lessons.append(Lesson(number, step, latents, _parts(predicted)))
                latents = batch.chain.advance(step, latents, predicted.combined)
    return lessons


def lesson_error(batches: NeutralBatches, lesson: Lesson, dtype: torch.dtype) -> Tensor:
    """Mean squared difference of the model's predictions from the lesson's."""
    chain = batches.chain(lesson.batch).chain
    with autocast(batches.model.device, dtype):
        found = _parts(chain.predict(lesson.step, lesson.latents))
    pairs = zip(found, lesson.predictions, strict=True)
    return torch.stack([F.mse_loss(got, wanted) for got, wanted in pairs]).mean()


def _parts(predicted: Any) -> tuple[Tensor, ...]:
    """Conditional and, with classifier-free guidance, unconditional prediction."""
    parts = (predicted.conditional, predicted.unconditional)
    return tuple(p for p in parts if p is not None)
