"""The released constants by algorithm and family, and the parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lethebench.errors import UserError

if TYPE_CHECKING:
    from lethebench.methods.esd import ESD
    from lethebench.zoo import Model


EMBEDDED_GUIDANCE = 1.0
"""What FLUX.1-dev gets as its guidance input while it is trained (forks)."""


@dataclass(frozen=True)
class Recipe:
    """The values of a fit; ``guidance`` is the scale while x_t is sampled."""

    steps: int
    lr: float
    negative_guidance: float
    guidance: float
    chain_steps: int


def recipe(method: ESD, family: str) -> Recipe:
    """The settings' values, and the released ones where those are None."""
    base = _original(family) if method.algorithm == "original" else _current(family, method.group)

    def given(name: str) -> float:
        value = getattr(method, name)
        return float(getattr(base, name) if value is None else value)

    return Recipe(
        int(given("steps")),
        given("lr"),
        given("negative_guidance"),
        given("guidance"),
        int(given("chain_steps")),
    )


def _original(family: str) -> Recipe:
    """``train-esd.py`` (SD 1.4); other families sample as in :func:`_current`."""
    if family in ("sd3", "flux"):
        return Recipe(steps=1000, lr=1e-5, negative_guidance=1.0, guidance=3.5, chain_steps=28)
    return Recipe(steps=1000, lr=1e-5, negative_guidance=1.0, guidance=3.0, chain_steps=50)


def _current(family: str, group: str) -> Recipe:
    """``esd_sd.py``, ``esd_sdxl.py``, and the forks' ``esd_flux.py``."""
    if family == "sd":
        return Recipe(steps=200, lr=5e-5, negative_guidance=2.0, guidance=3.0, chain_steps=50)
    if family == "sdxl":
        lr = 2e-4 if group.startswith("esd-x") else 1e-5
        return Recipe(steps=200, lr=lr, negative_guidance=1.0, guidance=2.0, chain_steps=50)
    return Recipe(steps=1400, lr=1e-4, negative_guidance=1.0, guidance=3.5, chain_steps=28)


_OUTPUT = ("conv_norm_out.", "conv_out.", "norm_out.", "proj_out.")
_TIME = ("time_embedding.", "add_embedding.", "time_text_embed.")


def trained_parameters(model: Model, algorithm: str, group: str) -> list[str]:
    """Names ``denoiser.<parameter>`` of the group, which means different parameters in the two algorithms.

    ``original``: of all parameters, esd-x is cross-attention, esd-u all but cross-attention, the output
    layers and the time embedding. ``current``: of linear and convolution layers only, esd-x is
    cross-attention, esd-u the rest, esd-all both (in SDXL the last two only inside blocks and without
    embeddings), esd-x-strict cross-attention's keys and values. Transformers have joint attention, which
    stands for cross-attention (forks); they follow SDXL's rule (ours). Raises UserError where the model has
    none.
    """
    mark = "attn2." if model.family in ("sd", "sdxl") else ".attn"
    if algorithm == "original":
        names = [name for name, _ in model.denoiser.named_parameters()]
        chosen = [n for n in names if _in_original(n, mark, group)]
    else:
        wanted = _in_current(mark, group, inner=model.family != "sd")
        chosen = [
            f"{name}.{part}"
            for name, module in model.denoiser.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and wanted(f"{name}.")
            for part, _ in module.named_parameters()
        ]
    if not chosen:
        raise UserError(f"{model.name} ({model.family}) has no parameters in ESD's group '{group}'")
    return [f"denoiser.{name}" for name in chosen]


def _in_original(name: str, mark: str, group: str) -> bool:
    if group == "esd-x":
        return mark in name
    return mark not in name and not name.startswith((*_OUTPUT, *_TIME))


def _in_current(mark: str, group: str, *, inner: bool) -> Callable[[str], bool]:
    def wanted(name: str) -> bool:
        if group == "esd-x":
            return mark in name
        if group == "esd-x-strict":
            return mark in name and (".to_k." in name or ".to_v." in name)
        outside = inner and ("emb" in name or "block" not in name)
        return not outside and (group == "esd-all" or mark not in name)

    return wanted
