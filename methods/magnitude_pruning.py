"""Control: masks by the size of the weights, in the place of learnt ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, Task, setting
from lethebench.methods.random_pruning import RandomPruning
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lethebench.pruning import Site
    from lethebench.zoo import Model


def element_norms(denoiser: nn.Module, site: Site) -> Tensor:
    """The root mean square of the weights and biases of each element of a site, float64 ``[size]``.

    An element's weights are its entries in the site's cuts (``lethebench.pruning.sites``): what dies with
    it. The mean makes elements comparable whose numbers of weights differ.
    """
    import torch

    squares, entries = torch.zeros(site.size, dtype=torch.float64), 0
    for cut in site.cuts:
        parameter = denoiser.get_parameter(cut.parameter).detach().double()
        others = [dim for dim in range(parameter.dim()) if dim != cut.dim]
        rows = parameter.square().sum(others) if others else parameter.square()
        repeat, tile = cut.layout.repeat, cut.layout.tile
        rows = rows[cut.layout.offset :][: tile * site.size * repeat]
        squares += rows.view(tile, site.size, repeat).sum((0, 2)).cpu()
        entries += parameter.numel() // parameter.shape[cut.dim] * tile * repeat
    return (squares / entries).sqrt()


def without_smallest(norms: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks that turn off the ``round(share * n)`` smallest of all n values; of equal ones, the first."""
    import torch

    if not norms:
        return []
    values = torch.cat(list(norms))
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[values.argsort(stable=True)[: round(share * len(values))]] = False
    return list(keep.split([len(n) for n in norms]))


def magnitude_masks(
    denoiser: nn.Module, sites: Sequence[Site], shares: Mapping[str, float], scope: str
) -> dict[str, Tensor]:
    """Masks by site that turn off each kind's share of its elements, those of the smallest norms."""
    masks: dict[str, Tensor] = {}
    for kind, share in shares.items():
        group = [s for s in sites if s.kind == kind]
        for ranked in [[s] for s in group] if scope == "layer" else [group]:
            kept = without_smallest([element_norms(denoiser, s) for s in ranked], share)
            masks.update(zip((s.name for s in ranked), kept, strict=True))
    return masks


@METHODS.register
@dataclass(frozen=True)
class MagnitudePruning(Method):
    """Turns off as many elements as ``random-pruning`` does: those whose weights are smallest.

    Is it the learnt mask, or just pruning? Random, smallest and learnt are compared at the same share of
    each kind of element (feed-forward neurons, normalisation outputs, ...). The measure is the root mean
    square of an element's weights, the structured form of magnitude pruning (Han et al. 2015; Li et al.
    2017 rank filters by their norm within a layer; the mean over entries is ours).
    """

    ffn: float = setting(0.0, "share of feed-forward neurons turned off")
    norm: float = setting(0.0, "share of normalisation outputs turned off")
    residual: float = setting(0.0, "share of hidden channels of residual blocks turned off (UNets)")
    attn: float = setting(0.0, "share of attention heads turned off")
    scope: str = setting(
        "global", "rank the elements of a kind over all layers ('global') or in each ('layer')"
    )

    name = "magnitude-pruning"
    summary = "Masks of the smallest weights at UniForget's shares."
    family = Family.WEIGHTS
    strengths: ClassVar = RandomPruning.strengths
    control = True
    citation = (
        "Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, "
        "NeurIPS 2015; Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017"
    )

    def __post_init__(self) -> None:
        """Refuse shares that are none, and an unknown scope."""
        for kind in ("ffn", "norm", "residual", "attn"):
            share = getattr(self, kind)
            if not 0 <= share <= 1:
                raise ValueError(f"{kind} is a share between 0 and 1, not {share}")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope is 'global' or 'layer', not '{self.scope}'")

    def fit(self, task: Task) -> Artefact:
        """Rank the elements by their weights; nothing else is looked at."""
        from lethebench.pruning import KINDS, find_sites, mask_facts, pack

        shares = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) > 0}
        denoiser = task.model.denoiser
        masks = magnitude_masks(denoiser, find_sites(denoiser, tuple(shares)), shares, self.scope)
        return Artefact(pack(masks), mask_facts(denoiser, masks))

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Zero the masked parts."""
        from lethebench.pruning import installed

        with installed(model.denoiser, artefact.tensors):
            yield SamplerHooks()
