"""Fitting UniForget: learn the masks and make them binary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.method import Artefact
from lethebench.methods.uniforget.backprop import backward_through_chain
from lethebench.methods.uniforget.gate import Gate
from lethebench.methods.uniforget.loss import reconstruction, size_by_layer, size_of_masks
from lethebench.methods.uniforget.masks import MaskParameters, NoisyGates
from lethebench.progress import progress
from lethebench.pruning import find_sites, mask_facts, pack
from lethebench.unlearning.neutral import (
    NeutralBatches,
    chosen_prompts,
    fitting_settings,
    working_model,
)

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.uniforget import UniForget

CURVE_POINTS = 20
"""Points of the loss curve that the facts keep."""
SMALL_LATENTS = 2**12
"""Latent elements of an image up to which plain attention is used on a CPU."""


def fit(method: UniForget, task: Task) -> Artefact:
    """The artefact: binary masks, mask parameters and facts."""
    texts = chosen_prompts(task.neutral_prompts(), method.prompts, task.generator("prompts"))
    masks, learnt = learn_masks(method, task, texts)
    gate = gate_of(method)
    kept = {name: gate.kept(m, method.threshold).cpu() for name, m in masks.by_site(_detached(masks)).items()}
    facts: dict[str, Any] = {**mask_facts(task.model.denoiser, kept), "learning": learnt}
    tensors = pack(kept)
    tensors.update({f"mask.{kind}": value.cpu() for kind, value in _detached(masks).items()})
    return Artefact(tensors, facts)


def learn_masks(
    method: UniForget, task: Task, texts: Sequence[str], name: str = "uniforget"
) -> tuple[MaskParameters, dict[str, Any]]:
    """Minimise eq. 3 over the mask parameters; also what there is to tell of it. ``name`` is for the eye."""
    model = working_model(task.model, dtype_of(method, task.model.dtype))
    sites = find_sites(model.denoiser, method.kinds)
    if not sites:
        raise UserError(f"{task.model.name} has no module to mask of kind {', '.join(method.kinds)}")
    masks = MaskParameters(sites, method.init, model.device)
    optimiser, schedule = optimiser_of(method, masks)
    settings = fitting_settings(task.sampler, model.family, method.chain_steps, method.guidance)
    batches = NeutralBatches(model, texts, settings, method.batch_size, task.generator("noise"))
    gate, seeds = gate_of(method), task.generator("gates")
    curve: list[dict[str, float]] = []
    began = time.perf_counter()
    title = f"{name} beta {method.beta:g}"
    with attention_for(batches), progress(title, total=method.steps) as bar:
        for step, number in enumerate(batches.order(method.steps)):
            seed = int(torch.randint(2**62, (1,), generator=seeds))
            optimiser.zero_grad()
            images = len(batches.chain(number).start) if method.noise_per_image else None
            gates = NoisyGates(model.denoiser, masks, gate, seed, images)
            error, size = backward(method, masks, gates, batches, number)
            optimiser.step()
            schedule.step()
            if step % max(1, method.steps // CURVE_POINTS) == 0 or step == method.steps - 1:
                curve.append(_point(step, error, size, masks, gate, method.threshold))
            bar.advance(note=f"error {float(error):.4f}, size {float(size):.3f}")
    seconds = (time.perf_counter() - began) / method.steps
    return masks, {"curve": curve, "prompts": len(texts), "timing": {"seconds_per_step": round(seconds, 4)}}


def backward(
    method: UniForget, masks: MaskParameters, gates: NoisyGates, batches: NeutralBatches, number: int
) -> tuple[Tensor, Tensor]:
    """Add the gradients of eq. 3 on a batch to the masks; returns its two terms, the second without beta."""
    target, batch = batches.final(number), batches.chain(number)

    def loss(latents: Tensor) -> Tensor:
        return reconstruction(latents, target)

    error = backward_through_chain(batch.chain, batch.start, gates, loss, recompute=method.recompute)
    size = size_term(method, masks)
    (method.beta * size).backward()  # type: ignore[no-untyped-call]
    return error, size.detach()


def attention_for(batches: NeutralBatches) -> AbstractContextManager[Any]:
    """Plain attention for small latents on a CPU, torch's own choice elsewhere.

    On mini-sd's 8x8 and 4x4 tokens, the fused kernel's backward took a quarter of a step in bfloat16 (551 ms
    against 418 with plain attention); its memory matters only for long sequences.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    small = batches.chain(0).start[0].numel() <= SMALL_LATENTS
    return sdpa_kernel(SDPBackend.MATH) if small and batches.model.device.type == "cpu" else nullcontext()


def size_term(method: UniForget, masks: MaskParameters) -> Tensor:
    """The sparsity term of the loss, without beta."""
    if method.objective in ("ecodiff", "ecodiff-raw"):
        bounded = method.objective == "ecodiff"
        return size_by_layer(masks.layers(), method.gamma, method.delta, bounded=bounded)
    return size_of_masks(masks.by_kind, method.gamma, method.delta)


def optimiser_of(method: UniForget, masks: MaskParameters) -> tuple[torch.optim.Optimizer, Any]:
    """Adam with a learning rate by kind, and its cosine schedule (paper, appendix D).

    Weight decay is decoupled (AdamW, as in EcoDiff): coupled, its gradient of 0.03 at the initial value would
    be thousands of times the loss's, and the masks would shrink whatever beta is.
    """
    groups = [{"params": [mask], "lr": getattr(method, f"lr_{kind}")} for kind, mask in masks.by_kind.items()]
    optimiser = torch.optim.AdamW(groups, eps=method.adam_eps, weight_decay=method.weight_decay)
    if method.cosine:
        return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=method.steps)
    return optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)


def gate_of(method: UniForget) -> Gate:
    """The gate with the method's constants."""
    return Gate(method.temperature, method.stretch_low, method.stretch_high, method.delta_re)


def dtype_of(method: UniForget, own: torch.dtype) -> torch.dtype:
    """The denoiser's type while fitting."""
    return own if method.dtype == "model" else getattr(torch, method.dtype)  # type: ignore[no-any-return]


def _detached(masks: MaskParameters) -> dict[str, Tensor]:
    return {kind: mask.detach() for kind, mask in masks.by_kind.items()}


def _point(
    step: int, error: Tensor, size: Tensor, masks: MaskParameters, gate: Gate, threshold: float
) -> dict[str, float]:
    kept = [gate.kept(m, threshold) for m in _detached(masks).values()]
    off = 1 - sum(int(k.sum()) for k in kept) / sum(k.numel() for k in kept)
    return {"step": step, "error": float(error), "size": float(size), "off": off}
