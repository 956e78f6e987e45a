"""The best matches of each picture among references, without the similarities of all pairs.

Two steps leave out pairs. The prefilter, a setting, keeps the ``keep`` references whose descriptors are
nearest; it can lose a match, and :func:`prefilter_recall` states how often. The second loses nothing: MS-SSIM
is a product of factors of at most 1, so that the coarse scales, at a quarter of the cost, bound it; the
finest is computed in order of that bound, until no bound left reaches the k-th best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lethebench.pairs.msssim import (
    MEMORY,
    MS_SSIM,
    Pixels,
    Scale,
    Similarity,
    View,
    as_view,
    chunks,
    moments,
    plan,
    row_factors,
)
from lethebench.pairs.neighbours import search
from lethebench.seeding import generator

SMALL = 16
"""Pixels a side of the prefilter's own descriptors."""
_ROUNDING = 1e-5
"""What a factor may exceed 1 by through rounding, at most."""

Views = View | Pixels | Sequence[View]


class Matches(NamedTuple):
    """The k best references of each picture, best first: ``values`` and ``indices``, ``[n, k]``.

    Equal values go to the lower index.
    """

    values: Tensor
    indices: Tensor


class Recall(NamedTuple):
    """The share of ``rows`` pictures whose exact best match the prefilter keeps."""

    share: float
    rows: int


@torch.no_grad()
def best_matches(
    x: Views,
    y: Views,
    k: int = 1,
    similarity: Similarity = MS_SSIM,
    *,
    keep: int | None = None,
    descriptors: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    memory: int = MEMORY,
) -> Matches:
    """The k references in ``y`` most similar to each picture of ``x``.

    Several views (foreground and background, say) are compared each with its own, and averaged. ``keep`` is
    the prefilter: only that many references are compared, those nearest by Euclidean distance of
    ``descriptors`` (``[n, d]`` and ``[m, d]``; None: :func:`small_pixels`). None compares all. ``memory``
    bounds the bytes used beside inputs and result, as in :func:`lethebench.pairs.msssim.all_pairs`.

    Raises ValueError as ``all_pairs`` does, and for views, ``k`` or ``keep`` that don't fit.
    """
    ours, theirs = _views(x), _views(y)
    if len(ours) != len(theirs):
        raise ValueError(f"both sides must have as many views; got {len(ours)} and {len(theirs)}")
    if descriptors is not None and keep is None:
        raise ValueError("descriptors go with keep, which says how many references they leave")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep}")
    if not 1 <= k <= min(len(theirs[0]), keep or len(theirs[0])):
        raise ValueError(f"k must be 1 to {min(len(theirs[0]), keep or len(theirs[0]))}; got {k}")
    parts = plan(ours[0], theirs[0], similarity, memory, len(ours))
    near = None if keep is None else torch.from_numpy(candidates(ours, theirs, keep, descriptors, memory))
    values = torch.full((len(ours[0]), k), -torch.inf, device=ours[0].device)
    indices = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    scales = len(similarity.betas)
    for rows in chunks(len(values), parts.rows):
        of_x = [moments(view, rows, scales, parts.block) for view in ours]
        for columns in chunks(len(theirs[0]), parts.columns):
            of_y = [moments(view, columns, scales, parts.block) for view in theirs]
            for row in range(rows.start, min(rows.stop, len(values))):
                at = None if near is None else _within(near[row], columns).to(values.device)
                found = _row(of_x, row - rows.start, of_y, at, values[row], parts.block, similarity)
                both = torch.cat([values[row], found])
                places = torch.arange(columns.start, columns.start + len(found), device=values.device)
                best = both.argsort(descending=True, stable=True)[:k]
                values[row], indices[row] = both[best], torch.cat([indices[row], places])[best]
            del of_y  # before the next are made
        del of_x
    return Matches(values, indices)


