"""A made runs folder, its page, and a browser without network to look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_runs import everything, write
from page_browser import Browser, launched

from lethebench.leaderboard import build


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return everything(tmp_path_factory.mktemp("made") / "runs")


@pytest.fixture(scope="session")
def site(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(runs, tmp_path_factory.mktemp("site"))


@pytest.fixture
def few(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small runs folder of the given methods, which a test may spoil."""
    return lambda *methods: write(tmp_path / "runs", methods, every=2)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with launched(tmp_path_factory.mktemp("chromium")) as found:
        yield found
