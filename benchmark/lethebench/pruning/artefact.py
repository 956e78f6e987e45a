"""Masks as a method's artefact, and an artefact put on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lethebench.pruning.sites import KINDS, Masks
from lethebench.pruning.zero import count, zeroed

KEEP = "keep."
"""Prefix of an artefact's tensors: masks by site."""


def pack(masks: Masks) -> dict[str, Tensor]:
    """An artefact's tensors: boolean masks ``[size]``."""
    return {KEEP + name: mask.detach().cpu().clone() for name, mask in masks.items()}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of an artefact."""
    return {n.removeprefix(KEEP): value.detach() for n, value in tensors.items() if n.startswith(KEEP)}


@contextmanager
def installed(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero the masked parts while the context is open; then restore bit for bit."""
    with zeroed(denoiser, unpack(tensors)):
        yield


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
