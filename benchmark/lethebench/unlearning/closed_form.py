"""The closed form that UCE and MACE edit projections with, in float64.

The weight that minimises, over the rows (c_i, v_i) with scales s_i,

    sum_i s_i |W c_i - v_i|^2 + trace((W - W0) R (W - W0)^T)

where R says what is to stay: ``lambda I + sum_p s_p c_p c_p^T`` over preserved embeddings c_p. It is

    W = (sum_i s_i v_i c_i^T + W0 R) (sum_i s_i c_i c_i^T + R)^-1        (UCE, eq. 7; arXiv:2308.14761)
      = W0 + sum_i s_i (v_i - W0 c_i) c_i^T (sum_i s_i c_i c_i^T + R)^-1

and the second line is what is computed: where nothing is asked for, nothing changes. Keys are the same for
every layer that takes the same embeddings, so the system is solved once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stays(embeddings: Tensor, scale: float, lamb: float) -> Tensor:
    """``lamb I + scale * sum_p c_p c_p^T``, ``[d, d]``, of rows ``[n, d]`` (n may be 0)."""
    identity = torch.eye(embeddings.shape[1], dtype=torch.float64)
    return lamb * identity + scale * (embeddings.T @ embeddings)


class ClosedForm:
    """The system solved for ``keys`` ``[n, d]`` with ``scales`` ``[n]`` and ``kept`` ``[d, d]`` (R above).

    Where it is singular (lambda 0 and few preserved embeddings) the smallest change is taken.
    """

    def __init__(self, keys: Tensor, scales: Tensor, kept: Tensor) -> None:
        self.keys = keys
        scaled = keys.T * scales
        system = kept + scaled @ keys
        # A factorisation would pass on many a singular system, by rounding.
        self._spread = torch.linalg.pinv(system, hermitian=True) @ scaled

    def weight(self, base: Tensor, values: Tensor) -> Tensor:
        """The edited weight ``[out, d]`` of ``base`` ``[out, d]``, for wanted outputs ``[n, out]``."""
        edited: Tensor = base + (values - self.keys @ base.T).T @ self._spread.T
        return edited
