"""Image features that FID and KID compare: clean-fid's Inception, and its CLIP features by open_clip."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.metrics import clip_score
from lethebench.metrics._weights import (
    Published,
    check_device,
    check_torchscript,
    locate,
    record,
)
from lethebench.store import known_sha256

Vectors = NDArray[np.float32]
BATCH = 32
INCEPTION = "inception-2015-12-05.pt"


@dataclass(frozen=True)
class Kind:
    """Features by name: their dimension, published weights and resizers."""

    dimension: int
    weights: Published
    resizers: tuple[str, ...]
    source: str


KINDS: Mapping[str, Kind] = {
    "inception": Kind(
        2048,
        Published(
            "inception",
            INCEPTION,
            f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}",
            "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
            "k-diffusion's evaluation.py, which downloads the same file",
        ),
        ("clean", "legacy-tensorflow"),
        "pool features of the TensorFlow Inception of Heusel et al. 2017, by clean-fid (Parmar et al. 2022)",
    ),
    "clip-vit-b-32": Kind(
        512,
        clip_score.PRESETS["vit-b-32"].weights,
        ("clean",),
        "image embeddings of OpenAI's ViT-B/32, as clean-fid's clip_vit_b_32 (Kynkaanniemi et al. 2023)",
    ),
}


@dataclass(frozen=True)
class Extractor:
    """What makes a feature vector of an image; ``metric`` is whom an error is about.

    ``resizer`` is clean-fid's mode: ``clean`` (to 299 by PIL's bicubic, each channel in floats; for CLIP its
    own: to 224 by PIL's bicubic and the centre) or ``legacy-tensorflow`` (inside the network).
    """

    metric: str
    features: str = "inception"
    resizer: str = "clean"
    path: str = ""
    sha256: str = ""
    device: str = "cpu"

    @cached_property
    def kind(self) -> Kind:
        """The features' facts. Raises UserError for unknown ones, or a resizer that they haven't."""
        if self.features not in KINDS:
            raise UserError(
                f"metric '{self.metric}' has no features '{self.features}': known {', '.join(KINDS)}"
            )
        kind = KINDS[self.features]
        if self.resizer not in kind.resizers:
            known = ", ".join(kind.resizers)
            raise UserError(
                f"metric '{self.metric}': {self.features} has no resizer '{self.resizer}': known {known}"
            )
        return kind

    def file(self) -> Path:
        """The weights file, checked against its sum. Raises UserError."""
        return locate(self.metric, self.kind.weights, self.path, self.sha256)

    def check(self) -> None:
        """Raise UserError unless the features can be computed here."""
        path = self.file()
        check_torchscript(self.metric, path)
        if self.features == "inception" and path.name != INCEPTION:
            raise UserError(f"metric '{self.metric}': clean-fid reads {INCEPTION} by its name: rename {path}")
        check_device(self.metric, self.device)

    def identity(self) -> dict[str, Any]:
        """What two sets of features must share to be compared."""
        return {
            "features": self.features,
            "resizer": self.resizer,
            "weights_sha256": known_sha256(self.file()),
        }

    def facts(self) -> dict[str, Any]:
        """What a row says of its features."""
        return {
            "features": f"{self.features}, {self.kind.dimension} dimensions",
            "features_source": self.kind.source,
            "resizer": f"clean-fid's {self.resizer}",
            "weights": record(self.file(), self.kind.weights, self.sha256),
            "device": self.device,
        }

    def load(self) -> Any:
        """The network, loaded once a process. Raises UserError for a file that is another one."""
        self.check()
        path = self.file()
        if self.features == "inception":
            return _inception(path.parent, known_sha256(path), self.resizer, self.device)
        preset = clip_score.PRESETS["vit-b-32"]
        return clip_score.load(preset.model, path, known_sha256(path), self.device)

    def __call__(self, images: Iterable[NDArray[np.uint8]]) -> Vectors:
        """Features float32 ``[n, d]`` of images uint8 ``[height, width, 3]``, of any sizes."""
        network = self.load()
        if self.features == "inception":
            found = _inception_features(images, network, self.resizer, self.device)
        else:
            found = _clip_features(images, network)
        return found if len(found) else np.zeros((0, self.kind.dimension), np.float32)


@lru_cache(maxsize=2)
def _inception(folder: Path, sha256: str, resizer: str, device: str) -> Any:
    """clean-fid's wrapper around the TorchScript file, tried on one blank image.

    ``sha256`` makes a changed file another one.
    """
    import torch
    from cleanfid.inception_torchscript import InceptionV3W

    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore", FutureWarning)
            wrapper = InceptionV3W(str(folder), download=False, resize_inside=resizer == "legacy-tensorflow")
            wrapper = wrapper.to(device).eval()
            wrapper(torch.zeros(1, 3, 299, 299, device=device))
    except (RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{folder / INCEPTION} can't be read as clean-fid's Inception: {first}") from error
    return wrapper


def _inception_features(
    images: Iterable[NDArray[np.uint8]], network: Any, resizer: str, device: str
) -> Vectors:
    from cleanfid.resize import build_resizer

    resize = build_resizer(resizer.replace("-", "_"))
    resized = (np.asarray(resize(image), dtype=np.float32) for image in images)
    return _batches(resized, network, device)


def _clip_features(images: Iterable[NDArray[np.uint8]], encoder: clip_score.Encoder) -> Vectors:
    remaining, found = iter(images), []
    while batch := list(islice(remaining, BATCH)):
        found.append(encoder.images(batch).astype(np.float32))
    return np.concatenate(found) if found else np.zeros((0, 0), np.float32)


def _batches(images: Iterator[NDArray[np.float32]], network: Callable[[Any], Any], device: str) -> Vectors:
    """The network over batches of images ``[height, width, 3]`` of one size at a time."""
    import torch

    found = []
    with torch.inference_mode():
        for _, alike in groupby(images, key=lambda image: image.shape):
            while batch := list(islice(alike, BATCH)):
                pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(device)
                found.append(network(pixels).float().cpu().numpy())
    return np.concatenate(found) if found else np.zeros((0, 0), np.float32)


def cached(extractor: Extractor, images: NDArray[np.uint8]) -> Vectors:
    """The features of a shard's images; the last shard's are kept, since FID and KID ask for the same."""
    key = (*extractor.identity().values(), extractor.device, images.shape, _digest(images))
    if key not in _last:
        _last.clear()
        _last[key] = extractor(images)
    return _last[key]


_last: dict[Any, Vectors] = {}


def _digest(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
