"""Fine-tuning a pruned model on neutral prompts, while what was removed stays removed.

The paper fine-tunes all parameters "utilizing the same training configuration" and says no more. Ours is
distillation: at latents along the base model's own chains of neutral prompts, the pruned model learns the
base model's predictions (with and without the prompt). No training image is needed, so the method's
knowledge stays neutral prompts. It takes any masks: a wrapper for other permanent edits can use it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lethebench.progress import progress
from lethebench.pruning import Masks, find_sites
from lethebench.pruning.zero import kept_entries, zero_entries_
from lethebench.unlearning.neutral import NeutralBatches, working_model

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Lesson:
    """One denoising step of one batch: the latents ``[B, ...]`` and the base model's predictions there."""

    batch: int
    step: int
    latents: Tensor
    predictions: tuple[Tensor, ...]


def retrain(
    model: Model,
    masks: Masks,
    texts: Sequence[str],
    *,
    settings: SamplerSettings,
    steps: int,
    lr: float,
    batch_size: int,
    dtype: torch.dtype,
    draws: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What fine-tuning adds to each parameter of the denoiser, by name, and facts.

    ``model`` is the base model and stays as it is; a float32 copy of its denoiser is trained (AdamW, cosine),
    under autocast to ``dtype`` where that is smaller. Masked entries are set to zero after every step.
    """
    began = time.perf_counter()
    student = working_model(model, torch.float32, own=True)
    batches = NeutralBatches(student, texts, settings, batch_size, draws)
    lessons = teach(batches, dtype, steps)
    denoiser = student.denoiser
    kept = kept_entries(denoiser, find_sites(denoiser), masks)
    base = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    zero_entries_(denoiser, kept)
    denoiser.requires_grad_(True)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    curve: list[dict[str, float]] = []
    order = torch.randint(len(lessons), (steps,), generator=draws).tolist()
    with progress("retrain", total=steps) as bar:
        for step, number in enumerate(order):
            optimiser.zero_grad()
            error = lesson_error(batches, lessons[number], dtype)
            error.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            zero_entries_(denoiser, kept)
            if step % max(1, steps // 10) == 0 or step == steps - 1:
                curve.append({"step": step, "error": float(error.detach())})
            bar.advance(note=f"error {float(error.detach()):.4f}")
    denoiser.requires_grad_(False)
    changes = {name: p.detach() - base[name] for name, p in denoiser.named_parameters()}
    seconds = round(time.perf_counter() - began, 1)
    return changes, {"curve": curve, "lessons": len(lessons), "timing": {"seconds": seconds}}


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


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``, off where it is float32 or wider."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype.itemsize < 4)


def _parts(predicted: Any) -> tuple[Tensor, ...]:
    """Conditional and, with classifier-free guidance, unconditional prediction."""
    parts = (predicted.conditional, predicted.unconditional)
    return tuple(p for p in parts if p is not None)
