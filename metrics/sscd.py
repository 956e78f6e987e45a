"""SSCD: the cosine of published copy-detection descriptors to the prompt's own references."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import (
    HARD_NEGATIVE,
    asks_for_copy,
    check_shard,
    reference_vectors,
    spread,
    texts,
    trigger_references,
)
from lethebench.metrics._weights import (
    Published,
    check_device,
    check_torchscript,
    locate,
    record,
    titled,
)
from lethebench.prompts import Role
from lethebench.referencing import Descriptor
from lethebench.registry import METRICS
from lethebench.store import known_sha256

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image
    from torch import Tensor

Floats = NDArray[np.float64]
BATCH = 32

_UPSTREAM = "https://dl.fbaipublicfiles.com/sscd-copy-detection"
_KNOWN_SUMS = {
    "sscd_disc_mixup": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56",
}
"""Upstream publishes no sums. This one is stated alike by several public projects that download the file;
none was found for the other models, whose files are recorded and not compared."""


def _published(name: str) -> Published:
    file = f"{name}.torchscript.pt"
    return Published(
        "sscd", file, f"{_UPSTREAM}/{file}", _KNOWN_SUMS.get(name), "public projects that use it"
    )


MODELS: Mapping[str, Published] = {
    name: _published(name)
    for name in (
        "sscd_disc_blur",
        "sscd_disc_advanced",
        "sscd_disc_mixup",
        "sscd_disc_large",
        "sscd_imagenet_blur",
        "sscd_imagenet_advanced",
        "sscd_imagenet_mixup",
    )
}
"""The TorchScript files of facebookresearch/sscd-copy-detection (MIT). ``disc_large`` is a ResNeXt101 with
1024 dimensions, the others are ResNet50 with 512."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5,), (0.5,))
Normalize = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Preset:
    """A published way to compute SSCD: model, preprocessing and threshold, with its source.

    ``resize`` is the length of the short side, or (height, width); ``crop`` the side of the central square
    cut out after it; ``normalize`` mean and standard deviation.
    """

    model: str
    resize: int | tuple[int, int]
    crop: int | None
    normalize: Normalize | None
    threshold: float
    source: str

    def describe(self) -> str:
        """The preprocessing in words."""
        steps = [f"Resize({self.resize})"]
        if self.crop is not None:
            steps.append(f"CenterCrop({self.crop})")
        steps.append("ToTensor")
        if self.normalize is not None:
            steps.append(f"Normalize({list(self.normalize[0])}, {list(self.normalize[1])})")
        return ", ".join(steps)


PRESETS: Mapping[str, Preset] = {
    "upstream-288": Preset(
        "sscd_disc_mixup",
        288,
        None,
        _IMAGENET,
        0.75,
        "facebookresearch/sscd-copy-detection README; there a cosine > 0.75 is 90 % precision on DISC",
    ),
    "nemo-320": Preset(
        "sscd_disc_mixup",
        (320, 320),
        None,
        _IMAGENET,
        0.7,
        "ml-research/localizing_memorization_in_diffusion_models compute_sscd_orig.py; 0.7 is its VM label",
    ),
    "fbmem-288": Preset(
        "sscd_disc_mixup",
        288,
        None,
        _IMAGENET,
        0.5,
        "Jimmy-di/localizing_memorization_in_diffusion_models (FB-Mem); it gives no threshold, 0.5 is ours",
    ),
    "wen-224": Preset(
        "sscd_disc_large",
        256,
        224,
        _HALF,
        0.7,
        "YuxinWenRick/diffusion_memorization inference_mem.py; 0.7 as its issue #5 quotes the paper",
    ),
    "dcr-224": Preset(
        "sscd_disc_mixup",
        256,
        224,
        _HALF,
        0.5,
        "somepago/DCR diff_retrieval.py, its default architecture resnet50; sim_gt_05pc",
    ),
    "membench-288": Preset(
        "sscd_disc_large",
        (288, 288),
        None,
        _IMAGENET,
        0.5,
        "chunsanHong/MemBench_code sim_utils.py, run_mitigation.py",
    ),
    "amg-224": Preset(
        "sscd_disc_mixup",
        (224, 224),
        None,
        None,
        0.5,
        "chenchen-usyd/AMG-sd scripts/eval.py: no normalisation",
    ),
}


