"""Where a denoiser can be masked: a table from the class of a block to its maskable vectors.

What each kind covers:

``ffn``
    Hidden neurons of the feed-forward layers, after the activation: the output of ``ff.net.0`` (GELU or
    GEGLU; ``ff`` and ``ff_context``), and of ``act_mlp`` in FLUX's single blocks. As EcoDiff
    (``src/sdib/hooks/ff_hooks.py``) and the UniForget paper (M_ffn).
``norm``
    In transformers: the modulation that the adaptive norms' ``.linear`` computes (shift, scale and
    gate entries), as EcoDiff (``norm_hook.py``) and the paper (M_norm). A UNet has no adaptive norm layer;
    there it is the output channels of the LayerNorms of its transformer blocks (our choice).
``residual``
    Hidden channels of a UNet's residual blocks: what ``conv2`` takes, after ``norm2`` and the
    activation. No counterpart in the papers, which mask transformers only (our choice): a UNet
    has most of its weights there, out of reach of the other kinds. The channels are masked after the
    group normalisation, so that those that stay keep their statistics.
``attn``
    Attention heads: what ``to_out`` takes (EcoDiff ``attention_processor.py``; M_attn, off in the paper's
    final method).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

KINDS = ("ffn", "norm", "residual", "attn")
"""The kinds of mask, in the order in which they are reported."""

Masks: TypeAlias = Mapping[str, Tensor]
"""By a site's name, a boolean vector ``[size]``: True keeps the element."""


@dataclass(frozen=True)
class Layout:
    """How the n elements of a site lie along one dimension of a tensor.

    From entry ``offset`` on, each element covers ``repeat`` consecutive entries, and the whole pattern
    comes ``tile`` times. With ``group`` > 1 an entry is off only where its whole group of that many
    consecutive elements is off.
    """

    offset: int = 0
    repeat: int = 1
    tile: int = 1
    group: int = 1

    def spread(self, values: Tensor, size: int) -> Tensor:
        """Values ``[..., n]`` to ``[..., size]``; entries that belong to no element are one (True)."""
        if self.group > 1:
            values = values.view(-1, self.group).any(1).repeat_interleave(self.group)
        if self.repeat > 1:
            values = values.repeat_interleave(self.repeat, dim=-1)
        if self.tile > 1:
            values = torch.cat([values] * self.tile, dim=-1)
        width = values.shape[-1]
        if width == size:
            return values
        before = values.new_ones(*values.shape[:-1], self.offset)
        after = values.new_ones(*values.shape[:-1], size - self.offset - width)
        return torch.cat([before, values, after], dim=-1)


@dataclass(frozen=True)
class Port:
    """A place where activations are multiplied by the gates: input or output of a module.

    ``size`` is the activation's width, ``channels_first`` says that it is ``[B, size, H, W]`` instead of
    ``[..., size]``.
    """

    module: str
    side: Literal["input", "output"]
    size: int
    layout: Layout = Layout()
    channels_first: bool = False


@dataclass(frozen=True)
class Cut:
    """A dimension of a parameter whose entries have no effect once their elements are off."""

    parameter: str
    dim: int
    layout: Layout = Layout()


@dataclass(frozen=True)
class Site:
    """A vector of ``size`` maskable elements of one module.

    ``ports`` say where gates act, ``cuts`` what becomes dead weight, and ``forms`` how a module must
    be rebuilt when it is made smaller, where that isn't just a narrower layer (see ``shrink``).
    """

    name: str
    kind: str
    size: int
    ports: tuple[Port, ...]
    cuts: tuple[Cut, ...]
    forms: tuple[tuple[str, str], ...] = ()


