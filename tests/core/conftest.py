"""A benchmark in miniature: a tiny random Stable Diffusion on disk, a metric in a file, a small suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

METRIC = """
import numpy as np
from lethebench.metric import Metric, Score

class Brightness(Metric):
    name = "brightness"
    summary = "mean pixel value"
    source = "made for a test"
    scores = (
        Score("brightness.mean", "brightness", "none", "share", (0.0, 1.0)),
        Score("brightness.neutral", "brightness", "lower", "share", (0.0, 1.0), roles=frozenset({"neutral"})),
    )

    def measure(self, shard):
        return {"brightness": shard.images.reshape(len(shard), -1).mean(1) / 255.0}
"""

SUITE = {
    "name": "tiny",
    "version": "1",
    "description": "a suite for tests",
    "model": "set by the fixture",
    "prompt_set": "planted",
    "select": [{"role": "trigger", "images": 2, "limit": 3}, {"role": "neutral", "images": 1, "limit": 4}],
    "sampler": {"scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 2.0},
    "metrics": [],
    "controls": {"base": "all", "blank": "all"},
    "suppression": {"score": "brightness.mean", "label": "brightness"},
    "adherence": {"score": "brightness.neutral", "label": "brightness on neutral prompts"},
    "shard_size": 4,
    "batch_size": 2,
    "bootstrap": 100,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    from tiny_pipelines import tiny_sd

    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_sd().save_pretrained(folder)
    return folder


def write_suite(folder: Path, model: Path) -> Path:
    metric = folder / "brightness.py"
    metric.write_text(METRIC)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SUITE, "model": str(model), "metrics": [f"{metric}:Brightness"]}))
    return path


@pytest.fixture
def tiny_suite(tmp_path: Path, tiny_model: Path) -> Path:
    return write_suite(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def shared_suite(tmp_path_factory, tiny_model: Path) -> Path:
    """The same suite for tests that don't change it."""
    return write_suite(tmp_path_factory.mktemp("suite"), tiny_model)
