"""Cross-attention as a recorder sees it: computed beside the model's own, which is left as it is.

Forward hooks on the ``attn2`` modules of a diffusers UNet read what ``to_q`` and ``to_k`` give and compute
the softmax of q k^T from it. Processors stay in place, no class is patched, and the images are the same to
the bit. What a method changes in the projections (masks, LoRA, hooks put in earlier) and in the attention's
mask (tokens masked, logits raised) is seen; what its own attention processor does after them is not.

Transformers with joint attention (Stable Diffusion 3, FLUX) have no cross-attention to the prompt alone:
:func:`cross_attention` finds nothing in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.errors import RunError

if TYPE_CHECKING:
    from lethebench.zoo import Model

_ORDER = ("down_blocks", "mid_block", "up_blocks")


def cross_attention(denoiser: Any) -> dict[str, Any]:
    """The UNet's cross-attention modules by name, in the order in which it calls them; else empty."""
    from diffusers.models.attention_processor import Attention

    found = {
        name: module
        for name, module in denoiser.named_modules()
        if name.endswith(".attn2")
        and name.split(".")[0] in _ORDER
        and isinstance(module, Attention)
        and module.is_cross_attention
    }
    return dict(sorted(found.items(), key=lambda entry: _ORDER.index(entry[0].split(".")[0])))


def probabilities(module: Any, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + mask), float32 ``[b, heads, pixels, tokens]``.

    ``query`` ``[b, pixels, heads * d]`` and ``key`` ``[b, tokens, heads * d]`` are what the module's ``to_q``
    and ``to_k`` gave; ``mask`` is added to the logits, ``[b, 1, tokens]`` or ``[b, heads, pixels, tokens]``.
    """
    q, k = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2).float() for x in (query, key))
    logits = q @ k.mT * module.scale
    if mask is not None:
        logits = logits + (mask if mask.ndim == 4 else mask[:, None]).float()
    found: Tensor = logits.softmax(dim=-1)
    return found


class CrossAttention:
    """Watches some cross-attention modules (of :func:`cross_attention`) for a batch of ``images`` prompts.

    After a call of the denoiser, ``seen`` holds ``reduce(probabilities)`` by module, where the probabilities
    are ``[images, heads, pixels, tokens]`` of the last rows of that call: under classifier-free guidance the
    conditional ones, whether the sampler asks for both halves at once or one after the other (a later call
    replaces what an earlier one left). Calls for fewer images (a method's own) are passed over. Nothing is
    computed while ``active`` is False.
    """

    def __init__(
        self, modules: Mapping[str, Any], images: int, reduce: Callable[[Tensor], Tensor], active: bool = True
    ) -> None:
        self.modules, self.images, self.reduce, self.active = dict(modules), images, reduce, active
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The hooks are in place inside, and gone after."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                for handle in self._hooks(name, module):
                    stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: Any) -> list[Any]:
        given: dict[str, Tensor] = {}

        def keep(what: str) -> Callable[[Any, Any, Tensor], None]:
            def hook(_module: Any, _args: Any, output: Tensor) -> None:
                if self.active:
                    given[what] = output.detach()[-self.images :]

            return hook

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.clear()
            mask = kwargs.get("attention_mask")
            if self.active and mask is not None:
                rows = len(args[0])
                if len(mask) != rows:  # one for each head
                    mask = mask.unflatten(0, (rows, -1))
                given["mask"] = mask.detach()[-self.images :]

        def after(_module: Any, _args: Any, _output: Any) -> None:
            if not self.active:
                return
            if not {"query", "key"} <= set(given):
                raise RunError(f"{name} doesn't call its to_q and to_k: unfuse its projections")
            if len(given["query"]) == self.images:
                self.seen[name] = self.reduce(probabilities(module, **given))
            given.clear()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.to_q.register_forward_hook(keep("query")),
            module.to_k.register_forward_hook(keep("key")),
            module.register_forward_hook(after),
        ]


def prompt_lengths(model: Model, texts: Sequence[str]) -> Tensor:
    """Tokens of each text in the (first) CLIP tokenizer, begin and end token included: ``[B]``, on the CPU.

    A text that is cut has the tokenizer's limit. The end token is number length - 1, counted from 0.
    """
    tokenizer = model.pipe.tokenizer
    found = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)
    return torch.tensor([len(ids) for ids in found["input_ids"]])
