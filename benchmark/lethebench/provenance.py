"""What a result was made with: versions, hashes, hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parent
DECISIVE = ("torch", "diffusers", "transformers", "numpy", "safetensors", "lethebench")
"""Packages whose version may move an image: part of every key of the store."""
SCORING = (
    "torchmetrics",
    "torchvision",
    "pillow",
    "scipy",
    "clean-fid",
    "open_clip_torch",
    "onnxruntime",
    "networkx",
    "nudenet",
    "timm",
)
"""Packages whose version may move a metric's value: part of the keys of scores and recordings."""
RECORDED = (*DECISIVE, *SCORING, "peft", "accelerate", "scikit-learn", "pandas")


def packages(names: Sequence[str] = RECORDED) -> dict[str, str]:
    """Installed versions of the named distributions."""
    return {name: found for name in names if (found := _version(name)) is not None}


@lru_cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@lru_cache
def code_sha256(*parts: str) -> str:
    """The SHA-256 of the package's own source files or folders, named relative to the package."""
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


SAMPLER_CODE = (
    "sampler",
    "zoo",
    "hooks.py",
    "seeding.py",
    "pruning",
    "composition.py",
    "method.py",
    "work.py",
)
FITTING_CODE = ("unlearning", "judges", "magnitude.py", "referencing/_read.py")
"""What methods share, beside the sampler's code: part of the keys of fits, and so of images."""
SCORING_CODE = (
    "judges",
    "referencing",
    "pairs/msssim.py",
    "pairs/matches.py",
    "pairs/neighbours.py",
    "metric.py",
    "metrics/_common.py",
    "metrics/_detectors.py",
    "metrics/_weights.py",
    "metrics/_world.py",
    "metrics/clip_mini.py",
    "metrics/clip_score.py",
    "metrics/noise_magnitude.py",
    "metrics/vqa_mini.py",
)


@lru_cache
def git_state() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout that the package runs from; (None, None) outside one."""
    try:
        root = PACKAGE.parents[1]
        if not (root / ".git").exists():
            return None, None
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout
        return commit, bool(status.strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def hardware(device: str) -> dict[str, str | int | float]:
    """Processor, cores, memory and the accelerator's name."""
    found: dict[str, str | int | float] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": physical_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "device": device,
    }
    if device.startswith("cuda"):
        import torch

        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def physical_cores() -> int:
    """Physical cores that this process may use: the default number of threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        text = Path("/proc/cpuinfo").read_text()
        pairs = set()
        physical = core = "0"
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "physical id":
                physical = value.strip()
            elif key.strip() == "core id":
                core = value.strip()
            elif not line.strip():
                pairs.add((physical, core))
        return max(1, min(usable, len(pairs) or usable))
    except OSError:
        return max(1, usable)
