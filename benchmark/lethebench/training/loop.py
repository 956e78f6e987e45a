"""One resumable training loop for every built-in model.

The batch of a step is a function of the step's number alone, so a run that was killed and resumed
sees the same batches as one that was not, and no random state needs saving. Checkpoints are
safetensors (weights, optimiser moments) and JSON (step), written to a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lethebench.progress import progress
from lethebench.store import file_sha256


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 200, again: tuple[int, float] = (0, 0.0)
) -> float:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then linear decay to 2 % of it.

    The last ``again[0]`` of the ``steps`` are a second cycle of the same form with the peak ``again[1]``.
    """
    first = steps - again[0]
    if step >= first:
        return learning_rate(step - first, *again, warmup)
    steps = first
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    return peak * max(0.02, left)


def recipe_key(*recipes: Any) -> str:
    """A short hash of frozen dataclasses: two runs with one key may share a checkpoint."""
    return hashlib.sha256(repr(recipes).encode()).hexdigest()[:16]


def checkpoint_digest(folder: Path) -> str:
    """The sha256 of a run's checkpoint; empty where there is none. For runs that build on that one."""
    path = folder / "checkpoint.safetensors"
    return file_sha256(path) if path.exists() else ""


def step_generator(name: str, step: int, seed: int = 0) -> torch.Generator:
    """A CPU generator that depends on the run's name, its seed and the step alone."""
    from lethebench.seeding import derive_seed

    return torch.Generator().manual_seed(derive_seed("training", name, seed, step))


def fit(
    name: str,
    modules: Mapping[str, nn.Module],
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    peak_lr: float,
    folder: Path,
    warmup: int = 200,
    again: tuple[int, float] = (0, 0.0),
    weight_decay: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.99),
    clip: float = 1.0,
    seed: int = 0,
    checkpoint_seconds: float = 60.0,
    key: str = "",
    on_checkpoint: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Minimise ``loss(step, generator)`` over the parameters of ``modules`` with AdamW.

    ``steps`` counts all steps; ``again`` is the second cycle of :func:`learning_rate`.

    Resumes from ``folder`` where it holds a checkpoint of this run, told by ``key`` (see
    :func:`recipe_key`); a checkpoint of another recipe is not resumed and will be overwritten. Returns
    what a model card needs: steps, seconds (of all sessions), final loss (exponential mean). Raises
    FloatingPointError on a loss that is not finite, leaving the last good checkpoint in place.
    """
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=betas, weight_decay=weight_decay)
    state = _resume(folder, modules, optimizer, key)
    start, spent, smooth = int(state["step"]), float(state["seconds"]), state["loss"]
    began = saved = time.monotonic()
    with progress(name, total=steps, done=start) as bar:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak_lr, warmup, again)
            value = loss(step, step_generator(name, step, seed))
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            if step % 20 == 0:
                now = float(value.detach())
                if not math.isfinite(now):
                    raise FloatingPointError(f"{name}: the loss is {now} at step {step}")
                smooth = now if smooth is None else 0.9 * float(smooth) + 0.1 * now
            bar.advance(1, note=f"loss {smooth:.4f}")
            if time.monotonic() - saved > checkpoint_seconds or step + 1 == steps:
                seconds = spent + time.monotonic() - began
                now_at = {"step": step + 1, "seconds": seconds, "loss": smooth, "key": key}
                _save(folder, modules, optimizer, now_at)
                saved = time.monotonic()
                if on_checkpoint is not None:
                    on_checkpoint(step + 1)
    return {"steps": steps, "seconds": spent + time.monotonic() - began, "loss": smooth}


def _save(folder: Path, modules: Mapping[str, nn.Module], optimizer: Any, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{m}.{k}": v.detach().cpu().contiguous().clone()
        for m, module in modules.items()
        for k, v in module.state_dict().items()
    }
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    temporary = folder / "checkpoint.tmp"
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    temporary.replace(folder / "checkpoint.safetensors")


def _resume(folder: Path, modules: Mapping[str, nn.Module], optimizer: Any, key: str) -> dict[str, Any]:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "loss": None}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:  # type: ignore[no-untyped-call]
        state: dict[str, Any] = json.loads(f.metadata()["state"])
    if state.get("key", "") != key:
        return {"step": 0, "seconds": 0.0, "loss": None}
    tensors = load_file(path)
    for m, module in modules.items():
        prefix = f"model.{m}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            moments.setdefault(int(index), {})[field] = value
    packed = optimizer.state_dict()
    packed["state"] = moments
    optimizer.load_state_dict(packed)
    return state
