"""Nearest neighbours of vectors among references that needn't fit into memory: exact, in blocks. Torch.

The product of 10,000 queries and 1,000,000 references is 40 GB in float32; no more than a block of it exists
at a time, and each query keeps its k best so far. A block is searched for the k best only in rows whose
maximum beats the k-th so far, which soon are few.

Scores are float32 inner products. Equal scores go to the lower index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethebench.errors import UserError

Metric = Literal["cosine", "inner", "euclidean"]
Engine = Literal["blocked", "faiss"]
Vectors = NDArray[Any] | Tensor
References = Vectors | Path | str | Iterable[Vectors]
MEMORY = 2**28
"""Bytes of blocks, by default."""
_QUERIES = 1024
"""Queries a block."""


class Neighbours(NamedTuple):
    """The k best references of each query, best first: ``scores`` float32, ``indices`` int64, ``[n, k]``."""

    scores: NDArray[np.float32]
    indices: NDArray[np.int64]


def search(
    queries: Vectors,
    references: References,
    k: int,
    *,
    metric: Metric = "cosine",
    engine: Engine = "blocked",
    memory: int = MEMORY,
) -> Neighbours:
    """The k references with the highest score for each query.

    ``queries`` ``[n, d]``, numpy or torch, on whose device the blocks are multiplied. ``references``
    ``[m, d]``: an array (memory-mapped too), a ``.npy`` or ``.safetensors`` file, or an iterable of parts
    ``[r, d]``, read once. A score is the cosine, the inner product, or minus the squared Euclidean distance.
    ``memory`` bounds the bytes of blocks, beside queries and result. ``faiss`` (``IndexFlatIP``,
    ``IndexFlatL2``) holds all references in memory; of equal scores at the k-th place it may keep any.

    Raises ValueError for wrong shapes, numbers that aren't finite, a zero vector under ``cosine``, or k
    beyond the number of references; UserError for a file that can't be read or a package that is missing.
    """
    if metric not in {"cosine", "inner", "euclidean"} or engine not in {"blocked", "faiss"}:
        raise ValueError(
            f"metric is cosine, inner or euclidean, engine blocked or faiss; got {metric}, {engine}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    asked = _vectors("queries", queries, 0, metric, None)
    parts = _blocks(references, _rows(asked, k, memory), metric, asked)
    with torch.no_grad():
        found = _faiss(asked, parts, k, metric) if engine == "faiss" else _blocked(asked, parts, k, metric)
    return Neighbours(found[0].cpu().numpy(), found[1].cpu().numpy())


def _rows(queries: Tensor, k: int, memory: int) -> int:
    """References a block: the product twice (chosen rows are copied), the references as read and as used."""
    n, d = queries.shape
    rows = memory // (4 * (2 * min(n, _QUERIES) + 3 * d))
    if rows <= k:
        need = 4 * (2 * min(n, _QUERIES) + 3 * d) * (k + 1)
        raise ValueError(f"{n} queries of {d} numbers need a memory limit of {need} bytes; got {memory}")
    return rows


# --- reading --------------------------------------------------------------------------------------


def _vectors(what: str, of: Any, first: int, metric: Metric, like: Tensor | None) -> Tensor:
    """Checked float32 ``[r, d]`` on the device of ``like``; unit length for ``cosine``."""
    shape = list(getattr(of, "shape", ()))
    if len(shape) != 2 or shape[1] < 1 or (like is not None and shape[1] != like.shape[1]):
        wanted = "n, d" if like is None else f"n, {like.shape[1]}"
        raise ValueError(f"{what} must be an array [{wanted}]; got {type(of).__name__} {shape}")
    if isinstance(of, Tensor):
        found = of.detach().to(torch.float32)
    else:
        found = torch.from_numpy(np.array(of, dtype=np.float32))
    found = found.to(like.device) if like is not None else found
    size = found.square().sum(dim=1)
    if not bool(size.isfinite().all()):
        bad = first + int((~size.isfinite()).int().argmax())
        raise ValueError(f"{what} must be finite numbers; row {bad} isn't (or its square overflows)")
    if metric != "cosine":
        return found
    if not bool((size > 0).all()):
        bad = first + int((size <= 0).int().argmax())
        raise ValueError(f"{what}: row {bad} is zero, and has no cosine")
    return found / size.sqrt()[:, None]


def _blocks(references: References, rows: int, metric: Metric, like: Tensor) -> Iterator[Tensor]:
    if isinstance(references, (str, Path)):
        references = stored(Path(references), rows)
    first = 0
    for part in [references] if isinstance(references, (np.ndarray, Tensor)) else references:
        if len(getattr(part, "shape", ())) != 2:
            _vectors("references", part, first, metric, like)
        for start in range(0, len(part), rows):
            yield _vectors("references", part[start : start + rows], first + start, metric, like)
        first += len(part)


def stored(path: Path, rows: int = 8192) -> Vectors | Iterator[Tensor]:
    """The vectors of a file: a memory-mapped ``.npy``, or a ``.safetensors`` with one tensor, in parts.

    Raises UserError if the file can't be read, is of another kind, or holds another number of tensors.
    """
    if path.suffix not in {".npy", ".safetensors"}:
        raise UserError(f"{path}: vectors are read from .npy or .safetensors files")
    try:
        if path.suffix == ".npy":
            mapped: NDArray[Any] = np.load(path, mmap_mode="r")
            return mapped
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if len(names) != 1:
        raise UserError(f"{path} must hold one tensor; it holds {len(names)}: {', '.join(names)}")
    return _safetensors(path, names[0], rows)


def _safetensors(path: Path, name: str, rows: int) -> Iterator[Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor = file.get_slice(name)
        for start in range(0, tensor.get_shape()[0], rows):
            yield tensor[start : start + rows]


# --- searching ------------------------------------------------------------------------------------


def _blocked(queries: Tensor, parts: Iterator[Tensor], k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            "float32 products are set to a lower precision: torch.set_float32_matmul_precision('highest')"
        )
    n = len(queries)
    scores = torch.full((n, k), -torch.inf, device=queries.device)
    indices = torch.full((n, k), -1, dtype=torch.int64, device=queries.device)
    squares = queries.square().sum(dim=1, keepdim=True)
    first = 0
    for part in parts:
        for start in range(0, n, _QUERIES):
            at = slice(start, start + _QUERIES)
            product = queries[at] @ part.mT
            if metric == "euclidean":
                product.mul_(2).sub_(part.square().sum(dim=1)).sub_(squares[at]).clamp_(max=0)
            better = torch.nonzero(product.amax(dim=1) > scores[at, -1])[:, 0]
            if len(better):
                values, places = _top(product if len(better) == len(product) else product[better], k)
                values = torch.cat([scores[at][better], values], dim=1)
                places = torch.cat([indices[at][better], places + first], dim=1)
                values, order = values.sort(dim=1, descending=True, stable=True)
                scores[start + better] = values[:, :k]
                indices[start + better] = places.gather(1, order)[:, :k]
        first += len(part)
    _check_count(k, first)
    return scores, indices


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first, equal ones by index (torch's choice among equals is arbitrary)."""
    kept = min(k, scores.shape[1])
    values, places = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = values[:, kept - 1] == values[:, -1] if values.shape[1] > kept else values.new_zeros(0).bool()
    values, places = values[:, :kept], places[:, :kept]
    if bool(tied.any()):
        again = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], places[tied] = again.values[:, :kept], again.indices[:, :kept]
    return _ordered(values, places)


def _ordered(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def _check_count(k: int, count: int) -> None:
    if count < k:
        raise ValueError(f"k = {k} neighbours of {count} references: ask for {count} at most")


def _faiss(queries: Tensor, parts: Iterator[Tensor], k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    try:
        import faiss  # type: ignore[import-not-found, import-untyped]
    except ImportError as error:
        raise UserError("engine 'faiss' needs faiss: pip install lethebench[faiss]") from error
    make = faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP
    index = make(queries.shape[1])
    for part in parts:
        index.add(part.cpu().numpy())
    _check_count(k, index.ntotal)
    scores, indices = (torch.from_numpy(found) for found in index.search(queries.cpu().numpy(), k))
    return _ordered(-scores if metric == "euclidean" else scores, indices)
