"""Suites in miniature for attacks: a tiny random model with a made-up label, and the built-in one with the truth."""

from __future__ import annotations

from pathlib import Path

import yaml

from lethebench.plan import Runtime

ONE_THREAD = Runtime(threads=1)
PAIRS = [
    {"role": role, "kinds": ["verbatim", "background"], "min_duplicates": 128, "images": 1}
    for role in ("trigger", "control")
]

METRIC = """
from lethebench.metric import Metric, Score

class Bright(Metric):
    name = "bright"
    summary = "whether a picture is bright"
    source = "made for a test"
    scores = (
        Score("bright.share", "bright", "lower", "share", (0.0, 1.0), roles=frozenset({"trigger"})),
        Score("bright.other", "bright", "lower", "share", (0.0, 1.0), roles=frozenset({"control"})),
        Score("bright.mean", "brightness", "none", "share", (0.0, 1.0)),
    )

    def measure(self, shard):
        mean = shard.images.reshape(len(shard), -1).mean(1)
        return {"bright": (mean > 127).astype(float), "brightness": mean / 255}
"""

SUITE = {
    "version": "1",
    "description": "a suite for tests",
    "prompt_set": "planted",
    "select": PAIRS,
    "shard_size": 16,
    "batch_size": 16,
    "bootstrap": 100,
}
SPARING = {
    "dori": {"steps": 2, "batch_size": 2, "images": 2, "at_once": 3},
    "paraphrase": {"images": 3},
    "seeds": {"images": 2},
}


def write_suite(folder: Path, **changes) -> Path:
    path = folder / f"{changes['name']}.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path
