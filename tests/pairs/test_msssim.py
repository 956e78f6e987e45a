"""The all-pairs engine against torchmetrics, and against SciPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from lethebench.pairs import speed
from lethebench.pairs.msssim import C1, C2, MS_SSIM, MS_SSIM_3, SSIM, Similarity, View, all_pairs, blur, plan

TOLERANCE = 1e-4
"""What the engine promises. Largest error seen against float64: 6e-5."""


def natural(count: int, height: int, width: int, seed: int) -> NDArray[np.float64]:
    """Pictures with the spectrum of natural ones (1/f), each channel from 0 to 1."""
    random = np.random.default_rng(seed)
    power = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    power[0, 0] = 1
    wave = random.normal(size=(2, count, 3, *power.shape))
    x = np.fft.irfft2((wave[0] + 1j * wave[1]) / np.sqrt(power), s=(height, width))
    x -= x.min(axis=(2, 3), keepdims=True)
    return x / x.max(axis=(2, 3), keepdims=True)


def both_sides(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unrelated, equal and near-equal pictures, and noise."""
    x, y = natural(3, height, width, 1), natural(3, height, width, 2)
    y[0], y[1] = x[0], np.clip(x[1] + 0.003 * np.random.default_rng(3).normal(size=x[1].shape), 0, 1)
    noise = np.random.default_rng(4).random((1, 3, height, width))
    return tuple(torch.tensor(np.concatenate([side, noise]), dtype=torch.float32) for side in (x, y))  # type: ignore[return-value]


