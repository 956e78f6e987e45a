"""Masks as zeros in the weights: the same output as hard gates, on the unchanged architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lethebench.pruning.sites import Masks, Site, check_masks, find_sites


@dataclass(frozen=True)
class Counts:
    """How much of a denoiser its masks take away."""

    elements: dict[str, int]
    """Maskable elements by kind."""
    off: dict[str, int]
    """Elements that are off, by kind."""
    parameters: int
    """Parameters of the denoiser."""
    dead: int
    """Parameters that have no effect any more."""

    @property
    def deactivated(self) -> dict[str, float]:
        """Share of the elements that are off, by kind (the paper's Table 5, columns M_ffn and M_norm)."""
        return {kind: self.off[kind] / n for kind, n in self.elements.items()}

    @property
    def sparsity(self) -> float:
        """Share of all maskable elements that are off."""
        return sum(self.off.values()) / max(1, sum(self.elements.values()))

    @property
    def parameters_changed(self) -> float:
        """Share of the denoiser's parameters that are zeroed or removed."""
        return self.dead / max(1, self.parameters)


def kept_entries(denoiser: nn.Module, sites: Sequence[Site], masks: Masks) -> dict[str, dict[int, Tensor]]:
    """By parameter and dimension, a boolean vector of the entries that keep an effect.

    A parameter's dead entries are those that any of its dimensions drops.
    """
    kept: dict[str, dict[int, Tensor]] = {}
    for site in sites:
        mask = masks.get(site.name)
        if mask is None:
            continue
        for cut in site.cuts:
            size = denoiser.get_parameter(cut.parameter).shape[cut.dim]
            entries = cut.layout.spread(mask, size)
            dims = kept.setdefault(cut.parameter, {})
            dims[cut.dim] = dims[cut.dim] & entries if cut.dim in dims else entries
    return {name: {d: k for d, k in dims.items() if not bool(k.all())} for name, dims in kept.items()}


def zero_(denoiser: nn.Module, masks: Masks) -> None:
    """Set every parameter entry whose elements are off to zero, in place."""
    sites = find_sites(denoiser)
    check_masks(sites, masks)
    zero_entries_(denoiser, kept_entries(denoiser, sites, masks))


@torch.no_grad()
def zero_entries_(denoiser: nn.Module, kept: dict[str, dict[int, Tensor]]) -> None:
    """Set the entries that :func:`kept_entries` doesn't keep to zero, in place."""
    for name, dims in kept.items():
        parameter = denoiser.get_parameter(name)
        for dim, entries in dims.items():
            parameter.index_fill_(dim, (~entries).nonzero()[:, 0].to(parameter.device), 0.0)


@contextmanager
def zeroed(denoiser: nn.Module, masks: Masks) -> Iterator[None]:
    """Zero the masked parts while the context is open; then restore the weights bit for bit."""
    sites = find_sites(denoiser)
    check_masks(sites, masks)
    kept = kept_entries(denoiser, sites, masks)
    with restored(denoiser, [name for name, dims in kept.items() if dims]):
        zero_entries_(denoiser, kept)
        yield


@contextmanager
def restored(denoiser: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put the named parameters back as they were, bit for bit, when the context closes."""
    saved = {name: denoiser.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                denoiser.get_parameter(name).copy_(value)


def count(denoiser: nn.Module, masks: Masks) -> Counts:
    """Count masked elements by kind, and the parameters that die with them."""
    sites = [s for s in find_sites(denoiser) if s.name in masks]
    check_masks(sites, masks)
    elements: dict[str, int] = {}
    off: dict[str, int] = {}
    for site in sites:
        elements[site.kind] = elements.get(site.kind, 0) + site.size
        off[site.kind] = off.get(site.kind, 0) + int((~masks[site.name]).sum())
    dead = sum(
        _dead(denoiser.get_parameter(n), dims) for n, dims in kept_entries(denoiser, sites, masks).items()
    )
    return Counts(elements, off, sum(p.numel() for p in denoiser.parameters()), dead)


def _dead(parameter: Tensor, dims: dict[int, Tensor]) -> int:
    live = 1
    for dim, size in enumerate(parameter.shape):
        live *= int(dims[dim].sum()) if dim in dims else size
    return parameter.numel() - live
