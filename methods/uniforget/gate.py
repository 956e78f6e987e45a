"""The hard-concrete gate that turns mask parameters into gates on activations.

Sources: Louizos et al. 2018; UniForget, appendix C (eq. 10 and 11); EcoDiff, ``src/sdib/utils/utils.py``
(``hard_concrete_distribution``). All functions are elementwise and keep the shape of ``mask``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """The constants of the gate.

    ``temperature`` 0.83 is EcoDiff's (UniForget doesn't print its own), the stretch to (-0.1, 1.1) is
    printed in UniForget's appendix, as is ``delta_re`` 0.5. ``delta_re`` is no numerical guard: it bounds the
    logistic noise to +-log((1 + delta_re) / delta_re), which is 1.10 at 0.5.
    """

    temperature: float = 0.83
    low: float = -0.1
    high: float = 1.1
    delta_re: float = 0.5

    def sampled(self, mask: Tensor, uniform: Tensor) -> Tensor:
        """Gates in [0, 1] for mask parameters and noise ``uniform`` in [0, 1), of the same shape."""
        noise = torch.log(uniform + self.delta_re) - torch.log(1 - uniform + self.delta_re)
        return self._stretched(mask + noise)

    def expected(self, mask: Tensor) -> Tensor:
        """The gates without noise (its median)."""
        return self._stretched(mask)

    def kept(self, mask: Tensor, threshold: float = 0.0) -> Tensor:
        """The binary mask, True where the parameter exceeds ``threshold``.

        Nothing is printed for UniForget; EcoDiff's scripts use seven different values. At 0 (our
        choice, and that of the same authors' later code) the gate without noise is rounded: it is 0.5 there.
        """
        return mask > threshold

    def active_probability(self, mask: Tensor) -> Tensor:
        """The probability that a parameter gets a gradient: that its gate is strictly between 0 and 1."""
        below_one = self._uniform_below(self._logit(1.0) - mask)
        below_zero = self._uniform_below(self._logit(0.0) - mask)
        return below_one - below_zero

    def _stretched(self, logits: Tensor) -> Tensor:
        return (torch.sigmoid(logits / self.temperature) * (self.high - self.low) + self.low).clamp(0.0, 1.0)

    def _logit(self, value: float) -> float:
        """Where the unclamped gate takes ``value``."""
        share = (value - self.low) / (self.high - self.low)
        return self.temperature * math.log(share / (1 - share))

    def _uniform_below(self, noise: Tensor) -> Tensor:
        """The probability that the logistic noise is below ``noise``."""
        odds = torch.exp(noise)
        return ((odds * (1 + self.delta_re) - self.delta_re) / (1 + odds)).clamp(0.0, 1.0)
