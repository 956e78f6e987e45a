"""FID and KID of images on neutral prompts against a reference set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics._weights import titled
from lethebench.metrics.frechet._distances import (
    Gaussian,
    frechet,
    kernel_distance,
    mean_kernel,
    within,
)
from lethebench.metrics.frechet._features import KINDS, Extractor, cached
from lethebench.metrics.frechet._reference import MADE_BY, Reference, read_reference
from lethebench.prompts import Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def _score(name: str, unit: str, bounds: tuple[float, float], help: str, judge: str) -> Score:
    return Score(
        name,
        f"{name}_features",
        "lower",
        unit,
        bounds,
        roles=frozenset({Role.NEUTRAL}),
        help=help,
        judge=judge,
    )


@dataclass(frozen=True)
class _ToReference(Metric):
    """What FID and KID share: features of each image on a neutral prompt, and a reference file."""

    reference: str = setting("", f"the reference set, an .npz file made by `{MADE_BY}`", place=True)
    features: str = setting("inception", f"what is compared: {', '.join(KINDS)}")
    resizer: str = setting("clean", "clean-fid's: clean or legacy-tensorflow")
    path: str = setting(
        "", "the features' weights file or its folder ('': below the data folder)", place=True
    )
    sha256: str = setting("", "what the weights file's SHA-256 must be ('': the published one)")
    device: str = setting("cpu", "where the features are computed, as torch names it")

    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    reads: ClassVar[frozenset[str] | None] = frozenset()

    @abstractmethod
    def distance(self, table: pd.DataFrame) -> float:
        """The distance of a table's images, which all have features; NaN with fewer than two."""

    def check(self) -> None:
        """Raise UserError for missing or wrong weights, or a reference that doesn't fit them."""
        self.extractor.load()
        self._reference().check(self.extractor)

    def weights(self) -> Mapping[str, Path]:
        """The features' weights and the reference file."""
        path, reference = self.extractor.file(), self._reference().path
        return {path.name: path, f"reference/{reference.name}": reference}

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``<name>_features`` float32 ``[n, d]``; NaN but on neutral prompts."""
        check_shard(self.name, shard)
        extractor = self.extractor
        found = np.full((len(shard), extractor.kind.dimension), np.nan, dtype=np.float32)
        at = [i for i, prompt in enumerate(shard.prompts) if prompt.role is Role.NEUTRAL]
        if at:
            found[at] = cached(extractor, shard.images[at])
        return {f"{self.name}_features": found}

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """The distance of the table's images to the reference."""
        return self.distance(table)

    def facts(self) -> dict[str, Any]:
        """Features, resizer, weights, reference set, and how far the sample size carries."""
        reference = self._reference()
        return {**self.extractor.facts(), **reference.facts()}

    @property
    def extractor(self) -> Extractor:
        """What makes the features."""
        return Extractor(self.name, self.features, self.resizer, self.path, self.sha256, self.device)

    def _judge(self) -> str:
        return titled(f"{self.features}, {self.resizer}", self.extractor.kind.weights, self.sha256)

    def _reference(self) -> Reference:
        if not self.reference:
            raise UserError(
                f"metric '{self.name}' needs a reference set: make it by `{MADE_BY}` and give the file as "
                "the setting 'reference'"
            )
        return read_reference(self.name, Path(self.reference).expanduser())

    def _stacked(self, table: pd.DataFrame) -> Floats:
        """The features, ``[n, d]``."""
        return np.stack([np.asarray(v, dtype=np.float64) for v in table[f"{self.name}_features"]])


def _fid_score(judge: str) -> Score:
    help = "Frechet distance of images on neutral prompts to the reference set; biased upwards at small N."
    return _score("fid", "squared distance", (0.0, np.inf), help, judge)


def _kid_score(judge: str) -> Score:
    help = "Kernel distance (not times 1000) of images on neutral prompts to the reference set; unbiased."
    return _score("kid", "squared distance", (-np.inf, np.inf), help, judge)


