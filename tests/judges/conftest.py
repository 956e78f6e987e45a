"""A small fresh sample of the planted world, apart from every pool of the training."""

from __future__ import annotations

import pytest

from lethebench.datasets.planted import PlantedWorld
from lethebench.training.judge_data import Pool, PoolRecipe, make_pool

SAMPLE = PoolRecipe(
    "tests", object_families=20, character_families=20, figures=16, near_misses=16, backdrops=8
)
"""200 scenes."""


@pytest.fixture(scope="session")
def world() -> PlantedWorld:
    return PlantedWorld()


@pytest.fixture(scope="session")
def sample(world: PlantedWorld) -> Pool:
    return make_pool(world, SAMPLE)
