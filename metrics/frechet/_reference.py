"""The reference set of FID and KID: an .npz file of features and moments, and how to make one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.metrics.frechet._distances import Gaussian, within
from lethebench.metrics.frechet._features import Extractor

IMAGES = frozenset({".bmp", ".jpg", ".jpeg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MADE_BY = "python -m lethebench.metrics.frechet FOLDER OUT.npz"
_IDENTITY = ("features", "resizer", "weights_sha256")


@dataclass(frozen=True)
class Reference:
    """A reference set: features ``[n, d]`` or only their mean and covariance, and what is known of them.

    ``made`` is empty for a file that Lethe didn't make (clean-fid's own statistics).
    """

    path: Path
    features: NDArray[np.float32] | None
    moments: tuple[NDArray[Any], NDArray[Any]] | None
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        """Of the features."""
        if self.features is not None:
            return int(self.features.shape[1])
        return len(self.moments[0]) if self.moments is not None else 0

    @cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian fitted to it."""
        if self.features is not None:
            return Gaussian.of_features(self.features)
        assert self.moments is not None
        return Gaussian.of_moments(*self.moments)

    @cached_property
    def within(self) -> float:
        """KID's term of the reference alone."""
        assert self.features is not None
        return within(self.features)

    def check(self, extractor: Extractor) -> None:
        """Raise UserError unless it holds features of the same kind."""
        if self.dimension != extractor.kind.dimension:
            raise UserError(
                f"metric '{extractor.metric}': reference {self.path} has {self.dimension} dimensions, "
                f"{extractor.features} has {extractor.kind.dimension}: make it by `{MADE_BY}`"
            )
        for name, value in extractor.identity().items():
            if name in self.made and self.made[name] != value:
                raise UserError(
                    f"metric '{extractor.metric}': reference {self.path} was made with {name} "
                    f"{self.made[name]}, the images with {value}: make it again by `{MADE_BY}`"
                )

    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        count = len(self.features) if self.features is not None else self.made.get("n")
        return {
            "reference": self.made.get("source", self.path.name),
            "reference_n": count,
            "reference_images_sha256": self.made.get("images_sha256"),
            "reference_made_by": "lethebench" if self.made else "another program: its features are not known",
        }


def read_reference(metric: str, path: Path) -> Reference:
    """The reference of an .npz file: ``features`` (or clean-fid's ``feats``), or ``mu`` and ``sigma``.

    Raises UserError for a missing, unreadable or empty file.
    """
    if path.is_dir():
        raise UserError(
            f"metric '{metric}': reference {path} is a folder: make its features once by "
            f"`{MADE_BY.replace('FOLDER', str(path))}` and give that file"
        )
    if not path.is_file():
        raise UserError(f"metric '{metric}': no reference file at {path}: make one by `{MADE_BY}`")
    stat = path.stat()
    try:
        return _read(path, stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(
            f"metric '{metric}': reference {path} can't be read ({str(error).splitlines()[0]}): it must be "
            f"an .npz file with 'features' or with 'mu' and 'sigma'; make one by `{MADE_BY}`"
        ) from error


@lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> Reference:
    with np.load(path, allow_pickle=False) as found:
        if not hasattr(found, "files"):
            raise ValueError("one array, not an .npz file")
        name = next((n for n in ("features", "feats") if n in found.files), None)
        features = np.asarray(found[name], dtype=np.float32) if name is not None else None
        moments = None
        if features is None:
            moments = (np.asarray(found["mu"]), np.asarray(found["sigma"]))
            d = moments[0].size
            if moments[0].shape != (d,) or moments[1].shape != (d, d):
                raise ValueError(f"mu is {list(moments[0].shape)}, sigma {list(moments[1].shape)}")
        elif features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features are {list(features.shape)}: at least two images [n, d] are needed")
        for values in (features, *(moments or ())):
            if values is not None and not np.isfinite(values).all():
                raise ValueError("not all of its values are finite")
        made = json.loads(str(found["made"])) if "made" in found.files else {}
    return Reference(path, features, moments, made)


def write_reference(
    images: Path | str | NDArray[np.uint8],
    out: Path | str,
    *,
    features: str = "inception",
    resizer: str = "clean",
    path: str = "",
    sha256: str = "",
    device: str = "cpu",
) -> Path:
    """Write the features of a reference set as an .npz file that ``fid`` and ``kid`` take; returns its path.

    ``images`` is a folder (all images below it, by name) or an array uint8 ``[n, height, width, 3]``. The
    file holds ``features`` float32 ``[n, d]`` and ``made``: kind, resizer, the weights' SHA-256, n, and a
    SHA-256 over the images' files (or pixels) in order. The other arguments are the metrics' settings.
    Raises UserError for an empty folder or missing weights.
    """
    extractor = Extractor("fid", features, resizer, path, sha256, device)
    extractor.check()
    target = Path(out)
    if target.suffix != ".npz":
        raise UserError(f"a reference is an .npz file: {target}")
    if isinstance(images, np.ndarray):
        pictures: Iterable[NDArray[np.uint8]] = images
        source, count = "array", len(images)
        digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    else:
        files = image_files(Path(images))
        pictures, source, count = _read_images(files), Path(images).name, len(files)
        digest = _files_sha256(Path(images), files)
    if count < 2:
        raise UserError(f"{images} has {count} images: a reference needs at least two")
    vectors = extractor(pictures)
    made = {**extractor.identity(), "n": count, "source": source, "images_sha256": digest}
    target.parent.mkdir(parents=True, exist_ok=True)
    waiting = target.with_suffix(".partial.npz")
    np.savez_compressed(waiting, features=vectors, made=np.array(json.dumps(made, sort_keys=True)))
    waiting.replace(target)
    return target


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by name. Raises UserError where there is no folder."""
    if not folder.is_dir():
        raise UserError(f"no folder of images at {folder}")
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in IMAGES)


def _read_images(files: Iterable[Path]) -> Iterator[NDArray[np.uint8]]:
    from PIL import Image, UnidentifiedImageError

    for file in files:
        try:
            with Image.open(file) as picture:
                yield np.array(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{file} can't be read as an image: {str(error).splitlines()[0]}") from error


def _files_sha256(folder: Path, files: Iterable[Path]) -> str:
    from lethebench.store import file_sha256

    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()
