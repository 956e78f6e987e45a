"""Fitting MACE: refine, train a LoRA for each subject, join them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.judges.nets import SIDE
from lethebench.method import Artefact
from lethebench.methods.mace.loras import Factors, Subject, importance, train
from lethebench.progress import progress
from lethebench.sampler import decode, image_size
from lethebench.sampler.attention import cross_attention
from lethebench.unlearning import (
    Editable,
    Target,
    draw_latents,
    editable,
    find_targets,
    fitting_settings,
    parameter_group,
    require_anchors,
)
from lethebench.unlearning.closed_form import ClosedForm, stays
from lethebench.unlearning.tokens import EncodedText, align, encode_texts

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.mace import MACE
    from lethebench.specs import SamplerSettings

CURVE_POINTS = 20
"""Points of the loss curve that the facts keep."""


def fit(method: MACE, task: Task) -> Artefact:
    """The artefact: the changes of keys and values, and facts."""
    model = task.model
    require_segmenter(method, task)
    targets = find_targets(task, method.targets, method.count)
    require_anchors(targets)
    kept = preserved_texts(method, task)
    settings = fitting_settings(
        task.sampler, model.family, method.chain_steps or task.sampler.num_inference_steps, None
    )
    found = encode_texts(model, [*(x for t in targets for x in (t.text, t.anchors[0])), *kept], settings)
    stay = stays(torch.cat([found[text].embeds for text in kept]), method.preserve_scale, method.lamb)
    began = time.perf_counter()
    subjects = draw_subjects(method, task, targets, found, settings) if method.steps else []
    drawn = time.perf_counter()
    with editable(model, parameter_group(model, "cross-attn-kv")) as edit:
        base = _weights(edit)
        for parameter in edit.parameters.values():
            parameter.requires_grad_(False)  # only the LoRAs are trained
        if method.refine:
            _assign(edit, refined(base, targets, found, stay))
        learnt: dict[str, Any] = {}
        if subjects:
            loras, learnt = train_loras(method, task, subjects, settings)
            _assign(edit, fused(base, _weights(edit), subjects, loras, found, stay))
        changes, facts = edit.changes(), edit.facts()
        moved = [
            float((p.detach() - edit.before[n]).norm() / edit.before[n].norm())
            for n, p in edit.parameters.items()
        ]
        facts["relative_change"] = sum(moved) / len(moved)
    timing = {
        "draw_seconds": round(drawn - began, 1),
        "train_seconds": round(time.perf_counter() - drawn, 1),
    }
    counts = {"targets": len(targets), "clusters": len({t.cluster for t in targets}), "loras": len(subjects)}
    return Artefact(changes, {**facts, **counts, **learnt, "preserved_texts": len(kept), "timing": timing})


def require_segmenter(method: MACE, task: Task) -> None:
    """Raise UserError where the segmenter can't be had or can't read the model's pictures."""
    if method.segmenter == "none":
        return
    from lethebench.metrics.fbmem.segmenters import check_segmenter

    check_segmenter(method.segmenter, method.segmenter_weights, str(task.model.device))
    height, width = image_size(task.model, task.sampler)
    if method.segmenter == "segmenter-mini" and (height, width) != (SIDE, SIDE):
        raise UserError(
            f"mace: segmenter-mini reads {SIDE} x {SIDE} pictures, {task.model.name} draws {height} x {width}"
            ": set segmenter to none, birefnet or sam"
        )


def preserved_texts(method: MACE, task: Task) -> list[str]:
    """Neutral prompts, drawn so that more hold fewer."""
    texts = task.neutral_prompts()
    if not texts:
        raise UserError("the prompt set has no neutral prompts to preserve (training_prompts)")
    order = torch.randperm(len(texts), generator=task.generator("preserved")).tolist()
    return [texts[i] for i in order[: method.preserve]]


def draw_subjects(
    method: MACE,
    task: Task,
    targets: Sequence[Target],
    found: Mapping[str, EncodedText],
    settings: SamplerSettings,
) -> list[Subject]:
    """The items and concepts with their pictures, drawn by the model as it is, and masks.

    A target whose tokens its anchor all has takes no part; nor does a subject with no other.
    """
    grouped: dict[str, dict[str, tuple[int, ...]]] = {}
    for target in targets:
        own = align(found[target.text].spans[0], found[target.anchors[0]].spans[0]).own
        if own:
            grouped.setdefault(target.cluster, {})[target.text] = own
    if not grouped:
        return []
    asked = [list(rows)[k % len(rows)] for rows in grouped.values() for k in range(method.images)]
    latents = draw_latents(task.model, asked, settings, task.generator("pictures"))
    masks = foreground(method, task, latents)
    parts = zip(grouped.items(), latents.split(method.images), masks.split(method.images), strict=True)
    return [
        Subject(cluster, tuple(rows), tuple(rows.values()), own, mask) for (cluster, rows), own, mask in parts
    ]


