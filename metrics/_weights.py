"""Published weights files that metrics read: where they lie, and whether they are the right ones.

Nothing is downloaded here. A file is looked for below :func:`data_folder`, in a folder named after what it
is for, or where a metric's setting ``path`` says.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethebench.errors import UserError
from lethebench.promptfiles.sources import data_folder
from lethebench.store import known_sha256


@dataclass(frozen=True)
class Published:
    """A published file: the folder and name that it is kept under, and where it comes from.

    ``sha256`` is None where no published sum was found (then it is recorded, and not compared);
    ``pinned_by`` names who states it.
    """

    folder: str
    file: str
    url: str
    sha256: str | None = None
    pinned_by: str = ""


def path_of(published: Published, given: str = "") -> Path:
    """Where the file should lie: ``given`` (the file, or the folder that holds it), else the data folder."""
    if not given:
        return data_folder() / published.folder / published.file
    path = Path(given).expanduser()
    return path / published.file if path.is_dir() else path


def locate(metric: str, published: Published, given: str = "", sha256: str = "") -> Path:
    """The file's path, after a check of its SHA-256.

    ``sha256``, if given, is what the file must have; else the published sum, where one is known. Raises
    UserError for a missing file, another sum, or a ``sha256`` that is none.
    """
    path = path_of(published, given)
    if not path.is_file():
        raise UserError(
            f"metric '{metric}' needs {published.file}, and it is not at {path}: download {published.url} "
            "and put it there, or give its path as the setting 'path'"
        )
    check_sha256(metric, path, sha256, published)
    return path


def check_sha256(metric: str, path: Path, sha256: str, published: Published | None = None) -> None:
    """Raise UserError unless the file has the given sum, or else the published one where it is known."""
    if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(f"metric '{metric}': sha256={sha256!r} must be 64 hexadecimal digits in lower case")
    expected = sha256 or (published.sha256 if published is not None else None)
    if expected is None or (found := known_sha256(path)) == expected:
        return
    if sha256 or published is None:
        raise UserError(
            f"metric '{metric}': {path} has SHA-256 {found}, and the setting 'sha256' asks for {expected}: "
            "give the right file or the right sum"
        )
    raise UserError(
        f"metric '{metric}': {path} has SHA-256 {found}, the published file has {expected}: it is damaged or "
        f"another file; download {published.url} again, or give your own file's sum as the setting 'sha256'"
    )


def record(path: Path, published: Published | None = None, sha256: str = "") -> dict[str, Any]:
    """What a row says of a weights file: name, sum, and what the sum was compared with."""
    found = known_sha256(path)
    known = published.sha256 if published is not None else None
    if known is not None and found == known:
        compared = f"the published file, by {published.pinned_by}" if published is not None else ""
    elif sha256:
        compared = "the sum given in the settings" + ("; not the published file" if known is not None else "")
    else:
        compared = "unpinned: no published sum is known"
    return {"file": path.name, "sha256": found, "compared_with": compared}


def titled(name: str, published: Published, sha256: str) -> str:
    """The model's name in a score: says so where the settings ask for another file than the published one."""
    own = published.sha256 is not None and sha256 not in ("", published.sha256)
    return f"{name}, own file" if own else name


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive: a zip file with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in f"/{name}" for name in archive.namelist())


def check_torchscript(metric: str, path: Path) -> None:
    """Raise UserError unless the file is a TorchScript archive."""
    if not is_torchscript(path):
        raise UserError(
            f"metric '{metric}': {path} is not a TorchScript file: a state dict or a checkpoint can't be used"
        )


def check_device(metric: str, device: str) -> None:
    """Raise UserError unless torch can use the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"metric '{metric}': device={device!r} can't be used here: {first}") from error
