"""The runner: suite + methods -> plan -> fit -> generate -> score -> rows."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lethebench import provenance
from lethebench.composition import Recipe, recipes
from lethebench.engines import Engine, Failure, engine
from lethebench.errors import RunError, StoreError, UserError
from lethebench.method import Family, Knowledge, Method, places_of, recorded_settings
from lethebench.plan import (
    RowPlan,
    Runtime,
    file_name,
    judges_sha256,
    make_metric,
    manifest_sha256,
    metric_files,
    prompt_set,
    require_own_names,
    weights_sha256,
)
from lethebench.progress import Bar, progress
from lethebench.referencing import described, unusable_references
from lethebench.registry import METHODS
from lethebench.row import Cost, Provenance, Row, ScoreRecord, Slice, SuiteKey, read_row
from lethebench.specs import Extra, MetricSpec, Suite, load_suite
from lethebench.store import Store, digest, explained, file_sha256, write_atomic
from lethebench.work import Job

if TYPE_CHECKING:
    import pandas as pd

STAGES = ("fit", "shard", "scores")


@dataclass
class Outcome:
    """What a run did: its rows, what it computed and what it found already there."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    computed: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*STAGES, "row"), 0))
    seconds: float = 0.0
    base_table: Any = field(default=None, repr=False)
    """Base's per-image table, read once a run."""


def plan_rows(
    methods: Sequence[str],
    suite: Suite,
    model: str,
    *,
    strength: str = "all",
    overrides: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
    controls: bool = True,
) -> list[RowPlan]:
    """The rows of a run, base first, then the suite's controls, then the methods. Raises UserError.

    ``methods`` may hold ``all``: every registered method that is not a control, then (at all strengths,
    without overrides) the suite's ``also``. Everything that can be wrong with names and settings is found
    here, before any work.
    """
    require_sound(suite)
    found = recipes_of(methods, suite, strength=strength, overrides=overrides, controls=controls)
    for recipe in found:
        for part in recipe.parts:
            require_files(part)
    _require_concepts(suite)
    for spec in suite.metrics:
        metric = make_metric(spec)
        metric.check()
        reason = unusable_references(metric, prompt_set(suite.prompt_set))
        if reason:
            raise UserError(reason)
    return [RowPlan(suite, model, recipe, runtime or Runtime()) for recipe in found]


def recipes_of(
    methods: Sequence[str],
    suite: Suite,
    *,
    strength: str = "all",
    overrides: Mapping[str, Any] | None = None,
    controls: bool = True,
) -> list[Recipe]:
    """The recipes of a run's rows, in order, by names and settings alone; no file is looked for.

    Without ``methods`` those that the suite names. Raises UserError.
    """
    fixed = {suite.reference: "all", **(suite.controls if controls else {})}
    asked = [Extra(method=name, strength=chosen) for name, chosen in fixed.items()]
    if not methods:
        asked += _own_methods(suite, strength, overrides)
    for name in methods:
        every = name == "all"
        single = _every_method(suite) if every else [name]
        asked += [Extra(method=n, strength=strength, set=dict(overrides or {})) for n in single]
        asked += suite.also if every and strength == "all" and not overrides else ()
    found: dict[tuple[str, str], Recipe] = {}
    for one in asked:
        for recipe in recipes(one.method, one.strength, one.set, suite.fit):
            found.setdefault((recipe.name, recipe.setting), recipe)
    for recipe in found.values():
        _require_track(recipe, suite)
    require_own_names(suite.metrics)
    return list(found.values())


def _own_methods(suite: Suite, strength: str, overrides: Mapping[str, Any] | None) -> tuple[Extra, ...]:
    """The methods that the suite names. Raises UserError where it names none."""
    if not suite.methods:
        raise UserError(f"suite {suite.key} names no methods of its own: name a METHOD, or 'all'")
    if strength != "all" or overrides:
        raise UserError(
            f"without a METHOD, suite {suite.key} runs its own methods at the strengths that it names: "
            "name a METHOD with --strength and --set"
        )
    return suite.methods


