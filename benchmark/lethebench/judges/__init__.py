"""The built-in judges: stand-ins, trained on the planted world, for the published models of this field.

Nothing heavy is imported until a judge is loaded.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from lethebench.errors import UserError

if TYPE_CHECKING:
    from lethebench.judges.base import Judge
    from lethebench.judges.clip import TextImageEncoder
    from lethebench.judges.descriptor import CopyDescriptor
    from lethebench.judges.recogniser import Recogniser
    from lethebench.judges.segmenter import Segmenter

_CLASSES = {
    "recogniser-mini": ("recogniser", "Recogniser"),
    "segmenter-mini": ("segmenter", "Segmenter"),
    "copy-mini": ("descriptor", "CopyDescriptor"),
    "clip-mini": ("clip", "TextImageEncoder"),
}

JUDGES = tuple(_CLASSES)
"""The names of the built-in judges."""


def judge_class(name: str) -> type[Judge]:
    """The class of a judge."""
    if name not in _CLASSES:
        near = get_close_matches(name, JUDGES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(JUDGES)}"
        raise UserError(f"unknown judge {name!r}{hint}")
    module, attribute = _CLASSES[name]
    found: type[Judge] = getattr(import_module(f"lethebench.judges.{module}"), attribute)
    return found


@overload
def load(
    name: Literal["recogniser-mini"], folder: str | Path | None = ..., device: str = ...
) -> Recogniser: ...
@overload
def load(
    name: Literal["segmenter-mini"], folder: str | Path | None = ..., device: str = ...
) -> Segmenter: ...
@overload
def load(
    name: Literal["copy-mini"], folder: str | Path | None = ..., device: str = ...
) -> CopyDescriptor: ...
@overload
def load(
    name: Literal["clip-mini"], folder: str | Path | None = ..., device: str = ...
) -> TextImageEncoder: ...
@overload
def load(name: str, folder: str | Path | None = ..., device: str = ...) -> Judge: ...
def load(name: str, folder: str | Path | None = None, device: str = "cpu") -> Judge:
    """The judge of that name, read once a process.

    ``folder`` holds the judge's own files (by default those that the package ships).
    """
    return _load(name, str(folder) if folder is not None else None, device)


@lru_cache(maxsize=16)
def _load(name: str, folder: str | None, device: str) -> Judge:
    return judge_class(name).load(folder, device)


__all__ = ["JUDGES", "judge_class", "load"]
