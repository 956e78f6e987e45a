"""Masks by rank: EcoDiff's binarisation (``binarize`` of ``src/sdib/hooks/ff_hooks.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.method import Artefact
from lethebench.methods.uniforget.fit import learn_masks
from lethebench.pruning import mask_facts, pack
from lethebench.unlearning.neutral import chosen_prompts

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.ecodiff import EcoDiff


def fit(method: EcoDiff, task: Task) -> Artefact:
    """The artefact: binary masks by rank, mask parameters by kind, and facts."""
    texts = chosen_prompts(task.neutral_prompts(), method.prompts, task.generator("prompts"))
    masks, learnt = learn_masks(method.learner, task, texts, method.name)
    kept: dict[str, Tensor] = {}
    for kind, layers in masks.layers().items():
        names = [s.name for s in masks.sites if s.kind == kind]
        kept.update(
            zip(names, largest([m.detach().cpu() for m in layers], method.keep, method.scope), strict=True)
        )
    tensors = pack(kept)
    tensors.update({f"mask.{kind}": value.detach().cpu() for kind, value in masks.by_kind.items()})
    return Artefact(tensors, {**mask_facts(task.model.denoiser, kept), "learning": learnt})


def largest(layers: Sequence[Tensor], keep: float, scope: str) -> list[Tensor]:
    """Masks that keep the ``int(keep * n)`` largest of n values; of equal ones, the first.

    ``scope`` "global" ranks all layers' values together, "local" each layer's own. As the release, except
    where nothing is to be kept (``int(keep * n)`` is 0): the release then keeps all but the smallest.
    """
    if scope == "local":
        return [largest([layer], keep, "global")[0] for layer in layers]
    values = torch.cat(list(layers))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[: int(keep * len(values))]] = True
    return list(mask.split([len(layer) for layer in layers]))