def require_sound(suite: Suite) -> None:
    """Raise UserError where a suite's reference is several rows, or its set has nothing to train on."""
    settings = METHODS.get(suite.reference).strengths
    if len(settings) > 1:
        raise UserError(
            f"suite {suite.key}: reference '{suite.reference}' has {len(settings)} settings, and rows are "
            "compared with one: take a method with one, as base or lora"
        )
    if suite.train is not None and not hasattr(prompt_set(suite.prompt_set), "examples"):
        raise UserError(
            f"suite {suite.key} fine-tunes, and prompt set '{suite.prompt_set}' has no training set"
        )


def _require_track(recipe: Recipe, suite: Suite) -> None:
    """Raise UserError where a method is of another track than the suite, training-time or not."""
    trains = [part.family is Family.TRAINING for part in recipe.parts]
    if any(trains) and suite.train is None:
        name = recipe.parts[trains.index(True)].name
        raise UserError(
            f"method '{name}' acts while a model is fine-tuned, and suite {suite.key} fine-tunes none: "
            "take a suite with a block `train:`, as --suite train"
        )
    if suite.train is not None and not recipe.control and not trains[0]:
        raise UserError(
            f"suite {suite.key} fine-tunes a model: method '{recipe.name}' must follow a fine-tuning, "
            f"as lora+{recipe.name}"
        )
    if any(trains[1:]):
        raise UserError(f"'{recipe.name}' fine-tunes after another method: the fine-tuning must come first")


def _require_concepts(suite: Suite) -> None:
    """Raise UserError where the suite tells methods of a concept that its prompts don't have."""
    known = {prompt.concept for prompt in prompt_set(suite.prompt_set)} if suite.concepts else set()
    for name in suite.concepts:
        if name not in known:
            raise UserError(f"suite {suite.key}: no prompt of {suite.prompt_set} has the concept '{name}'")


def require_files(method: Method) -> None:
    """Raise UserError where a file that a setting names isn't there."""
    for name in sorted(places_of(method)):
        value = getattr(method, name)
        if value and not Path(value).exists():
            raise UserError(f"method '{method.name}': {name} is {value}, which is not there")


def _every_method(suite: Suite) -> list[str]:
    """The methods of the suite's track: those that train where the suite trains, else all others."""
    trains = suite.train is not None
    own = [(name, cls) for name, cls in METHODS.items() if (cls.family is Family.TRAINING) == trains]
    return [name for name, cls in own if not cls.control and not cls.follows]


def one_row(
    method: str,
    suite: str,
    model: str | None,
    strength: str,
    overrides: Mapping[str, Any],
    runtime: Runtime,
) -> RowPlan:
    """The plan of one setting of a method. Raises UserError where ``strength`` is none of its settings."""
    spec = load_suite(suite)
    if strength == "all":
        raise UserError("name one strength of the method: --strength strong")
    recipe = recipes(method, strength, overrides, spec.fit)[0]
    _require_track(recipe, spec)
    plan = RowPlan(spec, model or spec.model, recipe, runtime)
    _check_model(plan.model, plan.runtime)
    if plan.inapplicable is not None:
        raise UserError(plan.inapplicable)
    return plan


def run(
    methods: Sequence[str],
    *,
    suite: str | Suite = "planted",
    model: str | None = None,
    strength: str = "all",
    overrides: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    engine_name: str = "local",
    workers: int = 1,
    runtime: Runtime | None = None,
    until: str = "row",
    controls: bool = True,
) -> Outcome:
    """Bench methods on a suite and write their rows. What is in the store already is not done again.

    ``until`` stops after ``fit``, ``shard`` (images) or ``scores``. Raises UserError for what the
    user must mend; a job that fails makes its row ``failed`` and stops nothing else.
    """
    began = time.monotonic()
    spec = suite if isinstance(suite, Suite) else load_suite(suite)
    runs = Path(runs)
    plans = plan_rows(
        methods,
        spec,
        model or spec.model,
        strength=strength,
        overrides=overrides,
        runtime=runtime,
        controls=controls,
    )
    _check_model(plans[0].model, plans[0].runtime)
    runner = engine(engine_name, workers)
    store = Store(runs / "store")
    store.prepare()
    outcome = Outcome()
    pending = (
        [p for p in plans if not _current(p, plans[0], runs, outcome)] if until == "row" else list(plans)
    )
    if pending:
        _check_references(plans[0])
        _check_space(pending, store)
        _work(pending, plans[0], store, runner, outcome, until)
    if until == "row":
        for plan in pending:
            _write_row(plan, plans[0], store, runs, outcome)
        _write_references(plans[0], runs)
        order = {(p.recipe.name, p.recipe.setting): i for i, p in enumerate(plans)}
        outcome.rows.sort(key=lambda r: order[(r.method, r.setting)])
    outcome.seconds = time.monotonic() - began
    return outcome


