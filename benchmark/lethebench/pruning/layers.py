"""Layers of a pruned model that aren't just narrower, and how a layer is rebuilt from recorded sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form: TypeAlias = dict[str, Any]
"""How a pruned module is built: its ``type`` and sizes, as JSON can hold them."""


class ScatteredLinear(nn.Linear):
    """A linear layer that computes the kept outputs, and gives zero for the others.

    ``index`` ``[kept]`` are the places of the computed outputs among the ``full`` ones. For adaptive
    norms, whose outputs are split into shift, scale and gate by place (EcoDiff's ``SparsityLinear``).
    """

    index: Tensor

    def __init__(self, in_features: int, kept: int, full: int, *, bias: bool) -> None:
        super().__init__(in_features, kept, bias=bias, device="meta")
        self.full = full
        self.register_buffer("index", torch.empty(kept, dtype=torch.int64, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., full]``."""
        kept = super().forward(input)
        return kept.new_zeros(*kept.shape[:-1], self.full).index_copy(-1, self.index, kept)


class SelectedLayerNorm(nn.Module):
    """A LayerNorm over all ``features`` that returns only the kept channels ``index`` ``[kept]``."""

    index: Tensor

    def __init__(self, features: int, kept: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.weight = nn.Parameter(torch.empty(kept, device="meta"))
        self.bias = nn.Parameter(torch.empty(kept, device="meta")) if bias else None
        self.register_buffer("index", torch.empty(kept, dtype=torch.int64, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., features]`` to ``[..., kept]``."""
        kept = F.layer_norm(input, (self.features,), eps=self.eps).index_select(-1, self.index) * self.weight
        return kept if self.bias is None else kept + self.bias


class SelectedConv2d(nn.Conv2d):
    """A convolution over the channels ``index`` ``[in_channels]`` of its input."""

    index: Tensor

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, device="meta", **options)
        self.register_buffer("index", torch.empty(in_channels, dtype=torch.int64, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to ``[B, out_channels, H', W']``."""
        return super().forward(input.index_select(1, self.index))


def rebuild(module: nn.Module, form: Mapping[str, Any]) -> nn.Module:
    """A module of the recorded form in place of ``module``, its parameters on the meta device.

    ``attention`` changes the number of heads of the module itself.
    """
    kind, bias = form["type"], getattr(module, "bias", None) is not None
    if kind == "attention":
        module.heads = int(form["heads"])  # type: ignore[assignment]
        return module
    if kind == "linear":
        return nn.Linear(form["in"], form["out"], bias=bias, device="meta")
    if kind == "scattered-linear":
        return ScatteredLinear(form["in"], form["out"], form["full"], bias=bias)
    if isinstance(module, nn.Conv2d) and kind in ("conv", "selected-conv"):
        return _convolution(module, form, bias=bias)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and kind in ("group-norm", "selected-norm"):
        return _norm(module, form, bias=bias)
    raise ValueError(f"a {type(module).__name__} has no pruned form '{kind}'")


def _convolution(conv: nn.Conv2d, form: Mapping[str, Any], *, bias: bool) -> nn.Conv2d:
    options: dict[str, Any] = {
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "bias": bias,
    }
    if form["type"] == "conv":
        return nn.Conv2d(form["in"], form["out"], device="meta", **options)
    return SelectedConv2d(form["in"], form["out"], **options)


def _norm(norm: nn.GroupNorm | nn.LayerNorm, form: Mapping[str, Any], *, bias: bool) -> nn.Module:
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(form["groups"], form["out"], eps=norm.eps, device="meta")
    return SelectedLayerNorm(form["full"], form["out"], norm.eps, bias=bias)
