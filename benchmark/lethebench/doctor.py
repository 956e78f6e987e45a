"""``lethe doctor``: whether this machine can run a model, and what is missing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.errors import LetheError, UserError
from lethebench.zoo import LoadSettings

if TYPE_CHECKING:
    from lethebench.memory import DryRun, Estimate, Outline
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import ModelEntry

GB = 10**9
LARGE_GPU = 80 * GB


@dataclass(frozen=True)
class Finding:
    """One thing that was examined. ``detail`` says what was found, or what to do.

    ``ok`` is None for what is only told: a problem to those alone who want just that.
    """

    what: str
    ok: bool | None
    detail: str

    def as_dict(self) -> dict[str, object]:
        """As JSON."""
        return dataclasses.asdict(self)


def examine(
    model: str,
    runs: Path,
    *,
    device: str = "",
    dtype: str = "",
    loading: LoadSettings | None = None,
) -> list[Finding]:
    """Examine packages, plugins, the model's files, the memory it needs, threads, and disk.

    Without a ``device`` the GPU where there is one; without a ``dtype`` bfloat16 there, float32 on a CPU.
    """
    steps: list[Callable[[], list[Finding]]] = [
        _packages,
        _plugins,
        lambda: _model(model, device, dtype, loading or LoadSettings()),
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


def _model(name: str, device: str, dtype: str, loading: LoadSettings) -> list[Finding]:
    from lethebench.memory import outline
    from lethebench.zoo import check_model, find_model

    what = f"model {name}"
    try:
        entry = find_model(name)
    except LetheError as error:
        return [Finding(what, False, str(error))]
    try:
        check_model(name)
        found = [Finding(what, True, _licensed(entry, "files are there and match their hashes"))]
    except LetheError as error:
        gate = "; it is gated: accept its licence on the hub, then `hf auth login`" if entry.gated else ""
        found = [Finding(what, False, _licensed(entry, f"{error}{gate}")), *_download(entry)]
    if entry.builtin:  # tens of megabytes: the machine's own check is enough
        return found
    try:
        return found + _needs(outline(entry), Machine.found(device), dtype, loading)
    except LetheError as error:
        return [*found, Finding("memory", False, str(error))]
    except (KeyError, TypeError, ValueError, OSError) as error:  # of files that are incomplete or damaged
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return [*found, Finding("memory", False, f"its needs can't be told from its files ({told})")]


def _licensed(entry: ModelEntry, detail: str) -> str:
    return f"{detail} ({entry.licence})" if entry.licence else detail


def _download(entry: ModelEntry) -> list[Finding]:
    """Whether the hub's cache has room for what is missing, where its size is known."""
    from huggingface_hub import constants

    size = sum(entry.parameters.values()) * entry.stored
    if not size:
        return []
    folder = Path(constants.HF_HUB_CACHE)
    there = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    detail = f"the files take about {size / GB:.1f} GB, and {folder} has {free / GB:.1f} GB free"
    return [Finding("room for the model", free > size, detail)]


@dataclass(frozen=True)
class Machine:
    """Where a model would run: the device, bytes of its memory, and bytes of main memory."""

    device: str
    room: int
    main: int

    @classmethod
    def found(cls, device: str = "") -> Machine:
        """That of this machine. Raises UserError for a device that isn't there."""
        import torch

        from lethebench.memory import CONTEXT
        from lethebench.provenance import hardware
        from lethebench.zoo._load import _torch_device

        where = _torch_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        main = int(float(hardware("cpu")["memory_gib"]) * 2**30)
        if where.type != "cuda":
            return cls(str(where), main, main)
        return cls(str(where), torch.cuda.get_device_properties(where).total_memory - CONTEXT, main)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def default_dtype(self) -> str:
        """The type that a model is examined in unless one is given."""
        return "bfloat16" if self.on_gpu else "float32"


