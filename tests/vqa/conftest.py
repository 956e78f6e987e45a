from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vqa.tiny_vlm import write_tiny_vlm

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key, no cache but the test's own, and no proxy before loopback."""
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("LETHE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Six images of 64 pixels that differ."""
    found = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    found[3], found[4] = 0, 255
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA-NeXT."""
    return write_tiny_vlm(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def real_server(tiny: Path) -> Iterator[str]:
    """The address of `transformers serve` with the tiny model."""
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server: Any = Serve(
        force_model=str(tiny), host="127.0.0.1", port=port, device="cpu", non_blocking=True, log_level="error"
    )
    try:
        for _ in range(200):
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"http://127.0.0.1:{port}/health", timeout=5
                )
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()
