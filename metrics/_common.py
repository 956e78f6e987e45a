"""What the built-in metrics share: checks of their input, references of a prompt set, and small helpers.

Nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import RunError
from lethebench.metric import Shard
from lethebench.prompts import Prompt, PromptSet, Reference, Role
from lethebench.referencing import Descriptor, described

T = TypeVar("T")
Images = NDArray[np.uint8]
Floats = NDArray[np.float64]

PLANTED_KINDS = frozenset({"verbatim", "foreground", "background", "one-to-many", "redundant-trigger"})
"""Kinds of prompts that ask for single memorized images."""
HARD_NEGATIVE = "hard-negative"
_KEPT = 4
"""Prompt sets whose references are kept in memory."""


def check_images(metric: str, images: Any) -> None:
    """Raise one clear ValueError unless ``images`` is uint8 ``[n, height, width, 3]``."""
    shape, dtype = list(getattr(images, "shape", ())), getattr(images, "dtype", type(images).__name__)
    if not isinstance(images, np.ndarray) or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(
            f"{metric}: images must be a numpy array, uint8 [n, height, width, 3]; got {dtype} {shape}"
        )


def check_shard(metric: str, shard: Shard) -> None:
    """Raise one clear ValueError unless the shard's parts are of one length and its images are images."""
    check_images(metric, shard.images)
    lengths = {"images": len(shard.images), "prompts": len(shard.prompts), "indices": len(shard.indices)}
    for name in ("latents", "noise_norm"):
        if getattr(shard, name) is not None:
            lengths[name] = len(getattr(shard, name))
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"{metric}: the parts of a shard must be of one length; got {told}")


def check_vectors(metric: str, name: str, vectors: Any, count: int) -> None:
    """Raise one clear ValueError unless ``vectors`` is a numeric array ``[count, d]``."""
    shape = list(getattr(vectors, "shape", ()))
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"{metric}: {name} must be a numpy array [{count}, d]; got {shape}")


# --- references -----------------------------------------------------------------------------------

_memos: OrderedDict[int, tuple[object, dict[Any, Any]]] = OrderedDict()


def remembered(owner: object, key: Any, make: Callable[[], T]) -> T:
    """``make()``, kept in memory for as long as ``owner`` is one of the last few owners asked about."""
    kept = _memos.pop(id(owner), (owner, {}))
    _memos[id(owner)] = kept
    while len(_memos) > _KEPT:
        _memos.popitem(last=False)
    if key not in kept[1]:
        kept[1][key] = make()
    found: T = kept[1][key]
    return found


def reference_of(prompt_set: PromptSet, reference_id: str) -> Reference:
    """The reference, made once."""
    return remembered(prompt_set, ("reference", reference_id), lambda: prompt_set.reference(reference_id))


def reference_vectors(
    prompt_set: PromptSet,
    ids: Iterable[str],
    descriptor: Descriptor,
    describe: Callable[[Iterable[Images]], NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """The references' vectors ``[d]`` by id: those that the set keeps, else ``describe`` of the images.

    Each is described once. Raises UserError where the set keeps vectors of another descriptor only.
    """
    known: dict[str, NDArray[Any]] = remembered(prompt_set, ("vectors", descriptor), dict)
    pictured = []
    for name in ids:
        if name in known:
            continue
        kept = described(prompt_set, name)
        if kept is None:
            pictured.append(name)
        else:
            known[name] = kept.by(descriptor)
    if pictured:
        vectors = describe(prompt_set.reference(name).image for name in pictured)  # the images aren't kept
        known.update(zip(pictured, vectors, strict=True))
    return known


def trigger_references(prompt_set: PromptSet) -> tuple[str, ...]:
    """The ids of all images that the set's triggers may reproduce, sorted."""

    def find() -> tuple[str, ...]:
        return tuple(sorted({r for p in prompt_set if p.role is Role.TRIGGER for r in p.references}))

    return remembered(prompt_set, "trigger references", find)


def asks_for_copy(prompt: Prompt) -> bool:
    """Whether the prompt may reproduce single images: it has references, and isn't about a concept."""
    return bool(prompt.references) and prompt.concept is None


def same_size(metric: str, images: Images, reference: Reference) -> None:
    """Raise one clear ValueError unless the reference is of the images' size."""
    if reference.image.shape != images.shape[1:]:
        ours, theirs = list(images.shape[1:]), list(reference.image.shape)
        raise ValueError(f"{metric}: reference {reference.id} is {theirs}, the images are {ours}")


# --- columns --------------------------------------------------------------------------------------


def spread(values: Any, at: Sequence[int] | NDArray[Any], count: int) -> Floats:
    """A column of ``count`` images: ``values`` where the metric applies, NaN elsewhere."""
    values = np.asarray(values, dtype=np.float64)
    column = np.full((count, *values.shape[1:]), np.nan)
    column[np.asarray(at, dtype=np.intp)] = values
    return column


def texts(values: Iterable[str], at: Sequence[int] | NDArray[Any], count: int) -> NDArray[np.object_]:
    """The same for texts: empty where the metric doesn't apply."""
    column = np.full(count, "", dtype=object)
    for row, value in zip(at, values, strict=True):
        column[row] = value
    return column


def one_hot(prefix: str, labels: NDArray[np.object_]) -> dict[str, Floats]:
    """Columns ``<prefix>_vm``, ``_fm``, ``_bm``, ``_nm`` and ``_memorized`` (any but NM) from labels."""
    none = labels == ""
    columns = {
        f"{prefix}_{name.lower()}": np.where(none, np.nan, labels == name)
        for name in ("VM", "FM", "BM", "NM")
    }
    return {**columns, f"{prefix}_memorized": np.where(none, np.nan, labels != "NM")}


# --- calibration ----------------------------------------------------------------------------------


CALIBRATION = "calibration.json"
CALIBRATE = "python -m lethebench.metrics._calibration"


@lru_cache(maxsize=8)
def read_calibration(folder: Path) -> Mapping[str, Any]:
    """A metric's ``calibration.json``, which ``python -m lethebench.metrics._calibration`` writes."""
    try:
        found: dict[str, Any] = json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder / CALIBRATION} can't be read: restore it, or make it by `{CALIBRATE}`"
        ) from error
    return found


def calibration_version(folder: Path, version: str) -> str:
    """A metric's version with the first digits of its calibration's hash: new thresholds, new version."""
    path = folder / CALIBRATION
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else "uncalibrated"
    return f"{version}+{digits}"


def calibration_summary(folder: Path) -> dict[str, Any]:
    """What a row records of a calibration: its error rates, recipe and what it was made with."""
    found = read_calibration(folder)
    return {k: found[k] for k in ("false_positives", "true_positives", "recipe", "made_with") if k in found}