def _needs(found: Outline, machine: Machine, dtype: str, loading: LoadSettings) -> list[Finding]:
    """What the model takes of the machine, what would make it fit, and what one large GPU can do."""
    import torch

    from lethebench.memory import CONTEXT, DryRun, largest_batch, sampling, uniforget, weights
    from lethebench.zoo._load import check_loading

    dtype = dtype or machine.default_dtype
    sampler = _defaults(found)
    dry = cache(lambda name: DryRun(found, sampler, name))
    findings = []
    try:
        check_loading(loading, torch.device(machine.device), dtype, found.entry.family)
    except UserError as error:
        findings.append(Finding("loading", False, str(error)))
    drawn = sampling(dry(dtype), loading)
    fits = drawn.total <= machine.room
    detail = f"{_told(drawn)} in {dtype}, {machine.device} has {_gb(machine.room)}"
    if fits:
        detail += f": batches of up to {largest_batch(dry(dtype), machine.room, loading)} images"
    else:
        detail += f"; {_advice(dry, machine, dtype, loading)}"
    findings.append(Finding("memory", fits, detail))
    taken = sum(weights(found, dtype, loading).values())
    if machine.on_gpu:
        text = f"weights pass through main memory: {_gb(taken)} of {_gb(machine.main)}"
        findings.append(Finding("main memory", taken < machine.main, text))
    plain, thrifty = (uniforget(dry, dtype, LoadSettings(checkpointing=c)) for c in (False, True))
    findings.append(Finding("UniForget's fit", None, _fit(plain, thrifty, machine.room)))
    if taken > GB:
        half = weights(found, "bfloat16")
        large = LARGE_GPU - CONTEXT
        most = largest_batch(dry("bfloat16"), large)
        fit = _fit(replace(plain, weights=half), replace(thrifty, weights=half), large)
        text = f"in bfloat16, sampling: batches of up to {most}; UniForget's fit: {fit}"
        findings.append(Finding("one 80 GB GPU", None, text))
    return findings


def _defaults(found: Outline) -> SamplerSettings:
    from lethebench.zoo import model_folder
    from lethebench.zoo._load import _defaults as of_folder

    try:
        return of_folder(model_folder(found.entry), found.entry.sampler)
    except UserError:
        return found.entry.sampler


def _told(estimate: Estimate) -> str:
    parts = ", ".join(f"{name} {taken / GB:.1f}" for name, taken in estimate.weights.items())
    return (
        f"drawing an image takes {_gb(estimate.total)} (weights: {parts}; an image's activations "
        f"{estimate.image / GB:.1f}, its decoding {estimate.once / GB:.1f})"
    )


def _fit(plain: Estimate, thrifty: Estimate, room: int) -> str:
    """The largest batches with and without recomputed activations."""
    most, more = plain.largest_batch(room), thrifty.largest_batch(room)
    if more == 0:
        return f"doesn't fit: {_gb(thrifty.at(1))} for batches of 1 with --load checkpointing=true"
    first = f"batches of up to {most} ({_gb(plain.at(1))} at 1)" if most else "doesn't fit as it is"
    return f"{first}, of up to {more} with --load checkpointing=true ({_gb(thrifty.at(1))} at 1)"


_CANDIDATES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("--dtype bfloat16", "bfloat16", {}),
    ("--dtype bfloat16 --load quantise=int8", "bfloat16", {"quantise": "int8"}),
    ("--load offload=model", "", {"offload": "model"}),
    ("--dtype bfloat16 --load offload=model", "bfloat16", {"offload": "model"}),
    ("--dtype bfloat16 --load quantise=nf4", "bfloat16", {"quantise": "nf4"}),
    ("--load offload=sequential", "", {"offload": "sequential"}),
)
"""What is tried in turn to make a model fit, from what changes results least; offload and nf4 need a GPU."""


def _advice(dry: Callable[[str], DryRun], machine: Machine, dtype: str, loading: LoadSettings) -> str:
    from lethebench.memory import sampling

    for words, other, changes in _CANDIDATES:
        if not machine.on_gpu and changes.get("quantise") != "int8" and changes:
            continue
        settings: dict[str, Any] = {"compile": False, **changes}
        estimate = sampling(dry(other or dtype), replace(loading, **settings))
        if estimate.total <= machine.room:
            return f"it fits with {words} ({_gb(estimate.total)})"
    return "nothing in --load makes it fit: it needs a larger machine"


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"


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