def _check_model(name: str, runtime: Runtime) -> None:
    """Raise now what loading the model would raise later: unknown names, damaged files, no such device."""
    from lethebench.zoo import LoadSettings, require_loadable

    loading = LoadSettings.of(dict(runtime.loading))
    require_loadable(name, device=runtime.device, dtype=runtime.dtype, loading=loading)


def _check_references(base: RowPlan) -> None:
    """Raise UserError now for a user's reference image that can't be read when images are scored."""
    prompts = prompt_set(base.suite.prompt_set)
    if not hasattr(prompts, "described") or not any("references" in m.needs for m in base.metrics):
        return
    for name in sorted({one for key in base.images for one in key.prompt.references}):
        if described(prompts, name) is None:
            prompts.reference(name)


def _check_space(plans: Sequence[RowPlan], store: Store) -> None:
    import shutil

    from lethebench.costing import CHANNELS, bytes_an_image, picture_size
    from lethebench.zoo import find_model

    entry = find_model(plans[0].model)
    height, width = picture_size(plans[0].suite.sampler, entry)
    images = sum(len(p.shards[j.number]) for p in plans for j in missing(p, "shard", store))
    need = bytes_an_image(height, width, CHANNELS[entry.family]) * images
    free = shutil.disk_usage(store.root).free
    if free < need:
        raise UserError(
            f"the disk of {store.root} is full: about {need >> 20} MiB are needed and {free >> 20} MiB free; "
            "free some space and run again; nothing is lost"
        )


def _work(
    plans: Sequence[RowPlan], base: RowPlan, store: Store, runner: Engine, outcome: Outcome, until: str
) -> None:
    """Run what the store lacks, stage by stage; a row with a failure goes no further."""
    rows = list(plans) if base in plans else [base, *plans]
    rows = [p for p in rows if p.inapplicable is None]
    for stage in STAGES:
        failed = {_row_name(f.job) for f in outcome.failures}
        jobs = [j for p in rows for j in missing(p, stage, store) if _row_name(j) not in failed]
        if jobs:
            title = {"fit": "fit", "shard": "generate", "scores": "score"}[stage]
            waves = _fit_waves(jobs) if stage == "fit" else [[[j] for j in jobs]]
            with progress(title, total=sum(map(len, waves))) as bar:
                for wave in waves:
                    outcome.computed[stage] += _wave(wave, runner, outcome, bar)
        if stage == until:
            return


def _wave(wave: Sequence[Sequence[Job]], runner: Engine, outcome: Outcome, bar: Bar) -> int:
    """Run the first of each group of jobs that are one; the number that succeeded."""
    failed = {_row_name(f.job) for f in outcome.failures}
    groups = [kept for group in wave if (kept := [j for j in group if _row_name(j) not in failed])]
    broken = runner.run([group[0] for group in groups], lambda job: bar.advance(1, str(job)))
    for failure in broken:
        alike = next(group for group in groups if group[0] == failure.job)
        outcome.failures += [replace(failure, job=job) for job in alike]
    return len(groups) - len(broken)


def _fit_waves(jobs: Sequence[Job]) -> list[list[list[Job]]]:
    """Fits by part of the composition, each wave after the one before, jobs of one fit in a group.

    So a fit that rows share (strengths that only ``apply`` tells apart, compositions with the same beginning)
    is done once, by however many workers.
    """
    waves: dict[int, dict[str, list[Job]]] = {}
    for job in jobs:
        plan = job.plan()
        fit = plan.fits[job.number]
        waves.setdefault(fit.part, {}).setdefault(digest(plan.fit_key(*fit)), []).append(job)
    return [list(waves[number].values()) for number in sorted(waves)]