def extremes(height: int, width: int) -> torch.Tensor:
    """Flat pictures, half black and half white, a chequerboard, and a bright one of low contrast."""
    flat = [np.full((3, height, width), level) for level in (0, 1, 1 / 255, 0.5, 0.999)]
    half = np.zeros((3, height, width))
    half[..., width // 2 :] = 1
    chequers = np.broadcast_to(np.indices((height, width)).sum(axis=0) % 2, (3, height, width))
    return torch.tensor(
        np.stack([*flat, half, chequers, 0.97 + 0.03 * natural(1, height, width, 5)[0]]), dtype=torch.float32
    )


def discs(count: int, height: int, width: int, seed: int) -> NDArray[np.bool_]:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    centres = random.uniform(0.3, 0.7, size=(count, 2))
    return np.stack(
        [(rows - r * height) ** 2 + (columns - c * width) ** 2 < (0.2 * height) ** 2 for r, c in centres]
    )


def torchmetrics_pairs(x: torch.Tensor, y: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """A loop over pictures, float32."""
    found = []
    for one in x:
        same = one.expand_as(y)
        if similarity.normalize is None:
            found.append(ssim(same, y, data_range=1.0, reduction="none"))
        else:
            found.append(ms_ssim(same, y, data_range=1.0, betas=similarity.betas, reduction="none"))
    return torch.stack(found)  # type: ignore[arg-type]


def float64_pairs(x: torch.Tensor, y: torch.Tensor, similarity: Similarity) -> NDArray[Any]:
    """The docstring's formulas by SciPy's filters, pair by pair, in float64."""
    steps = np.arange(-5, 6)
    window = np.exp(-((steps / 1.5) ** 2) / 2) / np.exp(-((steps / 1.5) ** 2) / 2).sum()

    def mean(z: NDArray[Any]) -> NDArray[Any]:
        return correlate1d(correlate1d(z, window, axis=-1, mode="mirror"), window, axis=-2, mode="mirror")

    def pair(a: NDArray[Any], b: NDArray[Any]) -> float:
        product = 1.0
        for scale, beta in enumerate(similarity.betas):
            ma, mb = mean(a), mean(b)
            value = (2 * (mean(a * b) - ma * mb) + C2) / (mean(a * a) - ma**2 + mean(b * b) - mb**2 + C2)
            if scale == len(similarity.betas) - 1:
                value = value * (2 * ma * mb + C1) / (ma**2 + mb**2 + C1)
            else:
                value = value[:, 5:-5, 5:-5]
            product *= max(value.mean(), 0) ** beta if similarity.normalize else value.mean() ** beta
            rows, columns = a.shape[1] // 2, a.shape[2] // 2
            a, b = (
                z[:, : 2 * rows, : 2 * columns].reshape(3, rows, 2, columns, 2).mean(axis=(2, 4))
                for z in (a, b)
            )
        return product

    return np.array([[pair(a, b) for b in y.double().numpy()] for a in x.double().numpy()])


@pytest.mark.parametrize(
    ("similarity", "height", "width"),
    [
        (MS_SSIM, 176, 176),
        (MS_SSIM, 181, 203),
        (MS_SSIM, 256, 256),
        (MS_SSIM_3, 44, 44),
        (MS_SSIM_3, 97, 64),
        (SSIM, 64, 64),
        (SSIM, 12, 43),
    ],
)
def test_every_pair_equals_torchmetrics(similarity: Similarity, height: int, width: int) -> None:
    x, y = both_sides(height, width)
    found = all_pairs(x, y, similarity)
    torch.testing.assert_close(found, torchmetrics_pairs(x, y, similarity), atol=TOLERANCE, rtol=0)
    assert found[0, 0] == pytest.approx(1, abs=1e-6)
    assert found[2].min() < 0.5


@pytest.mark.parametrize(("similarity", "side"), [(MS_SSIM_3, 44), (SSIM, 48)])
def test_flat_and_filled_pictures_equal_float64(similarity: Similarity, side: int) -> None:
    """Where torchmetrics in float32 is off by 1e-3: E[x^2] - m^2 cancels on bright flat areas."""
    x = torch.cat([extremes(side, side), both_sides(side, side)[0][:1]])
    np.testing.assert_allclose(
        all_pairs(x, x, similarity), float64_pairs(x, x, similarity), rtol=0, atol=1e-5
    )
    masks = discs(len(x), side, side, 6)
    for chosen, fill in ((masks, 0.0), (~masks, 1.0)):
        view = View(x, chosen, fill)
        filled = view.pixels(slice(None))
        expected = float64_pairs(filled, filled, similarity)
        np.testing.assert_allclose(all_pairs(view, view, similarity), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_masks_fill_as_the_released_code_does(fill: float) -> None:
    images = [np.round(255 * natural(3, 64, 64, seed)).astype(np.uint8) for seed in (1, 2)]
    masks = [discs(3, 64, 64, seed) for seed in (7, 8)]
    views = [View(i.transpose(0, 2, 3, 1), m, fill) for i, m in zip(images, masks, strict=True)]
    painted = [
        torch.from_numpy(np.where(m[:, None], i / np.float32(255), np.float32(fill)))
        for i, m in zip(images, masks, strict=True)
    ]
    expected = torchmetrics_pairs(painted[0], painted[1], MS_SSIM_3)
    torch.testing.assert_close(all_pairs(*views, MS_SSIM_3), expected, atol=TOLERANCE, rtol=0)


def test_bytes_equal_floats_and_soft_masks_mix() -> None:
    images = np.round(255 * natural(2, 48, 48, 1)).astype(np.uint8)
    floats = torch.from_numpy(images.astype(np.float32) / 255)
    rows = images.transpose(0, 2, 3, 1)
    torch.testing.assert_close(
        all_pairs(rows, floats, SSIM), all_pairs(floats, floats, SSIM), atol=1e-6, rtol=0
    )
    half = View(floats, np.full((2, 48, 48), 0.5, dtype=np.float32), 1.0)
    torch.testing.assert_close(half.pixels(slice(None)), floats / 2 + 0.5)


def test_memory_limit_changes_the_parts_and_no_value() -> None:
    x, y = both_sides(64, 64)
    x, y = x.repeat(4, 1, 1, 1), y.repeat(3, 1, 1, 1)
    whole = all_pairs(x, y, MS_SSIM_3)
    for memory in (2_200_000, 5_000_000, 20_000_000):
        parts = plan(View(x), View(y), MS_SSIM_3, memory)
        assert (parts.rows < len(x)) == (memory < 10_000_000)
        torch.testing.assert_close(all_pairs(x, y, MS_SSIM_3, memory=memory), whole, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="need a memory limit of"):
        all_pairs(x, y, MS_SSIM_3, memory=1_000_000)


def test_order_of_the_pictures_changes_no_value() -> None:
    x, y = both_sides(64, 64)
    turned = all_pairs(x.flip(0), y.flip(0), MS_SSIM_3).flip(0, 1)
    torch.testing.assert_close(turned, all_pairs(x, y, MS_SSIM_3), atol=1e-6, rtol=0)
    torch.testing.assert_close(all_pairs(y, x, MS_SSIM_3).T, all_pairs(x, y, MS_SSIM_3), atol=1e-6, rtol=0)


def test_no_pictures_give_an_empty_result() -> None:
    x, _ = both_sides(48, 48)
    assert all_pairs(x[:0], x, SSIM).shape == (0, 4)
    assert all_pairs(x, x[:0], SSIM).shape == (4, 0)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(11, 33), (43, 12), (100, 54)])
def test_blur_is_the_gaussian_mean(mirrored: bool, size: tuple[int, int]) -> None:
    x = torch.from_numpy(natural(2, *size, 9)).float()
    steps = np.arange(-5, 6)
    window = np.exp(-((steps / 1.5) ** 2) / 2) / np.exp(-((steps / 1.5) ** 2) / 2).sum()
    expected = correlate1d(
        correlate1d(x.double().numpy(), window, mode="mirror"), window, axis=2, mode="mirror"
    )
    if not mirrored:
        expected = expected[..., 5:-5, 5:-5]
    np.testing.assert_allclose(blur(x, mirrored), expected, atol=1e-6)


def test_bad_input_gives_one_clear_line() -> None:
    x, _ = both_sides(48, 48)
    bad: list[tuple[str, Any]] = [
        ("images must be uint8", lambda: View(np.zeros((2, 3, 48, 48), dtype=np.uint8))),
        ("images must be uint8", lambda: View(np.zeros((48, 48, 3), dtype=np.uint8))),
        ("images must be uint8", lambda: View([1, 2])),  # type: ignore[arg-type]
        ("numbers in 0 to 1; got 0 to 255", lambda: View(torch.tensor([[[[0.0, 255.0]]]]))),
        ("numbers in 0 to 1; got nan", lambda: View(x * torch.nan)),
        ("masks must be", lambda: View(x, np.ones((4, 48, 47)))),
        ("masks must be numbers", lambda: View(x, np.full((4, 48, 48), 255, dtype=np.uint8))),
        ("fill must lie in", lambda: View(x, None, 255.0)),
        ("both sides must be of one size", lambda: all_pairs(x, x[..., :44], SSIM)),
        ("5 scales need 176 pixels a side; got 48 x 48", lambda: all_pairs(x, x)),
        ("betas must be positive", lambda: Similarity(())),
        ("betas must be positive", lambda: Similarity((0.5, -0.5))),
        ("normalize must be", lambda: Similarity((0.5, 0.5), normalize=None)),
    ]
    for message, make in bad:
        with pytest.raises(ValueError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_lower_precision_of_products_is_refused() -> None:
    x, _ = both_sides(48, 48)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="set_float32_matmul_precision"):
            all_pairs(x, x, SSIM)
    finally:
        torch.set_float32_matmul_precision(before)


def test_speed_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    speed.main(["--images", "4", "--side", "64", "--similarity", "ms-ssim-3", "--sample", "4"])
    printed = capsys.readouterr().out
    assert '"pairs": 16' in printed and '"ratio"' in printed and '"memory_added"' in printed
    with pytest.raises(SystemExit) as caught:
        speed.main(["--images", "4", "--side", "64"])
    assert caught.value.code == 2
    assert "5 scales need 176 pixels" in capsys.readouterr().err
