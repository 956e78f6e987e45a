"""The training images of a planted world: rendered once, kept as an array beside the checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethebench.datasets import planted
from lethebench.datasets.planted import PlantedWorld, Scene, render
from lethebench.progress import progress


@dataclass(frozen=True)
class TrainingSet:
    """The training examples, copies included, as indices into different pictures and captions.

    ``images`` uint8 [pictures, 64, 64, 3]; ``image_of`` and ``caption_of`` int64 [examples];
    ``captions`` the different captions.
    """

    images: NDArray[np.uint8]
    image_of: Tensor
    caption_of: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_of)


def training_set(world: PlantedWorld, cache: Path) -> TrainingSet:
    """The world's training set, its different pictures rendered once into ``cache``."""
    examples = world.training_examples()
    scenes = {scene: index for index, scene in enumerate(dict.fromkeys(e.scene for e in examples))}
    captions = {text: index for index, text in enumerate(dict.fromkeys(e.caption for e in examples))}
    return TrainingSet(
        rendered(list(scenes), cache),
        torch.tensor([scenes[e.scene] for e in examples]),
        torch.tensor([captions[e.caption] for e in examples]),
        tuple(captions),
    )


def fresh_scenes(world: PlantedWorld, count: int, purpose: str) -> list[Scene]:
    """Scenes outside the training set: of eight, five neutral, two with a character, one a figure."""
    kinds = ("neutral", "character", "neutral", "figure", "neutral", "character", "neutral", "neutral")
    return [world.random_scene(f"{purpose}-{i}", kind=kinds[i % 8]) for i in range(count)]  # type: ignore[arg-type]


def rendered(scenes: Sequence[Scene], cache: Path) -> NDArray[np.uint8]:
    """The scenes' pictures, uint8 [n, 64, 64, 3]; read from ``cache`` if they were drawn before."""
    path = cache / f"pictures-{_digest(scenes)}.npy"
    if path.exists():
        return np.asarray(np.load(path, mmap_mode="r"))
    pictures = []
    with progress("render", total=len(scenes)) as bar:
        for scene in scenes:
            pictures.append(render(scene).image)
            bar.advance()
    out = np.stack(pictures)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as f:
        np.save(f, out)
    temporary.replace(path)
    return out


def to_model(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, height, width, 3] as float32 [n, 3, height, width] in -1 to 1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> NDArray[np.uint8]:
    """Float [n, 3, height, width] in -1 to 1 as uint8 [n, height, width, 3]."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _digest(scenes: Sequence[Scene]) -> str:
    """Changes with the scenes and with the source that draws them."""
    digest = hashlib.sha256()
    for source in sorted(Path(planted.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for scene in scenes:
        digest.update(repr(scene).encode())
    return digest.hexdigest()[:16]
