"""The begin token's logit as a model has it, measured while neutral prompts are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lethebench.hooks import ImageKey
from lethebench.method import Task
from lethebench.methods.ren.attention import changed_attention
from lethebench.methods.ren.hooks import RenHooks
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.unlearning.neutral import chosen_prompts


class Watch:
    """Sums of the begin token's logits by layer, over the rows whose factor isn't 1; changes nothing."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, layer: str, logits: Tensor, c1: Tensor) -> Tensor:
        """Add up count, l, |l| and the number of l below 0, and return zeros."""
        seen = logits[c1[:, 0, 0] != 1].double()
        sums = (
            torch.stack([torch.ones_like(seen), seen, seen.abs(), seen.lt(0).double()]).flatten(1).sum(dim=1)
        )
        self.sums[layer] = self.sums.get(layer, torch.zeros_like(sums)) + sums
        return torch.zeros_like(logits)


def begin_logits(task: Task, prompts: int) -> dict[str, dict[str, float]]:
    """Mean, mean absolute value and share below 0 of the begin token's logit, by layer.

    Over heads, places, the suite's steps and one image each of (at most) ``prompts`` neutral prompts, drawn
    with the suite's sampler; the conditional predictions. Empty for FLUX, which has no begin token.
    """
    if task.model.family == "flux":
        return {}
    texts = chosen_prompts(task.neutral_prompts(), prompts, task.generator("prompts"))
    seed = int(torch.randint(2**62, (1,), generator=task.generator("noise")))
    keys = [
        ImageKey(f"ren-{seed}", Prompt(str(i), text, Role.NEUTRAL, cluster=""), 0)
        for i, text in enumerate(texts)
    ]
    watch = Watch()
    with changed_attention(task.model, watch):
        sample(task.model, keys, task.sampler, [RenHooks(2.0, "none")], batch_size=8)
    return {layer: _shares(sums) for layer, sums in watch.sums.items()}


def _shares(sums: Tensor) -> dict[str, Any]:
    mean, absolute, negative = (sums[1:] / sums[0]).tolist()
    return {"mean": mean, "absolute": absolute, "negative": negative}
