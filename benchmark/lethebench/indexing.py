"""``lethe index``: a reference index from a user's images (:mod:`lethebench.referencing`)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import RunError, UserError
from lethebench.metric import Metric, configure_metric
from lethebench.progress import progress
from lethebench.provenance import SCORING, code_sha256, packages
from lethebench.referencing import ReferenceIndex, UnreadableImage, load_index, read_image, save_index
from lethebench.referencing._folder import image_ids, listed, reference_id
from lethebench.registry import METRICS, source_sha256
from lethebench.store import digest

_SHOWN = 20
"""Lines of one kind that are printed before the rest is only counted."""
_SUM = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Entry:
    """An image of the index to be; ``duplicates`` is how often it was in the training data (0: not known)."""

    id: str
    file: Path
    caption: str = ""
    duplicates: int = 0


@dataclass(frozen=True)
class Built:
    """An index as it was written, and what was found on the way.

    ``same`` are the ids whose files hold the same bytes, ``unreadable`` the files that are not in the index
    and why, ``others`` the number of files in the folder that are no images by their names.
    """

    path: Path
    index: ReferenceIndex
    same: tuple[tuple[str, ...], ...]
    unreadable: tuple[tuple[str, str], ...]
    others: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        made_by = self.index.descriptor
        return {
            "index": str(self.path),
            "sha256": self.index.sha256,
            "references": len(self.index),
            "descriptor": made_by.name,
            "weights": made_by.weights,
            "preprocessing": made_by.preprocessing,
            "same": [list(ids) for ids in self.same],
            "unreadable": dict(self.unreadable),
            "others": self.others,
        }


def describing_metric(name: str, settings: Mapping[str, Any]) -> Metric:
    """The metric whose descriptor is wanted. Raises UserError for one that has none, or that can't run."""
    metric = configure_metric(METRICS.get(name), settings)
    if type(metric).descriptor is Metric.descriptor:
        known = sorted(n for n, cls in METRICS.items() if cls.descriptor is not Metric.descriptor)
        raise UserError(f"metric '{name}' compares no descriptors: --descriptor {' or '.join(known)}")
    metric.check()
    return metric


def build_index(
    images: Path, out: Path, metric: Metric, *, table: Path | None = None, skip_unreadable: bool = False
) -> Built:
    """Describe images with the metric's descriptor and write the index to ``out``.

    ``images`` is a folder: every image below it by its path without suffix, or with a ``table`` those that
    the table names. One image is read and described at a time, so memory holds one image and all vectors,
    and the same files give the same bytes, whatever was interrupted. Vectors wait in ``<out>.part`` until all
    are there. Raises UserError before any work; RunError where an image can't be read, unless
    ``skip_unreadable``: then nothing is written, and the vectors are kept for the next time.
    """
    entries, others = _entries(images, table)
    _require_place(out, images)
    descriptor = metric.descriptor()
    assert descriptor is not None
    key = digest(
        [
            descriptor.name,
            descriptor.weights,
            source_sha256(type(metric)),
            code_sha256("referencing/_read.py", "judges"),
            packages(("torch", *SCORING)),
        ]
    )
    kept: list[tuple[Entry, bytes, NDArray[np.float32]]] = []
    unreadable: list[tuple[str, str]] = []
    part = out.with_name(f"{out.name}.part")
    with _Journal(part, key) as journal, progress("index", total=len(entries)) as bar:
        for entry in entries:
            try:
                kept.append((entry, *_described(entry.file, metric, journal)))
            except (UnreadableImage, OSError) as error:
                unreadable.append((str(entry.file), str(error)))
            bar.advance(1)
    _report(unreadable, len(entries), skip_unreadable)
    index = ReferenceIndex(
        descriptor,
        tuple(entry.id for entry, _, _ in kept),
        np.stack([vector for _, _, vector in kept]),
        np.stack([np.frombuffer(total, np.uint8) for _, total, _ in kept]),
        tuple(entry.caption for entry, _, _ in kept),
        tuple(entry.duplicates for entry, _, _ in kept),
    )
    save_index(index, out)
    part.unlink()
    return Built(out, load_index(out), _same(kept), tuple(unreadable), others)


def _described(path: Path, metric: Metric, journal: _Journal) -> tuple[bytes, NDArray[np.float32]]:
    """A file's SHA-256 and the unit vector of its image. Raises UnreadableImage."""
    if not path.is_file():
        raise UnreadableImage("no such file")
    with path.open("rb") as file:
        total = hashlib.file_digest(file, "sha256").digest()
    if total not in journal.vectors:
        vector = np.asarray(metric.describe([read_image(path)])[0], dtype=np.float64)
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0:
            raise UnreadableImage("its descriptor has no direction")
        journal.add(total, (vector / length).astype(np.float32))
    return total, journal.vectors[total]


# --- what is to be indexed ------------------------------------------------------------------------


def _entries(images: Path, table: Path | None) -> tuple[list[Entry], int]:
    """The images by id, and the number of other files. Raises UserError where there is nothing."""
    if not images.is_dir():
        raise UserError(f"{images} is no folder: give the folder that holds the images")
    if table is not None:
        return entries_of_table(images, table), 0
    found = [Entry(name, path) for name, path in image_ids(images).items()]
    if not found:
        raise UserError(f"there are no images in {images}: nothing to index")
    return found, len(listed(images)) - len(found)


