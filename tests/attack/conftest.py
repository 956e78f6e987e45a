"""A tiny random model, a suite on it, and rows that were benched."""

from __future__ import annotations

from pathlib import Path

import pytest
from attack_suites import METRIC, ONE_THREAD, SPARING, write_suite

from lethebench.bench import run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    from tiny_pipelines import tiny_sd

    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory, tiny_model: Path) -> dict:
    metric = tmp_path_factory.mktemp("metric") / "bright.py"
    metric.write_text(METRIC)
    return {
        "name": "tiny",
        "model": str(tiny_model),
        "metrics": [f"{metric}:Bright"],
        "sampler": {"scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 2.0},
        "suppression": {"score": "bright.share", "label": "bright"},
        "adherence": {"score": "bright.mean", "label": "brightness"},
        "controls": {"base": "all", "blank": "all", "oracle": "all"},
        "attack": {"items": 4, "min_duplicates": 128, "set": SPARING},
    }


@pytest.fixture(scope="session")
def tiny_suite(tmp_path_factory, tiny_settings: dict) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), **tiny_settings)


@pytest.fixture(scope="session")
def benched(tmp_path_factory, tiny_suite: Path) -> Path:
    """Rows of the tiny suite, for tests that add nothing but attacks to them."""
    runs = tmp_path_factory.mktemp("benched") / "runs"
    options = {"suite": str(tiny_suite), "runs": runs, "runtime": ONE_THREAD}
    run(["random-tokens"], strength="weak", overrides={"tokens": 3}, **options)
    run(["random-tokens"], strength="weak", **options)
    return runs