@METRICS.register
@dataclass(frozen=True)
class FID(_ToReference):
    """FID (Heusel et al. 2017) with clean-fid's resizing and features (Parmar et al. 2022).

    FID's expectation grows as N falls, and with no more images than dimensions (2048) the covariance has no
    full rank: use :class:`KID` there, whose expectation doesn't depend on N. Rows with another N, reference
    set, resizer or features don't compare.
    """

    name: ClassVar[str] = "fid"
    summary: ClassVar[str] = "Frechet Inception Distance of neutral images to a reference set, by clean-fid."
    source: ClassVar[str] = "Heusel et al. 2017; Parmar et al. 2022 (clean-fid)"
    scores: ClassVar[tuple[Score, ...]] = (_fid_score("inception"),)

    def all_scores(self) -> tuple[Score, ...]:
        """The score, naming its features and resizer."""
        return (_fid_score(self._judge()),)

    def distance(self, table: pd.DataFrame) -> float:
        """The squared Frechet distance of the two Gaussians."""
        if len(table) < 2:
            return float("nan")
        return frechet(Gaussian.of_features(self._stacked(table), thin=False), self._reference().gaussian)

    def compare(self, table: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
        """``fid_relative``: the distance over base's (UniForget's Figure 7), N of both, and a warning where N
        is too small for FID. (KID has no ratio: base's value may be 0 or negative.)
        """
        from lethebench import stats

        chosen = [stats.select(self.scores[0], t) for t in (table, base)]
        ours, theirs = (t[[not np.isnan(v).any() for v in t["fid_features"]]] for t in chosen)
        value, of_base = self.distance(ours), self.distance(theirs)
        if not np.isfinite([value, of_base]).all() or of_base == 0:
            return {}
        found = {"fid_relative": value / of_base, "n": len(ours), "base_n": len(theirs)}
        small = min(len(ours), len(theirs)) <= self.extractor.kind.dimension
        return {**found, "warning": self._warning()} if small else found

    def facts(self) -> dict[str, Any]:
        """The shared facts, and from which N on FID is meant to be used."""
        return {**super().facts(), "covariance": "n - 1", "small_n": self._warning()}

    def _warning(self) -> str:
        d = self.extractor.kind.dimension
        return f"with N <= {d} images the covariance has no full rank and FID is biased upwards: read kid"


@METRICS.register
@dataclass(frozen=True)
class KID(_ToReference):
    """KID (Binkowski et al. 2018): the measure to read at small N, since it is unbiased at any.

    All pairs of images by default, which needs no random subsets; ``subsets=100`` is clean-fid's protocol,
    with draws seeded by Lethe.
    """

    subsets: int = setting(0, "random subsets to average over (0: all pairs at once)")
    subset_size: int = setting(1000, "images of a subset")

    name: ClassVar[str] = "kid"
    summary: ClassVar[str] = "Kernel Inception Distance of neutral images to a reference set, by clean-fid."
    source: ClassVar[str] = "Binkowski et al. 2018; features by clean-fid (Parmar et al. 2022)"
    scores: ClassVar[tuple[Score, ...]] = (_kid_score("inception"),)
    reads: ClassVar[frozenset[str] | None] = frozenset({"kid_to_reference"})

    def all_scores(self) -> tuple[Score, ...]:
        """The score, naming its features and resizer."""
        return (_kid_score(self._judge()),)

    def check(self) -> None:
        """As FID's; the reference must hold features, and subsets must have at least two images."""
        if self.subsets < 0 or self.subset_size < 2:
            raise UserError(
                f"metric 'kid': subsets={self.subsets} must not be negative, subset_size={self.subset_size} "
                "at least 2"
            )
        super().check()
        self._reference_features()

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``kid_features`` as FID's, and ``kid_to_reference``: the mean kernel with the reference's images.

        The second makes a resample of images cheap: what is left of KID is the pairs among them.
        """
        columns = super().measure(shard)
        has = ~np.isnan(columns["kid_features"]).any(axis=1)
        to_reference = np.full(len(shard), np.nan)
        to_reference[has] = mean_kernel(columns["kid_features"][has], self._reference_features())
        return {**columns, "kid_to_reference": to_reference}

    def distance(self, table: pd.DataFrame) -> float:
        """The unbiased squared MMD."""
        from lethebench.seeding import derive_seed

        if len(table) < 2:
            return float("nan")
        features = self._stacked(table)
        if not self.subsets:
            cross = float(table["kid_to_reference"].mean())
            return within(features) + self._reference().within - 2 * cross
        draws = np.random.Generator(np.random.PCG64(derive_seed("kid", self.subsets, self.subset_size)))
        reference = self._reference_features()
        return kernel_distance(
            features, reference, subsets=self.subsets, subset_size=self.subset_size, draws=draws
        )

    def facts(self) -> dict[str, Any]:
        """The shared facts, and which pairs are taken."""
        pairs = f"{self.subsets} subsets of {self.subset_size}" if self.subsets else "all"
        return {**super().facts(), "kernel": "(x . y / d + 1)^3", "pairs": pairs}

    def _reference_features(self) -> NDArray[np.float32]:
        found = self._reference().features
        if found is None:
            raise UserError(
                f"metric 'kid': reference {self.reference} has only mean and covariance: KID needs the "
                f"features; make it by `{MADE_BY}`"
            )
        return found
