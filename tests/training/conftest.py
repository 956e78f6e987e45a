"""Fixtures of the training tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lethebench.datasets.planted import PlantedWorld

sys.path.insert(0, str(Path(__file__).parent))  # for training_world, which a subprocess imports too

from training_world import CONFIG


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world() -> PlantedWorld:
    return PlantedWorld(CONFIG)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")