def _row_name(job: Job) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    return job.specs, job.strengths, repr(job.overrides)  # an override may be a list


def missing(plan: RowPlan, stage: str, store: Store) -> list[Job]:
    """The jobs of one stage of a row whose results the store lacks."""
    if stage == "fit":
        numbers = [i for i, fit in enumerate(plan.fits) if store.find("fit", plan.fit_key(*fit)) is None]
    elif stage == "shard":
        numbers = [i for i in range(len(plan.shards)) if store.find("shard", plan.shard_key(i)) is None]
    else:
        numbers = [
            i
            for i in range(len(plan.shards))
            if any(store.find("scores", plan.scores_key(i, m)) is None for m in plan.suite.metrics)
        ]
    return [Job.of(stage, n, plan, store) for n in numbers]


# --- rows -----------------------------------------------------------------------------------------


def _current(plan: RowPlan, base: RowPlan, runs: Path, outcome: Outcome) -> bool:
    """Whether the row on disk is the result of exactly this plan; if so it is kept."""
    folder = plan.folder(runs)
    try:
        made = json.loads((folder / "made.json").read_text())
        same = made["key"] == digest(plan.row_key(base)) and made["row"] == file_sha256(folder / "row.json")
        if not same or any(file_sha256(folder / n) != s for n, s in made["files"].items()):
            return False
        outcome.rows.append(read_row(folder / "row.json"))
    except (OSError, ValueError, KeyError, UserError):
        return False
    return True


def _write_row(plan: RowPlan, base: RowPlan, store: Store, runs: Path, outcome: Outcome) -> None:
    folder = plan.folder(runs)
    failed = [f for f in outcome.failures if _same_row(f.job, plan) or _same_row(f.job, base)]
    table = None
    if plan.inapplicable is not None:
        row = _empty_row(plan, "not-applicable", plan.inapplicable)
    elif failed:
        row = _empty_row(plan, "failed", failed[0].error)
    else:
        try:
            row, table = _scored_row(plan, base, store, outcome)
        except StoreError:
            raise
        except Exception as error:  # a metric's aggregate must not stop the other rows
            failed = [Failure.of(Job.of("scores", 0, plan, store), error)]
            outcome.failures += failed
            row = _empty_row(plan, "failed", failed[0].error)
    with explained(runs):
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        if table is not None:
            _write_images(plan, store, folder)
            table.to_parquet(folder / ".images.tmp", index=False)
            (folder / ".images.tmp").replace(folder / "images.parquet")
            files["images.parquet"] = file_sha256(folder / "images.parquet")
        if failed:
            write_atomic(folder / "failure.txt", failed[0].traceback.encode())
        else:
            (folder / "failure.txt").unlink(missing_ok=True)
        write_atomic(folder / "row.json", row.to_json().encode())
        if row.status == "ok":
            made = {
                "key": digest(plan.row_key(base)),
                "row": file_sha256(folder / "row.json"),
                "files": files,
            }
            write_atomic(folder / "made.json", json.dumps(made).encode())
    outcome.rows.append(row)
    outcome.computed["row"] += 1


def _same_row(job: Job, plan: RowPlan) -> bool:
    return _row_name(job) == _row_name(Job.of("fit", 0, plan, Store(Path(job.store))))


def _empty_row(plan: RowPlan, status: Any, reason: str) -> Row:
    now = _now()
    return Row(
        **_identity(plan), status=status, reason=reason, scores={}, provenance=_provenance(plan, now, now)
    )


