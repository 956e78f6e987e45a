"""A share of yes, corrected by the judge's measured errors (Rogan and Gladen 1978), with an interval."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError

QUESTIONS = ("acc_g", "acc_l")
_COUNTS = ("tp", "fn", "fp", "tn")
INTERVAL = (
    "Lang and Reiczigel 2014, equations 16 and 17 (sampling of images, sensitivity and specificity), with "
    "the effective number of images by the design effect of the prompt clusters (Korn and Graubard 1998)"
)


@dataclass(frozen=True)
class Confusion:
    """A judge's answers where the truth is known, unusable ones left out.

    ``tp`` yes and ``fn`` no where yes is true; ``fp`` yes and ``tn`` no where no is true.
    """

    tp: int
    fn: int
    fp: int
    tn: int

    @property
    def sensitivity(self) -> float:
        """The share of yes where yes is true; NaN where nothing was asked."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else math.nan

    @property
    def specificity(self) -> float:
        """The share of no where no is true; NaN where nothing was asked."""
        return self.tn / (self.tn + self.fp) if self.tn + self.fp else math.nan

    @property
    def correctable(self) -> bool:
        """Whether yes is likelier where it is true: sensitivity + specificity > 1."""
        return self.sensitivity + self.specificity > 1

    def facts(self) -> dict[str, Any]:
        """The counts, both rates (None where unknown), and whether a share can be corrected."""
        rates = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        told = "yes" if self.correctable else "no: sensitivity + specificity is not above 1"
        return {
            **asdict(self),
            **{k: None if math.isnan(v) else v for k, v in rates.items()},
            "correctable": told,
        }


def rogan_gladen(share: float, errors: Confusion) -> float:
    """The true share behind an observed share of yes: (share + sp - 1) / (se + sp - 1), kept in [0, 1].

    NaN where se + sp <= 1: a judge no better than a coin can't be corrected.
    """
    if not errors.correctable:
        return math.nan
    corrected = (share + errors.specificity - 1) / (errors.sensitivity + errors.specificity - 1)
    return min(1.0, max(0.0, corrected))


def lang_reiczigel(
    share: float, count: float, errors: Confusion, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval of :func:`rogan_gladen` for a share of ``count`` images: Lang and Reiczigel 2014.

    It counts the sampling of the images, of the positives that gave se and of the negatives that gave sp.
    Their equations 6, 7, 16 and 17: a small number of successes and failures is added to each sample, and
    the centre is shifted. (NaN, NaN) where no correction is possible or ``count`` is 0.
    """
    if not errors.correctable or not count > 0:
        return math.nan, math.nan
    z = _normal_quantile(0.5 + confidence / 2)
    positives, negatives = errors.tp + errors.fn + 2, errors.tn + errors.fp + 2
    se, sp = (errors.tp + 1) / positives, (errors.tn + 1) / negatives
    if se + sp <= 1:
        return math.nan, math.nan
    n = count + z**2
    seen = (count * share + z**2 / 2) / n
    true = (seen + sp - 1) / (se + sp - 1)
    of_se, of_sp = se * (1 - se) / positives, sp * (1 - sp) / negatives
    centre = true + 2 * z**2 * (true * of_se - (1 - true) * of_sp)
    variance = seen * (1 - seen) / n + true**2 * of_se + (1 - true) ** 2 * of_sp
    reach = z * math.sqrt(variance) / (se + sp - 1)
    low, high = (min(1.0, max(0.0, limit)) for limit in (centre - reach, centre + reach))
    return low, high


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def effective_number(values: NDArray[np.float64], clusters: NDArray[Any]) -> float:
    """How many independent images ``values`` ``[n]`` (0 or 1) are worth, by their ``clusters`` ``[n]``.

    n divided by the design effect: the variance of the mean by clusters (Taylor, with replacement) over that
    of n independent images; never more than n (Korn and Graubard 1998, without their t factor). Where all
    values are alike, nothing can be seen of the spread: the number of clusters (ours). With fewer than two
    clusters: 0.
    """
    _, code = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    sizes = np.bincount(code).astype(np.float64)
    if len(sizes) < 2:
        return 0.0
    share, n = float(values.mean()), len(values)
    if share in (0.0, 1.0):
        return float(len(sizes))
    residuals = np.bincount(code, weights=values) - share * sizes
    variance = len(sizes) / (len(sizes) - 1) * float(residuals @ residuals) / n**2
    return float(min(n, share * (1 - share) / variance)) if variance > 0 else float(n)


def check_origin(
    given: str | Mapping[str, Any], who: str, judge: Mapping[str, Any], instruction: str
) -> None:
    """Raise UserError where the errors tell that they were measured of another judge or instruction."""
    content = _content(given, who)
    if not isinstance(content, Mapping):
        return
    if content.get("instruction", instruction) != instruction:
        raise UserError(
            f"{who}: its errors were measured with instruction {content['instruction']!r}; the metric has "
            f"{instruction!r}: measure them again with --instruction"
        )
    of = content.get("judge")
    if not isinstance(of, Mapping):
        return
    for name in ("kind", "model"):
        if name in of and name in judge and of[name] != judge[name]:
            raise UserError(f"{who}: its errors are those of {of[name]!r}: measure this judge's own")


def _content(given: str | Mapping[str, Any], who: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{who}: errors file {given} can't be read: make it by "
            "`python -m lethebench.metrics.vqa.error_rates`"
        ) from error


def read_confusions(given: str | Mapping[str, Any], who: str) -> dict[str, Confusion]:
    """The confusion of each question from a JSON file or its content: ``{acc_g: {tp, fn, fp, tn}, ...}``.

    Other keys tell of the measurement. Raises UserError naming what is wrong.
    """
    content = _content(given, who)
    found = {}
    for question in QUESTIONS:
        if isinstance(content, Mapping) and question in content:
            found[question] = _confusion(content[question], f"{who}: errors of {question}")
    if not found:
        raise UserError(
            f"{who}: errors hold neither acc_g nor acc_l: write {{acc_g: {{tp, fn, fp, tn}}, ...}}"
        )
    return found


def _confusion(counts: Any, where: str) -> Confusion:
    values = [counts.get(name) for name in _COUNTS] if isinstance(counts, Mapping) else []
    good = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
    if len(good) < len(_COUNTS):
        raise UserError(f"{where} must be counts of {', '.join(_COUNTS)}; got {counts!r}")
    return Confusion(*good)
