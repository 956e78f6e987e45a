"""The units of work that engines run: fit one method, generate one shard, score one shard, attack one row.

Each reads what it needs from the store and writes one entry to it. The same functions run in this
process, in worker processes and on a cluster.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.composition import recipes
from lethebench.errors import RunError
from lethebench.method import Artefact, Task, fitted_settings
from lethebench.plan import PlannedFit, RowPlan, Runtime, make_metric, prompt_set
from lethebench.specs import MetricSpec, Suite
from lethebench.store import Store, digest

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.hooks import ImageKey, SamplerHooks
    from lethebench.metric import Shard
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Job:
    """One unit of work, as it travels to another process: names and numbers only."""

    what: str
    """``fit`` (number: of the plan's fits), ``shard`` (number: shard), ``scores`` (same) or ``attack``."""
    number: int
    suite: Suite
    model: str
    specs: tuple[str, ...]
    strengths: tuple[str, ...]
    overrides: tuple[tuple[str, Any], ...]
    runtime: Runtime
    store: str
    attack: str = ""
    """Which attack, of a job that attacks."""

    @staticmethod
    def of(what: str, number: int, plan: RowPlan, store: Store) -> Job:
        """The job that does one part of a planned row."""
        r = plan.recipe
        overrides = tuple(sorted(r.overrides.items()))
        return Job(
            what,
            number,
            plan.suite,
            plan.model,
            r.specs,
            r.strengths,
            overrides,
            plan.runtime,
            str(store.root),
        )

    def plan(self) -> RowPlan:
        """The planned row, made again from the names."""
        found = recipes("+".join(self.specs), "+".join(self.strengths), dict(self.overrides), self.suite.fit)
        return RowPlan(self.suite, self.model, found[0], self.runtime)

    def __str__(self) -> str:
        return f"{'+'.join(self.specs)}/{'+'.join(self.strengths)} {self.what} {self.attack or self.number}"


def perform(job: Job) -> None:
    """Do the job, unless the store holds its result."""
    set_threads(job.runtime.threads)
    plan, store = job.plan(), Store(Path(job.store))
    if job.what == "fit":
        fit_part(plan, plan.fits[job.number], store)
    elif job.what == "shard":
        generate_shard(plan, job.number, store)
    elif job.what == "attack":
        from lethebench.attack._trial import attack_row

        attack_row(plan, job.attack, store)
    else:
        for metric in plan.suite.metrics:
            score_shard(plan, job.number, metric, store)


def set_threads(threads: int) -> int:
    """Set torch's threads; 0 means the physical cores (more slow a busy machine down badly)."""
    import torch

    from lethebench.provenance import physical_cores

    count = threads or physical_cores()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


@lru_cache(maxsize=1)
def loaded_model(name: str, runtime: Runtime) -> Model:
    """The model under test, loaded once a process."""
    return _load(name, runtime)


def _load(name: str, runtime: Runtime) -> Model:
    from lethebench.zoo import LoadSettings, load_model

    loading = LoadSettings.of(dict(runtime.loading))
    return load_model(name, device=runtime.device, dtype=runtime.dtype, loading=loading)


def _another_model(plan: RowPlan) -> Model:
    """The model loaded once more: untouched by what is applied to the one at work."""
    return _load(plan.model, plan.runtime)


def _model(plan: RowPlan) -> Model:
    return loaded_model(plan.model, plan.runtime)


# --- fit ------------------------------------------------------------------------------------------


def fit_all(plan: RowPlan, store: Store, instance: str = "") -> list[Artefact]:
    """The artefacts of every part for an instance; fits what the store lacks."""
    parts = range(len(plan.recipe.parts))
    return [read_artefact(fit_part(plan, PlannedFit(part, instance), store)) for part in parts]


def fit_part(plan: RowPlan, fit: PlannedFit, store: Store) -> Path:
    """Fit one part of the recipe, with the parts before it applied, and store the artefact."""
    part, instance = fit
    key = plan.fit_key(*fit)
    found = store.find("fit", key)
    if found is not None:
        return found
    before = [read_artefact(fit_part(plan, PlannedFit(i, instance), store)) for i in range(part)]
    method, model = plan.recipe.parts[part], _model(plan)
    prompts = prompt_set(plan.suite.prompt_set)
    checkpoints = store.root / "checkpoints" / digest(key)
    task = Task(
        model,
        plan.suite.sampler,
        prompts,
        method.sees,
        seed_parts=(plan.suite.seed_key, method.name, *([instance] if instance else [])),
        instance=instance,
        training=plan.suite.train,
        checkpoints=checkpoints,
        control=method.control,
        concepts=plan.suite.concepts,
        base=partial(_another_model, plan) if part else None,
    )
    with plan.recipe.apply(model, before), peak_memory(plan.runtime.device) as memory:
        began = time.perf_counter()
        artefact = method.fit(task)
        seconds = time.perf_counter() - began
    measured = {"seconds": seconds, "peak_memory_bytes": memory[0]}
    entry = store.put(
        "fit", key, lambda folder: write_artefact(artefact, folder, measured, fitted_settings(method))
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return entry


def write_artefact(
    artefact: Artefact, folder: Path, measured: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Write an artefact as safetensors and JSON."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in artefact.tensors.items()}
    save_file(tensors, folder / "artefact.safetensors")
    record = {"facts": artefact.facts, "settings": settings}
    (folder / "artefact.json").write_text(json.dumps(record, indent=1, sort_keys=True, default=str))
    (folder / "measured.json").write_text(json.dumps(measured))


def read_artefact(folder: Path) -> Artefact:
    """An artefact as it was written."""
    from safetensors.torch import load_file

    facts = json.loads((folder / "artefact.json").read_text())["facts"]
    return Artefact(load_file(folder / "artefact.safetensors"), facts)


# --- generate -------------------------------------------------------------------------------------


def generate_shard(plan: RowPlan, shard: int, store: Store) -> Path:
    """Draw a shard's images with the recipe applied, and store them with their latents."""
    key = plan.shard_key(shard)
    found = store.find("shard", key)
    if found is not None:
        return found
    artefacts = []
    for part in range(len(plan.recipe.parts)):
        fitted = store.find("fit", plan.fit_key(part, plan.instance(shard)))
        if fitted is None:
            raise RunError(f"{plan.recipe.parts[part].name} is not fitted")
        artefacts.append(read_artefact(fitted))
    model, keys = _model(plan), plan.shards[shard]
    with peak_memory(plan.runtime.device) as memory:
        began = time.perf_counter()
        tensors = _draw(plan, model, keys, artefacts)
        seconds = time.perf_counter() - began
    measured = {"seconds": seconds, "peak_memory_bytes": memory[0], "images": len(keys)}
    if shard == 0 and plan.recipe.generates:
        measured["relative_to_base"] = _relative_to_base(plan, model, keys[:_TIMED], artefacts)

    def write(folder: Path) -> None:
        from safetensors.numpy import save_file

        save_file(tensors, folder / "images.safetensors")
        (folder / "measured.json").write_text(json.dumps(measured))

    return store.put("shard", key, write)


def _draw(
    plan: RowPlan, model: Model, keys: Sequence[ImageKey], artefacts: Sequence[Artefact]
) -> dict[str, Any]:
    import numpy as np
    import torch

    from lethebench.sampler import image_size, sample

    with plan.recipe.apply(model, artefacts) as hooks:
        if plan.recipe.generates:
            recorders = [made for m in plan.metrics if m.records and (made := m.recorder()) is not None]
            drawn = sample(
                model,
                keys,
                plan.suite.sampler,
                hooks,
                recorders=recorders,
                batch_size=plan.suite.batch_size,
            )
            images, latents, norms = drawn.images, drawn.latents, drawn.noise_norm
            recorded = drawn.recorded
        else:
            height, width = image_size(model, plan.suite.sampler)
            blank = torch.zeros(len(keys), height, width, 3, dtype=torch.uint8)
            for hook in hooks:
                blank = hook.images(blank, tuple(keys))
            images = blank.numpy()
            latents = np.zeros((len(keys), 0), dtype=np.float32)
            norms = np.full((len(keys), plan.suite.sampler.num_inference_steps), np.nan, dtype=np.float32)
            recorded = {}
    return {
        "images": np.ascontiguousarray(images),
        "latents": np.ascontiguousarray(latents, dtype=np.float32),
        "noise_norm": np.ascontiguousarray(norms, dtype=np.float32),
        **{f"recorded.{name}": np.ascontiguousarray(values) for name, values in recorded.items()},
    }


_TIMED = 8
"""Images that are drawn by turns with and without the method, to time it."""


def _relative_to_base(
    plan: RowPlan, model: Model, keys: Sequence[ImageKey], artefacts: Sequence[Artefact]
) -> float:
    """Time of drawing ``keys`` with the method, relative to drawing them without, by turns in one process.

    The faster of two draws each, so that what else the machine does falls out. Recorders are left out.
    """
    from lethebench.sampler import sample

    def seconds(hooks: Sequence[SamplerHooks]) -> float:
        began = time.perf_counter()
        sample(model, keys, plan.suite.sampler, hooks, batch_size=plan.suite.batch_size)
        return time.perf_counter() - began

    own, of_base = [], []
    for _ in range(2):
        of_base.append(seconds(()))
        with plan.recipe.apply(model, artefacts) as hooks:
            own.append(seconds(hooks))
    return min(own) / min(of_base)


def read_shard(folder: Path, keys: Sequence[ImageKey], suite: Suite) -> Shard:
    """A stored shard as metrics see it."""
    from safetensors.numpy import load_file

    from lethebench.metric import Shard

    tensors = load_file(folder / "images.safetensors")
    return Shard(
        images=tensors["images"],
        prompts=tuple(k.prompt for k in keys),
        indices=tuple(k.index for k in keys),
        prompt_set=prompt_set(suite.prompt_set),
        latents=tensors["latents"] if tensors["latents"].size else None,
        noise_norm=tensors["noise_norm"],
        recorded={
            name.removeprefix("recorded."): values
            for name, values in tensors.items()
            if name.startswith("recorded.")
        },
    )


# --- score ----------------------------------------------------------------------------------------


def score_shard(plan: RowPlan, shard: int, metric: MetricSpec, store: Store) -> Path:
    """Measure one metric on a stored shard and store its columns."""
    key = plan.scores_key(shard, metric)
    found = store.find("scores", key)
    if found is not None:
        return found
    stored = store.find("shard", plan.shard_key(shard))
    if stored is None:
        raise RunError(f"shard {shard} of {plan.recipe.name}/{plan.recipe.setting} has no images")
    began = time.perf_counter()
    measurer = make_metric(metric)
    columns = measurer.measure(read_shard(stored, plan.shards[shard], plan.suite))
    measured = {"seconds": time.perf_counter() - began, "images": len(plan.shards[shard])}

    def write(folder: Path) -> None:
        columns_frame(columns, len(plan.shards[shard]), metric.name).to_parquet(
            folder / "scores.parquet", index=False
        )
        (folder / "facts.json").write_text(json.dumps(measurer.facts(), sort_keys=True, default=str))
        (folder / "measured.json").write_text(json.dumps(measured))

    return store.put("scores", key, write)


def columns_frame(columns: Any, n: int, metric: str) -> pd.DataFrame:
    """A metric's columns as a table; vectors become lists. Raises RunError on a wrong length."""
    import numpy as np
    import pandas as pd

    data: dict[str, Any] = {}
    for name, values in columns.items():
        array = np.asarray(values)
        if len(array) != n:
            raise RunError(f"metric '{metric}' gave {len(array)} values of '{name}' for {n} images")
        data[name] = list(array) if array.ndim > 1 else array
    return pd.DataFrame(data, index=range(n))


def row_table(plan: RowPlan, store: Store) -> pd.DataFrame:
    """The per-image table of a row: what is known of each image, then every metric's columns."""
    import pandas as pd

    pieces = []
    for number, keys in enumerate(plan.shards):
        frames = [known_frame(keys)]
        for metric in plan.suite.metrics:
            found = store.find("scores", plan.scores_key(number, metric))
            if found is None:
                raise RunError(f"shard {number} has no scores of {metric}")
            frames.append(pd.read_parquet(found / "scores.parquet"))
        pieces.append(pd.concat(frames, axis=1))
    table = pd.concat(pieces, ignore_index=True)
    if "+" in plan.suite.prompt_set:
        table["set"] = table["prompt_id"].str.partition("/")[0]
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise RunError(f"two metrics write the column '{twice[0]}'")
    return table


def known_frame(keys: Sequence[ImageKey]) -> pd.DataFrame:
    """What is known of each image before any metric: one line an image."""
    import pandas as pd

    return pd.DataFrame(
        {
            "prompt_id": [k.prompt.id for k in keys],
            "index": [k.index for k in keys],
            "text": [k.prompt.text for k in keys],
            "role": [str(k.prompt.role) for k in keys],
            "kind": [k.prompt.kind for k in keys],
            "cluster": [k.prompt.cluster for k in keys],
            "category": pd.Series([k.prompt.category for k in keys], dtype="string"),
            "concept": pd.Series([k.prompt.concept for k in keys], dtype="string"),
            "duplicates": pd.Series([k.prompt.duplicates for k in keys], dtype="Int64"),
            "correlation": pd.Series([k.prompt.correlation for k in keys], dtype="Float64"),
            "trained": pd.Series([k.prompt.trained for k in keys], dtype="boolean"),
            "reference": pd.Series([next(iter(k.prompt.references), None) for k in keys], dtype="string"),
        }
    )


# --- measuring ------------------------------------------------------------------------------------


@contextmanager
def peak_memory(device: str) -> Iterator[list[int | None]]:
    """Peak memory of what runs inside, in bytes: of the accelerator, else of this process.

    None where the system can't tell (the process's own peak needs Linux).
    """
    found: list[int | None] = [None]
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = int(torch.cuda.max_memory_allocated(device))
        return
    resettable = _reset_peak()
    yield found
    found[0] = _peak_resident() if resettable else None


def _reset_peak() -> bool:
    try:
        write_file = Path("/proc/self/clear_refs")
        write_file.write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
