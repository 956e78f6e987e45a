"""Final latents: their magnitude, a projection that keeps distances, and how far they moved from base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import Floats, check_shard, spread
from lethebench.prompts import Role
from lethebench.registry import METRICS
from lethebench.seeding import derive_seed

if TYPE_CHECKING:
    import pandas as pd

DIMENSIONS = 64
"""Of the projection. The relative error of a squared distance has standard deviation sqrt(2 / 64) = 18 %."""
GROUPS = (Role.NEUTRAL, Role.CONCEPT, Role.TRIGGER)
_PROTECTED = (Role.CONCEPT, Role.TRIGGER)


def drawn(latents: NDArray[Any] | None, count: int) -> NDArray[np.intp]:
    """The rows of ``latents`` ``[n, ...]`` that hold one: not where nothing was drawn or sampling diverged.

    ValueError where there are not ``count`` rows.
    """
    if latents is None:
        return np.zeros(0, dtype=np.intp)
    if len(latents) != count:
        raise ValueError(f"latents: {count} images need as many latents; got {list(latents.shape)}")
    if not latents[:1].size:
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero(np.isfinite(latents.reshape(count, -1)).all(axis=1))


def magnitudes(latents: NDArray[Any]) -> Floats:
    """The root mean square of each latent's elements, ``[n]``: its l2 norm over the root of its size.

    1 for unit normal noise of any size, so that resolutions compare.
    """
    if not len(latents):
        return np.zeros(0)
    flat = np.asarray(latents, dtype=np.float64).reshape(len(latents), -1)
    return np.asarray(np.sqrt((flat**2).mean(axis=1)))


@lru_cache(maxsize=1)
def projection_matrix(size: int, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """The fixed Gaussian projection of vectors of that size: float32 ``[dimensions, size]``."""
    random = np.random.Generator(np.random.PCG64(derive_seed("latents", "projection", size, dimensions)))
    matrix = random.standard_normal((dimensions, size), dtype=np.float32)
    matrix /= np.float32(np.sqrt(dimensions))
    matrix.flags.writeable = False
    return matrix


def project(latents: NDArray[Any], dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """A random projection of flattened latents ``[n, ...]`` (Johnson and Lindenstrauss): ``[n, dimensions]``.

    Squared lengths and distances are kept on average; for one of them the relative error has a standard
    deviation of sqrt(2 / dimensions). Each image is projected alone, so that no batch can change a digit.
    """
    if not len(latents):
        return np.zeros((0, dimensions), np.float32)
    flat = np.asarray(latents, dtype=np.float32).reshape(len(latents), -1)
    matrix = projection_matrix(flat.shape[1], dimensions)
    return np.stack([matrix @ row for row in flat])


def _score(role: Role) -> Score:
    return Score(
        f"latents.magnitude_{role}",
        "latent_magnitude",
        "none",
        "root mean square",
        (0.0, np.inf),
        roles=frozenset({role}),
        help=f"Magnitude of the final latents, mean over images on {role} prompts.",
    )


@METRICS.register
class Latents(Metric):
    """UniForget's Figures 4 and 5 as numbers: the final latent's magnitude, and how far latents moved.

    Per image the magnitude (:func:`magnitudes`) and a projection of the latent to 64 dimensions, since the
    latents of a large model don't fit a table. The paper plots a norm after a reduction that it doesn't name;
    ours is the whole latent's, with which any projection that keeps lengths agrees. That a high magnitude
    says memorized is the paper's claim, declared in ``detects`` to be measured like any other.

    The row records how far the latents are from base's on the same prompts and noise (the paper's claim:
    neutral stays, protected content moves), and how far protected prompts' latents are from neutral ones',
    for the method and for base (the claim: closer than before). The number is the squared maximum mean
    discrepancy of :mod:`lethebench.two_sample`, on the projections, with one bandwidth: the median distance
    between base's images. It is a fact about these prompts' latents, no proof of forgetting: a method that
    breaks every image moves them far. NaN where nothing was drawn (``blank``) or sampling diverged.
    """

    name: ClassVar[str] = "latents"
    summary: ClassVar[str] = "Magnitude of the final latents, and how far they moved from base's."
    source: ClassVar[str] = "UniForget, Figures 4 and 5; Gretton et al., JMLR 2012 (statistic)"
    needs: ClassVar[frozenset[str]] = frozenset({"latents"})
    scores: ClassVar[tuple[Score, ...]] = tuple(_score(role) for role in GROUPS)
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {"latent_magnitude": "high"}

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``latent_magnitude`` and ``latent_projection`` ``[n, 64]``; NaN where there is no latent."""
        check_shard(self.name, shard)
        at = drawn(shard.latents, len(shard))
        found = np.zeros((0, 1)) if shard.latents is None or not len(at) else shard.latents[at]
        return {
            "latent_magnitude": spread(magnitudes(found), at, len(shard)),
            "latent_projection": spread(project(found), at, len(shard)),
        }

    def compare(self, table: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
        """Separations, each with interval and p, by role: ``from_base`` and ``from_neutral``.

        None where a role has fewer than two clusters of prompts with latents, or shares one with the neutral
        prompts. Only ``reason`` where base's latents give no bandwidth.
        """
        from lethebench.two_sample import median_bandwidth

        ours, theirs = (_with_latents(t) for t in (table, base))
        try:
            bandwidth = median_bandwidth(_vectors(theirs), theirs["cluster"].to_numpy())
        except ValueError as error:
            return {"reason": f"base: {error}"}
        return {
            "statistic": "unbiased squared maximum mean discrepancy, Gaussian kernel",
            "bandwidth": bandwidth,
            "from_base": {str(role): _from_base(ours, theirs, role, bandwidth) for role in GROUPS},
            "from_neutral": {
                str(role): {
                    "row": _from_neutral(ours, role, bandwidth),
                    "base": _from_neutral(theirs, role, bandwidth),
                }
                for role in _PROTECTED
            },
        }

    def facts(self) -> dict[str, Any]:
        """What the magnitude and the projection are."""
        return {
            "magnitude": "root mean square of the final latent, before the VAE's scaling is undone",
            "projection": f"seeded Gaussian to {DIMENSIONS} dimensions",
            "projection_error": "relative error of a squared distance: standard deviation sqrt(2 / 64)",
        }


def _with_latents(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["latent_magnitude"].notna().to_numpy(dtype=bool)]


def _vectors(table: pd.DataFrame) -> Floats:
    rows = [np.asarray(v, dtype=np.float64) for v in table["latent_projection"]]
    return np.stack(rows) if rows else np.zeros((0, DIMENSIONS))


def _from_base(
    ours: pd.DataFrame, theirs: pd.DataFrame, role: Role, bandwidth: float
) -> dict[str, Any] | None:
    """The row's separation from base, paired image by image."""
    from lethebench.two_sample import paired_two_sample

    keys = ["prompt_id", "index"]
    columns = [*keys, "latent_projection"]
    own = ours[(ours["role"] == str(role)).to_numpy(dtype=bool)]
    both = own[[*columns, "cluster"]].merge(theirs[columns], on=keys, suffixes=("", "_base"), validate="1:1")
    if both["cluster"].nunique() < 2:
        return None
    of_base = both[["latent_projection_base"]].set_axis(["latent_projection"], axis=1)
    clusters = both["cluster"].to_numpy()
    parts = ("latents", "from base", role)
    found = paired_two_sample(
        _vectors(both), _vectors(of_base), clusters, bandwidth=bandwidth, seed_parts=parts
    )
    return found.as_dict()


def _from_neutral(table: pd.DataFrame, role: Role, bandwidth: float) -> dict[str, Any] | None:
    """The separation of one role's latents from the neutral ones."""
    from lethebench.two_sample import two_sample

    own, neutral = (table[(table["role"] == str(r)).to_numpy(dtype=bool)] for r in (role, Role.NEUTRAL))
    names = [part["cluster"].to_numpy() for part in (own, neutral)]
    kinds = [set(part) for part in names]
    if min(map(len, kinds)) < 2 or kinds[0] & kinds[1]:
        return None
    parts = ("latents", "from neutral", role)
    found = two_sample(
        _vectors(own), _vectors(neutral), names[0], names[1], bandwidth=bandwidth, seed_parts=parts
    )
    return found.as_dict()