# --- descriptors ----------------------------------------------------------------------------------


def pipeline(preset: Preset) -> Callable[[Image.Image], Tensor]:
    """The preset's torchvision transform: an RGB image to float32 ``[3, height, width]``."""
    from torchvision import transforms  # type: ignore[import-untyped]

    size = list(preset.resize) if isinstance(preset.resize, tuple) else preset.resize
    steps: list[Any] = [transforms.Resize(size)]
    if preset.crop is not None:
        steps.append(transforms.CenterCrop(preset.crop))
    steps.append(transforms.ToTensor())
    if preset.normalize is not None:
        mean, deviation = preset.normalize
        steps.append(transforms.Normalize(list(mean), list(deviation)))
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def describe(
    images: Iterable[NDArray[np.uint8]],
    model: Callable[[Tensor], Tensor],
    preset: Preset,
    device: str = "cpu",
) -> Floats:
    """Descriptors ``[n, d]`` of unit length of images uint8 ``[height, width, 3]``, of any sizes.

    The published models give unit vectors; they are made so again, since some papers' code takes the inner
    product and some the cosine.
    """
    import torch
    from PIL import Image

    transform = pipeline(preset)
    found = []
    with torch.inference_mode():
        for _, alike in groupby((transform(Image.fromarray(i)) for i in images), key=lambda t: t.shape):
            while batch := list(islice(alike, BATCH)):
                found.append(model(torch.stack(batch).to(device)).double().cpu().numpy())
    if not found:
        return np.zeros((0, 0))
    raw = np.concatenate(found)
    return np.asarray(raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12))


@lru_cache(maxsize=2)
def load(path: Path, sha256: str, device: str) -> Any:
    """The TorchScript model in evaluation mode; ``sha256`` makes a changed file another one.

    Raises UserError unless it turns images ``[1, 3, 224, 224]`` into descriptors ``[1, d]``.
    """
    import torch

    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore", FutureWarning)
            model = torch.jit.load(str(path), map_location=device).eval()
            shape = list(model(torch.zeros(1, 3, 224, 224, device=device)).shape)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"metric 'sscd': {path} is no TorchScript model of images: {first}") from error
    if len(shape) != 2 or shape[0] != 1:
        raise UserError(f"metric 'sscd': {path} gives {shape} for one image, not a descriptor [1, d]")
    return model


# --- scores ---------------------------------------------------------------------------------------


