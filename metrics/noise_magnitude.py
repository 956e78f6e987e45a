"""Wen's magnitude of the text-conditional noise, and how well it detects what is memorized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import HARD_NEGATIVE, PLANTED_KINDS, check_shard
from lethebench.metrics._detectors import first_steps, require_count
from lethebench.prompts import Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
_AUC = ("noise_magnitude.auc", "noise_magnitude.auc_first", "noise_magnitude.auc_window")


def magnitudes(noise_norm: NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean over steps and first step, each ``[n]``, of norms ``[n, steps]``; NaN where a step is NaN."""
    norms = np.asarray(noise_norm, dtype=np.float64)
    if norms.ndim != 2:
        raise ValueError(f"noise-magnitude: noise_norm must be [n, steps]; got {list(norms.shape)}")
    if not norms.shape[1]:
        return np.full(len(norms), np.nan), np.full(len(norms), np.nan)
    return norms.mean(axis=1), norms[:, 0].copy()


def auc(positive: NDArray[Any], values: NDArray[Any]) -> float:
    """Area under the ROC curve of ``values`` for ``positive`` (bool), ties at half; NaN with one class only.

    By ranks (Mann and Whitney): the share of pairs in which the positive is above the negative.

    >>> auc(np.array([True, True, False]), np.array([0.9, 0.2, 0.4]))
    0.5
    """
    known = ~np.isnan(values)
    positive, values = positive[known], values[known]
    if positive.all() or not positive.any():
        return float("nan")
    from scipy.stats import rankdata

    count = int(positive.sum())
    above = float(rankdata(values)[positive].sum()) - count * (count + 1) / 2
    return above / (count * (len(values) - count))


def _auc_score(name: str, column: str, which: str) -> Score:
    return Score(
        name,
        column,
        "none",
        "AUC",
        (0.0, 1.0),
        roles=frozenset({Role.TRIGGER, Role.CONTROL}),
        kinds=PLANTED_KINDS | {HARD_NEGATIVE},
        trained=True,
        help=f"AUC of {which} for trigger images against those of rare-name captions seen once.",
    )


@METRICS.register
@dataclass(frozen=True)
class NoiseMagnitude(Metric):
    """Detection by Wen et al. (ICLR 2024): the l2 norm of conditional minus unconditional noise, by step.

    Per image the mean over all steps, as in the paper, over a window of the first steps, and the first step
    alone. The norm is over the whole latent, not divided by its size, so values compare within one model
    only. The trajectory is the guided one that made the image. NaN for models that sample without guidance.

    The AUC is over images, not over prompts (Wen averages four images a prompt first). Its positives are
    the images of all triggers, memorized or not (items with few copies aren't):
    :func:`lethebench.metrics.meta.against_truth` has the AUC against what was really copied.
    """

    first: int = setting(5, "steps of the window, from the first (all, where there are fewer)")

    name: ClassVar[str] = "noise-magnitude"
    summary: ClassVar[str] = "Magnitude of the text-conditional noise (Wen), and detection by it."
    source: ClassVar[str] = "Wen et al., ICLR 2024 (formula; per image)"
    needs: ClassVar[frozenset[str]] = frozenset({"noise_norm"})
    scores: ClassVar[tuple[Score, ...]] = (
        Score(
            "noise_magnitude.trigger",
            "noise_magnitude_mean",
            "none",
            "l2 norm",
            (0.0, np.inf),
            roles=frozenset({Role.TRIGGER}),
            help="Magnitude of the text-conditional noise, mean over steps and trigger images.",
        ),
        Score(
            "noise_magnitude.control",
            "noise_magnitude_mean",
            "none",
            "l2 norm",
            (0.0, np.inf),
            roles=frozenset({Role.CONTROL}),
            kinds=PLANTED_KINDS,
            trained=False,
            help="The same on never-memorized twins.",
        ),
        _auc_score(_AUC[0], "noise_magnitude_mean", "the magnitude over all steps"),
        _auc_score(_AUC[1], "noise_magnitude_first", "the magnitude of the first step"),
        _auc_score(_AUC[2], "noise_magnitude_window", "the magnitude over the window of first steps"),
    )
    set_valued: ClassVar[frozenset[str]] = frozenset(_AUC)
    reads: ClassVar[frozenset[str] | None] = frozenset()
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "noise_magnitude_mean": "high",
        "noise_magnitude_first": "high",
        "noise_magnitude_window": "high",
    }

    def __post_init__(self) -> None:
        require_count("first", self.first, 1)

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``noise_magnitude_mean``, ``noise_magnitude_first`` and ``noise_magnitude_window``."""
        check_shard(self.name, shard)
        norms = shard.noise_norm if shard.noise_norm is not None else np.full((len(shard), 0), np.nan)
        mean, first = magnitudes(norms)
        return {
            "noise_magnitude_mean": mean,
            "noise_magnitude_first": first,
            "noise_magnitude_window": first_steps(norms, self.first),
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """AUC of triggers against hard negatives; the mean for all other scores."""
        if score.name not in self.set_valued:
            return super().aggregate(score, table)
        positive = (table["role"] == str(Role.TRIGGER)).to_numpy(dtype=bool)
        return auc(positive, table[score.column].to_numpy(dtype=float))

    def facts(self) -> dict[str, Any]:
        """What the norm is of."""
        return {
            "norm": "l2 over the latent of (conditional - unconditional)",
            "steps": "all; first; window",
            "window": self.first,
        }
