"""References as images in a folder, and where a prompt set's references lie."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lethebench.errors import UserError
from lethebench.store import digest, file_sha256

from ._index import Indexes, load_index
from ._read import SUFFIXES, UnreadableImage, read_image

if TYPE_CHECKING:
    from lethebench.prompts import Reference

    from ._use import Described, References

INDEX_SUFFIX = ".safetensors"


def find_references(prompt_set: str) -> References | None:
    """The references of a registered prompt set, in ``<data folder>/<prompt set>/references``.

    None where nothing is there. Raises UserError as :func:`open_references` does.
    """
    from lethebench.promptfiles.sources import data_folder

    folder = data_folder() / prompt_set / "references"
    return open_references(folder) if folder.is_dir() and any(listed(folder)) else None


def open_references(path: str | Path) -> References:
    """The references at ``path``: a folder of images, a folder of indexes, or one index file.

    Several indexes hold the same references by different descriptors. Raises UserError for a place that
    isn't there, is empty, or holds both kinds.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return Indexes((load_index(place),))
    if not place.is_dir():
        raise UserError(f"there are no references at {path}: give a folder of images or an index file")
    files = listed(place)
    indexes = [file for file in files if file.suffix == INDEX_SUFFIX]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if indexes and images:
        raise UserError(
            f"{path} holds images and index files, and both can't be the references: move one kind away"
        )
    if indexes:
        return Indexes(tuple(load_index(file) for file in indexes))
    if not images:
        raise UserError(f"{path} holds no images and no index: put references there, or name another folder")
    return ImageFolder(place)


def listed(folder: Path) -> list[Path]:
    """Every file below the folder, in order; hidden ones and unfinished indexes left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")
    return sorted(f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def reference_id(file: str | PurePath) -> str:
    """The id of an image by its file's path below its folder: the path without an image's suffix.

    >>> reference_id("laion/0012.jpg"), reference_id("0012"), reference_id("mr. x")
    ('laion/0012', '0012', 'mr. x')
    """
    path = PurePath(file)
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).as_posix()


def image_ids(folder: Path) -> dict[str, Path]:
    """Every image below the folder by its id. Raises UserError where two have the same."""
    found: dict[str, Path] = {}
    for path in listed(folder):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name = reference_id(path.relative_to(folder))
        if name in found:
            raise UserError(
                f"{folder}: {found[name].name} and {path.name} both have the id '{name}': rename one"
            )
        found[name] = path
    return dict(sorted(found.items()))


class ImageFolder:
    """Images below a folder. Raises UserError where two files have one id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = image_ids(folder)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, sorted."""
        return tuple(self._files)

    def __contains__(self, reference_id: object) -> bool:
        return reference_id in self._files

    def reference(self, reference_id: str) -> Reference:
        """The image, read by :func:`read_image`. Raises UserError for a file that can't be read."""
        from lethebench.prompts import Reference

        path = self._files[reference_id]
        try:
            return Reference(reference_id, read_image(path))
        except UnreadableImage as error:
            raise UserError(f"reference {path} can't be read: {error}; mend it or take it away") from error

    def described(self, reference_id: str) -> Described | None:
        """None: the image is there."""
        if reference_id not in self._files:
            raise KeyError(reference_id)
        return None

    def manifest(self) -> dict[str, Any]:
        """Number of images, and the SHA-256 of all ids with their files' sums."""
        return {"images": len(self._files), "sha256": self._sha256}

    @cached_property
    def _sha256(self) -> str:
        return digest([[name, file_sha256(path)] for name, path in self._files.items()])
