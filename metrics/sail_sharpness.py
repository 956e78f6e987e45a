"""SAIL's detection of memorization: how the text sharpens the density at the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.hooks import Batch, Recorder
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics._detectors import recorded, scores_of
from lethebench.registry import METRICS

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "sail_sharpness"


def hessian_product(batch: Batch) -> Tensor:
    """|J d| of each image, ``[B]``: d is conditional minus unconditional prediction at the first step, J its
    Jacobian in the noise, by forward differentiation (exact explicit attention; flash kernels have none).
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from lethebench.magnitude import FirstStep, magnitudes

    first = FirstStep(batch)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        along = first.difference(batch.noise)
        product = torch.func.jvp(first.difference, (batch.noise,), (along,))[1]
    return magnitudes(product)


class _Asker(Recorder):
    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        return {RECORD: hessian_product(batch)[:, None]}


@METRICS.register
@dataclass(frozen=True)
class SAILSharpness(Metric):
    """Detection by Jeon et al. (ICML 2025): |H s| at the first step, high says memorized.

    s is the difference of conditional and unconditional score, H that of the two Hessians, its Jacobian. Both
    are taken of the raw prediction: the factor between it and the score is one number for a model and
    schedule (close to 1 for noise; in flow matching the score's own difference is zero at the first step).
    Values compare within one model and schedule only.

    The noise and the prompt are those that made the image, with a method's changes. Models that sample
    without guidance are asked for the empty prompt at this step.
    """

    name: ClassVar[str] = "sail-sharpness"
    summary: ClassVar[str] = "Sharpness that the text adds at the first step (SAIL), and detection by it."
    source: ClassVar[str] = "Jeon et al., ICML 2025, section 4.4 (arXiv 2412.04140; formula, per image)"
    needs: ClassVar[frozenset[str]] = frozenset({"recorded"})
    records: ClassVar[frozenset[str]] = frozenset({RECORD})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {"sail_sharpness": "high"}
    scores: ClassVar[tuple[Score, ...]] = scores_of(
        "sail_sharpness",
        "sail_sharpness.first",
        "Sharpness at the first step",
        "l2 norm",
        (0.0, np.inf),
    )

    def recorder(self) -> Recorder:
        """Asks the denoiser once more for the first step, after the images are drawn."""
        return _Asker()

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``sail_sharpness``; NaN where no model drew."""
        check_shard(self.name, shard)
        return {"sail_sharpness": recorded(self.name, shard, RECORD, 1)[:, 0]}

    def facts(self) -> dict[str, Any]:
        """What the norm is of, and the step."""
        return {"norm": "l2 of H s, differences of conditional and unconditional", "steps": "first"}
