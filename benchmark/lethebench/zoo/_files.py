"""Where a named model lies on disk, which family it is, and whether its weights are intact.

Needs neither torch nor diffusers: the planner asks here before any work starts.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lethebench.errors import UserError
from lethebench.store import file_sha256
from lethebench.zoo._model import FAMILIES, Family, ModelEntry

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
"""The package's folder of built-in models."""
INDEX = "model_index.json"
RECORD = "weights.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(name: str, *, revision: str | None = None) -> ModelEntry:
    """The entry of a registered name, a local folder or a hub id, without loading it. Raises UserError.

    A folder wins over a hub id of the same spelling; ``revision`` is for hub ids.
    """
    from lethebench.registry import MODELS

    if name in MODELS:
        entry: ModelEntry = MODELS.get(name)
        return entry if revision is None or entry.builtin else replace(entry, revision=revision)
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelEntry(_slug(path.resolve().name), _family(path, name), str(path.resolve()))
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise UserError(f"model folder not found: {name}")
    if _HUB_ID.fullmatch(name):
        folder = _cached(name, revision)
        return ModelEntry(_slug(name), _family(folder, name), name, revision=revision)
    entry = MODELS.get(name)  # raises, with near names
    return entry


def model_folder(entry: ModelEntry) -> Path:
    """The folder that holds the entry's pipeline. Raises UserError where there is none."""
    if entry.builtin:
        folder = WEIGHTS / entry.source
        if not (folder / INDEX).is_file():
            raise UserError(
                f"built-in model '{entry.name}' has no weights in {folder}: "
                "install lethebench again, or train them with `make models`"
            )
        return folder
    path = Path(entry.source).expanduser()
    return path if path.is_dir() else _cached(entry.source, entry.revision)


def family_of(name: str) -> Family:
    """The family of a registered model, a local folder or a cached hub id. Raises UserError."""
    return find_model(name).family


def check_model(name: str, *, revision: str | None = None) -> ModelEntry:
    """Raise now what loading would raise later: an unknown name, missing or damaged files.

    Returns the entry. Reads every recorded file once (built-in models: under 0.2 s).
    """
    entry = find_model(name, revision=revision)
    verify(model_folder(entry), entry)
    return entry


def weights_sha256(name: str, *, revision: str | None = None) -> dict[str, str]:
    """The SHA-256 of each safetensors file of a named model, computed from the files."""
    return folder_sha256(model_folder(find_model(name, revision=revision)))


def folder_sha256(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file under ``folder``, by its relative path."""
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*.safetensors"))}


def verify(folder: Path, entry: ModelEntry) -> None:
    """Compare a folder with the SHA-256 of each file in its ``weights.json``.

    Only built-in models must have that record. Raises UserError naming the first file that is missing
    or differs.
    """
    record = folder / RECORD
    if not record.is_file():
        if entry.builtin:
            raise UserError(f"model '{entry.name}': {record} is missing: {_repair(entry)}")
        return
    for relative, expected in read_json(record).items():
        path = folder / relative
        if not path.is_file():
            raise UserError(f"model '{entry.name}': weights file {path} is missing: {_repair(entry)}")
        if file_sha256(path) != expected:
            raise UserError(
                f"model '{entry.name}': weights file {path} is damaged "
                f"(its SHA-256 is not that of {RECORD}): {_repair(entry)}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model's folder. Raises UserError naming the file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object")
    return found


def _repair(entry: ModelEntry) -> str:
    if entry.builtin:
        return "restore it (`git checkout` in a clone), install lethebench again, or run `make models`"
    return "copy or save the model again"


def _family(folder: Path, name: str) -> Family:
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"model folder {name} has no {INDEX}: give a folder that save_pretrained wrote")
    found = str(read_json(index).get("_class_name"))
    if found not in FAMILIES:
        raise UserError(f"model {name} is a {found}: Lethe runs {', '.join(FAMILIES)}")
    return FAMILIES[found]


def _cached(name: str, revision: str | None) -> Path:
    """The snapshot folder of a hub id in the local cache; never downloads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    at = f" --revision {revision}" if revision else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"model '{name}' is not registered, no local folder, and not in the local Hugging Face cache: "
            f"Lethe downloads nothing by itself; fetch it with `hf download {name}{at}`"
        ) from error
    return folder


def _slug(name: str) -> str:
    """A name that a results folder can bear: lower case, digits, ``-``, ``_`` and ``.``."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"