def _identity(plan: RowPlan) -> dict[str, Any]:
    recipe, suite = plan.recipe, plan.suite
    axes = {"suppression": suite.suppression.model_dump(), "adherence": suite.adherence.model_dump()}
    return {
        "suite": SuiteKey(name=suite.name, version=suite.version),
        "model": plan.model_name,
        "method": recipe.name,
        "setting": recipe.setting,
        "control": recipe.control,
        "family": recipe.family,
        "knowledge": tuple(k for k in map(str, Knowledge) if k in {str(x) for x in recipe.knowledge}),
        "summary": " + ".join(p.summary for p in recipe.parts),
        "citation": "; ".join(dict.fromkeys(p.citation for p in recipe.parts if p.citation)),
        "config": {
            "method": recipe.config(),
            "sampler": suite.sampler.model_dump(mode="json"),
            **({"train": suite.train} if suite.train is not None else {}),
        },
        "seeds": {
            "noise": f"sha256(noise, {suite.seed_key}, prompt id, image index)",
            "fit": "sha256(fit, suite, method)",
            **({"train": "sha256(train, suite, instance)"} if suite.train is not None else {}),
        },
        "axes": axes,
        "reference": suite.reference,
    }


def _scored_row(plan: RowPlan, base: RowPlan, store: Store, outcome: Outcome) -> tuple[Row, pd.DataFrame]:
    """The row and its per-image table."""
    from lethebench import stats
    from lethebench.work import row_table

    suite = plan.suite
    table = row_table(plan, store)
    is_base = plan == base
    if outcome.base_table is None:
        outcome.base_table = row_table(base, store)
    base_table = None if is_base else outcome.base_table
    scores: dict[str, ScoreRecord] = {}
    slices: list[Slice] = []
    metrics = {}
    for spec, metric in zip(suite.metrics, plan.metrics, strict=True):
        metrics[metric.name] = {
            "version": metric.version,
            "source": metric.source,
            "settings": {k: v for k, v in recorded_settings(metric).items() if k in spec.settings},
            **_facts(plan, spec, store),
        }
        if base_table is not None and (compared := metric.compare(table, base_table)):
            metrics[metric.name]["compared_to_base"] = compared
        for score in metric.all_scores():
            seed = (suite.key, score.name)
            scores[score.name] = stats.summarise(
                metric, score, table, base_table, resamples=suite.bootstrap, seed_parts=seed
            )
            slices += stats.slices(metric, score, table, resamples=suite.bootstrap, seed_parts=seed)
    of_base = next((r for r in outcome.rows if r.method == base.recipe.name), None)
    warnings = []
    if of_base is not None and not is_base:
        warnings = stats.guards(scores, of_base.scores, of_base.method)
    started, cost = _cost(plan, base, store)
    row = Row(
        **_identity(plan),
        status="ok",
        scores=scores,
        slices=tuple(slices),
        metrics=metrics,
        cost=cost,
        provenance=_provenance(plan, started, _now()),
        warnings=tuple(warnings),
    )
    row.to_json()  # what JSON can't hold (a NaN in a metric's facts, say) shows here
    return row, table


def _facts(plan: RowPlan, metric: MetricSpec, store: Store) -> dict[str, Any]:
    found = store.find("scores", plan.scores_key(0, metric))
    return json.loads((found / "facts.json").read_text()) if found is not None else {}


def _measured(plan: RowPlan, stage: str, store: Store) -> list[dict[str, Any]]:
    keys = [plan.fit_key(*fit) for fit in plan.fits]
    if stage != "fit":
        keys = [plan.shard_key(number) for number in range(len(plan.shards))]
    return [json.loads((store.path(stage, k) / "measured.json").read_text()) for k in keys]


