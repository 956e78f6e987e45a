"""The contract of a metric: a value for each image first, then scores with intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.prompts import Prompt, PromptSet, Role

if TYPE_CHECKING:
    import pandas as pd

Direction = Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Score:
    """One number of a row: the mean of a column of the per-image table over some prompts.

    ``roles`` and ``kinds`` choose the images (an empty set: all); ``trained`` keeps only prompts
    whose items were (True) or were not (False) in the training set. ``direction`` says what is
    better for mitigation. ``bounds`` are of the aggregate.
    """

    name: str
    column: str
    direction: Direction
    unit: str
    bounds: tuple[float, float]
    roles: frozenset[Role] = frozenset()
    kinds: frozenset[str] = frozenset()
    trained: bool | None = None
    help: str = ""
    judge: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class Shard:
    """Generated images with all that a metric may need.

    ``images`` uint8 ``[n, height, width, 3]``; ``prompts`` and ``indices`` have length n;
    ``latents`` float32 ``[n, ...]`` are the final latents; ``noise_norm`` float32 ``[n, steps]`` is
    the l2 norm of (conditional - unconditional) prediction at each step (NaN where the model
    samples without guidance). ``prompt_set`` gives references.
    """

    images: NDArray[np.uint8]
    prompts: tuple[Prompt, ...]
    indices: tuple[int, ...]
    prompt_set: PromptSet
    latents: NDArray[np.float32] | None = None
    noise_norm: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.prompts)


class Metric(ABC):
    """A metric. Subclasses are light to import: heavy work lives in functions that they call."""

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[str] = "1"
    source: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    """Of ``images``, ``references``, ``masks``, ``prompts``, ``latents``, ``noise_norm``."""
    scores: ClassVar[tuple[Score, ...]]

    @abstractmethod
    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """Columns of the per-image table: arrays of length n (or ``[n, d]`` for a feature vector).

        NaN (or an empty string) means that the metric doesn't apply to that image: a prompt without
        references has no copy similarity. Batch and order of the images don't change a value.
        """

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """The score over the images of ``table`` (already chosen by role and kind): the mean."""
        return float(np.nanmean(table[score.column].to_numpy(dtype=float)))

    def facts(self) -> dict[str, Any]:
        """What the row records of the metric beside its values: judge, features, thresholds, N."""
        return {}
