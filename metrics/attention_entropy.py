"""Ren's detection of memorization: how spread the cross-attention over the prompt's tokens is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.hooks import Batch, Prediction, Recorder, Step
from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics._detectors import recorded, require_count, scores_of
from lethebench.registry import METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.sampler.attention import CrossAttention

RECORD = "attention_entropy"
LAYER, LAYERS = 3, 16
"""Metric E's layer, and the cross-attention layers of the model that the paper numbers (SD 1.4)."""


def entropy(attention: Tensor) -> Tensor:
    """Sum over the last axis of -a log a, in nats; a token without attention adds nothing."""
    import torch

    found: Tensor = torch.special.entr(attention).sum(dim=-1)
    return found


def summary_entropy(attention: Tensor, lengths: Tensor) -> Tensor:
    """The same sum over the end token and the padding only: ``[..., B]`` of attention ``[..., B, tokens]``.

    ``lengths`` ``[B]`` counts a prompt's tokens, begin and end included. The shares aren't made to add up to
    1 again.
    """
    import torch

    places = torch.arange(attention.shape[-1], device=attention.device)
    return entropy(attention * (places >= lengths.to(attention.device)[:, None] - 1))


def final_steps(total: int) -> range:
    """The last fifth of ``total`` steps (40 to 49 of 50), at least one.

    >>> final_steps(50), final_steps(3)
    (range(40, 50), range(2, 3))
    """
    return range(total - max(1, total // 5), total)


def layer_of(count: int) -> int:
    """Metric E's layer in a model of ``count`` layers: number 3 of 16, at the same depth where there are more
    or fewer (rounded down, ours).

    >>> layer_of(16), layer_of(7), layer_of(70)
    (3, 1, 13)
    """
    return LAYER * count // LAYERS


class _Watcher(Recorder):
    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        from lethebench.sampler.attention import CrossAttention, cross_attention, prompt_lengths

        modules = cross_attention(batch.model.denoiser)
        self._attention: CrossAttention | None = None
        self._steps = {0, *final_steps(len(batch.timesteps))}
        self._tokens: dict[int, Tensor] = {}
        if not modules:
            yield
            return
        self._number = layer_of(len(modules)) if self.layer is None else self.layer
        if self._number >= len(modules):
            raise UserError(
                f"attention-entropy: layer={self._number}, but {batch.model.name} has {len(modules)} "
                f"cross-attention layers: choose 0 to {len(modules) - 1}"
            )
        self._lengths = prompt_lengths(batch.model, list(batch.texts))
        self._attention = CrossAttention(modules, len(batch.keys), lambda p: p.mean(dim=(1, 2)))
        with self._attention.watch():
            yield

    def step(self, step: Step, predicted: Prediction) -> None:
        import torch

        if self._attention is None:
            return
        if step.index in self._steps:
            seen = self._attention.seen
            self._tokens[step.index] = torch.stack([seen[name] for name in self._attention.modules])
        self._attention.active = step.index + 1 in self._steps

    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        import torch

        if self._attention is None:
            return {}
        first = self._tokens[0]
        last = torch.stack([self._tokens[i].mean(dim=0) for i in final_steps(len(batch.timesteps))])
        change = summary_entropy(last, self._lengths).mean(dim=0) - summary_entropy(
            first.mean(dim=0), self._lengths
        )
        d, e = entropy(last).mean(dim=0) + change, entropy(first[self._number])
        self._attention, self._tokens = None, {}
        return {RECORD: torch.stack([d, e], dim=1)}


@METRICS.register
@dataclass(frozen=True)
class AttentionEntropy(Metric):
    """Detection by Ren et al. (ECCV 2024): entropy of the cross-attention over the prompt's tokens.

    The attention of the conditional half is averaged over heads and places (pixels); a is what each token
    gets, E the sum of -a log a. High says memorized.

    - ``attention_entropy_d`` (metric D): E of the attention averaged over all layers, mean over the last
      fifth of the steps, plus the change of its share of end token and padding from the first step to those;
    - ``attention_entropy_e`` (metric E): E of one layer at the first step.

    As in ``detect.py`` of renjie3/MemAttn: the layers are averaged before the entropy is taken, and the
    change is signed (the paper writes its absolute value). Where the model has another number of layers than
    SD 1.4's 16, metric E's is at the same depth: number ``3 * layers // 16``, from 0, in the order of calls.
    The prompt is the one that was encoded, with a method's changes.

    NaN for models without cross-attention to the prompt (SD 3, FLUX).
    """

    layer: int | None = setting(
        None, "metric E's cross-attention layer, from 0 (null: number 3 of 16, scaled)"
    )

    name: ClassVar[str] = "attention-entropy"
    summary: ClassVar[str] = "Entropy of the cross-attention over the prompt's tokens (Ren), metrics D and E."
    source: ClassVar[str] = "Ren et al., ECCV 2024; detect.py of renjie3/MemAttn (formula)"
    needs: ClassVar[frozenset[str]] = frozenset({"recorded"})
    records: ClassVar[frozenset[str]] = frozenset({RECORD})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "attention_entropy_d": "high",
        "attention_entropy_e": "high",
    }
    scores: ClassVar[tuple[Score, ...]] = tuple(
        score
        for which, low in (("d", -np.inf), ("e", 0.0))
        for score in scores_of(
            f"attention_entropy_{which}",
            f"attention_entropy.{which}",
            f"Entropy of the cross-attention over tokens, metric {which.upper()}",
            "nats",
            (low, np.inf),
        )
    )

    def __post_init__(self) -> None:
        if self.layer is not None:
            require_count("layer", self.layer, 0)

    def recorder(self) -> Recorder:
        """Watches the cross-attention at the first step and over the last fifth."""
        return _Watcher(self.layer)

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``attention_entropy_d`` and ``attention_entropy_e``."""
        check_shard(self.name, shard)
        found = recorded(self.name, shard, RECORD, 2)
        return {"attention_entropy_d": found[:, 0], "attention_entropy_e": found[:, 1]}

    def facts(self) -> dict[str, Any]:
        """Which layer, and which steps."""
        where = f"number {LAYER} of {LAYERS}, scaled" if self.layer is None else self.layer
        return {"layer": where, "steps": "D: last fifth, and first; E: first"}