def _cost(plan: RowPlan, base: RowPlan, store: Store) -> tuple[str, Cost]:
    from lethebench.work import read_artefact

    fits, shards = _measured(plan, "fit", store), _measured(plan, "shard", store)
    peaks = [m["peak_memory_bytes"] for m in (*fits, *shards) if m["peak_memory_bytes"] is not None]
    parts = plan.recipe.parts
    told = {
        fit: parts[fit.part].facts(read_artefact(store.path("fit", plan.fit_key(*fit)))) for fit in plan.fits
    }
    # what says itself how long it took is believed: all of it after a kill, and without what timing it costs
    seconds = [
        told[fit].get("fit_seconds", measured["seconds"])
        for fit, measured in zip(plan.fits, fits, strict=True)
    ]
    facts: dict[str, Any] = {}
    for fit in plan.fits:
        if fit.instance == plan.instances[0]:
            facts.update(told[fit])
    own = [told[fit].get("parameters_changed") for fit in plan.fits if fit.instance == plan.instances[0]]
    changed = [share for share in own if share is not None]
    steps = [f["step_relative_to_plain"] for f in told.values() if "step_relative_to_plain" in f]
    fit_peaks = [m["peak_memory_bytes"] for m in fits if m["peak_memory_bytes"] is not None]
    cost = Cost(
        fit_seconds=sum(seconds) / len(plan.instances),
        fit_peak_memory_bytes=max(fit_peaks, default=None),
        seconds_per_image=_per_image(shards),
        relative_to_base=1.0 if plan.recipe.name == "base" else shards[0].get("relative_to_base"),
        peak_memory_bytes=max(peaks, default=None),
        parameters_changed=min(1.0, sum(changed)) if changed else None,
        targets=facts.get("targets"),
        clusters=facts.get("clusters"),
        sparsity=facts.get("sparsity"),
        deactivated=facts.get("deactivated", {}),
        step_relative_to_plain=median(steps) if steps else None,
        training_state_bytes=facts.get("training_state_bytes"),
    )
    first = min(store.path("fit", plan.fit_key(*plan.fits[0])).stat().st_mtime, time.time())
    return datetime.fromtimestamp(first, UTC).isoformat(timespec="seconds"), cost


def _per_image(measured: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(m["seconds"] for m in measured) / max(1, sum(m["images"] for m in measured)))


def _provenance(plan: RowPlan, started: str, finished: str) -> Provenance:
    commit, dirty = provenance.git_state()
    weights = {f"{plan.model_name}/{k}": v for k, v in weights_sha256(plan.model).items()}
    files = {f"{m.name}/{k}": v for m in plan.metrics for k, v in metric_files(m).items()}
    return Provenance(
        git_commit=commit,
        dirty=dirty,
        plugin_sha256=plan.recipe.sources(),
        weights_sha256={**weights, **judges_sha256(), **files},
        data_sha256={plan.suite.prompt_set: manifest_sha256(plan.suite.prompt_set)},
        packages=provenance.packages(),
        hardware=provenance.hardware(plan.runtime.device),
        dtype=plan.runtime.dtype,
        threads=plan.runtime.threads or provenance.physical_cores(),
        loading=dict(plan.runtime.loading),
        started=started,
        finished=finished,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- pictures beside the row ----------------------------------------------------------------------


def _write_images(plan: RowPlan, store: Store, folder: Path) -> None:
    """The row's images as PNG, ``images/<prompt id>-<index>.png``."""
    from PIL import Image
    from safetensors.numpy import load_file

    (folder / "images").mkdir(exist_ok=True)
    for number, keys in enumerate(plan.shards):
        images = load_file(store.path("shard", plan.shard_key(number)) / "images.safetensors")["images"]
        for key, image in zip(keys, images, strict=True):
            Image.fromarray(image).save(folder / "images" / f"{file_name(key.prompt.id)}-{key.index}.png")


def _write_references(base: RowPlan, runs: Path) -> None:
    """The prompts' reference images as PNG, once a suite, for the page."""
    from PIL import Image

    prompts = prompt_set(base.suite.prompt_set)
    folder = runs / base.suite.key / "references"
    with explained(runs):
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted({r for key in base.images for r in key.prompt.references}):
            path = folder / f"{file_name(name)}.png"
            if not path.exists() and described(prompts, name) is None:
                temporary = path.with_suffix(".tmp")
                Image.fromarray(prompts.reference(name).image).save(temporary, format="png")
                temporary.replace(path)


def report_failures(failures: Sequence[Failure]) -> None:
    """One line to stderr for each failed job; raises RunError if there were any."""
    for failure in failures:
        print(f"lethe: {failure.job} failed: {failure.error}", file=sys.stderr)
    if failures:
        raise RunError(f"{len(failures)} jobs failed; the other rows are complete")