def lower_median(values: Floats) -> float:
    """The median, the lower of the middle two as ``torch.median`` takes it (NeMo's code uses that).

    >>> lower_median(np.array([3.0, 1.0, 2.0, 4.0]))
    2.0
    """
    return float(np.sort(values)[(len(values) - 1) // 2])


def prompt_maxima(table: pd.DataFrame) -> Floats:
    """The highest ``sscd_similarity`` of each prompt's images, ``[prompts]``.

    A cluster that a resample drew twice counts as two.
    """
    best = table.groupby(["cluster", "prompt_id"], sort=True)["sscd_similarity"].max()
    return best.to_numpy(dtype=float)


AGGREGATES: Mapping[str, Callable[[pd.DataFrame], float]] = {
    "sscd.p95": lambda t: float(np.percentile(t["sscd_similarity"].to_numpy(dtype=float), 95)),
    "sscd.prompt_max": lambda t: float(prompt_maxima(t).mean()),
    "sscd.prompt_median": lambda t: lower_median(prompt_maxima(t)),
    "sscd.prompt_mad": lambda t: lower_median(np.abs(prompt_maxima(t) - lower_median(prompt_maxima(t)))),
}


def _scores(judge: str, threshold: str) -> tuple[Score, ...]:
    triggers, controls = frozenset({Role.TRIGGER}), frozenset({Role.CONTROL})

    def cosine(
        name: str, help: str, column: str = "sscd_similarity", direction: Literal["lower", "none"] = "lower"
    ) -> Score:
        return Score(name, column, direction, "cosine", (-1.0, 1.0), roles=triggers, help=help, judge=judge)

    def share(name: str, column: str, over: str) -> Score:
        help = f"Share of trigger images whose cosine to an own training image is above {over}."
        return Score(name, column, "lower", "share", (0.0, 1.0), roles=triggers, help=help, judge=judge)

    def floor(name: str, column: str, unit: str, help: str, kinds: frozenset[str] = frozenset()) -> Score:
        bounds = (-1.0, 1.0) if unit == "cosine" else (0.0, 1.0)
        return Score(
            name, column, "none", unit, bounds, roles=controls, kinds=kinds, trained=None if kinds else False,
            help=help, judge=judge,
        )  # fmt: skip

    return (
        cosine("sscd.similarity", "Cosine to the nearest own training image, mean over trigger images."),
        share("sscd.rate", "sscd_copy", threshold),
        share("sscd.rate_05", "sscd_above_05", "0.5"),
        share("sscd.rate_07", "sscd_above_07", "0.7"),
        cosine("sscd.p95", "95th percentile of the similarity over trigger images (DCR; AMG's Top5%)."),
        cosine(
            "sscd.prompt_max", "The highest similarity of each trigger prompt's images, mean over prompts."
        ),
        cosine("sscd.prompt_median", "The same highest similarity, median over prompts (NeMo)."),
        cosine(
            "sscd.prompt_mad",
            "Median absolute deviation of the same from its median over prompts (NeMo).",
            direction="none",
        ),
        cosine(
            "sscd.nearest",
            "Cosine to the nearest of all trigger prompts' training images, mean over trigger images.",
            column="sscd_nearest_similarity",
        ),
        floor("sscd.similarity_control", "sscd_similarity", "cosine", "The floor: never-memorized twins."),
        floor("sscd.control", "sscd_copy", "share", "sscd.rate on never-memorized twins: the floor."),
        floor(
            "sscd.hard_negative",
            "sscd_copy",
            "share",
            "sscd.rate on rare-name captions seen once.",
            frozenset({HARD_NEGATIVE}),
        ),
    )


@METRICS.register
@dataclass(frozen=True)
class SSCD(Metric):
    """SSCD (Pizzi et al., CVPR 2022) by a published TorchScript file, preprocessed as a named paper does.

    Papers differ in model, resizing and normalisation, so their numbers don't compare: every score names its
    preset. The similarity is the maximum over the prompt's own references (Wen et al. 2024). A share counts
    values strictly above its threshold, as the papers' code does.
    """

    preset: str = setting("nemo-320", f"model, preprocessing and threshold of a paper: {', '.join(PRESETS)}")
    threshold: float | None = setting(
        None, "cosine above which sscd.rate counts an image as a copy (None: the preset's)"
    )
    path: str = setting(
        "", "the model's TorchScript file or its folder ('': the data folder's sscd/)", place=True
    )
    sha256: str = setting("", "what the file's SHA-256 must be ('': the published one, where known)")
    device: str = setting("cpu", "where the model runs, as torch names it")

    name: ClassVar[str] = "sscd"
    summary: ClassVar[str] = "Similarity to the prompt's own training images by published SSCD descriptors."
    source: ClassVar[str] = "Pizzi et al. 2022; facebookresearch/sscd-copy-detection; preset's source: facts"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "references"})
    scores: ClassVar[tuple[Score, ...]] = _scores("sscd", "the threshold")
    set_valued: ClassVar[frozenset[str]] = frozenset(AGGREGATES)
    reads: ClassVar[frozenset[str] | None] = frozenset()
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "sscd_similarity": "high",
        "sscd_nearest_similarity": "high",
    }

    def all_scores(self) -> tuple[Score, ...]:
        """The scores, naming model, preset and threshold."""
        preset = self._preset()
        model = titled(preset.model, MODELS[preset.model], self.sha256)
        return _scores(f"{model} ({self.preset})", f"{self._threshold():g}")

    def check(self) -> None:
        """Raise UserError for an unknown preset, a bad threshold, and a missing, damaged or wrong file."""
        if not -1 <= self._threshold() <= 1:
            raise UserError(f"metric 'sscd': threshold={self.threshold} must be a cosine, from -1 to 1")
        check_torchscript(self.name, self._file())
        check_device(self.name, self.device)
        self._model()

    def weights(self) -> Mapping[str, Path]:
        """The model's file."""
        path = self._file()
        return {path.name: path}

    def descriptor(self) -> Descriptor:
        """The preset, and the SHA-256 of the model's file."""
        return Descriptor(f"sscd:{self.preset}", known_sha256(self._file()), self._preset().describe())

    def describe(self, images: Iterable[NDArray[np.uint8]]) -> Floats:
        """Descriptors of the preset, float64 ``[n, d]`` of unit length."""
        return describe(images, self._model(), self._preset(), self.device)

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """Columns of the table; NaN (or an empty text) on prompts that ask for no copy.

        ``sscd_similarity`` to the nearest own reference; ``sscd_copy``, ``sscd_above_05`` and
        ``sscd_above_07``: whether it is above the threshold, 0.5 and 0.7; ``sscd_nearest`` and
        ``sscd_nearest_similarity``: id and similarity of the nearest of all trigger references.
        """
        check_shard(self.name, shard)
        count = len(shard)
        at = [i for i, prompt in enumerate(shard.prompts) if asks_for_copy(prompt)]
        own: list[float] = []
        nearest: list[float] = []
        names: list[str] = []
        if at:
            trained = trigger_references(shard.prompt_set)
            ids = sorted({r for i in at for r in shard.prompts[i].references} | set(trained))
            place = {name: number for number, name in enumerate(ids)}
            among = [place[name] for name in trained]
            products = self.describe(shard.images[i] for i in at) @ self._references(shard, ids).T
            cosines = np.clip(products, -1.0, 1.0)  # of equal pictures, rounding may leave more than 1
            for row, i in zip(cosines, at, strict=True):
                own.append(float(row[[place[r] for r in shard.prompts[i].references]].max()))
                best = int(row[among].argmax()) if among else None
                nearest.append(float(row[among[best]]) if best is not None else np.nan)
                names.append(trained[best] if best is not None else "")
        similarity = spread(own, at, count)
        return {
            "sscd_similarity": similarity,
            **{
                column: np.where(np.isnan(similarity), np.nan, similarity > cut)
                for column, cut in (
                    ("sscd_copy", self._threshold()),
                    ("sscd_above_05", 0.5),
                    ("sscd_above_07", 0.7),
                )
            },
            "sscd_nearest": texts(names, at, count),
            "sscd_nearest_similarity": spread(nearest, at, count),
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """The mean over images, or what :data:`AGGREGATES` names."""
        if score.name in AGGREGATES:
            return AGGREGATES[score.name](table)
        return super().aggregate(score, table)

    def facts(self) -> dict[str, Any]:
        """Model, preset, preprocessing in words, threshold, their source, and the file with its sum."""
        preset = self._preset()
        return {
            "model": preset.model,
            "preset": self.preset,
            "preprocessing": preset.describe(),
            "threshold": self._threshold(),
            "preset_source": preset.source,
            "weights": record(self._file(), MODELS[preset.model], self.sha256),
            "url": MODELS[preset.model].url,
            "device": self.device,
            "comparable_with": "rows of the same preset only",
        }

    def _preset(self) -> Preset:
        if self.preset not in PRESETS:
            raise UserError(f"metric 'sscd' has no preset '{self.preset}': known {', '.join(PRESETS)}")
        return PRESETS[self.preset]

    def _threshold(self) -> float:
        return self._preset().threshold if self.threshold is None else self.threshold

    def _file(self) -> Path:
        return locate(self.name, MODELS[self._preset().model], self.path, self.sha256)

    def _model(self) -> Any:
        path = self._file()
        return load(path, known_sha256(path), self.device)

    def _references(self, shard: Shard, ids: Sequence[str]) -> Floats:
        """The references' descriptors, ``[r, d]``."""
        known = reference_vectors(shard.prompt_set, ids, self.descriptor(), self.describe)
        return np.stack([known[name] for name in ids])
