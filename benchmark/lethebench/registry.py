"""Registries of methods, metrics, prompt sets, models and attacks.

A plugin registers itself with one line, ``@METHODS.register`` above its class, and is found

- inside Lethe: by its place in a room (``methods/``, ``metrics/``, ...), no central list;
- in an installed package: by an entry point in the group ``lethebench.methods`` (``.metrics``,
  ``.prompt_sets``, ``.models``, ``.attacks``);
- in a file: by ``./my_method.py:MyMethod`` wherever a name is accepted.

A plugin that fails to import is listed with its error and breaks nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from lethebench.errors import UserError

T = TypeVar("T")
_NAME = re.compile(r"[a-z0-9]+([-._][a-z0-9]+)*\Z")


class Registry(Generic[T]):
    """Names to plugins of one kind. ``room`` is the subpackage whose modules are Lethe's own."""

    def __init__(self, kind: str, base: str, room: str, group: str) -> None:
        self.kind, self.room, self.group = kind, room, group
        self._base = base
        self._items: dict[str, T] = {}
        self.errors: dict[str, str] = {}
        self._loaded = False

    def register(self, item: T) -> T:
        """Add a plugin under its own ``name``; refuses a bad name or one that is taken."""
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not _NAME.match(name):
            raise UserError(f"{self.kind} {item!r} has no valid name: use lower case, digits, '-' and '.'")
        known = self._items.get(name)
        if known is not None and known is not item and not _reloaded(known, item):
            raise UserError(
                f"{self.kind} '{name}' is registered already, by {_origin(known)}; choose another name"
            )
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """The plugin of that name, or at ``path.py:Class``. Raises UserError with near names."""
        if ".py:" in name or name.endswith(".py"):
            return self._from_path(name)
        self._discover()
        if name in self._items:
            return self._items[name]
        if name in self.errors:
            raise UserError(f"{self.kind} '{name}' failed to import: {self.errors[name]}")
        near = difflib.get_close_matches(name, self._items, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(self._items))}"
        raise UserError(f"unknown {self.kind} '{name}': {hint}")

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._items))

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._items

    def items(self) -> list[tuple[str, T]]:
        """Every plugin that imports, by name."""
        return [(name, self._items[name]) for name in self]

    def _discover(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.room)
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            if not module.startswith("_"):
                self._guarded(
                    module.replace("_", "-"), lambda m=module: importlib.import_module(f"{self.room}.{m}")
                )
        for point in sorted(entry_points(group=self.group), key=lambda p: p.name):
            self._guarded(point.name, lambda p=point: self.register(p.load()))

    def _guarded(self, name: str, load: Any) -> None:
        try:
            load()
        except Exception as error:  # a broken plugin must not break the others
            self.errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _from_path(self, spec: str) -> T:
        file, _, attribute = spec.partition(":")
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"{self.kind} file not found: {path}; give an existing file as path.py:Class")
        module_name = "lethe_plugin_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        module = sys.modules.get(module_name)
        if module is None:
            found = importlib.util.spec_from_file_location(module_name, path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[module_name] = module
            try:
                found.loader.exec_module(module)
            except Exception as error:
                del sys.modules[module_name]
                first = str(error).splitlines()[0] if str(error) else ""
                raise UserError(
                    f"{self.kind} file {path} failed to import: {type(error).__name__}: {first}"
                ) from error
        if not attribute:
            raise UserError(f"say which class of {path} is the {self.kind}: {path}:ClassName")
        item = getattr(module, attribute, None)
        if item is None:
            raise UserError(f"{path} has no '{attribute}'")
        self._check_base(item, spec)
        return item  # type: ignore[no-any-return]

    def _check_base(self, item: Any, spec: str) -> None:
        module, _, name = self._base.partition(":")
        base = getattr(importlib.import_module(module), name)
        fits = issubclass(item, base) if inspect.isclass(item) else isinstance(item, base)
        if not fits:
            raise UserError(f"{spec} is not a {self.kind}: it must derive from {module}.{name}")


def _reloaded(known: Any, item: Any) -> bool:
    """Whether two classes are the same one, imported twice (as a reload does)."""
    return inspect.isclass(item) and _origin(known) == _origin(item)


def _origin(item: Any) -> str:
    module = getattr(item, "__module__", type(item).__module__)
    return f"{module}.{getattr(item, '__qualname__', type(item).__qualname__)}"


def source_sha256(item: Any) -> str:
    """The SHA-256 of a plugin's source: of every Python file of its folder, or of its one file, and of the
    methods, metrics and prompt sets that these import.

    A change to the plugin changes the hash, so that its stored results no longer match.
    """
    module = sys.modules[item.__module__ if hasattr(item, "__module__") else type(item).__module__]
    package = getattr(module, "__package__", "") or ""
    file = Path(inspect.getfile(module))
    rooms = {
        "lethebench.methods",
        "lethebench.metrics",
        "lethebench.datasets",
        "lethebench.attack",
        "lethebench",
    }
    if package and package not in rooms and not module.__name__.startswith("lethe_plugin_"):
        files = sorted(file.parent.rglob("*.py"))
    else:
        files = [file]
    digest = hashlib.sha256()
    for path in _with_imported(tuple(files)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


_IMPORT = re.compile(rb"lethebench\.(methods|metrics|datasets)(?:\.| import )(\w+)")


@lru_cache(maxsize=256)
def _with_imported(files: tuple[Path, ...]) -> list[Path]:
    """The files, then those of every plugin of Lethe's own rooms that they name in turn."""
    found, pending = dict.fromkeys(files), list(files)
    package = Path(__file__).parent
    while pending:
        for room, name in sorted(set(_IMPORT.findall(pending.pop().read_bytes()))):
            place = package / room.decode() / name.decode()
            more = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
            new = [f for f in more if f.is_file() and not any(f.samefile(known) for known in found)]
            found.update(dict.fromkeys(new))
            pending += new
    return list(found)


METHODS: Registry[Any] = Registry(
    "method", "lethebench.method:Method", "lethebench.methods", "lethebench.methods"
)
METRICS: Registry[Any] = Registry(
    "metric", "lethebench.metric:Metric", "lethebench.metrics", "lethebench.metrics"
)
PROMPT_SETS: Registry[Any] = Registry(
    "prompt set", "lethebench.prompts:PromptSet", "lethebench.datasets", "lethebench.prompt_sets"
)
MODELS: Registry[Any] = Registry("model", "lethebench.zoo:ModelEntry", "lethebench.zoo", "lethebench.models")
ATTACKS: Registry[Any] = Registry(
    "attack", "lethebench.attack.base:Attack", "lethebench.attack", "lethebench.attacks"
)
