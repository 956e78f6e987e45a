"""Bright Ending: where the end token's attention lies, and the noise magnitude there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.hooks import Batch, Prediction, Recorder, Step
from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics._detectors import check_recorded, first_steps, recorded, require_count, scores_of
from lethebench.registry import METRICS

if TYPE_CHECKING:
    from torch import Tensor

RECORD, MASK = "bright_ending", "bright_ending_mask"
LAYERS = 2
"""Layers that the mask is a mean of: Stable Diffusion has two at the down blocks' highest resolution."""


def masked_norms(squared: Tensor, mask: Tensor) -> Tensor:
    """l2 norm of masked differences over the mask's mean, ``[B, steps]``: the summands of the paper's LD.

    ``squared`` ``[B, steps, h, w]`` are squared differences summed over channels, ``mask`` is ``[B, h, w]``.
    """
    total = (squared * mask[:, None].square()).sum(dim=(2, 3))
    return total.sqrt() / mask.mean(dim=(1, 2))[:, None]


def grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of an attention over ``pixels`` places: the latent's sides, halved (rounded up) as
    often as needed. Raises ValueError where none fit.

    >>> grid(64, 16, 16), grid(12, 11, 16)
    ((8, 8), (3, 4))
    """
    h, w = height, width
    while h * w > pixels and h * w > 1:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != pixels:
        raise ValueError(f"bright-ending: {pixels} places don't fit latents of {height} x {width}")
    return h, w


class _Watcher(Recorder):
    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        import torch

        from lethebench.sampler.attention import CrossAttention, cross_attention, prompt_lengths

        modules = cross_attention(batch.model.denoiser)
        down = {name: module for name, module in modules.items() if name.startswith("down_blocks")}
        self._attention: CrossAttention | None = None
        self._squared: list[Tensor] = []
        if not modules:
            yield
            return
        images = torch.arange(len(batch.keys))
        ends = prompt_lengths(batch.model, list(batch.texts)) - 1
        self._attention = CrossAttention(
            down or modules,
            len(images),
            lambda p: p[images, :, :, ends].mean(dim=1),
            active=len(batch.timesteps) == 1,
        )
        with self._attention.watch():
            yield

    def step(self, step: Step, predicted: Prediction) -> None:
        if self._attention is None:
            return
        if predicted.unconditional is not None:
            difference = predicted.conditional - predicted.unconditional
            self._squared.append(difference.square().sum(dim=1))
        self._attention.active = step.index + 1 == step.total - 1

    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        import torch

        if self._attention is None:
            return {}
        seen = [self._attention.seen[name] for name in self._attention.modules]
        finest = max(maps.shape[1] for maps in seen)
        mask = torch.stack([maps for maps in seen if maps.shape[1] == finest][:LAYERS]).mean(dim=0)
        height, width = batch.noise.shape[-2:]
        mask = torch.nn.functional.interpolate(
            mask.unflatten(1, grid(finest, height, width))[:, None], size=(height, width), mode="bilinear"
        )[:, 0]
        if self._squared:
            norms = masked_norms(torch.stack(self._squared, dim=1), mask)
        else:
            norms = mask.new_full((len(mask), len(batch.timesteps)), torch.nan)
        self._attention, self._squared = None, []
        return {RECORD: norms, MASK: mask}


@METRICS.register
@dataclass(frozen=True)
class BrightEnding(Metric):
    """Detection by Chen et al. (Bright Ending, ICLR 2025): Wen's magnitude, weighted by the end token's mask.

    The mask m is the attention that the end token gets at the last step, the conditional half, mean over
    heads and over the first two cross-attention layers of the highest resolution in the down blocks (in all
    blocks, where those have none). It is brought to the latent's size bilinearly where it is smaller (ours:
    Stable Diffusion's has that size) and kept beside the images as ``bright_ending_mask``, ``[n, h, w]``.
    LD = mean over steps of ||(eps_conditional - eps_unconditional) m||_2 / mean(m). High says memorized.

    - ``bright_ending_first``: the first step (T = 1 in the paper's table);
    - ``bright_ending_window``: the first ``first`` steps (there: 10 of 50);
    - ``bright_ending_mean``: all steps.

    One pass gives both: the differences' squares are kept until the last step gives the mask. The prompt
    whose end token is asked for is the one that was encoded, with a method's changes. NaN for models without
    cross-attention to the prompt (SD 3, FLUX), and where a method masks the end token (``ren`` can); without
    guidance there is a mask, but no value.
    """

    first: int = setting(5, "steps of the window, from the first (all, where there are fewer)")

    name: ClassVar[str] = "bright-ending"
    summary: ClassVar[str] = "Noise magnitude where the end token's attention lies (Bright Ending)."
    source: ClassVar[str] = (
        "Chen et al., ICLR 2025 (arXiv 2410.21665); controller.py of chenchen-usyd/BE-PRSS"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"recorded"})
    records: ClassVar[frozenset[str]] = frozenset({RECORD, MASK})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "bright_ending_first": "high",
        "bright_ending_window": "high",
        "bright_ending_mean": "high",
    }
    scores: ClassVar[tuple[Score, ...]] = scores_of(
        "bright_ending_mean",
        "bright_ending.mean",
        "Masked magnitude over all steps",
        "l2 norm",
        (0.0, np.inf),
    )

    def __post_init__(self) -> None:
        require_count("first", self.first, 1)

    def recorder(self) -> Recorder:
        """Watches guidance at every step, and the cross-attention at the last."""
        return _Watcher()

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``bright_ending_first``, ``bright_ending_window`` and ``bright_ending_mean``."""
        check_shard(self.name, shard)
        check_recorded(self.name, shard, MASK, 3)
        norms = recorded(self.name, shard, RECORD)
        return {
            "bright_ending_first": first_steps(norms, 1),
            "bright_ending_window": first_steps(norms, self.first),
            "bright_ending_mean": first_steps(norms, norms.shape[1]),
        }

    def facts(self) -> dict[str, Any]:
        """What the mask is of, and the window."""
        return {
            "mask": f"end token, last step, first {LAYERS} layers of highest resolution",
            "window": self.first,
        }
