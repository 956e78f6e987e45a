"""Masks (and retrained weights) as a method's artefact, and an artefact put on a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethebench.pruning.shrink import save_pruned, shrink
from lethebench.pruning.sites import KINDS, Masks, check_masks, find_sites
from lethebench.pruning.zero import count, kept_entries, restored, zero_entries_

if TYPE_CHECKING:
    from lethebench.method import Artefact
    from lethebench.zoo import Model

KEEP, CHANGE = "keep.", "change."
"""Prefixes of an artefact's tensors: masks by site, and what is added to a parameter by its name."""


def pack(masks: Masks, changes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An artefact's tensors: boolean masks ``[size]``, and changes of parameters in their own shapes."""
    found = {KEEP + name: mask.detach().cpu().clone() for name, mask in masks.items()}
    found.update({CHANGE + name: change.detach().cpu() for name, change in (changes or {}).items()})
    return found


def unpack(tensors: Mapping[str, Tensor], prefix: str = KEEP) -> dict[str, Tensor]:
    """The masks of an artefact; with ``prefix=CHANGE`` its changes of parameters."""
    return {
        name.removeprefix(prefix): value.detach()
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


@contextmanager
def installed(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Add the changes and zero the masked parts while the context is open; then restore bit for bit."""
    masks, changes = unpack(tensors), unpack(tensors, CHANGE)
    sites = find_sites(denoiser)
    check_masks(sites, masks)
    kept = kept_entries(denoiser, sites, masks)
    touched = dict.fromkeys([*changes, *(name for name, dims in kept.items() if dims)])
    with restored(denoiser, list(touched)):
        with torch.no_grad():
            for name, change in changes.items():
                parameter = denoiser.get_parameter(name)
                parameter.add_(change.to(parameter))
        zero_entries_(denoiser, kept)
        yield


def export(model: Model, artefact: Artefact, folder: Path | str) -> Path:
    """Save the model with the artefact's masked parts physically removed, as a folder that Lethe loads.

    Retrained weights are in it. ``lethe bench --model FOLDER`` and :func:`lethebench.pruning.load_pruned`
    take the folder; the model in memory stays as it is.
    """
    masks = unpack(artefact.tensors)
    with installed(model.denoiser, artefact.tensors):
        folder = save_pruned(shrink(model.pipe, masks), folder, {"model": model.name, **artefact.facts})
    (folder / "lethe.json").write_text(json.dumps(model.entry.sampler.model_dump(), indent=1))
    return folder


def mask_facts(denoiser: nn.Module, masks: Masks) -> dict[str, Any]:
    """What an artefact says of its masks: the paper's Table 5, with both denominators spelt out.

    (The paper's column M can't be a share of mask elements, since it is less than both of its columns'.
    Here ``sparsity`` is that share, and ``parameters_changed`` the share of the denoiser's parameters
    that have no effect any more.)
    """
    counts = count(denoiser, masks)
    kinds = [k for k in KINDS if k in counts.elements]
    return {
        "deactivated": {k: counts.deactivated[k] for k in kinds},
        "mask_elements": {k: counts.elements[k] for k in kinds},
        "sparsity": counts.sparsity,
        "parameters_changed": counts.parameters_changed,
        "denoiser_parameters": counts.parameters,
        "dead_parameters": counts.dead,
    }
