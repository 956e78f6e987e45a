"""Recipes and losses of the four judges: a batch is a function of the step's generator alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lethebench.judges.base import to_input
from lethebench.judges.clip import Words
from lethebench.judges.nets import ClipNet
from lethebench.training.augment import (
    chance,
    copied,
    gaussian_blur,
    generated_look,
    resample,
    shift_grid,
    uniform,
    warped,
)
from lethebench.training.judge_data import Pool

Loss = Callable[[int, Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What every judge's training has; all values are ours unless a source is given."""

    steps: int
    batch: int
    peak_lr: float
    widths: tuple[int, ...]
    seed: int = 0
    weight_decay: float = 1e-2
    steps_again: int = 0
    """Of a second cycle of the learning rate, after ``steps``."""
    peak_lr_again: float = 0.0


@dataclass(frozen=True)
class RecogniserRecipe(Recipe):
    """recogniser-mini: cross-entropy over the heads, with negatives of the protected characters."""

    steps: int = 12_000
    batch: int = 64
    peak_lr: float = 2e-3
    widths: tuple[int, ...] = (32, 64, 96, 128)
    hidden: int = 256
    spoilt: int = 8
    """Characters a batch that are blended, cut, blurred or recoloured away: none of them any more."""
    junk: int = 2
    """Pictures a batch of nothing at all: flat, noisy, shuffled."""
    character_weight: float = 2.0
    steps_again: int = 4000
    peak_lr_again: float = 1e-3
    warp: float = 1.8
    """Pixels by which pictures are warped in the second cycle: generated outlines waver, and a judge that
    never saw that says "none" to characters with every feature right."""


@dataclass(frozen=True)
class SegmenterRecipe(Recipe):
    """segmenter-mini: binary cross-entropy and soft Dice against the true coverage."""

    steps: int = 1500
    batch: int = 32
    peak_lr: float = 3e-3
    widths: tuple[int, ...] = (16, 32, 64, 96)


@dataclass(frozen=True)
class CopyRecipe(Recipe):
    """copy-mini: SSCD (Pizzi et al. 2022): InfoNCE at temperature 0.05 and the entropy regulariser.

    The batch is made of families of pictures of the same kind, so that most negatives are hard.
    SSCD weighs the regulariser 30 at a batch of 4096; ours is far smaller, and so is the weight.
    SSCD's mixed images are left out.
    """

    steps: int = 1300
    batch: int = 64
    peak_lr: float = 2e-3
    widths: tuple[int, ...] = (32, 64, 96, 128)
    size: int = 128
    temperature: float = 0.05
    entropy_weight: float = 2.0


@dataclass(frozen=True)
class ClipRecipe(Recipe):
    """clip-mini: CLIP (Radford et al. 2021), plus captions with one attribute changed as negatives."""

    steps: int = 1800
    batch: int = 64
    peak_lr: float = 1.5e-3
    widths: tuple[int, ...] = (32, 64, 96, 128)
    features: int = 64
    size: int = 64
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_length: int = 16
    wrong: int = 2
    """Changed captions an image that the whole batch is compared with."""
    part_weight: float = 0.5
    """Weight of telling a caption of a part of the picture from the same with that part changed."""


