"""The content-addressed store: everything computed, under the hash of all that determines it.

An entry is a folder ``<root>/<kind>/<aa>/<sha256>/`` with the files that were computed and an
``entry.json`` that holds the resolved key and the SHA-256 of each file. It is written under a
temporary name, flushed to disk and renamed, so an entry is there whole or not at all, and any
number of processes may share a store. A damaged entry is found by its hashes, reported, and made
again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lethebench.errors import StoreError


def digest(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """The file's SHA-256, read once while size and time of change stay."""
    stat = path.stat()
    return _known_sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _known_sha256(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals below ``folder`` into one clear line (exit 2)."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StoreError(
                f"the disk of {folder} is full: free some space and run again; nothing is lost"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENOENT):
            raise StoreError(f"can't write to {folder}: choose another folder with --runs") from error
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it, rename it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """Entries of several kinds (``fit``, ``shard``, ``scores``) below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folder and try a write, before any long work. Raises UserError."""
        with explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomic(self.root / "probe", b"lethe\n")
            (self.root / "probe").unlink()

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """Where the entry of that key is or would be."""
        name = digest(key)
        return self.root / kind / name[:2] / name

    def find(self, kind: str, key: Mapping[str, Any]) -> Path | None:
        """The entry's folder, if it is there and whole. A damaged one is reported and removed."""
        folder = self.path(kind, key)
        if not folder.is_dir():
            return None
        problem = _damage(folder)
        if problem is None:
            return folder
        print(f"lethe: damaged {kind} entry {folder}: {problem}; making it again", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def put(self, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """Make the entry by ``write(folder)`` and put it in place; an existing one wins."""
        final = self.path(kind, key)
        with explained(self.root):
            temporary = self.root / "tmp" / uuid.uuid4().hex
            temporary.mkdir(parents=True)
            try:
                write(temporary)
                files = {p.name: file_sha256(p) for p in sorted(temporary.iterdir())}
                entry = json.dumps({"key": key, "files": files}, indent=1, sort_keys=True, default=str)
                (temporary / "entry.json").write_text(entry)
                for path in temporary.iterdir():
                    _flush(path)
                _flush(temporary)
                final.parent.mkdir(parents=True, exist_ok=True)
                _rename_unless_there(temporary, final)
                _flush(final.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return final

    def clear_temporary(self) -> None:
        """Remove what killed runs left behind. Not while another run uses the store."""
        shutil.rmtree(self.root / "tmp", ignore_errors=True)


def _damage(folder: Path) -> str | None:
    try:
        entry = json.loads((folder / "entry.json").read_text())
        for name, expected in entry["files"].items():
            if file_sha256(folder / name) != expected:
                return f"{name} doesn't have its recorded SHA-256"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _rename_unless_there(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
