"""Best matches against the full matrix of similarities."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lethebench.pairs import matches
from lethebench.pairs.matches import best_matches, prefilter_recall
from lethebench.pairs.msssim import MS_SSIM_3, SSIM, Scale, Similarity, View, all_pairs, moments
from lethebench.pairs.speed import pictures

SIDE = 48


def some(count: int, seed: int) -> torch.Tensor:
    return pictures(count, SIDE, seed)


def two_views(images: torch.Tensor, seed: int) -> list[View]:
    random = np.random.default_rng(seed)
    masks = np.zeros((len(images), SIDE, SIDE), dtype=bool)
    for mask, corner in zip(masks, random.integers(4, 20, size=len(images)), strict=True):
        mask[corner : corner + 20, corner : corner + 20] = True
    return [View(images, masks, 0.0), View(images, ~masks, 1.0)]


@pytest.mark.parametrize("memory", [1_500_000, 3_000_000])
@pytest.mark.parametrize("search", [all_pairs, best_matches])
def test_moments_never_outgrow_the_memory_limit(
    search: Callable[..., Any], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(*given: Any) -> tuple[Scale, ...]:
        nonlocal most
        found = moments(*given)
        tensors = [t for scale in found for t in vars(scale).values() if isinstance(t, torch.Tensor)]
        made.extend(weakref.ref(t) for t in tensors)
        most = max(most, sum(t.nbytes for t in (m() for m in made) if t is not None))
        return found

    monkeypatch.setattr(sys.modules[search.__module__], "moments", watched)
    search(some(30, 1), some(30, 2), similarity=MS_SSIM_3, memory=memory)
    assert memory / 10 < most < memory


@pytest.mark.parametrize("similarity", [MS_SSIM_3, SSIM])
@pytest.mark.parametrize("memory", [1_500_000, 2**30])
def test_best_of_all_equal_the_matrix(similarity: Similarity, memory: int) -> None:
    x, y = some(9, 1), some(23, 2)
    expected = all_pairs(x, y, similarity).sort(dim=1, descending=True, stable=True)
    found = best_matches(x, y, 4, similarity, memory=memory)
    torch.testing.assert_close(found.values, expected.values[:, :4], atol=1e-6, rtol=0)
    assert torch.equal(found.indices, expected.indices[:, :4])


def test_views_are_averaged() -> None:
    x, y = two_views(some(6, 1), 1), two_views(some(15, 2), 2)
    both = torch.stack([all_pairs(a, b, MS_SSIM_3) for a, b in zip(x, y, strict=True)]).mean(dim=0)
    found = best_matches(x, y, 2, MS_SSIM_3)
    torch.testing.assert_close(found.values, both.topk(2).values, atol=1e-6, rtol=0)
    assert torch.equal(found.indices, both.topk(2).indices)


def test_equal_references_go_to_the_lower_index() -> None:
    x = some(3, 1)
    found = best_matches(x, x.repeat(4, 1, 1, 1), 3, MS_SSIM_3, memory=2_000_000)
    assert found.indices.tolist() == [[i, i + 3, i + 6] for i in range(3)]


def test_bound_leaves_out_finest_scales_and_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    y = some(40, 2)
    x = (y[:5] + 0.02 * torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    finest = 0
    whole = matches.row_factors

    def counted(*given: object) -> torch.Tensor:
        nonlocal finest
        found = whole(*given)  # type: ignore[arg-type]
        finest += len(found) if given[-1] == slice(0, 1) else 0
        return found

    monkeypatch.setattr(matches, "row_factors", counted)
    monkeypatch.setattr(matches, "_step", lambda *_: 1)
    assert best_matches(x, y, 1, MS_SSIM_3).indices[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert finest < 5 * 40 / 4


def test_prefilter_compares_the_candidates_exactly() -> None:
    x, y = some(8, 1), some(30, 2)
    near = matches.candidates([View(x)], [View(y)], 6)
    small = [torch.nn.functional.adaptive_avg_pool2d(z, 16).flatten(1) for z in (x, y)]
    assert np.array_equal(np.sort(near), torch.cdist(*small).argsort(dim=1)[:, :6].sort().values.numpy())
    exact = all_pairs(x, y, MS_SSIM_3)
    expected = exact.gather(1, torch.from_numpy(np.sort(near))).max(dim=1).values
    for memory in (1_500_000, 2**30):
        found = best_matches(x, y, 1, MS_SSIM_3, keep=6, memory=memory)
        torch.testing.assert_close(found.values[:, 0], expected, atol=1e-6, rtol=0)


def test_recall_counts_the_matches_that_survive() -> None:
    x, y = some(12, 1), some(30, 2)
    assert prefilter_recall(x, y, 30, MS_SSIM_3) == (1.0, 12)
    best = all_pairs(x, y, MS_SSIM_3).argmax(dim=1).numpy()
    right = np.eye(30, dtype=np.float32)[best]
    right[:5] = np.eye(30, dtype=np.float32)[(best[:5] + 1) % 30]
    found = prefilter_recall(x, y, 1, MS_SSIM_3, descriptors=(right, np.eye(30, dtype=np.float32)))
    assert found == (pytest.approx(7 / 12), 12)
    drawn = [prefilter_recall(x, y, 2, MS_SSIM_3, sample=6, seed=3) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].rows == 6


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("k must be 1 to 5; got 6", {"k": 6}),
        ("k must be 1 to 2; got 3", {"k": 3, "keep": 2}),
        ("k must be 1 to 5; got 0", {"k": 0}),
        ("keep must be at least 1", {"k": 1, "keep": 0}),
        ("descriptors must be", {"keep": 2, "descriptors": (np.ones((2, 4)), np.ones((5, 4)))}),
        ("descriptors go with keep", {"descriptors": (np.ones((3, 4)), np.ones((5, 4)))}),
    ],
)
def test_bad_settings_give_one_clear_line(message: str, given: dict) -> None:
    with pytest.raises(ValueError, match=message):
        best_matches(some(3, 1), some(5, 2), similarity=MS_SSIM_3, **given)


def test_views_that_do_not_fit_give_one_clear_line() -> None:
    x = View(some(3, 1))
    with pytest.raises(ValueError, match="as many views; got 2 and 1"):
        best_matches([x, x], [x], 1, MS_SSIM_3)
    with pytest.raises(ValueError, match="views of one side must be of one shape"):
        best_matches([x, View(some(4, 1))], [x, x], 1, MS_SSIM_3)
    with pytest.raises(ValueError, match="views of one side must be of one shape"):
        best_matches([], [], 1, MS_SSIM_3)
