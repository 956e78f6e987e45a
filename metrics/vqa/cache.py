"""Answers that were paid for, on disk: a killed run asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.promptfiles.sources import data_folder
from lethebench.store import digest, write_atomic


def default_folder() -> Path:
    """``vqa`` in Lethe's data folder (``LETHE_DATA``)."""
    return data_folder() / "vqa"


def image_sha256(image: NDArray[np.uint8]) -> str:
    """The SHA-256 of an image's size and pixels: the same picture in any file format."""
    found = hashlib.sha256(f"{image.shape}".encode())
    found.update(np.ascontiguousarray(image).tobytes())
    return found.hexdigest()


class Cache:
    """One JSON file an answer, named by the SHA-256 of all that determines it; written whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Raise UserError if the folder can't be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "probe", b"lethe\n")
            (self.folder / "probe").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"vqa: can't write to {self.folder}: name another folder by the judge's `cache`"
            ) from error

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the answer of that key is or would be."""
        name = digest(key)
        return self.folder / name[:2] / f"{name}.json"

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The stored answer. One that can't be read is reported and asked again."""
        path = self.path(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["key"] == dict(key) and isinstance(entry["answer"]["text"], str):
                return dict(entry["answer"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        print(f"lethe: damaged answer {path}; asking again", file=sys.stderr)
        return None

    def put(self, key: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Store an answer with its key."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": dict(key), "answer": dict(answer)}, indent=1, sort_keys=True)
        write_atomic(path, text.encode())
