"""NeMo's fit on a task, its artefact, and the artefact put on a model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.hooks import Conditioning, ImageKey, SamplerHooks
from lethebench.method import Artefact, Task
from lethebench.methods.nemo.neurons import (
    Scaling,
    ValueNeurons,
    factors_of,
    mask_of,
    scaled_for_good,
    scaling,
    selected,
    z_scores,
)
from lethebench.methods.nemo.score import FirstStep, likeness, similarity
from lethebench.methods.nemo.search import Question, conduct, search
from lethebench.metrics.first_step_ssim import threshold
from lethebench.progress import progress
from lethebench.unlearning import encode, find_targets, working_model

if TYPE_CHECKING:
    from lethebench.methods.nemo import NeMo
    from lethebench.unlearning import Target
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Localized:
    """The neurons that each target needs."""

    neurons: ValueNeurons
    targets: list[Target]
    masks: Tensor
    """Bool ``[targets, total]``."""
    initial: Tensor
    """The masks before refinement."""
    embeds: Tensor
    """The targets' token embeddings, ``[targets, tokens, width]``."""
    facts: dict[str, Any]


def fit(method: NeMo, task: Task) -> Artefact:
    """NeMo's artefact: each prompt's neurons, with the SHA-256 of its text in place of the text."""
    found = localize(method, task)
    digests = [list(_digest(target.text)) for target in found.targets]
    tensors = packed(found.neurons, found.masks, found.initial)
    return Artefact({**tensors, "prompts": torch.tensor(digests, dtype=torch.uint8)}, found.facts)


def packed(neurons: ValueNeurons, refined: Tensor, initial: Tensor) -> dict[str, Tensor]:
    """Masks ``[rows, total]`` as an artefact's tensors."""
    return {
        f"{selection}.{name}": part.contiguous()
        for selection, masks in (("refined", refined), ("initial", initial))
        for name, part in neurons.split(masks).items()
    }


def unpacked(method: NeMo, neurons: ValueNeurons, tensors: Mapping[str, Tensor]) -> Tensor:
    """The masks that the method's ``selection`` asks for, bool ``[rows, total]``."""
    return neurons.join(tensors, f"{method.selection}.").bool().cpu()


def localize(method: NeMo, task: Task) -> Localized:
    """Find the neurons of every target (steps 1 to 3 of :class:`NeMo`). Raises UserError without targets."""
    began = time.monotonic()
    neurons = ValueNeurons(task.model, up_blocks=method.up_blocks)
    targets = list({t.text: t for t in find_targets(task, method.targets, method.count)}.values())
    neutral = _neutral(method, task)
    work = task.model if method.dtype == "model" else working_model(task.model, torch.bfloat16)
    noise = _noise(method, task)
    with scaling(ValueNeurons(work, up_blocks=method.up_blocks), "nemo_fit") as scaler:
        step = partial(
            FirstStep, work, task.sampler, noise=noise, scaling=scaler, batch_size=method.batch_size
        )
        first, other = step([t.text for t in targets]), step(neutral[: method.calibration_prompts])
        activations = neurons.activations(first.embeds).cpu()
        scores = z_scores(activations, _activations(neurons, task, neutral))
        limit = _calibrated(other) if method.threshold is None else method.threshold
        stop = limit if method.stop_ssim is None else method.stop_ssim
        calibrated = time.monotonic()
        clean = first.unchanged()
        likes = torch.stack([likeness(own) for own in clean])
        searches = {
            i: search(
                partial(selected, neurons, scores[i], activations[i], rising=method.group > 1),
                (like > limit).nonzero().flatten().tolist(),
                stop,
                theta=method.theta,
                theta_step=method.theta_step,
                theta_min=method.theta_min,
                top_k=method.top_k,
                group=method.group,
            )
            for i, like in enumerate(likes)
            if bool((like > limit).any())
        }
        with progress(method.name, total=len(searches)) as bar:
            found = conduct(searches, partial(answers, first, clean), lambda number: bar.advance())
    refined = _masks(neurons.total, [found[i].refined if i in found else [] for i in range(len(targets))])
    initial = _masks(neurons.total, [found[i].initial if i in found else [] for i in range(len(targets))])
    ids = [target.id for target in targets]
    facts = {
        **mask_facts(neurons, refined),
        "targets": len(targets),
        "clusters": len({t.cluster for t in targets}),
        "threshold": round(float(limit), 6),
        "first_step_ssim": dict(zip(ids, _rounded(likes.amax(dim=1)), strict=True)),
        "prompts_without_neurons": int((~refined.any(dim=1)).sum()),
        "initial_neurons_by_prompt": dict(zip(ids, initial.sum(dim=1).tolist(), strict=True)),
        "neurons_by_prompt": dict(zip(ids, refined.sum(dim=1).tolist(), strict=True)),
        "stop_ssim_not_reached": sum(f.limit > stop for f in found.values()),
        "denoiser_images": first.passes + other.passes,
        "timing": {
            "calibrate_seconds": round(calibrated - began, 3),
            "search_seconds": round(time.monotonic() - calibrated, 3),
        },
    }
    return Localized(neurons, targets, refined, initial, first.embeds, facts)


