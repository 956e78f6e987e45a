"""The all-pairs engine against a loop over pairs with torchmetrics: ``python -m lethebench.pairs.speed``.

The engine compares every pair; the loop is timed on a sample of them, one pair a call, half before and half
after the engine (so that other work on the machine weighs on both), and scaled. Prints the ratio by the clock
and by the processor's time, the most memory that the engine added, and the largest difference on the sample.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.pairs.msssim import MEMORY, MS_SSIM, MS_SSIM_3, Similarity, View, all_pairs, plan
from lethebench.seeding import derive_seed

SIMILARITIES = {"ms-ssim": MS_SSIM, "ms-ssim-3": MS_SSIM_3}


class PeakMemory:
    """The most bytes by which memory grew within the block: the device's, or on a CPU this process's."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.added = device, 0
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            with suppress(OSError, AttributeError):  # what was freed and kept would hide what is added
                ctypes.CDLL(None).malloc_trim(0)
            self._start = self._now()
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.added = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._done.set()
            self._watch.join()

    def _now(self) -> int:
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process().memory_info().rss)

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.added = max(self.added, self._now() - self._start)


def pictures(count: int, side: int, seed: int) -> Tensor:
    """Smooth random pictures ``[count, 3, side, side]`` in 0 to 1, each half one of a few common layouts."""
    random = np.random.default_rng(derive_seed("pairs speed", seed))
    common = np.random.default_rng(derive_seed("pairs speed")).random((8, 3, 8, 8))
    small = 0.5 * random.random((count, 3, 8, 8)) + 0.5 * common[random.integers(8, size=count)]
    smooth = torch.nn.functional.interpolate(torch.from_numpy(small).float(), (side, side), mode="bicubic")
    noise = torch.from_numpy(random.random((count, 3, side, side), dtype=np.float32))
    return (smooth + 0.1 * (noise - 0.5)).clamp(0, 1)


def looped(x: Tensor, y: Tensor, pairs: Sequence[tuple[int, int]], similarity: Similarity) -> list[float]:
    """Torchmetrics' similarity of each pair, one a call."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    return [
        float(ms_ssim(x[i : i + 1], y[j : j + 1], data_range=1.0, betas=similarity.betas)) for i, j in pairs
    ]


def measure(
    images: int, side: int, similarity: Similarity, memory: int, sample: int, device: str = "cpu"
) -> dict[str, Any]:
    """The figures that the module's docstring names, for ``images`` x ``images`` pairs.

    Raises UserError without psutil, ValueError as ``all_pairs`` does.
    """
    if find_spec("psutil") is None:
        raise UserError("the measurement of memory needs psutil: pip install psutil")
    x, y = (pictures(images, side, seed).to(device) for seed in (1, 2))
    plan(View(x), View(y), similarity, memory)
    random = np.random.default_rng(derive_seed("pairs speed", "sample"))
    pairs = [(int(i), int(j)) for i, j in random.integers(images, size=(sample, 2))]
    looped(x, y, pairs[:1], similarity)
    all_pairs(x[:2], y[:2], similarity, memory=memory)
    expected: list[float] = []
    loop, engine = np.zeros(2), np.zeros(2)
    for half in (pairs[: sample // 2], pairs[sample // 2 :]):
        start = _clocks(device)
        expected += looped(x, y, half, similarity)
        loop += _clocks(device) - start
        if len(expected) == sample // 2:
            with PeakMemory(x.device) as peak:
                start = _clocks(device)
                found = all_pairs(x, y, similarity, memory=memory)
                engine += _clocks(device) - start
    each_loop, each = loop / sample, engine / images**2
    differences = [abs(e - float(found[i, j])) for e, (i, j) in zip(expected, pairs, strict=True)]
    return {
        "pairs": images**2,
        "side": side,
        "scales": len(similarity.betas),
        "threads": torch.get_num_threads(),
        "device": str(x.device),
        "loop_ms_a_pair": round(each_loop[0] * 1e3, 3),
        "engine_ms_a_pair": round(each[0] * 1e3, 3),
        "ratio": round(each_loop[0] / each[0], 1),
        "ratio_processor_time": round(each_loop[1] / each[1], 1),
        "memory_limit": memory,
        "memory_added": peak.added,
        "largest_difference": max(differences),
        "sample": sample,
    }


def _clocks(device: str) -> Any:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m lethebench.pairs.speed", description=__doc__)
    parser.add_argument("--images", type=int, default=500, help="pictures on either side")
    parser.add_argument("--side", type=int, default=256, help="pixels a side")
    parser.add_argument("--similarity", choices=SIMILARITIES, default="ms-ssim")
    parser.add_argument("--memory", type=int, default=MEMORY, help="bytes that the engine may use")
    parser.add_argument("--sample", type=int, default=200, help="pairs on which the loop is timed")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(arguments)
    if asked.images < 2 or asked.sample < 2:
        parser.error("--images and --sample must be at least 2")
    similarity = SIMILARITIES[asked.similarity]
    try:
        found = measure(asked.images, asked.side, similarity, asked.memory, asked.sample, asked.device)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
