"""What the denoiser is told of each image: which tokens to mask, and which rows are conditional."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lethebench.hooks import Batch, Conditioning, SamplerHooks
from lethebench.methods.ren.attention import FACTOR


@dataclass(frozen=True)
class RenHooks(SamplerHooks):
    """Gives the batch's conditionings the arguments that :mod:`lethebench.methods.ren.attention` reads.

    A conditioning that another method makes on its own has none of them, and is left alone. A method that
    changes the number of text tokens must come first in a composition.
    """

    c1: float
    mask: str

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.c1 == 1 and self.mask == "none"

    def start(self, batch: Batch) -> Batch:
        """The batch with a mask for both conditionings, and the begin token's factor."""
        if self.idle:
            return batch
        keep = None if self.mask == "none" else kept_tokens(batch, self.mask == "summary")
        negative = batch.conditioning.negative
        if negative is not None:
            negative = self._told(negative, batch, keep, 1.0)
        positive = self._told(batch.conditioning, batch, keep, self.c1)
        return replace(batch, conditioning=replace(positive, negative=negative))

    def _told(self, conditioning: Conditioning, batch: Batch, keep: Tensor | None, c1: float) -> Conditioning:
        extra: dict[str, Any] = dict(conditioning.extra)
        family = batch.model.family
        if self.c1 != 1 and family != "flux":
            extra[FACTOR] = torch.full((len(batch.keys),), c1, device=conditioning.embeds.device)
        if keep is not None and family in ("sd", "sdxl"):
            extra["encoder_attention_mask"] = keep
        elif keep is not None:
            # FLUX puts the image's tokens after the text's; for Stable Diffusion 3 `JointAttention` adds them
            if family == "flux":
                keep = pad(keep, (0, batch.noise.shape[1]), value=True)
            given = extra.get("joint_attention_kwargs", {})
            extra["joint_attention_kwargs"] = {**given, "attention_mask": keep}
        return replace(conditioning, extra=extra)


def kept_tokens(batch: Batch, without_end: bool) -> Tensor:
    """Bool ``[B, tokens]``: False for a prompt's padding, and with ``without_end`` for its end token.

    For Stable Diffusion 3 the CLIP tokens and then the T5 tokens, for FLUX the T5 tokens.
    """
    pipe, family = batch.model.pipe, batch.model.family
    tokens = batch.conditioning.embeds.shape[1]
    if family == "flux":
        parts = [(pipe.tokenizer_2, tokens)]
    elif family == "sd3":
        clip = int(pipe.tokenizer_max_length)
        parts = [(pipe.tokenizer, clip), (pipe.tokenizer_3, tokens - clip)]
    else:
        parts = [(pipe.tokenizer, tokens)]
    kept = []
    for tokenizer, size in parts:
        lengths = token_counts(tokenizer, batch.texts, size) - int(without_end)
        kept.append(torch.arange(size) < lengths[:, None])
    return torch.cat(kept, dim=1).to(batch.conditioning.embeds.device)


def token_counts(tokenizer: Any, texts: Sequence[str], limit: int) -> Tensor:
    """Tokens of each text, begin (CLIP) and end token included, at most ``limit``: ``[B]``, on the CPU.

    0 without a tokenizer (a Stable Diffusion 3 loaded without T5 has zeros in that part).
    """
    if tokenizer is None:
        return torch.zeros(len(texts), dtype=torch.long)
    limit = min(limit, int(tokenizer.model_max_length))
    found = tokenizer(list(texts), truncation=True, max_length=limit)
    return torch.tensor([len(ids) for ids in found["input_ids"]])