def foreground(method: MACE, task: Task, latents: Tensor) -> Tensor:
    """Where the subject is in each picture, ``[n, 1, height, width]`` in 0 to 1, at the latents' size."""
    if method.segmenter == "none":
        return torch.ones_like(latents[:, :1])
    from lethebench.metrics.fbmem.segmenters import load_segmenter

    segmenter = load_segmenter(method.segmenter, method.segmenter_weights, str(task.model.device))
    with torch.no_grad():
        masks = torch.from_numpy(segmenter.masks(decode(task.model, latents).cpu().numpy()))
    height, width = latents.shape[-2:]
    return torch.nn.functional.adaptive_avg_pool2d(masks[:, None], (height, width)).to(latents)


def refined(
    base: Mapping[str, Tensor], targets: Sequence[Target], found: Mapping[str, EncodedText], stay: Tensor
) -> dict[str, Tensor]:
    """The first step: words beside the target's as they are in the anchor. New weights by name."""
    texts, anchors = [], []
    for target in targets:
        text, anchor = found[target.text], found[target.anchors[0]]
        rows = align(text.spans[0], anchor.spans[0]).shared
        texts.append(text.embeds[[i for i, _ in rows]])
        anchors.append(anchor.embeds[[j for _, j in rows]])
    keys, wanted = torch.cat(texts), torch.cat(anchors)
    form = ClosedForm(keys, keys.new_ones(len(keys)), stay)
    return {name: form.weight(weight, wanted @ weight.T) for name, weight in base.items()}


def fused(
    base: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    subjects: Sequence[Subject],
    loras: Sequence[Factors],
    found: Mapping[str, EncodedText],
    stay: Tensor,
) -> dict[str, Tensor]:
    """The third step: on each subject's rows what ``start`` with its LoRA gives. New weights by name.

    What ``stay`` preserves are the outputs of ``base``.
    """
    blocks = [
        torch.cat([found[t].embeds[min(o) :] for t, o in zip(s.texts, s.own, strict=True)]) for s in subjects
    ]
    keys = torch.cat(blocks)
    form = ClosedForm(keys, keys.new_ones(len(keys)), stay)
    weights = {}
    for name, weight in base.items():
        added = []
        for block, lora in zip(blocks, loras, strict=True):
            up, down = lora[name]
            added.append(block @ down.T @ up.T)
        weights[name] = form.weight(weight, keys @ start[name].T + torch.cat(added))
    return weights


def train_loras(
    method: MACE, task: Task, subjects: Sequence[Subject], settings: SamplerSettings
) -> tuple[list[Factors], dict[str, Any]]:
    """The second step, ``batch_size`` subjects at a time; the LoRAs, and facts of the training."""
    modules = cross_attention(task.model.denoiser)
    total = int(task.model.pipe.scheduler.config.num_train_timesteps)
    density = importance(total) if method.importance else torch.ones(total)
    loras: list[Factors] = []
    losses: list[Tensor] = []
    with progress("mace", total=method.steps * len(subjects)) as bar:
        for start in range(0, len(subjects), method.batch_size):
            part = subjects[start : start + method.batch_size]
            found, loss = train(
                task.model,
                modules,
                part,
                settings,
                steps=method.steps,
                lr=method.lr,
                rank=method.rank,
                timesteps=density,
                draws=[task.generator("lora", s.cluster) for s in part],
                bar=bar,
            )
            loras += found
            losses.append(loss)
    mean = torch.cat(losses, dim=1).mean(dim=1)
    points = torch.linspace(0, len(mean) - 1, min(len(mean), CURVE_POINTS)).round().long().tolist()
    return loras, {"curve": [{"step": i, "attention": float(mean[i])} for i in points]}


def _weights(edit: Editable) -> dict[str, Tensor]:
    """The weights by their names in the denoiser, in float64 on the CPU."""
    return {
        name.removeprefix("denoiser."): value.detach().cpu().double()
        for name, value in edit.parameters.items()
    }


def _assign(edit: Editable, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            edit.parameters[f"denoiser.{name}"].copy_(value)