def entries_of_table(images: Path, table: Path) -> list[Entry]:
    """What a CSV, TSV, JSONL or Parquet table says of the images, sorted by id.

    Columns: ``file`` (below ``images``), and where wanted ``id`` (else the file's path without suffix),
    ``caption`` or ``prompt``, and ``duplicates``; all others are left aside. Raises UserError, with the line.
    """
    from lethebench.promptfiles.readers import format_of, read

    rows = read(table, format_of(table))
    if "file" not in rows.columns:
        has = ", ".join(rows.columns)
        raise UserError(f"{table} needs a column `file`, the image's path below {images}; it has {has}")
    found: dict[str, Entry] = {}
    for row in rows.rows:
        cells = row.cells
        if not cells["file"]:
            raise UserError(f"{table}: line {row.line} names no file")
        name = cells.get("id") or reference_id(cells["file"])
        if name in found:
            raise UserError(
                f"{table}: line {row.line} has the id '{name}' of a line before: ids are told once"
            )
        copies = cells.get("duplicates", "") or "0"
        if not copies.isdecimal():
            raise UserError(f"{table}: line {row.line}: duplicates is '{copies}', and must be a whole number")
        caption = cells.get("caption") or cells.get("prompt") or ""
        found[name] = Entry(name, images / cells["file"], caption, int(copies))
    if not found:
        raise UserError(f"{table} has no rows: nothing to index")
    return [found[name] for name in sorted(found)]


def _require_place(out: Path, images: Path) -> None:
    """Raise UserError unless the index can be written to ``out`` without harm."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out {out}: name a file that ends in .safetensors")
    if out.resolve().is_relative_to(images.resolve()):
        raise UserError(f"--out {out} is among the images: put the index elsewhere")
    if out.exists():
        try:
            load_index(out)
        except UserError as error:
            raise UserError(f"--out {out} is there already and is no index: name another file") from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.part").open("ab").close()
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}; choose another place with --out") from error


# --- what was made so far -------------------------------------------------------------------------


class _Journal:
    """Vectors made so far, in a file: a line with key and dimension, then records of SHA-256 and vector.

    A record that was cut short is dropped; a file of another key (another descriptor, or other code) is begun
    anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.vectors: dict[bytes, NDArray[np.float32]] = {}

    def __enter__(self) -> Self:
        whole = self._read()
        self._file: BinaryIO = self.path.open("r+b")
        self._file.truncate(whole)
        self._file.seek(whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, total: bytes, vector: NDArray[np.float32]) -> None:
        """Keep a vector ``[d]`` under the SHA-256 of its file."""
        if not self.vectors:
            self._file.write(f"{self.key} {len(vector)}\n".encode())
        self._file.write(total + vector.astype("<f4").tobytes())
        self._file.flush()
        self.vectors[total] = vector

    def _read(self) -> int:
        """Read what is there; the length of what is whole."""
        data = self.path.read_bytes()
        head, _, records = data.partition(b"\n")
        key, _, size = head.decode("ascii", "replace").partition(" ")
        if key != self.key or not size.isdecimal():
            return 0
        step = _SUM + 4 * int(size)
        count = len(records) // step
        for start in range(0, count * step, step):
            total = records[start : start + _SUM]
            self.vectors[total] = np.frombuffer(records[start + _SUM : start + step], "<f4")
        return len(head) + 1 + count * step if count else 0


# --- what is told ---------------------------------------------------------------------------------


def _report(unreadable: Sequence[tuple[str, str]], count: int, skip: bool) -> None:
    """A line for each unreadable image. Raises RunError unless they are to be skipped and others remain."""
    for file, why in _first(unreadable):
        print(f"lethe: {file} can't be read: {why}", file=sys.stderr)
    if len(unreadable) == count:
        raise RunError(f"none of the {count} images can be read: there is nothing to index")
    if unreadable and not skip:
        raise RunError(
            f"{len(unreadable)} of {count} images can't be read: mend them or take them away, or leave them "
            "out with --skip-unreadable; what was described is kept for the next time"
        )


def print_built(built: Built) -> None:
    """What was indexed, for a reader."""
    for ids in _first(built.same):
        print(f"lethe: the same file: {', '.join(ids)}", file=sys.stderr)
    told = [f"{len(built.index)} references by {built.index.descriptor.name}"]
    told += [f"{len(built.same)} files are there more than once"] if built.same else []
    told += [f"{len(built.unreadable)} unreadable ones left out"] if built.unreadable else []
    told += [f"{built.others} other files left aside"] if built.others else []
    print(f"{built.path}: {'; '.join(told)}\nsha256 {built.index.sha256}")


def _first(lines: Sequence[Any]) -> Iterator[Any]:
    """The first lines; says how many more there are."""
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        print(f"lethe: and {len(lines) - _SHOWN} more", file=sys.stderr)


def _same(kept: Sequence[tuple[Entry, bytes, Any]]) -> tuple[tuple[str, ...], ...]:
    groups: dict[bytes, list[str]] = {}
    for entry, total, _ in kept:
        groups.setdefault(total, []).append(entry.id)
    return tuple(tuple(ids) for ids in groups.values() if len(ids) > 1)
