"""The reference index: descriptors and hashes of images, without the images.

A file of an index is one safetensors file:

- ``descriptors``: float32 ``[n, d]``, of unit length, a row for each reference, sorted by id;
- ``sha256``: uint8 ``[n, 32]``, of the bytes of the file that each was made from;
- ``duplicates``: int64 ``[n]``, how often each was in the training data (0: not known);
- in the header's metadata ``format`` (:data:`FORMAT`), ``descriptor`` and ``weights`` (what made the rows,
  and the SHA-256 of what it learnt), ``preprocessing`` in words, and ``ids`` and ``captions``, JSON lists of
  n texts ("": no caption).

The same references give the same bytes. AMG reads the file too, as its setting ``index``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.store import file_sha256, write_atomic

from ._use import Described, Descriptor, Floats

if TYPE_CHECKING:
    from lethebench.prompts import Reference

FORMAT = "lethe-reference-index/1"


@dataclass(frozen=True, eq=False)
class ReferenceIndex:
    """n references: ``vectors`` float32 ``[n, d]``, ``sums`` uint8 ``[n, 32]``, the rest as in the file.

    ``sha256`` is the file's own, where it was read from one.
    """

    descriptor: Descriptor
    ids: tuple[str, ...]
    vectors: Floats
    sums: NDArray[np.uint8]
    captions: tuple[str, ...]
    duplicates: tuple[int, ...]
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each id."""
        return {name: row for row, name in enumerate(self.ids)}


def save_index(index: ReferenceIndex, path: Path) -> None:
    """Write the index as one file, whole or not at all. Raises UserError where it can't be written."""
    from safetensors.numpy import save

    tensors = {
        "descriptors": np.ascontiguousarray(index.vectors, dtype=np.float32),
        "sha256": np.ascontiguousarray(index.sums, dtype=np.uint8),
        "duplicates": np.array(index.duplicates, dtype=np.int64),
    }
    metadata = {
        "format": FORMAT,
        "descriptor": index.descriptor.name,
        "weights": index.descriptor.weights,
        "preprocessing": index.descriptor.preprocessing,
        "ids": json.dumps(index.ids, ensure_ascii=False),
        "captions": json.dumps(index.captions, ensure_ascii=False),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _in_order(save(tensors, metadata)))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its header's keys sorted: the library writes metadata in any order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def load_index(path: Path) -> ReferenceIndex:
    """Read an index. Raises UserError, one line, for a file that is missing, damaged, or no index."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no reference index at {path}: make one by `lethe index`")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no reference index, or a damaged one ({error}): make it again by `lethe index`"
        ) from error
    if metadata.get("format") != FORMAT:
        said = metadata.get("format", "nothing")
        raise UserError(f"{path} is no reference index: its format must be {FORMAT}, and it says {said}")
    if "ids" not in metadata or "sha256" not in tensors:
        raise UserError(f"{path} doesn't say whose descriptors it holds: make it again by `lethe index`")
    descriptor = Descriptor(
        metadata.get("descriptor", ""), metadata.get("weights", ""), metadata.get("preprocessing", "")
    )
    found = ReferenceIndex(
        descriptor,
        _texts(path, metadata, "ids"),
        tensors.get("descriptors", np.zeros(0, np.float32)),
        tensors["sha256"],
        _texts(path, metadata, "captions"),
        tuple(int(value) for value in tensors.get("duplicates", np.zeros(0, np.int64))),
        file_sha256(path),
    )
    _check(path, found)
    return found


def _texts(path: Path, metadata: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        found: Any = json.loads(metadata.get(name, ""))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{path}: '{name}' in its metadata must be a JSON list of texts")
    return tuple(found)


def _check(path: Path, index: ReferenceIndex) -> None:
    vectors, count = index.vectors, len(index.ids)
    if vectors.dtype != np.float32 or vectors.ndim != 2 or not vectors.shape[1]:
        shape = list(vectors.shape)
        raise UserError(f"{path}: 'descriptors' must be float32 [n, d], not {vectors.dtype} {shape}")
    if index.sums.dtype != np.uint8 or index.sums.shape != (count, 32):
        shape = list(index.sums.shape)
        raise UserError(f"{path}: 'sha256' must be uint8 [{count}, 32], not {index.sums.dtype} {shape}")
    if not len(vectors) == len(index.captions) == len(index.duplicates) == count:
        raise UserError(
            f"{path}: {len(vectors)} descriptors, {count} ids, {len(index.captions)} captions and "
            f"{len(index.duplicates)} duplicates: there must be one of each for every reference"
        )
    if not count or len(index.rows) < count:
        raise UserError(f"{path} holds " + ("an id twice" if count else "no references"))
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(lengths).all() or np.abs(lengths - 1).max() > 1e-3:
        raise UserError(f"{path}: 'descriptors' must be of unit length: make the index again")


class Indexes:
    """References that are there as descriptors only, in one index or several by different descriptors."""

    def __init__(self, indexes: tuple[ReferenceIndex, ...]) -> None:
        """Raises UserError for two indexes by one descriptor."""
        names = [index.descriptor.name for index in indexes]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two indexes hold descriptors of {name}: put away one of them")
        self.indexes = indexes

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids that any index holds, sorted."""
        return tuple(sorted({name for index in self.indexes for name in index.ids}))

    def __contains__(self, reference_id: object) -> bool:
        return any(reference_id in index.rows for index in self.indexes)

    def reference(self, reference_id: str) -> Reference:
        """Raises UserError: there is no image."""
        if reference_id not in self:
            raise KeyError(reference_id)
        raise UserError(
            f"reference {reference_id} is there only as a descriptor: what needs its image does not apply"
        )

    def described(self, reference_id: str) -> Described:
        """The vectors of a reference."""
        vectors = {
            index.descriptor: index.vectors[index.rows[reference_id]]
            for index in self.indexes
            if reference_id in index.rows
        }
        if not vectors:
            raise KeyError(reference_id)
        return Described(reference_id, vectors)

    def manifest(self) -> dict[str, Any]:
        """Each index's descriptor, size and SHA-256."""
        return {
            "descriptors": {
                index.descriptor.name: {"references": len(index), "sha256": index.sha256}
                for index in sorted(self.indexes, key=lambda index: index.descriptor.name)
            }
        }