def _masks(total: int, selections: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([mask_of(total, selection) for selection in selections])


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def common(masks: Tensor, share: float) -> Tensor:
    """The neurons, bool ``[total]``, of at least ``share`` of the masks ``[rows, total]`` that have any.

    Those of any mask where ``share`` is 0.
    """
    counts = masks.sum(dim=0)
    return (counts > 0) & (counts >= share * int(masks.any(dim=1).sum()))


def mask_facts(neurons: ValueNeurons, masks: Tensor) -> dict[str, Any]:
    """Cost facts of masks ``[prompts or clusters, total]``; shares are of the union."""
    union = masks.any(dim=0)
    total = sum(p.numel() for p in neurons.denoiser.parameters())
    return {
        "parameters_changed": neurons.parameters_of(union) / total,
        "sparsity": float(union.float().mean()),
        "denoiser_parameters": total,
        "neurons": neurons.total,
        "neurons_of_union": int(union.sum()),
        "neurons_by_layer": {
            name: {
                "size": part.numel(),
                "union": int(part.sum()),
                "parameters": neurons.parameters_of_one(name),
            }
            for name, part in neurons.split(union).items()
        },
    }


def facts_at(selection: str, artefact: Artefact, union_of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The artefact's facts at settings that only ``apply`` reads: of the selection that they take.

    ``union_of`` says which neurons go, bool ``[total]``, of all masks ``[rows, total]``.
    """
    layers: dict[str, dict[str, int]] = artefact.facts["neurons_by_layer"]
    masks = torch.cat([artefact.tensors[f"{selection}.{name}"] for name in layers], dim=1).bool()
    parts = union_of(masks).split([layer["size"] for layer in layers.values()])
    off = {name: int(part.sum()) for name, part in zip(layers, parts, strict=True)}
    changed = sum(off[name] * layer["parameters"] for name, layer in layers.items())
    return {
        **artefact.facts,
        "parameters_changed": changed / artefact.facts["denoiser_parameters"],
        "sparsity": sum(off.values()) / artefact.facts["neurons"],
        "neurons_of_union": sum(off.values()),
        "neurons_by_layer": {name: {**layer, "union": off[name]} for name, layer in layers.items()},
    }


def _neutral(method: NeMo, task: Task) -> list[str]:
    texts = list(task.neutral_prompts())[: method.neutral_prompts]
    if len(texts) < 2:
        raise UserError(f"{method.name} needs at least 2 neutral prompts; the prompt set has {len(texts)}")
    return texts


def _noise(method: NeMo, task: Task) -> Tensor:
    from lethebench.methods.nemo.score import first_step_settings
    from lethebench.sampler._families import adapter_for

    shape = adapter_for(task.model, first_step_settings(task.sampler, task.model)).latent_shape
    return torch.randn(method.seeds, *shape, generator=task.generator("nemo", "noise"))


def _activations(neurons: ValueNeurons, task: Task, texts: Sequence[str], at_once: int = 256) -> Tensor:
    """The activations of texts, ``[texts, total]``, encoded some at a time."""
    found = []
    for start in range(0, len(texts), at_once):
        with torch.no_grad():
            part = encode(task.model, texts[start : start + at_once], task.sampler)
        found.append(neurons.activations(part.embeds).cpu())
    return torch.cat(found)


def _calibrated(neutral: FirstStep) -> float:
    """NeMo's threshold: mean plus standard deviation of the prompts' greatest likeness."""
    best = torch.stack([likeness(own).max() for own in neutral.unchanged()])
    return threshold(best.double().numpy())


def answers(first: FirstStep, clean: Tensor, asked: list[tuple[int, Question]]) -> list[list[float]]:
    """The SSIM that each question asks for, all in one list of rows."""
    total = first.scaling.neurons.total
    prompts = [number for number, question in asked for _ in question.seeds]
    seeds = [seed for _, question in asked for seed in question.seeds]
    factors = torch.cat([factors_of(mask_of(total, q.off), 0.0).expand(len(q.seeds), -1) for _, q in asked])
    changed = first.differences(prompts, seeds, factors)
    values = iter(similarity(clean[prompts, seeds], changed).tolist())
    return [[next(values) for _ in question.seeds] for _, question in asked]


# --- on a model -----------------------------------------------------------------------------------


class PerPrompt(SamplerHooks):
    """Scales, for each image, the neurons of its own prompt."""

    def __init__(self, scaler: Scaling, factors: Mapping[bytes, Tensor]) -> None:
        self.scaler, self.factors = scaler, factors
        self.nothing = torch.ones(scaler.neurons.total)

    def conditioning(self, conditioning: Conditioning, keys: tuple[ImageKey, ...]) -> Conditioning:
        """Each image's factors by the text of its prompt; 1 for a text that wasn't fitted."""
        rows = [self.factors.get(_digest(key.prompt.text), self.nothing) for key in keys]
        return self.scaler.marked(conditioning, torch.stack(rows))


@contextmanager
def installed(method: NeMo, model: Model, tensors: Mapping[str, Tensor]) -> Iterator[SamplerHooks]:
    """NeMo on a model while the context is open."""
    neurons = ValueNeurons(model, up_blocks=method.up_blocks)
    masks = unpacked(method, neurons, tensors)
    if method.mode == "union":
        with scaled_for_good(neurons, factors_of(common(masks, method.common), method.scale)):
            yield SamplerHooks()
        return
    digests = [bytes(row.tolist()) for row in tensors["prompts"]]
    with scaling(neurons, "nemo") as scaler:
        yield PerPrompt(scaler, dict(zip(digests, factors_of(masks, method.scale), strict=True)))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
