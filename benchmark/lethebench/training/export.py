"""From a trained pipeline to the folder that ships: float16, pinned by sha256, written whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.store import file_sha256

if TYPE_CHECKING:
    from lethebench.training.diffusion import DiffusionRecipe
    from lethebench.training.flux import FluxRecipe

SUMS = "weights.json"
UNSUMMED = (SUMS, "MODEL_CARD.md", "card.json")
"""Not in the sums: the sums themselves, and what is written about the weights later."""


def export(pipeline: Path, target: Path, recipe: DiffusionRecipe | FluxRecipe) -> None:
    """Write the pipeline's folder to ``target`` in float16, with the recipe's sampler defaults and sums.

    ``from_pretrained(target)`` gives float32 throughout: diffusers does so by itself, and the text
    encoders' configurations say so, since transformers follows the dtype written there.
    """
    import torch
    from diffusers import DiffusionPipeline

    staged = target.with_name(target.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    half = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float16)
    for part in half.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()  # what is loaded as float32 all the same: some layers of T5
    half.save_pretrained(staged)
    for config in staged.glob("text_encoder*/config.json"):
        values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in staged.rglob("*.json"):  # diffusers records the folder that it read from, and how
        text = path.read_text(encoding="utf-8").replace(
            '"local_files_only": true', '"local_files_only": false'
        )
        kept = [line for line in text.split("\n") if '"_name_or_path"' not in line]
        path.write_text("\n".join(kept), encoding="utf-8")
    (staged / "lethe.json").write_text(json.dumps(recipe.defaults, indent=2) + "\n", encoding="utf-8")
    for path in staged.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    sums = sums_of(staged)
    (staged / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    if target.exists() and sums_of(target) == sums:  # keeps the card, which is about these very weights
        shutil.rmtree(staged)
        return
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)


def sums_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file that a model needs, by its path within the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): file_sha256(path) for path in files if path.name not in UNSUMMED
    }


def write_record(folder: Path, part: str, record: dict[str, Any]) -> None:
    """Keep what a part of the training has to say for the model card."""
    (folder / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path, part: str) -> dict[str, Any] | None:
    """What :func:`write_record` kept; None where the part was not trained in this folder."""
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def finished(folder: Path, part: str, key: str) -> dict[str, Any] | None:
    """The record of a part that was trained to its end by the recipe of that key; None otherwise."""
    record = read_record(folder, part)
    return record if record is not None and record.get("key") == key else None
