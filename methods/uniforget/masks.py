"""Mask parameters of a denoiser, and their gates with noise that can be drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lethebench.methods.uniforget.gate import Gate
from lethebench.pruning import KINDS, Site, gated
from lethebench.seeding import derive_seed


class MaskParameters:
    """One float32 vector of mask parameters for each kind, over the elements of all its sites in order.

    (EcoDiff keeps them in the model's type; in bfloat16 a step of 0.01 at 3 is lost to rounding.)
    """

    def __init__(
        self, sites: Sequence[Site], init: float, device: torch.device, dtype: torch.dtype = torch.float32
    ):
        self.sites = list(sites)
        self.by_kind: dict[str, Tensor] = {}
        for kind in KINDS:
            size = sum(s.size for s in sites if s.kind == kind)
            if size:
                self.by_kind[kind] = torch.full((size,), init, device=device, dtype=dtype, requires_grad=True)

    def by_site(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by kind, ``[..., elements of the kind]``, cut into values by site."""
        found: dict[str, Tensor] = {}
        for kind, vector in values.items():
            group = [s for s in self.sites if s.kind == kind]
            found.update(
                zip((s.name for s in group), vector.split([s.size for s in group], dim=-1), strict=True)
            )
        return found

    def layers(self) -> dict[str, list[Tensor]]:
        """The mask parameters of every site, by kind."""
        split = self.by_site(self.by_kind)
        return {kind: [split[s.name] for s in self.sites if s.kind == kind] for kind in self.by_kind}


class NoisyGates:
    """Gates of an optimiser step: fresh noise for each site and denoising step, the same when asked again.

    The noise of a step is a function of ``seed`` and the step's index alone, drawn on the CPU. Each of
    ``images`` has noise of its own, as with EcoDiff's batches of one; None shares it among all. Both
    halves of classifier-free guidance share an image's.
    """

    def __init__(
        self, denoiser: nn.Module, masks: MaskParameters, gate: Gate, seed: int, images: int | None = None
    ) -> None:
        self.denoiser, self.masks, self.gate, self.seed = denoiser, masks, gate, seed
        self.images = images

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        """Gate the denoiser for denoising step ``index``."""
        draws = torch.Generator().manual_seed(derive_seed("gate", self.seed, index))
        values: dict[str, Tensor] = {}
        for kind, mask in self.masks.by_kind.items():
            shape = mask.shape if self.images is None else (self.images, *mask.shape)
            uniform = torch.rand(shape, generator=draws, dtype=mask.dtype).to(mask.device)
            values[kind] = self.gate.sampled(mask, uniform)
        with gated(self.denoiser, self.masks.sites, self.masks.by_site(values)):
            yield
