"""The begin token's logit, changed inside the model's own attention.

Nothing is patched: forward pre-hooks on the denoiser and its cross-attention modules, and for Stable
Diffusion 3 processors on its joint attention, are in place inside :func:`changed_attention` and gone after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lethebench.errors import UserError
from lethebench.sampler.attention import cross_attention

if TYPE_CHECKING:
    from lethebench.zoo import Model

FACTOR = "begin_factor"
"""Argument of the denoiser, ``[b]``: c1 of each row of its call (1 leaves the row alone)."""

Change = Callable[[str, Tensor, Tensor], Tensor]
"""What is added to the begin token's logits ``[b, heads, queries]``, given the layer's name, them, and c1 as
``[b, 1, 1]``."""


def raised(_layer: str, logits: Tensor, c1: Tensor) -> Tensor:
    """(c1 - 1) |l|: never lowers the begin token's attention (ours)."""
    return (c1 - 1) * logits.abs()


def multiplied(_layer: str, logits: Tensor, c1: Tensor) -> Tensor:
    """(c1 - 1) l, so that the logit is c1 l (released code)."""
    return (c1 - 1) * logits


FORMS: dict[str, Change] = {"raise": raised, "multiply": multiplied}


@contextmanager
def changed_attention(model: Model, change: Change) -> Iterator[None]:
    """Inside, a call of the denoiser may carry :data:`FACTOR`, and Stable Diffusion 3 knows a mask.

    A call without it is as before. In FLUX, which has no begin token, the factor is only taken off. Raises
    UserError where Stable Diffusion 3's attention isn't diffusers' own.
    """
    rows: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.callback(
            model.denoiser.register_forward_pre_hook(_taker(rows), with_kwargs=True).remove  # type: ignore[operator]
        )
        for name, module in cross_attention(model.denoiser).items():
            hook = _adder(name, rows, change)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if model.family == "sd3":
            for name, module in joint_attention(model.denoiser).items():
                stack.callback(module.set_processor, module.processor)
                module.set_processor(JointAttention(name, rows, change))
        yield


def joint_attention(denoiser: Any) -> dict[str, Any]:
    """Stable Diffusion 3's joint attention modules by name.

    Raises UserError where one has another processor than diffusers' ``JointAttnProcessor2_0``.
    """
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    found = {
        f"transformer_blocks.{i}.attn": block.attn for i, block in enumerate(denoiser.transformer_blocks)
    }
    for name, module in found.items():
        if type(module.processor) is not JointAttnProcessor2_0:
            raise UserError(
                f"ren: {name} has the attention processor {type(module.processor).__name__}: put diffusers' "
                "JointAttnProcessor2_0 back (unfuse_qkv_projections)"
            )
    return found


def _taker(rows: dict[str, Tensor]) -> Callable[..., Any]:
    """Takes the factor off a call of the denoiser, for the attention modules to find."""

    def hook(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        rows.clear()
        if FACTOR in kwargs:
            rows[FACTOR] = kwargs[FACTOR]
        return args, {name: value for name, value in kwargs.items() if name != FACTOR}

    return hook


def _adder(name: str, rows: Mapping[str, Tensor], change: Change) -> Callable[..., Any]:
    """Adds the change to the cross-attention's mask, which any of diffusers' processors adds to the logits.

    The query and the begin token's key are computed once more for it, by the module's own projections, so
    that whatever changes these is in the logits.
    """

    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if FACTOR not in rows:
            return None
        text = kwargs["encoder_hidden_states"]
        query, key = module.to_q(args[0]), module.to_k(text)
        logits = begin_logits(_heads(query, module), _heads(key, module)[:, :, 0], module.scale)
        bias = logits.new_zeros(*logits.shape, text.shape[1])
        if kwargs.get("attention_mask") is not None:
            bias = bias + kwargs["attention_mask"][:, None]
        bias[..., 0] += change(name, logits, _column(rows, logits))
        return args, {**kwargs, "attention_mask": bias.flatten(0, 1).to(query.dtype)}

    return hook


def begin_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """One token's logits, scale times query times key: ``[b, heads, queries]``, in float32 or wider.

    ``query`` is ``[b, heads, queries, d]``, ``key`` that of the token, ``[b, heads, d]``.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    found: Tensor = scale * torch.einsum("bhqd,bhd->bhq", query.to(wide), key.to(wide))
    return found


def _heads(x: Tensor, module: Any) -> Tensor:
    """``[b, tokens, heads * d]`` as ``[b, heads, tokens, d]``."""
    found: Tensor = x.unflatten(-1, (module.heads, -1)).transpose(1, 2)
    return found


def _column(rows: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    return rows[FACTOR].to(logits)[:, None, None]


class JointAttention:
    """Joint attention of image and text tokens (Stable Diffusion 3) with a mask and the changed begin logit.

    ``attention_mask``, which diffusers' own processor ignores, is bool ``[b, text tokens]``: False for a text
    token that no query may attend to. The begin token is the first text token; its logit is changed for the
    image's queries.
    """

    def __init__(self, name: str, rows: Mapping[str, Tensor], change: Change) -> None:
        self.name, self.rows, self.change = name, rows, change

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The image's and the text's output, each shaped like its input."""
        images, texts = hidden_states.shape[1], encoder_hidden_states.shape[1]
        query = _joined(
            attn,
            attn.to_q(hidden_states),
            attn.add_q_proj(encoder_hidden_states),
            attn.norm_q,
            attn.norm_added_q,
        )
        key = _joined(
            attn,
            attn.to_k(hidden_states),
            attn.add_k_proj(encoder_hidden_states),
            attn.norm_k,
            attn.norm_added_k,
        )
        value = _joined(attn, attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states))
        scale = query.shape[-1] ** -0.5
        if FACTOR in self.rows:
            logits = begin_logits(query[:, :, :images], key[:, :, images], scale)
            added = self.change(self.name, logits, _column(self.rows, logits)).to(query.dtype)
            # one more dimension of query and key, instead of a mask of all queries by all keys
            query = torch.cat([query, F.pad(added / scale, (0, texts))[..., None]], dim=-1)
            begin = torch.arange(images + texts, device=key.device) == images
            key = torch.cat([key, begin.to(key.dtype)[:, None].expand(*key.shape[:-1], 1)], dim=-1)
        mask = attention_mask
        if mask is not None:
            mask = F.pad(mask, (images, 0), value=True)[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        image, text = found.transpose(1, 2).flatten(2).split([images, texts], dim=1)
        for layer in attn.to_out:
            image = layer(image)
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _joined(attn: Any, image: Tensor, text: Tensor, image_norm: Any = None, text_norm: Any = None) -> Tensor:
    """``[b, heads, image and text tokens, d]`` of the two projections, each with its norm over d."""
    parts = [
        _heads(x, attn) if norm is None else norm(_heads(x, attn))
        for x, norm in ((image, image_norm), (text, text_norm))
    ]
    return torch.cat(parts, dim=2)