def find_sites(denoiser: nn.Module, kinds: Sequence[str] = KINDS) -> list[Site]:
    """The sites of the given kinds, in the order of ``named_modules``."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kind of mask '{unknown[0]}': known {', '.join(KINDS)}")
    found = (site for name, block in denoiser.named_modules() for site in _sites_of(name, block))
    return [site for site in found if site.kind in kinds]


def check_masks(sites: Sequence[Site], masks: Masks) -> None:
    """Raise ValueError unless every mask belongs to a site and has its size."""
    sizes = {s.name: s.size for s in sites}
    for name, mask in masks.items():
        if name not in sizes:
            raise ValueError(f"the model has no maskable module '{name}'")
        if mask.shape != (sizes[name],):
            raise ValueError(
                f"the mask of '{name}' has shape {tuple(mask.shape)}, its module {sizes[name]} elements"
            )


def _sites_of(name: str, block: Any) -> Iterator[Site]:
    build = _BLOCKS.get(type(block).__name__)
    if build is not None:
        yield from build(name, block)


def _linear_cuts(name: str, linear: nn.Module, dim: int, layout: Layout = Layout()) -> tuple[Cut, ...]:
    """Rows (dim 0, with the bias) or columns (dim 1) of a linear or convolution layer."""
    cuts = (Cut(f"{name}.weight", dim, layout),)
    return (*cuts, Cut(f"{name}.bias", 0, layout)) if dim == 0 and linear.bias is not None else cuts


def _feed_forward(name: str, ff: Any) -> Site:
    """Neurons of a diffusers ``FeedForward``; a gated activation's projection holds them twice."""
    first, out = ff.net[0], ff.net[2]
    size = int(out.in_features)
    rows = Layout(tile=int(first.proj.out_features) // size)
    cuts = (*_linear_cuts(f"{name}.net.0.proj", first.proj, 0, rows), *_linear_cuts(f"{name}.net.2", out, 1))
    return Site(f"{name}.net.0", "ffn", size, (Port(f"{name}.net.0", "output", size),), cuts)


def _layer_norm(name: str, norm: nn.LayerNorm, readers: Mapping[str, nn.Module]) -> Site:
    """Output channels of a LayerNorm; ``readers`` are the linear layers that take its output."""
    size = int(norm.normalized_shape[0])
    own = tuple(Cut(f"{name}.{p}", 0) for p in ("weight", "bias") if getattr(norm, p) is not None)
    columns = tuple(cut for reader, linear in readers.items() for cut in _linear_cuts(reader, linear, 1))
    return Site(name, "norm", size, (Port(name, "output", size),), own + columns, ((name, "selected-norm"),))


def _modulation(name: str, norm: Any) -> Site:
    """Outputs of an adaptive norm's ``linear``: all its shift, scale and gate entries."""
    linear, name = norm.linear, f"{name}.linear"
    size = int(linear.out_features)
    cuts = _linear_cuts(name, linear, 0)
    return Site(name, "norm", size, (Port(name, "output", size),), cuts, ((name, "scattered-linear"),))


def _heads(name: str, attn: Any, outputs: Mapping[str, tuple[Any, int]]) -> Site:
    """Heads of an attention layer; ``outputs`` are the layers that take them, and from which column."""
    heads = int(attn.heads)
    width = int(attn.to_q.out_features) // heads
    rows = Layout(repeat=width)
    cuts: tuple[Cut, ...] = ()
    for projection in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        linear = getattr(attn, projection, None)
        if linear is not None:
            cuts += _linear_cuts(f"{name}.{projection}", linear, 0, rows)
    ports: tuple[Port, ...] = ()
    for output, (linear, offset) in outputs.items():
        columns = Layout(offset=offset, repeat=width)
        cuts += _linear_cuts(output, linear, 1, columns)
        ports += (Port(output, "input", int(linear.in_features), columns),)
    return Site(name, "attn", heads, ports, cuts, ((name, "attention"),))


def _attention(name: str, attn: Any) -> Site:
    outputs = {f"{name}.to_out.0": (attn.to_out[0], 0)}
    if getattr(attn, "to_add_out", None) is not None:
        outputs[f"{name}.to_add_out"] = (attn.to_add_out, 0)
    return _heads(name, attn, outputs)


def _unet_block(name: str, block: Any) -> Iterator[Site]:
    """``BasicTransformerBlock`` of a UNet: three LayerNorms, self- and cross-attention, feed-forward."""
    readers: dict[str, dict[str, nn.Module]] = {"norm1": {}, "norm2": {}, "norm3": {}}
    for norm, attn in (("norm1", "attn1"), ("norm2", "attn2")):
        module = getattr(block, attn)
        if module is None:
            continue
        projections = ("to_q",) if module.is_cross_attention else ("to_q", "to_k", "to_v")
        readers[norm] = {f"{name}.{attn}.{p}": getattr(module, p) for p in projections}
        yield _attention(f"{name}.{attn}", module)
    readers["norm3"] = {f"{name}.ff.net.0.proj": block.ff.net[0].proj}
    for norm, linears in readers.items():
        module = getattr(block, norm)
        if linears and type(module) is nn.LayerNorm and module.elementwise_affine:
            yield _layer_norm(f"{name}.{norm}", module, linears)
    yield _feed_forward(f"{name}.ff", block.ff)


def _residual_block(name: str, block: Any) -> Iterator[Site]:
    """``ResnetBlock2D``: the channels between ``norm2`` and ``conv2``.

    A channel's column of ``conv2`` dies with it. Its row of ``conv1`` and of the time projection and its
    affine parameters of ``norm2`` die only with its whole group, since they feed the group's statistics.
    """
    size = int(block.conv2.in_channels)
    group = Layout(group=size // int(block.norm2.num_groups))
    cuts = _linear_cuts(f"{name}.conv2", block.conv2, 1)
    cuts += _linear_cuts(f"{name}.conv1", block.conv1, 0, group)
    cuts += _linear_cuts(f"{name}.norm2", block.norm2, 0, group)
    if block.time_emb_proj is not None:
        tile = int(block.time_emb_proj.out_features) // size
        cuts += _linear_cuts(
            f"{name}.time_emb_proj", block.time_emb_proj, 0, Layout(group=group.group, tile=tile)
        )
    port = Port(f"{name}.conv2", "input", size, channels_first=True)
    yield Site(f"{name}.conv2", "residual", size, (port,), cuts, ((f"{name}.conv2", "selected-conv"),))


def _joint_block(name: str, block: Any) -> Iterator[Site]:
    """``FluxTransformerBlock`` and SD3's ``JointTransformerBlock``: image and text streams."""
    for norm in ("norm1", "norm1_context"):
        yield _modulation(f"{name}.{norm}", getattr(block, norm))
    for attn in ("attn", "attn2"):
        if getattr(block, attn, None) is not None:
            yield _attention(f"{name}.{attn}", getattr(block, attn))
    for ff in ("ff", "ff_context"):
        if getattr(block, ff, None) is not None:
            yield _feed_forward(f"{name}.{ff}", getattr(block, ff))


def _single_block(name: str, block: Any) -> Iterator[Site]:
    """``FluxSingleTransformerBlock``: ``proj_out`` takes the attention's output, then the neurons'."""
    yield _modulation(f"{name}.norm", block.norm)
    out, size = block.proj_out, int(block.proj_mlp.out_features)
    heads_width = int(out.in_features) - size
    yield _heads(f"{name}.attn", block.attn, {f"{name}.proj_out": (out, 0)})
    cuts = _linear_cuts(f"{name}.proj_mlp", block.proj_mlp, 0)
    cuts += _linear_cuts(f"{name}.proj_out", out, 1, Layout(offset=heads_width))
    yield Site(f"{name}.act_mlp", "ffn", size, (Port(f"{name}.act_mlp", "output", size),), cuts)


_BLOCKS: dict[str, Callable[[str, Any], Iterator[Site]]] = {
    "BasicTransformerBlock": _unet_block,
    "ResnetBlock2D": _residual_block,
    "FluxTransformerBlock": _joint_block,
    "JointTransformerBlock": _joint_block,
    "FluxSingleTransformerBlock": _single_block,
}
