"""The reference index: what is to be kept from being copied, as descriptors with captions, without images.

A file of an index is one safetensors file:

- ``descriptors``: float32 ``[n, d]``, a row for each reference (of unit length if compared by cosine);
- ``duplicates``: int64 ``[n]``, how often each reference was in the training data (0: not known);
- in the header's metadata ``format`` (:data:`FORMAT`), ``descriptor`` (how the rows were made, such as
  ``copy-mini``), ``weights`` (the SHA-256 of what made them, "" where nothing was learnt), and
  ``captions``, a JSON list of n texts ("": no caption).

``sscd`` and ``copy-mini`` rows don't show the image; rows of ``latents`` and ``pixels`` do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethebench.errors import UserError

if TYPE_CHECKING:
    from lethebench.methods.amg.similarity import Describer

FORMAT = "lethe-reference-index/1"
_BATCH = 32


@dataclass(frozen=True)
class ReferenceIndex:
    """Descriptors ``[n, d]`` (float32, on the CPU) of n references, with their captions and duplicates."""

    descriptors: Tensor
    captions: tuple[str, ...]
    duplicates: tuple[int, ...]
    descriptor: str
    weights: str = ""

    def __len__(self) -> int:
        return len(self.captions)


def build(
    images: Iterable[NDArray[np.uint8]],
    describer: Describer,
    captions: Sequence[str],
    duplicates: Sequence[int] | None = None,
) -> ReferenceIndex:
    """The index of images uint8 ``[height, width, 3]``, of any sizes. Raises ValueError for other numbers."""
    parts: list[Tensor] = []
    with torch.no_grad():
        for _, alike in groupby(images, key=lambda image: image.shape):
            same = list(alike)
            for start in range(0, len(same), _BATCH):
                pixels = torch.from_numpy(np.stack(same[start : start + _BATCH])).to(describer.device)
                parts.append(describer.images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).float().cpu())
    descriptors = torch.cat(parts) if parts else torch.zeros(0, 0)
    counts = tuple(duplicates) if duplicates is not None else (0,) * len(captions)
    if not len(descriptors) == len(captions) == len(counts):
        raise ValueError(f"{len(descriptors)} images, {len(captions)} captions, {len(counts)} duplicates")
    return ReferenceIndex(descriptors, tuple(captions), counts, describer.name, describer.weights)


def save(index: ReferenceIndex, path: Path) -> None:
    """Write the index as one file."""
    from safetensors.torch import save_file

    tensors = {
        "descriptors": index.descriptors.float().cpu().contiguous(),
        "duplicates": torch.tensor(index.duplicates, dtype=torch.int64),
    }
    metadata = {
        "format": FORMAT,
        "descriptor": index.descriptor,
        "weights": index.weights,
        "captions": json.dumps(index.captions, ensure_ascii=False),
    }
    save_file(tensors, path, metadata)


def load(path: Path) -> ReferenceIndex:
    """Read an index. Raises UserError, one line, for a file that is missing, damaged, or no index."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no reference index at {path}: name the file that holds it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no reference index, or a damaged one: {error}") from error
    if metadata.get("format") != FORMAT:
        said = metadata.get("format", "nothing")
        raise UserError(f"{path} is no reference index: its format must be {FORMAT}, and it says {said}")
    captions = _captions(path, metadata)
    descriptors = tensors.get("descriptors", torch.empty(0))
    duplicates = tensors.get("duplicates", torch.empty(0))
    _check(path, descriptors, duplicates, len(captions))
    counts = tuple(int(value) for value in duplicates)
    name, weights = metadata.get("descriptor", ""), metadata.get("weights", "")
    return ReferenceIndex(descriptors, captions, counts, name, weights)


def require_made_by(index: ReferenceIndex, describer: Describer, source: str) -> None:
    """Raise UserError where the rows were made by another descriptor than the one they are compared with."""
    if index.descriptor != describer.name:
        raise UserError(
            f"{source} holds descriptors of '{index.descriptor}', the settings ask for '{describer.name}': "
            "change the setting, or make the index again"
        )
    if index.weights != describer.weights:
        raise UserError(f"{source} was made with other weights of {describer.name}: make the index again")
    if describer.cosine:
        off = (index.descriptors.norm(dim=1) - 1).abs().max()
        if off > 1e-3:
            raise UserError(
                f"{source} holds descriptors of {describer.name} that are not of unit length: normalise them"
            )


def _captions(path: Path, metadata: dict[str, str]) -> tuple[str, ...]:
    try:
        captions: Any = json.loads(metadata.get("captions", ""))
    except ValueError as error:
        raise UserError(f"{path}: 'captions' in its metadata is no JSON list") from error
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{path}: 'captions' in its metadata must be a JSON list of texts")
    return tuple(captions)


def _check(path: Path, descriptors: Tensor, duplicates: Tensor, count: int) -> None:
    if descriptors.dtype != torch.float32 or descriptors.ndim != 2 or not descriptors.shape[1]:
        shape = list(descriptors.shape)
        raise UserError(f"{path}: 'descriptors' must be float32 [n, d], not {descriptors.dtype} {shape}")
    if duplicates.dtype != torch.int64 or duplicates.ndim != 1:
        shape = list(duplicates.shape)
        raise UserError(f"{path}: 'duplicates' must be int64 [n], not {duplicates.dtype} {shape}")
    if not len(descriptors) == len(duplicates) == count:
        raise UserError(
            f"{path}: {len(descriptors)} descriptors, {len(duplicates)} duplicates and {count} captions: "
            "there must be one of each for every reference"
        )
    if not count:
        raise UserError(f"{path} holds no references")
    if not descriptors.isfinite().all():
        raise UserError(f"{path}: 'descriptors' holds values that are no finite numbers")
