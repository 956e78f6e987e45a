"""The contract of a metric: a value for each image first, then scores with intervals."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.prompts import Prompt, PromptSet, Role

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.hooks import Recorder
    from lethebench.referencing import Descriptor

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
    samples without guidance). ``recorded`` holds what metrics recorded while the images were drawn
    (:attr:`Metric.records`), by name, each ``[n, ...]``; a name is missing where nothing was drawn.
    ``prompt_set`` gives references.
    """

    images: NDArray[np.uint8]
    prompts: tuple[Prompt, ...]
    indices: tuple[int, ...]
    prompt_set: PromptSet
    latents: NDArray[np.float32] | None = None
    noise_norm: NDArray[np.float32] | None = None
    recorded: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)


class Metric(ABC):
    """A metric. Subclasses are light to import: heavy work lives in functions that they call.

    A metric with settings is a frozen dataclass whose fields are made by
    :func:`lethebench.method.setting`; the constructor only stores them. A suite names a metric alone
    (``fbmem``) or with settings (``sscd: {preset: wen-224}``).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[str] = "1"
    source: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    """Of ``images``, ``references``, ``masks``, ``prompts``, ``latents``, ``noise_norm``, ``recorded``."""
    scores: ClassVar[tuple[Score, ...]]
    set_valued: ClassVar[frozenset[str]] = frozenset()
    """Of a metric that overrides ``aggregate``: the scores that are not means over images (none named:
    all of them)."""
    reads: ClassVar[frozenset[str] | None] = None
    """Columns that set-valued scores read beside their own and what is known of an image (None: all)."""
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = None
    """Columns that tell memorized images from others, and which end of them says memorized. None: the
    columns of the scores on triggers that mitigation should lower (high) or raise (low)."""
    shown: ClassVar[str] = "planted"
    """The registered prompt set that the contract suite shows the metric."""
    records: ClassVar[frozenset[str]] = frozenset()
    """Names of what :meth:`recorder` records while images are drawn."""

    @abstractmethod
    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """Columns of the per-image table: arrays of length n (or ``[n, d]`` for a feature vector).

        NaN (or an empty string) means that the metric doesn't apply to that image: a prompt without
        references has no copy similarity. Batch and order of the images don't change a value.
        """

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """The score over the images of ``table`` (already chosen by role and kind): the mean."""
        return float(np.nanmean(table[score.column].to_numpy(dtype=float)))

    def interval(self, score: Score, table: pd.DataFrame) -> tuple[float, float] | None:
        """The score's own 95 % interval over the images of ``table``; None: the bootstrap's."""
        return None

    def all_scores(self) -> tuple[Score, ...]:
        """The scores under these settings: ``scores``, unless settings name more of them."""
        return self.scores

    def check(self) -> None:  # noqa: B027 (most metrics need nothing)
        """Raise UserError, saying what to do, if the metric can't run here: a package or a file is missing.

        Called before any long work.
        """

    def weights(self) -> Mapping[str, Path]:
        """Files that determine the values, by a name: their SHA-256 goes into row and store."""
        return {}

    def descriptor(self) -> Descriptor | None:
        """What makes the vectors by which images are compared with references, if nothing else is asked of a
        reference: then :meth:`describe` makes them, and references may be an index (``lethe index``).
        """
        return None

    def describe(self, images: Iterable[NDArray[np.uint8]]) -> NDArray[Any]:
        """Vectors of unit length ``[n, d]`` of images uint8 ``[height, width, 3]``, of any sizes."""
        raise NotImplementedError(f"metric '{self.name}' compares no descriptors")

    def recorder(self) -> Recorder | None:
        """What watches the sampling for this metric; needed if ``records`` names something."""
        return None

    def compare(self, table: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
        """What the row records of the change from base beside the differences: transitions of labels, say.

        Both tables have one image a row; ``prompt_id`` and ``index`` pair them.
        """
        return {}

    def facts(self) -> dict[str, Any]:
        """What the row records of the metric beside its values: judge, features, thresholds, N."""
        return {}


def configure_metric(cls: type[Metric], settings: Mapping[str, Any]) -> Metric:
    """The metric with these settings. Raises UserError for a setting that it hasn't or a bad value."""
    import difflib

    fields: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    )
    known = [f.name for f in fields if f.init]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"
            raise UserError(f"metric '{cls.name}' has no setting '{name}': {hint}")
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"metric '{cls.name}': {error}") from error


def detectors(metric: Metric) -> dict[str, Literal["high", "low"]]:
    """The metric's columns that tell memorized images from others, and which end says memorized."""
    from lethebench.stats import is_mean

    if metric.detects is not None:
        return dict(metric.detects)
    ends: dict[str, Literal["high", "low"]] = {"lower": "high", "higher": "low"}
    wanted = {Role.TRIGGER, Role.CONCEPT}
    return {
        score.column: ends[score.direction]
        for score in metric.all_scores()
        if score.direction in ends and score.roles & wanted and is_mean(metric, score)
    }
