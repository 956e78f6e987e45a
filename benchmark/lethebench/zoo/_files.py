"""Where a named model lies on disk, which family it is, and whether its weights are intact.

Needs neither torch nor diffusers: the planner asks here before any work starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lethebench.errors import UserError
from lethebench.store import file_sha256, known_sha256
from lethebench.zoo._model import FAMILIES, Family, ModelEntry
from lethebench.zoo._snapshot import NEEDED, NOT_NEEDED

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
"""The package's folder of built-in models."""
INDEX = "model_index.json"
RECORD = "weights.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS_FILE = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
"""What is loaded of a component: the hub has variants and single-file copies beside it."""
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that Lethe never loads."""


def find_model(name: str, *, revision: str | None = None) -> ModelEntry:
    """The entry of a registered name, a local folder or a hub id, without loading it. Raises UserError.

    A hub id that a registered model is loaded from gives that model, defaults and pinned revision included.
    A folder wins over a hub id of the same spelling; ``revision`` is for hub ids.
    """
    from lethebench.registry import MODELS

    if name in MODELS:
        entry: ModelEntry = MODELS.get(name)
        return entry if revision is None or entry.builtin else replace(entry, revision=revision, mirrors={})
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelEntry(_slug(path.resolve().name), _family(path, name), str(path.resolve()))
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise UserError(f"model folder not found: {name}")
    for _, registered in MODELS.items():
        if not registered.builtin and name in (registered.source, *registered.mirrors):
            pinned = registered.revision if name == registered.source else registered.mirrors[name]
            mirrors = registered.mirrors if revision is None else {}  # which hold the pinned revision
            found: ModelEntry = replace(registered, source=name, revision=revision or pinned, mirrors=mirrors)
            return found
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
    if path.is_dir():
        return path
    try:
        return _cached(entry.source, entry.revision)
    except UserError:
        for source, revision in entry.mirrors.items():
            if source != entry.source and _in_cache(source, revision) is not None:
                return _cached(source, revision)
        raise


def family_of(name: str) -> Family:
    """The family of a registered model, a local folder or a cached hub id. Raises UserError."""
    return find_model(name).family


def check_model(name: str, *, revision: str | None = None) -> ModelEntry:
    """Raise now what loading would raise later: an unknown name, missing or damaged files.

    Returns the entry. Reads every recorded file once (built-in models: under 0.2 s).
    """
    entry = find_model(name, revision=revision)
    folder = model_folder(entry)
    verify(folder, entry)
    lacking = missing_files(folder)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"model '{name}': {folder} lacks {lacking[0]}{more}: {_repair(entry)}")
    return entry


def missing_files(folder: Path) -> list[str]:
    """What a model's folder lacks of the files that loading reads: a download that was cut short, say."""
    found = []
    for component, (library, _) in components(folder).items():
        if library not in ("diffusers", "transformers"):
            continue
        there = folder / component
        if component.startswith(("tokenizer", "scheduler")):
            if not there.is_dir() or not any(there.iterdir()):
                found.append(f"{component}/")
            continue
        parts = [n for n in _parts(there) if not (there / n).is_file()]
        found += [f"{component}/{n}" for n in ("config.json", *parts) if not (there / n).is_file()]
    return found


def _parts(folder: Path) -> list[str]:
    """The names of a component's safetensors files: those of its index, else the single one."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if index.name.startswith(("model.", "diffusion_pytorch_model.")):
            return sorted(set(read_json(index).get("weight_map", {}).values()))
    present = weights_files(folder)
    return present or [
        "model.safetensors" if "encoder" in folder.name else "diffusion_pytorch_model.safetensors"
    ]


def weights_files(folder: Path) -> list[str]:
    """The safetensors files of a component's folder that are loaded: no variants (fp16, EMA)."""
    return sorted(p.name for p in folder.glob("*.safetensors") if _WEIGHTS_FILE.fullmatch(p.name))


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """The components that ``model_index.json`` names and Lethe loads: (library, class) by name."""
    found = {
        name: (str(value[0]), str(value[1]))
        for name, value in read_json(folder / INDEX).items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
    }
    return {name: value for name, value in found.items() if name not in _UNUSED}


def weights_sha256(name: str, *, revision: str | None = None) -> dict[str, str]:
    """The SHA-256 of each safetensors file that a named model is loaded from."""
    return folder_sha256(model_folder(find_model(name, revision=revision)))


def folder_sha256(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file that is loaded from ``folder``, by its relative path.

    Read once a process while a file stays as it is: a large model has 34 GB of them.
    """
    files = sorted(f"{part}/{name}" for part in components(folder) for name in weights_files(folder / part))
    return {name: known_sha256(folder / name) for name in files}


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
    if not Path(entry.source).is_absolute():
        return f"fetch it again with `{fetch_command(entry.source, entry.revision)}`"
    return "copy or save the model again"


def fetch_command(source: str, revision: str | None) -> str:
    """The command that fetches the files of a hub id that Lethe loads, and no others, into the cache."""
    return f"lethe fetch {source}" + (f" --revision {revision}" if revision else "")


def _family(folder: Path, name: str) -> Family:
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"model folder {name} has no {INDEX}: give a folder that save_pretrained wrote")
    found = str(read_json(index).get("_class_name"))
    if found not in FAMILIES:
        raise UserError(f"model {name} is a {found}: Lethe runs {', '.join(FAMILIES)}")
    return FAMILIES[found]


def quantised(index: Iterable[str]) -> list[str]:
    """The components that ``quantise`` packs, of those of a pipeline: the denoiser and the T5 encoder."""
    denoiser = [name for name in ("unet", "transformer") if name in index]
    t5 = {"tokenizer_3": "text_encoder_3", "tokenizer_2": "text_encoder_2"}
    largest = next((t5[name] for name in t5 if name in index and "transformer" in index), None)
    return denoiser + ([largest] if largest else [])


def _cached(name: str, revision: str | None) -> Path:
    """The snapshot folder of a hub id in the local cache; never downloads. Raises UserError."""
    folder = _in_cache(name, revision)
    if folder is None:
        raise UserError(
            f"model '{name}' is no local folder and not in the local Hugging Face cache: "
            f"Lethe downloads nothing by itself; fetch it with `{fetch_command(name, revision)}`"
        )
    return folder


def _in_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(NEEDED),  # what the hub has beside these may be missing
                ignore_patterns=list(NOT_NEEDED),
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _slug(name: str) -> str:
    """A name that a results folder can bear: lower case, digits, ``-``, ``_`` and ``.``."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"
