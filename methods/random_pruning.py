"""Control: random masks in the place of learnt ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Method, Task, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lethebench.pruning import Site
    from lethebench.zoo import Model


def random_masks(sites: list[Site], shares: dict[str, float], draws: torch.Generator) -> dict[str, Tensor]:
    """Masks that turn off exactly ``round(share * n)`` of the n elements of each kind, chosen uniformly."""
    import torch

    masks: dict[str, Tensor] = {}
    for kind, share in shares.items():
        group = [s for s in sites if s.kind == kind]
        total = sum(s.size for s in group)
        keep = torch.ones(total, dtype=torch.bool)
        keep[torch.randperm(total, generator=draws)[: round(share * total)]] = False
        masks.update(zip((s.name for s in group), keep.split([s.size for s in group]), strict=True))
    return masks


@METHODS.register
@dataclass(frozen=True)
class RandomPruning(Method):
    """Turns off the shares that UniForget does, but of randomly chosen elements.

    Is it the learnt mask, or just pruning? The shares of the three strengths are those that UniForget's
    strength of the same name gave on ``mini-sd`` in the suite ``planted`` (guidance 3, 60 steps): for
    another model, give the shares of its own artefact (``deactivated``).
    """

    ffn: float = setting(0.0, "share of feed-forward neurons turned off")
    norm: float = setting(0.0, "share of normalisation outputs turned off")
    residual: float = setting(0.0, "share of hidden channels of residual blocks turned off (UNets)")
    attn: float = setting(0.0, "share of attention heads turned off")
    draw: int = setting(0, "which random draw: another number gives other masks")

    name = "random-pruning"
    summary = "Random masks at UniForget's shares."
    family = Family.WEIGHTS
    strengths: ClassVar = {
        "weak": {"ffn": 0.16, "norm": 0.05, "residual": 0.02},
        "medium": {"ffn": 0.38, "norm": 0.17, "residual": 0.06},
        "strong": {"ffn": 0.66, "norm": 0.38, "residual": 0.17},
    }
    control = True

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        for kind in ("ffn", "norm", "residual", "attn"):
            share = getattr(self, kind)
            if not 0 <= share <= 1:
                raise ValueError(f"{kind} is a share between 0 and 1, not {share}")

    def fit(self, task: Task) -> Artefact:
        """Draw the masks."""
        from lethebench.pruning import find_sites, mask_facts, pack

        shares = {
            kind: getattr(self, kind)
            for kind in ("ffn", "norm", "residual", "attn")
            if getattr(self, kind) > 0
        }
        sites = find_sites(task.model.denoiser, tuple(shares))
        masks = random_masks(sites, shares, task.generator("masks", self.draw))
        return Artefact(pack(masks), mask_facts(task.model.denoiser, masks))

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Zero the masked parts."""
        from lethebench.pruning import installed

        with installed(model.denoiser, artefact.tensors):
            yield SamplerHooks()
