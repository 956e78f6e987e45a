"""Fitting CA: anchor images, the loss, and what of the weights it moves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lethebench.errors import UserError
from lethebench.judges.nets import SIDE
from lethebench.method import Artefact
from lethebench.methods.ca import PARAMETERS
from lethebench.prompts import Role
from lethebench.sampler import decode, unpack_latents
from lethebench.sampler.attention import cross_attention
from lethebench.unlearning import (
    Target,
    draw_latents,
    editable,
    encode,
    find_targets,
    fitting_settings,
    noised,
    parameter_group,
    prediction,
    random_timesteps,
    require_anchors,
    training_target,
    working_model,
)
from lethebench.unlearning.finetune import Optimiser, finetune

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.ca import ConceptAblation
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


def fit(method: ConceptAblation, task: Task) -> Artefact:
    """The artefact: changes of the trained parameters, and facts."""
    recipe = method.recipe
    targets = find_targets(task, method.targets, method.count)
    require_anchors(targets)
    model = working_model(task.model, torch.float32)
    names = parameter_group(model, PARAMETERS[recipe.parameters])
    moving = own_rows(model, names, targets) if recipe.parameters == "embedding" else {}
    settings = fitting_settings(task.sampler, model.family, method.chain_steps, method.guidance)
    began = time.perf_counter()
    anchors, dropped = anchor_images(method, task, model, targets, settings)
    drawn = time.perf_counter()
    batches = Batches(model, anchors, recipe.batch_size, bool(recipe.prior_weight), task.generator("batches"))
    teacher = working_model(model, torch.float32, own=True) if method.anchor_weights == "base" else model
    optimiser = Optimiser(
        recipe.lr, weight_decay=method.weight_decay, clip=method.clip, accumulate=method.accumulate
    )

    def loss(index: int) -> Mapping[str, Tensor]:
        return ablation_loss(model, teacher, batches.draw(), settings, method.objective, recipe.prior_weight)

    detached = start_token_detached(model) if method.detach_start else nullcontext()
    with editable(model, names) as edit, detached:
        curve = finetune(
            {name: edit.parameters[name] for name in (moving or names)},
            loss,
            recipe.steps,
            optimiser,
            title=f"ca {recipe.parameters}",
            moving=moving,
            dtype=getattr(torch, method.dtype),
        )
        tensors, facts = edit.changes(), edit.facts()
    ended, trained = time.perf_counter(), set(anchors.targets)
    facts |= {
        "targets": len(trained),
        "clusters": len({t.cluster for t in targets if t.text in trained}),
        "anchor_images": {
            "used": len(anchors.targets),
            "copies_dropped": dropped,
        },
        "steps": recipe.steps,
        "learning_rate": recipe.lr,
        "curve": curve,
        "timing": {"anchor_seconds": round(drawn - began, 1), "training_seconds": round(ended - drawn, 1)},
    }
    return Artefact(tensors, facts)


# --- anchor images --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchors:
    """N anchor images with their prompts: ``targets[i]`` is to be drawn as ``anchors[i]``.

    ``latents`` are final latents ``[N, ...]`` as the denoiser takes them.
    """

    targets: list[str]
    anchors: list[str]
    latents: Tensor


def anchor_pairs(targets: Sequence[Target], images: int) -> list[tuple[Target, str]]:
    """``images`` pairs of target and anchor a cluster: its targets and their anchors in turn.

    In rounds of one pair a cluster, so that a part of the list does justice to all.
    """
    clusters: dict[str, list[Target]] = {}
    for target in targets:
        clusters.setdefault(target.cluster, []).append(target)
    found = []
    for i in range(images):
        for group in clusters.values():
            target, turn = group[i % len(group)], i // len(group)
            found.append((target, target.anchors[turn % len(target.anchors)]))
    return found


def anchor_images(
    method: ConceptAblation,
    task: Task,
    model: Model,
    targets: Sequence[Target],
    settings: SamplerSettings,
) -> tuple[Anchors, int]:
    """Images that the model draws for the anchors, without copies, and how many copies were dropped.

    Raises UserError where none is left.
    """
    used = method.recipe.steps * method.accumulate * method.recipe.batch_size
    pairs = anchor_pairs(targets, method.images)[: max(1, used)]
    latents = draw_latents(model, [anchor for _, anchor in pairs], settings, task.generator("anchors"))
    kept = list(range(len(pairs)))
    if method.descriptor != "none":
        copies = copies_among(method, task, model, [target for target, _ in pairs], latents, settings)
        kept = [i for i in kept if i not in copies]
    if not kept:
        raise UserError(
            f"all {len(pairs)} anchor images are copies of the targets' training images (similarity above "
            f"{method.similarity:g}): raise `similarity` or switch the filter off with descriptor=none"
        )
    chosen = [pairs[i] for i in kept]
    return Anchors([t.text for t, _ in chosen], [a for _, a in chosen], latents[kept]), len(pairs) - len(kept)


def copies_among(
    method: ConceptAblation,
    task: Task,
    model: Model,
    targets: Sequence[Target],
    latents: Tensor,
    settings: SamplerSettings,
) -> set[int]:
    """The images of triggers that resemble a training image of their own target above the limit."""
    places = [i for i, target in enumerate(targets) if target.role is Role.TRIGGER]
    if not places:
        return set()
    from lethebench.judges import load

    judge = load("copy-mini", device=str(model.device))
    images = decode(model, unpack_latents(model, latents[places], settings))
    references = {p.id: p.references for p in task.memorized_prompts()}
    described = {
        name: judge.describe(at_judges_size(torch.tensor(reference.image)[None]))[0]
        for name, reference in task.training_images().items()
    }
    found = set()
    for place, descriptor in zip(places, judge.describe(at_judges_size(images)), strict=True):
        own = [described[r] for r in references[targets[place].id]]
        if own and float((np.stack(own) @ descriptor).max()) > method.similarity:
            found.add(place)
    return found


def at_judges_size(images: Tensor) -> NDArray[np.uint8]:
    """Images uint8 ``[n, height, width, 3]`` at the size that the built-in judges take."""
    if images.shape[1:3] != (SIDE, SIDE):
        resized = F.interpolate(
            images.permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="bilinear", antialias=True
        )
        images = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return images.cpu().numpy()


# --- loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B images for the ablation loss, followed by as many for the prior loss or by none.

    ``latents`` and ``noise`` are ``[B + len(prior), ...]``, ``timesteps`` ``[B + len(prior)]``.
    """

    targets: list[str]
    anchors: list[str]
    prior: list[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor


class Batches:
    """Draws batches: every anchor image once in random order, then again; prior images in another order."""

    def __init__(
        self, model: Model, images: Anchors, batch_size: int, prior: bool, draws: torch.Generator
    ) -> None:
        self._model, self._images, self._draws = model, images, draws
        self._size, self._prior = batch_size, prior
        self._pending: dict[str, list[int]] = {"ablation": [], "prior": []}

    def draw(self) -> Batch:
        """The next batch, with new noise and timesteps."""
        images, model = self._images, self._model
        rows, prior = self._rows("ablation"), self._rows("prior") if self._prior else []
        latents = images.latents[rows + prior]
        noise = torch.randn(latents.shape, generator=self._draws).to(latents)
        return Batch(
            [images.targets[i] for i in rows],
            [images.anchors[i] for i in rows],
            [images.anchors[i] for i in prior],
            latents,
            noise,
            random_timesteps(model, len(latents), self._draws),
        )

    def _rows(self, purpose: str) -> list[int]:
        pending = self._pending[purpose]
        while len(pending) < self._size:
            pending += torch.randperm(len(self._images.targets), generator=self._draws).tolist()
        rows, self._pending[purpose] = pending[: self._size], pending[self._size :]
        return rows


def ablation_loss(
    model: Model, teacher: Model, batch: Batch, settings: SamplerSettings, objective: str, prior_weight: float
) -> dict[str, Tensor]:
    """The terms of the loss, scalars: ``ablation``, and ``prior`` times its weight where the batch has one.

    ``teacher`` predicts for the anchors without a gradient: ``model`` itself, or one that stays as it was.
    """
    size = len(batch.targets)
    noisy = noised(model, batch.latents, batch.noise, batch.timesteps)
    conditioning = encode(model, [*batch.targets, *batch.prior], settings)
    predicted = prediction(model, noisy, batch.timesteps, conditioning, settings)
    wanted = training_target(model, batch.latents, batch.noise, batch.timesteps)
    terms = {}
    if batch.prior:
        terms["prior"] = prior_weight * F.mse_loss(predicted[size:], wanted[size:])
    if objective == "model-based":
        with torch.no_grad():
            anchors = encode(teacher, batch.anchors, settings)
            wanted = prediction(teacher, noisy[:size], batch.timesteps[:size], anchors, settings)
    return {"ablation": F.mse_loss(predicted[:size], wanted[:size]), **terms}


@contextmanager
def start_token_detached(model: Model) -> Iterator[None]:
    """No gradient through the keys and values of the first text token, while the context is open.

    It is the same in every prompt (``CustomDiffusionAttnProcessor`` of the released model_pipeline.py).
    Joint-attention transformers have no cross-attention and are left alone.
    """

    def detach(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    modules = [m for a in cross_attention(model.denoiser).values() for m in (a.to_k, a.to_v)]
    handles = [m.register_forward_hook(detach) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- token embeddings -----------------------------------------------------------------------------


def own_rows(model: Model, tables: Sequence[str], targets: Sequence[Target]) -> dict[str, Tensor]:
    """The rows of each table that stand for the targets' own tokens, boolean ``[tokens, 1]``.

    The targets' own tokens are those of their texts that no anchor has. Tables without such a row are left
    out. Raises UserError where no target has a token of its own, or the tables are in half precision.
    """
    found = {}
    for name, encoder, tokenizer in zip(tables, model.text_encoders, model.tokenizers, strict=True):
        weight = encoder.get_input_embeddings().weight  # type: ignore[operator]
        if weight.dtype.itemsize < 4:
            raise UserError(f"{model.name} is in half precision: load it in float32 to train embeddings")

        def tokens(texts: Sequence[str], tokenizer: Any = tokenizer) -> set[int]:
            return {i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids}

        own = tokens([t.text for t in targets]) - tokens([a for t in targets for a in t.anchors])
        if own:
            rows = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
            rows[sorted(own)] = True
            found[name] = rows
    if not found:
        raise UserError("no target has a token of its own: train another group of parameters than embedding")
    return found