def half(device: str) -> Any:
    """The context in which training runs the networks: bfloat16 where it is safe."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def draw_rows(rows: NDArray[np.int64], count: int, g: Generator) -> NDArray[np.int64]:
    """``count`` of the rows, with repetition."""
    return rows[torch.randint(len(rows), (count,), generator=g).numpy()]  # type: ignore[no-any-return]


# --- recogniser ----------------------------------------------------------------------------------


def recogniser_loss(
    net: nn.Module, pool: Pool, options: Mapping[str, tuple[str, ...]], recipe: RecogniserRecipe, device: str
) -> Loss:
    """Cross-entropy of every head over the pictures that its question can be put to."""
    everything = np.arange(len(pool))
    columns = {name: index for index, name in enumerate(options)}
    weights = {"character": recipe.character_weight}

    def loss(step: int, g: Generator) -> Tensor:
        rows = draw_rows(everything, recipe.batch, g)
        x = to_input(pool.images[rows])
        labels = torch.from_numpy(pool.labels[rows].astype(np.int64))
        spoil(x, labels, columns, pool, recipe.spoilt, g)
        fill_with_junk(x, labels, options, recipe.junk, g)
        grid = shift_grid(len(x), g)
        if step >= recipe.steps:
            grid = warped(grid, g, recipe.warp)
        x = generated_look(resample(x, grid), g)
        with half(device):
            logits = net(x.to(device))
        return heads_loss(logits, labels.to(device), options, weights)

    return loss


def heads_loss(
    logits: tuple[Tensor, ...], labels: Tensor, options: Mapping[str, Any], weights: Mapping[str, float]
) -> Tensor:
    """The weighted sum of the heads' mean cross-entropies; -1 labels don't count."""
    total = logits[0].new_zeros(())
    for index, name in enumerate(options):
        wanted = labels[:, index]
        summed = F.cross_entropy(logits[index], wanted, ignore_index=-1, reduction="sum")
        total = total + weights.get(name, 1.0) * summed / (wanted >= 0).sum().clamp(min=1)
    return total


def spoil(
    x: Tensor, labels: Tensor, columns: Mapping[str, int], pool: Pool, count: int, g: Generator
) -> None:
    """Replace the first ``count`` pictures, in place, by characters that aren't whole any more.

    A quarter each: mixed with another figure pixel by pixel; cut in two, half of another figure;
    blurred beyond recognition; recoloured by swapping channels. Their one sure answer is that they
    show no protected character; where even that is unsure (the same character twice, hardly
    changed colours) no question is put.
    """
    if not count:
        return
    people = pool.rows("character", "figure", "near miss")
    rows, others = draw_rows(pool.rows("character"), count, g), draw_rows(people, count, g)
    first, second = to_input(pool.images[rows]), to_input(pool.images[others])
    mask = torch.from_numpy(pool.masks[rows]).unsqueeze(1) > 127
    mixed = torch.lerp(first, second, uniform(count, 0.35, 0.65, g))
    edge = torch.randint(28, 37, (), generator=g)
    side = torch.arange(64) < edge
    cut_up = torch.where(side.view(1, 1, 64, 1), first, second)
    cut_left = torch.where(side.view(1, 1, 1, 64), first, second)
    cut = torch.lerp(cut_up, cut_left, chance(count, 0.5, g))
    washed = gaussian_blur(F.interpolate(F.avg_pool2d(first, 8), scale_factor=8.0, mode="nearest"), 3.0)
    swapped = torch.where(mask, first[:, [2, 0, 1]], first)
    which = torch.arange(count) % 4
    choices = torch.stack([mixed, cut, washed, swapped])
    spoilt = choices[which, torch.arange(count)]
    character = columns["character"]
    names = torch.from_numpy(pool.labels[:, character].astype(np.int64))
    same = names[torch.from_numpy(rows)] == names[torch.from_numpy(others)]
    moved = ((spoilt - first).abs() * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3))).clamp(min=1)
    unsure = torch.where(which < 2, same, moved < 0.35) & (which != 2)
    x[:count] = spoilt
    labels[:count] = -1
    labels[:count, character] = torch.where(unsure, -1, int(names.max()))
    labels[:count, columns["protected"]] = torch.where(unsure, -1, 0)


def fill_with_junk(
    x: Tensor, labels: Tensor, options: Mapping[str, tuple[str, ...]], count: int, g: Generator
) -> None:
    """Replace the last ``count`` pictures, in place, by pictures of nothing: every answer is none."""
    for index in range(len(x) - count, len(x)):
        kind = int(torch.randint(4, (), generator=g))
        colour = torch.rand(3, 1, 1, generator=g) * 2 - 1
        if kind == 0:
            x[index] = colour
        elif kind == 1:
            x[index] = (colour + torch.randn(3, 64, 64, generator=g) * 0.6).clamp(-1, 1)
        elif kind == 2:
            coarse = torch.randn(1, 3, 5, 5, generator=g)
            x[index] = F.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=False)[0].clamp(
                -1, 1
            )
        else:
            blocks = x[index].reshape(3, 8, 8, 8, 8).permute(1, 3, 0, 2, 4).reshape(64, 3, 8, 8)
            blocks = blocks[torch.randperm(64, generator=g)]
            x[index] = blocks.reshape(8, 8, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 64, 64)
        labels[index] = torch.tensor(
            [
                answers.index("none") if "none" in answers else 0 if name == "protected" else -1
                for name, answers in options.items()
            ]
        )


# --- segmenter -----------------------------------------------------------------------------------


def segmenter_loss(net: nn.Module, pool: Pool, recipe: SegmenterRecipe, device: str) -> Loss:
    """Binary cross-entropy and soft Dice against the coverage, moved along with the picture."""
    everything = np.arange(len(pool))

    def loss(step: int, g: Generator) -> Tensor:
        rows = draw_rows(everything, recipe.batch, g)
        cover = torch.from_numpy(pool.masks[rows]).float().div(255).unsqueeze(1)
        moved = resample(
            torch.cat([to_input(pool.images[rows]), cover], 1), shift_grid(len(rows), g, flip=0.5)
        )
        x, wanted = generated_look(moved[:, :3], g), moved[:, 3].clamp(0, 1).to(device)
        with half(device):
            logits = net(x.to(device))
        return F.binary_cross_entropy_with_logits(logits, wanted) + 0.5 * dice_loss(
            torch.sigmoid(logits), wanted
        )

    return loss


def dice_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """One minus soft Dice of masks ``[n, h, w]`` in [0, 1], averaged; two empty masks agree."""
    overlap = (found * wanted).sum((1, 2))
    sizes = found.sum((1, 2)) + wanted.sum((1, 2))
    return 1 - ((2 * overlap + 10) / (sizes + 10)).mean()


# --- copy descriptor -----------------------------------------------------------------------------


def copy_loss(net: nn.Module, pool: Pool, recipe: CopyRecipe, device: str) -> Loss:
    """InfoNCE between two views plus the entropy term, on families of pictures of the same kind."""
    loose = pool.rows("figure", "near miss", "backdrop")
    members = pool.families.shape[1]

    def loss(step: int, g: Generator) -> Tensor:
        families = torch.randint(
            len(pool.families), (recipe.batch * 7 // 8 // members,), generator=g
        ).unique()
        rows = pool.families[families.numpy()].reshape(-1)
        rows = np.concatenate([rows, np.unique(draw_rows(loose, recipe.batch - len(rows), g))])
        x = to_input(pool.images[rows])
        plain = torch.lerp(copied(x, g), resample(x, shift_grid(len(x), g)), chance(len(x), 0.4, g))
        views = torch.cat([generated_look(plain, g), copied(x, g)])
        with half(device):
            z = net(views.to(device))
        return info_nce(z, recipe.temperature) + recipe.entropy_weight * koleo(z)

    return loss


def info_nce(z: Tensor, temperature: float) -> Tensor:
    """InfoNCE of unit descriptors ``[2 n, d]`` whose row i and row i + n are views of one picture."""
    n = len(z) // 2
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner)


def koleo(z: Tensor) -> Tensor:
    """Pizzi et al. 2022, eq. 4: minus the mean log distance to the nearest descriptor of another picture."""
    n = len(z) // 2
    same = torch.arange(2 * n, device=z.device) % n
    similarity = (z @ z.T).masked_fill(same[:, None] == same[None], -1.0)
    nearest = similarity.max(1).values
    return -0.5 * torch.log((2 - 2 * nearest).clamp(min=1e-6)).mean()


# --- text-image encoder --------------------------------------------------------------------------


def clip_loss(net: ClipNet, pool: Pool, words: Words, recipe: ClipRecipe, device: str) -> Loss:
    """Symmetric InfoNCE, changed captions among the candidates, and captions of parts.

    Captions that mean the same as an image's own are not counted as its negatives.
    """
    everything = np.arange(len(pool))
    tokens = torch.from_numpy(np.stack([words.encode(list(column)) for column in pool.captions.T], 1))
    meanings = torch.from_numpy(np.unique(pool.meanings, return_inverse=True)[1].reshape(pool.meanings.shape))

    def loss(step: int, g: Generator) -> Tensor:
        rows = torch.from_numpy(draw_rows(everything, recipe.batch, g))
        n = len(rows)
        x = generated_look(resample(to_input(pool.images[rows.numpy()]), shift_grid(n, g)), g)
        chosen = torch.rand(n, 3, generator=g).argsort(1)[:, : recipe.wrong] + 1
        wrong = tokens[rows[:, None], chosen].reshape(-1, tokens.shape[2])
        texts = torch.cat([tokens[rows, 0], wrong, tokens[rows, 4], tokens[rows, 5]])
        texts = texts[:, : int((texts > 0).sum(1).max())].to(device)
        means = torch.cat([meanings[rows, 0], meanings[rows[:, None], chosen].reshape(-1)]).to(device)
        with half(device):
            image, text = net.image(x.to(device)), net.text(texts)
        candidates = n * (1 + recipe.wrong)
        logits = net.scale() * image @ text.T
        alike = (means[None] == means[:n, None]) & ~torch.eye(n, candidates, dtype=torch.bool, device=device)
        to_text = logits[:, :candidates].masked_fill(alike, float("-inf"))
        to_image = to_text[:, :n].T
        own = torch.arange(n, device=device)
        parts = torch.stack([logits[own, candidates + own], logits[own, candidates + n + own]], 1)
        symmetric = (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2
        return symmetric + recipe.part_weight * F.cross_entropy(parts, torch.zeros_like(own))

    return loss
