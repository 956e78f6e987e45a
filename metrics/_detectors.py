"""What the detection metrics share: scores, windows of steps, and checks of what was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Direction, Score, Shard
from lethebench.metrics._common import PLANTED_KINDS, Floats
from lethebench.prompts import Role


def scores_of(
    column: str,
    name: str,
    what: str,
    unit: str,
    bounds: tuple[float, float],
    direction: Direction = "none",
) -> tuple[Score, ...]:
    """The column's mean over trigger images (``<name>_trigger``) and over twins (``<name>_control``)."""
    return (
        Score(
            f"{name}_trigger",
            column,
            direction,
            unit,
            bounds,
            roles=frozenset({Role.TRIGGER}),
            help=f"{what}, mean over trigger images.",
        ),
        Score(
            f"{name}_control",
            column,
            "none",
            unit,
            bounds,
            roles=frozenset({Role.CONTROL}),
            kinds=PLANTED_KINDS,
            trained=False,
            help=f"{what}, mean over images of never-memorized twins: the floor.",
        ),
    )


def first_steps(values: NDArray[Any], first: int) -> Floats:
    """Mean over the ``first`` steps (all, if there are fewer) of ``[n, steps]``: ``[n]``; NaN without any."""
    window = np.asarray(values, dtype=np.float64)[:, :first]
    return np.asarray(window.mean(axis=1)) if window.shape[1] else np.full(len(window), np.nan)


def recorded(metric: str, shard: Shard, name: str, width: int | None = None) -> Floats:
    """What was recorded under ``name``: float64 ``[n, width]``, NaN where nothing was (no model drew, or the
    metric doesn't apply to it).

    Raises ValueError for another shape; ``width`` None takes any (``[n, 0]`` where nothing was recorded).
    """
    found = shard.recorded.get(name)
    if found is None:
        return np.full((len(shard), width or 0), np.nan)
    check_recorded(metric, shard, name, 2)
    if width not in (None, found.shape[1]):
        raise ValueError(f"{metric}: recorded '{name}' must be [n, {width}]; got {list(found.shape)}")
    return np.asarray(found, dtype=np.float64)


def check_recorded(metric: str, shard: Shard, name: str, axes: int) -> None:
    """Raise ValueError unless what was recorded under ``name`` (if anything was) has an entry an image."""
    found = shard.recorded.get(name)
    if found is not None and (found.ndim != axes or len(found) != len(shard)):
        told = f"{axes} axes, the first of {len(shard)} images; got {list(found.shape)}"
        raise ValueError(f"{metric}: recorded '{name}' must have {told}")


def require_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless a setting is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
