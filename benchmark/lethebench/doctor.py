"""``lethe doctor``: whether this machine can run a model, and what is missing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from lethebench.errors import LetheError


@dataclass(frozen=True)
class Finding:
    """One thing that was examined. ``detail`` says what was found, or what to do."""

    what: str
    ok: bool
    detail: str

    def as_dict(self) -> dict[str, object]:
        """As JSON."""
        return dataclasses.asdict(self)


def examine(model: str, runs: Path) -> list[Finding]:
    """Examine packages, plugins, the model's files, threads, memory and disk."""
    steps: list[Callable[[], list[Finding]]] = [
        _packages,
        _plugins,
        lambda: _model(model),
        _judges,
        _machine,
        lambda: _disk(runs),
    ]
    return [finding for step in steps for finding in step()]


def _packages() -> list[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    for line in requires("lethebench") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    detail = "; ".join(wrong) + "; run 'make setup'" if wrong else "all requirements are installed"
    return [Finding("packages", not wrong, detail)]


def _plugins() -> list[Finding]:
    from lethebench.listing import REGISTRIES

    found = []
    for kind, registry in REGISTRIES.items():
        names = list(registry)
        bad = "; ".join(f"{n}: {e}" for n, e in registry.errors.items())
        found.append(Finding(kind, not bad, bad or f"{len(names)} registered"))
    return found


def _model(name: str) -> list[Finding]:
    from lethebench.zoo import check_model

    try:
        check_model(name)
    except LetheError as error:
        return [Finding(f"model {name}", False, str(error))]
    return [Finding(f"model {name}", True, "files are there and match their hashes")]


def _judges() -> list[Finding]:
    from lethebench.judges.base import read_folder
    from lethebench.plan import builtin_folder

    found = []
    for record in sorted(builtin_folder("").glob("*-mini/weights.json")):
        try:
            read_folder(record.parent.name, record.parent)
            found.append(Finding(f"judge {record.parent.name}", True, "files match their hashes"))
        except LetheError as error:
            found.append(Finding(f"judge {record.parent.name}", False, str(error)))
    return found


def _machine() -> list[Finding]:
    from lethebench.provenance import hardware

    facts = hardware("cpu")
    memory = float(facts["memory_gib"])
    detail = f"{facts['processor']}, {facts['cores']} physical cores, {memory:g} GiB"
    return [
        Finding("machine", memory >= 4, detail if memory >= 4 else f"{detail}: at least 4 GiB are needed")
    ]


def _disk(runs: Path) -> list[Finding]:
    from lethebench.store import Store

    try:
        Store(runs / "store").prepare()
    except LetheError as error:
        return [Finding("runs", False, str(error))]
    free = shutil.disk_usage(runs).free
    return [Finding("runs", free > 2**30, f"{runs} is writable, {free / 2**30:.1f} GiB free")]
