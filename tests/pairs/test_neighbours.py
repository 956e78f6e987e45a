"""Nearest neighbours against a naive sort, scikit-learn and FAISS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.neighbors import NearestNeighbors

from lethebench.errors import UserError
from lethebench.pairs.neighbours import search

SMALL = 60_000
"""A memory limit under which the references come in many blocks."""


def vectors(count: int, seed: int, size: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def naive(scores: NDArray[Any], k: int) -> NDArray[Any]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("memory", [SMALL, 2**28])
@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
def test_equals_a_naive_sort_and_scikit_learn(metric: Any, memory: int) -> None:
    queries, references = vectors(50, 1), vectors(2000, 2)
    q, r = queries.astype(np.float64), references.astype(np.float64)
    scores = {
        "inner": q @ r.T,
        "cosine": (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (r / np.linalg.norm(r, axis=1)[:, None]).T,
        "euclidean": -((q[:, None] - r[None]) ** 2).sum(axis=2),
    }[metric]
    found = search(queries, references, 7, metric=metric, memory=memory)
    assert np.array_equal(found.indices, naive(scores, 7))
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.indices, axis=1), atol=3e-5)
    if metric != "inner":
        learned = NearestNeighbors(n_neighbors=7, algorithm="brute", metric=metric).fit(references)
        assert np.array_equal(found.indices, learned.kneighbors(queries, return_distance=False))


@pytest.mark.parametrize("memory", [SMALL, 2**28])
def test_equal_scores_go_to_the_lower_index(memory: int) -> None:
    random = np.random.default_rng(0)
    queries = random.integers(-2, 3, size=(40, 6)).astype(np.float32)
    references = random.integers(-2, 3, size=(1500, 6)).astype(np.float32)
    found = search(queries, references, 9, metric="inner", memory=memory)
    assert np.array_equal(found.indices, naive(queries @ references.T, 9))


def test_many_queries_come_in_blocks() -> None:
    queries, references = vectors(2500, 1, 8), vectors(300, 2, 8)
    found = search(queries, references, 3, metric="inner", memory=1_000_000)
    parts = [search(queries[i : i + 1], references, 3, metric="inner").indices for i in range(0, 2500, 250)]
    assert np.array_equal(found.indices[::250], np.concatenate(parts))


def test_files_and_parts_give_the_same(tmp_path: Path) -> None:
    queries, references = vectors(20, 1), vectors(500, 2).astype(np.float16)
    expected = search(queries, references, 5)
    np.save(tmp_path / "r.npy", references)
    save_file({"features": references}, tmp_path / "r.safetensors")
    parts = (references[start : start + 37] for start in range(0, 500, 37))
    mapped = np.load(tmp_path / "r.npy", mmap_mode="r")
    for given in (
        tmp_path / "r.npy",
        str(tmp_path / "r.safetensors"),
        parts,
        mapped,
        torch.from_numpy(references),
    ):
        found = search(queries, given, 5, memory=SMALL)
        assert np.array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
def test_faiss_equals_the_blocked_search(metric: Any) -> None:
    pytest.importorskip("faiss")
    queries, references = vectors(30, 1), vectors(1000, 2)
    expected = search(queries, references, 6, metric=metric)
    found = search(queries, references, 6, metric=metric, engine="faiss", memory=SMALL)
    assert np.array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.scores, expected.scores, atol=3e-5)
    with pytest.raises(ValueError, match="k = 8 neighbours of 5 references"):
        search(queries, references[:5], 8, engine="faiss")


def test_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install lethebench\[faiss\]"):
        search(vectors(2, 1), vectors(5, 2), 1, engine="faiss")


def spoilt(value: float) -> NDArray[np.float32]:
    found = vectors(700, 2)
    found[613] = value
    return found


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"queries must be an array \[n, d\]; got ndarray \[16\]",
            lambda: search(vectors(1, 1)[0], vectors(5, 2), 1),
        ),
        (r"queries must be an array", lambda: search([[1.0]], vectors(5, 2), 1)),  # type: ignore[arg-type]
        (
            r"references must be an array \[n, 16\]; got ndarray \[5, 8\]",
            lambda: search(vectors(1, 1), vectors(5, 2, 8), 1),
        ),
        (
            r"references must be an array \[n, 16\]; got ndarray \[5\]",
            lambda: search(vectors(1, 1), [np.ones(5)], 1),
        ),
        ("queries must be finite numbers; row 613", lambda: search(spoilt(np.nan), vectors(5, 2), 1)),
        (
            "references must be finite numbers; row 613",
            lambda: search(vectors(1, 1), spoilt(np.inf), 1, memory=SMALL),
        ),
        ("references: row 613 is zero", lambda: search(vectors(1, 1), spoilt(0), 1, memory=SMALL)),
        ("k = 6 neighbours of 5 references", lambda: search(vectors(1, 1), vectors(5, 2), 6)),
        ("k = 6 neighbours of 0 references", lambda: search(vectors(1, 1), [], 6)),
        ("k must be at least 1", lambda: search(vectors(1, 1), vectors(5, 2), 0)),
        ("metric is cosine", lambda: search(vectors(1, 1), vectors(5, 2), 1, metric="l1")),  # type: ignore[arg-type]
        ("need a memory limit of", lambda: search(vectors(9, 1), vectors(5, 2), 1, memory=100)),
    ],
)
def test_bad_arrays_give_one_clear_line(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_files_say_what_was_wrong(tmp_path: Path) -> None:
    for name in ("a.npy", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not vectors")
    save_file({"a": vectors(2, 1), "b": vectors(2, 2)}, tmp_path / "two.safetensors")
    for name, message in {
        "a.npy": "can't be read",
        "a.safetensors": "can't be read",
        "none.npy": "can't be read",
        "none.safetensors": "can't be read",
        "two.safetensors": "must hold one tensor; it holds 2",
        "a.csv": "are read from .npy or .safetensors",
    }.items():
        with pytest.raises(UserError, match=message):
            search(vectors(1, 1), tmp_path / name, 1)
