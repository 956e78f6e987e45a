"""What can be fetched, by name: upstream files, the files of a prompt set, models."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lethebench.errors import LetheError, RunError, UserError
from lethebench.promptfiles.consent import require_allowed
from lethebench.promptfiles.sources import SOURCES, SourceFile, data_folder, local_file
from lethebench.registry import MODELS, PROMPT_SETS
from lethebench.store import file_sha256

from ._download import download
from ._models import fetch_model
from ._space import require_space, told_bytes

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
State = Literal["there", "missing", "changed"]


@dataclass(frozen=True)
class Item:
    """A line of ``lethe fetch --list``.

    ``state``: ``there`` (with the published SHA-256, where one is known), ``changed`` (with another) or
    ``missing``. ``note`` says how to get what a program can't fetch, or what must be allowed first.
    """

    name: str
    kind: Literal["file", "prompt set", "model"]
    licence: str
    bytes: int | None
    state: State
    note: str = ""

    def __str__(self) -> str:
        size = "" if self.bytes is None else told_bytes(self.bytes)
        return f"{self.state:<8} {size:>9}  {self.name}  [{self.licence}]" + (
            f"  {self.note}" if self.note else ""
        )


def known_items() -> list[Item]:
    """Everything that has a name here: files, prompt sets of files, models of the hub."""
    items = [_file_item(source) for source in SOURCES.values()]
    for name, files in _prompt_sets().items():
        sources = [SOURCES[file] for file in files]
        states = {_state(source) for source in sources}
        state: State = next(s for s in ("missing", "changed", "there") if s in states)
        sizes = [source.bytes for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        licences = ", ".join(dict.fromkeys(source.licence for source in sources))
        needs = dict.fromkeys(f"needs --allow {source.opt_in}; " for source in sources if source.opt_in)
        items.append(Item(name, "prompt set", licences, total, state, "".join(needs) + ", ".join(files)))
    for name, entry in MODELS.items():
        if _on_hub(entry):
            size = sum(entry.parameters.values()) * entry.stored or None
            at = f"{entry.source} at {entry.revision or 'its newest revision'}"
            gated = "; its licence must be accepted on the hub" if entry.gated else ""
            items.append(Item(name, "model", entry.licence, size, _model_state(entry), at + gated))
    return items


def fetch(
    names: Sequence[str], *, to: Path | None = None, revision: str | None = None, **settings: Any
) -> list[tuple[str, Path]]:
    """Fetch what the names stand for; (name, where it lies) of each.

    A name is an upstream file's in the data folder, a prompt set's, a model's of the zoo, or a hub id
    (``owner/name``, at ``revision``). ``to`` is where models go if not into the hub's cache; ``settings`` are
    :func:`.download`'s. What is there and intact is left alone. A line on stderr for each that fails: the
    others are fetched all the same, and RunError is raised at the end. Raises UserError for an unknown name
    and for a disk without room, before anything is fetched.
    """
    files, models = _resolved(names)
    lacking = [s for s in files if s.url is not None and _state(s) != "there"]
    require_space(data_folder(), sum(s.bytes or 0 for s in lacking))
    done: list[tuple[str, Path]] = []
    failed = 0
    for name in (*(source.name for source in files), *models):
        try:
            source = SOURCES.get(name)
            if source is not None:
                done.append((name, fetch_file(source, **settings)))
            else:
                done.append((name, _fetch_model(name, revision, to)))
        except (LetheError, OSError) as error:
            failed += 1
            print(f"lethe: {name}: {_one_line(error)}", file=sys.stderr)
    if failed:
        raise RunError(f"{failed} of {failed + len(done)} could not be fetched; each line above says why")
    return done


def fetch_file(source: SourceFile, **settings: Any) -> Path:
    """The upstream file in the data folder, fetched unless it is there and intact.

    Raises UserError for what must be allowed first, RunError where it can't be fetched.
    """
    require_allowed(source.opt_in, source.name)
    state = _state(source)
    if state == "there":
        return local_file(source)
    path = data_folder() / source.name
    if source.url is None:
        raise RunError(f"can't be fetched by a program: {source.note} ({path})")
    if state == "changed":
        print(f"lethe: {path} is not the published file: fetching that in its place", file=sys.stderr)
    found = download(source.url, path, sha256=source.sha256, size=source.bytes, **settings)
    if source.sha256 is None:
        print(f"lethe: {path}: no published SHA-256 is known; this file's is {found}", file=sys.stderr)
    return path


def _fetch_model(name: str, revision: str | None, to: Path | None) -> Path:
    entry = MODELS.get(name) if name in MODELS else _registered(name)
    if entry is not None and not _on_hub(entry):
        raise RunError(
            "it is built in: there is nothing to fetch" if entry.builtin else "it is a local folder"
        )
    if entry is None or name in entry.mirrors:
        source, pinned = name, None if entry is None else entry.mirrors[name]
    else:
        source, pinned = entry.source, entry.revision
    folder = None if to is None else to / name.replace("/", "--")
    return fetch_model(source, revision or pinned, to=folder)


def _registered(hub_id: str) -> Any:
    """The registered model that is loaded from a hub id; None where there is none."""
    return next((entry for _, entry in MODELS.items() if hub_id in (entry.source, *entry.mirrors)), None)


def _resolved(names: Sequence[str]) -> tuple[list[SourceFile], list[str]]:
    """The upstream files and the models that the names stand for, each once. Raises UserError."""
    sets = _prompt_sets()
    files: dict[str, SourceFile] = {}
    models: dict[str, None] = {}
    for name in names:
        if name in SOURCES:
            files[name] = SOURCES[name]
        elif name in sets:
            files |= {file: SOURCES[file] for file in sets[name]}
        elif name in MODELS or _is_hub_id(name):
            models[name] = None
        else:
            near = get_close_matches(name, [*SOURCES, *sets, *MODELS], n=2, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "`lethe fetch --list` shows what there is"
            )
            raise UserError(f"nothing to fetch is named '{name}': {hint}")
    return list(files.values()), list(models)


def _is_hub_id(name: str) -> bool:
    """Whether it reads ``owner/name``, and not like a file of the data folder."""
    folders = {source.partition("/")[0] for source in SOURCES}
    return _HUB_ID.fullmatch(name) is not None and name.partition("/")[0] not in folders


def _prompt_sets() -> dict[str, tuple[str, ...]]:
    """The registered prompt sets that are made of upstream files, with those."""
    found = {name: tuple(getattr(item, "files", ())) for name, item in PROMPT_SETS.items()}
    return {name: files for name, files in found.items() if files}


def _file_item(source: SourceFile) -> Item:
    notes = [f"needs --allow {source.opt_in}"] if source.opt_in else []
    notes += [source.note] if source.note else []
    return Item(source.name, "file", source.licence, source.bytes, _state(source), "; ".join(notes))


def _state(source: SourceFile) -> State:
    try:
        path = local_file(source)
    except UserError:
        return "missing"
    return "there" if source.sha256 in (None, file_sha256(path)) else "changed"


def _on_hub(entry: Any) -> bool:
    return not entry.builtin and not Path(entry.source).expanduser().is_dir()


def _model_state(entry: Any) -> State:
    from lethebench.zoo._files import model_folder

    try:
        model_folder(entry)
    except UserError:
        return "missing"
    return "there"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"can't write {error.filename or 'it'}: {error.strerror}"
    return " ".join(str(error).split())
