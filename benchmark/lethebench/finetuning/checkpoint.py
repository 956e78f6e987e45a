"""A training's state on disk: one safetensors file, with JSON in its header; no pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lethebench.store import write_atomic

FILE = "checkpoint.safetensors"


@dataclass
class Checkpoint:
    """Tensors and facts after a step. ``facts`` is what JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with the prefix, without it."""
        return {n.removeprefix(prefix): value for n, value in self.tensors.items() if n.startswith(prefix)}


def write(folder: Path, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint at once: a kill leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(folder / FILE, save(held, metadata={"key": key, "facts": json.dumps(facts)}))


def read(folder: Path, key: str) -> Checkpoint | None:
    """The folder's checkpoint; None where there is none, or one of another training or damaged (it warns)."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            header = file.metadata() or {}
            if header.get("key") != key:
                warnings.warn(f"{path} is another training's: starting anew", stacklevel=2)
                return None
            names = file.keys()
            return Checkpoint({name: file.get_tensor(name) for name in names}, json.loads(header["facts"]))
    except (SafetensorError, ValueError, KeyError) as error:
        warnings.warn(f"{path} is damaged ({error}): starting anew", stacklevel=2)
        return None


def optimiser_tensors(optimiser: Any) -> dict[str, Tensor]:
    """The optimiser's state by ``<parameter's number>.<name>``."""
    state = optimiser.state_dict()["state"]
    return {
        f"{place}.{name}": torch.as_tensor(value)
        for place, values in state.items()
        for name, value in values.items()
    }


def restore_optimiser(optimiser: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimiser_tensors` gave."""
    packed = optimiser.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, field = name.partition(".")
        moments.setdefault(int(place), {})[field] = value
    optimiser.load_state_dict({**packed, "state": moments})
