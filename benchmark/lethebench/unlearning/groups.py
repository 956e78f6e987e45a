"""Groups of parameters that the papers train or edit, by name, for every family of models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from lethebench.errors import UserError

if TYPE_CHECKING:
    from lethebench.zoo import Model

_CROSS_KV = re.compile(r"\.attn2\.to_[kv]\.weight\Z")
_ATTENTION = re.compile(r"\.attn\d?\.")
_JOINT_KV = re.compile(r"\.attn\.add_[kv]_proj\.weight\Z")
_TEXT_INPUT = re.compile(r"\A(context_embedder\.weight|time_text_embed\.text_embedder\.linear_1\.weight)\Z")


def _has_cross_attention(model: Model) -> bool:
    return model.family in ("sd", "sdxl")


def _named(model: Model, wanted: Callable[[str], bool]) -> list[str]:
    return [f"denoiser.{name}" for name, _ in model.denoiser.named_parameters() if wanted(name)]


def _cross_kv(model: Model) -> list[str]:
    pattern = _CROSS_KV if _has_cross_attention(model) else _JOINT_KV
    return _named(model, lambda n: bool(pattern.search(n)))


def _attention(model: Model) -> list[str]:
    return _named(model, lambda n: bool(_ATTENTION.search(n)))


def _full(model: Model) -> list[str]:
    return _named(model, lambda n: True)


def _text_projections(model: Model) -> list[str]:
    pattern = _CROSS_KV if _has_cross_attention(model) else _TEXT_INPUT
    return _named(model, lambda n: bool(pattern.search(n)))


def _embedding(model: Model) -> list[str]:
    found = []
    for place, encoder in enumerate(model.text_encoders):
        table = encoder.get_input_embeddings()  # type: ignore[operator]
        name = next(n for n, m in encoder.named_modules() if m is table)
        part = "text_encoder" if place == 0 else f"text_encoder_{place + 1}"
        if not isinstance(table, nn.Embedding):
            raise UserError(f"{model.name}: {part} has no table of token embeddings")
        found.append(f"{part}.{name}.weight")
    return found


GROUPS: dict[str, Callable[[Model], list[str]]] = {
    "cross-attn-kv": _cross_kv,
    "attn": _attention,
    "full": _full,
    "text-projections": _text_projections,
    "embedding": _embedding,
}
"""Groups by name.

``cross-attn-kv``
    Keys and values of cross-attention (``attn2.to_k``, ``attn2.to_v``): Concept Ablation, MACE. On
    joint-attention transformers (SD3, FLUX), which have none, those of the text stream (``add_k_proj``,
    ``add_v_proj``: ours).
``attn``
    All parameters of attention layers.
``full``
    The whole denoiser.
``text-projections``
    The linear layers that take text embeddings: ``attn2.to_k`` and ``to_v`` of UNets, ``context_embedder``
    and ``text_embedder.linear_1`` of transformers (UCE on FLUX).
``embedding``
    The text encoders' tables of token embeddings.
"""


def parameter_group(model: Model, group: str) -> list[str]:
    """The group's parameters, ``<component>.<parameter>``. Raises UserError for an unknown or empty group."""
    if group not in GROUPS:
        raise UserError(f"unknown group of parameters '{group}': known {', '.join(GROUPS)}")
    found = GROUPS[group](model)
    if not found:
        raise UserError(f"{model.name} ({model.family}) has no parameters in the group '{group}'")
    return found