def _views(pictures: Views) -> list[View]:
    found = list(pictures) if isinstance(pictures, (list, tuple)) else [as_view(cast(Pixels, pictures))]
    if not found or len({(view.shape, view.device) for view in found}) > 1:
        shapes = ", ".join(str(list(view.shape)) for view in found) or "none"
        raise ValueError(f"the views of one side must be of one shape and device; got {shapes}")
    return found


def _within(near: Tensor, columns: slice) -> Tensor:
    """Of these references those in a chunk, in order, counted from its start."""
    first: int = columns.start
    kept = near[(near >= first) & (near < columns.stop)]
    return torch.sort(kept)[0] - first


def _row(
    x: list[tuple[Scale, ...]],
    row: int,
    y: list[tuple[Scale, ...]],
    at: Tensor | None,
    best: Tensor,
    block: int,
    similarity: Similarity,
) -> Tensor:
    """One picture's similarity to each of a chunk, ``[columns]``: -inf where it can't be among the best."""
    found = torch.full((len(y[0][0].pixels),), -torch.inf, device=best.device)
    if at is not None and not len(at):
        return found
    pairs = list(zip(x, y, strict=True))
    coarse = torch.stack([row_factors(a, row, b, at, block, similarity, slice(1, None)) for a, b in pairs])
    at = torch.arange(len(found), device=best.device) if at is None else at
    bound, order = coarse.mean(dim=0).sort(descending=True, stable=True)
    step = _step(y, block)
    for start in range(0, len(order), step):
        least = torch.cat([best, found]).topk(len(best)).values[-1]
        if bound[start] < least - _ROUNDING:
            break
        taken = order[start : start + step]
        fine = [row_factors(a, row, b, at[taken], block, similarity, slice(0, 1)) for a, b in pairs]
        found[at[taken]] = (torch.stack(fine) * coarse[:, taken]).mean(dim=0)
    return found


def _step(y: list[tuple[Scale, ...]], block: int) -> int:
    return max(1, block // y[0][0].pixels[0].numel())


# --- prefilter ------------------------------------------------------------------------------------


def small_pixels(views: Sequence[View], memory: int = MEMORY) -> NDArray[np.float32]:
    """Pictures at 16 x 16 pixels, all views after each other, ``[n, d]``."""
    _, channels, height, width = views[0].shape
    step = max(1, memory // (16 * channels * height * width))
    small = [
        torch.cat([F.adaptive_avg_pool2d(view.pixels(at), SMALL).flatten(1).cpu() for view in views], dim=1)
        for at in chunks(len(views[0]), step)
    ]
    found: NDArray[np.float32] = torch.cat(small).numpy()
    return found


def candidates(
    x: Sequence[View],
    y: Sequence[View],
    keep: int,
    descriptors: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    memory: int = MEMORY,
) -> NDArray[np.int64]:
    """The references that the prefilter keeps for each picture, nearest first, ``[n, keep]``."""
    ours, theirs = descriptors or (small_pixels(x, memory), small_pixels(y, memory))
    if len(ours) != len(x[0]) or len(theirs) != len(y[0]):
        raise ValueError(
            f"descriptors must be [{len(x[0])}, d] and [{len(y[0])}, d]; "
            f"got {len(ours)} and {len(theirs)} rows"
        )
    return search(ours, theirs, min(keep, len(theirs)), metric="euclidean", memory=memory).indices


def prefilter_recall(
    x: Views,
    y: Views,
    keep: int,
    similarity: Similarity = MS_SSIM,
    *,
    descriptors: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    sample: int = 50,
    seed: int = 0,
    memory: int = MEMORY,
) -> Recall:
    """How often the prefilter keeps the exact best match, on ``sample`` pictures drawn by ``seed``."""
    ours, theirs = _views(x), _views(y)
    drawn = torch.randperm(len(ours[0]), generator=generator("prefilter recall", seed))[:sample].numpy()
    near = candidates(ours, theirs, keep, descriptors, memory)[drawn]
    chosen = [view.subset(drawn) for view in ours]
    exact = best_matches(chosen, theirs, 1, similarity, memory=memory).indices.cpu().numpy()
    return Recall(float((near == exact).any(axis=1).mean()), len(drawn))
