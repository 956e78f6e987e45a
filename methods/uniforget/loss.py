"""UniForget's objective (paper, eq. 3 and 4), and EcoDiff's sparsity term for comparison."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def reconstruction(masked: Tensor, original: Tensor) -> Tensor:
    """Eq. 2: mean squared difference of final latents, over all their elements and the batch."""
    return F.mse_loss(masked.float() if masked.dtype.itemsize < 4 else masked, original.to(masked.dtype))


def relaxed(mask: Tensor, gamma: float, delta: float) -> Tensor:
    """Eq. 4: ``sigmoid(gamma * mask + delta)``. At mask 3, gamma 0.4 and delta 1 it is 0.900."""
    return torch.sigmoid(gamma * mask + delta)


def size_of_masks(masks: Mapping[str, Tensor], gamma: float, delta: float) -> Tensor:
    """Second term of eq. 3 without beta: ``||relaxed(M)||_1 / |M|`` over the elements of all masks.

    Every kind takes part. In EcoDiff's code the norm masks never reach the loss, since their term is
    added after the sum was formed (``scripts/train.py``); the paper's Table 5 shows that they do here.
    """
    total = sum(relaxed(m, gamma, delta).sum() for m in masks.values())
    assert isinstance(total, Tensor)
    return total / sum(m.numel() for m in masks.values())


def size_by_layer(
    layers: Mapping[str, list[Tensor]], gamma: float, delta: float, *, bounded: bool = True
) -> Tensor:
    """EcoDiff's term: the mean over each layer's elements, then over layers, summed over kinds.

    ``layers`` holds by kind the mask of every layer. ``calculate_reg_loss`` with p = 1, of the relaxed masks
    (``lambda_reg``, its FLUX configurations) or with ``bounded`` off of the masks' absolute values (SDXL,
    SD3); with the norm masks included (ours: see above).
    """
    sizes = {
        kind: [relaxed(m, gamma, delta).mean() if bounded else m.abs().mean() for m in masks]
        for kind, masks in layers.items()
    }
    return torch.stack([torch.stack(means).mean() for means in sizes.values()]).sum()
