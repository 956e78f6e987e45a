"""The ``lethe`` command. Heavy imports happen inside the commands, so that ``lethe list`` is instant."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lethebench import cli_data
from lethebench.errors import LetheError, UserError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _allow(given: str) -> str:
    if given:
        from lethebench.promptfiles.consent import allow

        allow(given)
    return given


Runs = Annotated[Path, typer.Option("--runs", help="Folder of results and of the store.")]
SuiteName = Annotated[str, typer.Option("--suite", help="A suite of the package, or a YAML file.")]
ModelName = Annotated[str | None, typer.Option("--model", help="A model of the zoo, a folder, or a hub id.")]
Strength = Annotated[str, typer.Option("--strength", help="A strength of the method, or 'all'.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: KEY=VALUE.")]
EngineName = Annotated[str, typer.Option("--engine", help="What runs the shards: local.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes that share the work.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Processor threads; 0: the physical cores.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Load = Annotated[
    list[str] | None,
    typer.Option("--load", help="How the model is loaded: KEY=VALUE (offload, compile, quantise, ...)."),
]
Allow = Annotated[
    str,
    typer.Option(
        "--allow",
        help="Prompts that are used only on request: unsafe, living-persons (or both).",
        callback=_allow,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lethe {version('lethebench')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def lethe(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Lethe: a benchmark of memorization mitigation in text-to-image diffusion models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The entry point: runs the command, and turns Lethe's errors into one line and an exit code."""
    try:
        app(standalone_mode=False)
    except LetheError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        _fail("interrupted; run the same command again to go on where it stopped", 130)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on where it stopped", 130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(error.format_message(), 2)
        raise


def _fail(message: str, code: int) -> None:
    print(f"lethe: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _overrides(pairs: list[str] | None, option: str = "--set") -> dict[str, Any]:
    import yaml

    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} takes KEY=VALUE, not '{pair}'")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{option} {key}: '{value}' is not a value") from error
        found[key] = _number(parsed) if isinstance(parsed, str) else parsed
    return found


def _number(text: str) -> float | str:
    """The finite number that the text is, if it is one: YAML takes 1e-4 (without a dot) for a text."""
    try:
        found = float(text)
    except ValueError:
        return text
    if not math.isfinite(found):
        return text
    return int(found) if found.is_integer() else found


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"unknown dtype '{name}': known float32, bfloat16, float16")
    return name


def _threads(threads: int, workers: int) -> int:
    from lethebench.provenance import physical_cores

    return max(1, physical_cores() // workers) if workers > 1 and not threads else threads


def _runtime(device: str, dtype: str, threads: int, load: list[str] | None = None) -> Any:
    """How things are computed. Raises UserError for a dtype or a setting of loading that there isn't."""
    from lethebench.plan import Runtime
    from lethebench.zoo import LoadSettings

    loading = _overrides(load, "--load")
    LoadSettings.of(loading)
    return Runtime(device, _dtype(dtype), threads, tuple(sorted(loading.items())))


def _bench(
    method: str,
    suite: str,
    model: str | None,
    strength: str,
    overrides: list[str] | None,
    runs: Path,
    engine: str,
    workers: int,
    threads: int,
    device: str,
    dtype: str,
    load: list[str] | None,
    until: str,
) -> Any:
    from lethebench.bench import report_failures, run

    outcome = run(
        [m for m in method.split(",") if m],
        suite=suite,
        model=model,
        strength=strength,
        overrides=_overrides(overrides),
        runs=runs,
        engine_name=engine,
        workers=workers,
        runtime=_runtime(device, dtype, _threads(threads, workers), load),
        until=until,
    )
    return outcome, lambda: report_failures(outcome.failures)


@app.command(epilog="Example: lethe bench uniforget --suite planted --strength all")
def bench(
    method: Annotated[
        str,
        typer.Argument(
            help="A method, a+b, path.py:Class, a comma-separated list, or 'all'; none: the suite's own.",
            show_default=False,
        ),
    ] = "",
    suite: SuiteName = "planted",
    model: ModelName = None,
    strength: Strength = "all",
    overrides: Set = None,
    runs: Runs = Path("runs"),
    engine: EngineName = "local",
    workers: Workers = 1,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    load: Load = None,
    allow: Allow = "",
    site: Annotated[Path, typer.Option(help="Where the page is written.")] = Path("site"),
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the run will do and cost; start nothing.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --plan: draw a batch to find the time of an image.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option("--rate", help="With --plan: the base model's seconds an image.")
    ] = None,
    json_: Json = False,
) -> None:
    """Fit, generate, score and rank a method; write its rows and the leaderboard page."""
    if plan:
        from lethebench.costing import costs, print_costs

        found = costs(
            [m for m in method.split(",") if m],
            suite=suite,
            model=model,
            strength=strength,
            overrides=_overrides(overrides),
            runs=runs,
            runtime=_runtime(device, dtype, _threads(threads, workers), load),
            rate=rate,
            measure=measure,
        )
        if json_:
            print(json.dumps(found.as_dict()))
        else:
            print_costs(found)
        return
    if measure or rate is not None:
        raise UserError("--measure and --rate belong to --plan")
    outcome, report = _bench(
        method, suite, model, strength, overrides, runs, engine, workers, threads, device, dtype, load, "row"
    )
    from lethebench.leaderboard import build

    page = build(runs, site)
    if json_:
        print(json.dumps([r.model_dump(mode="json", by_alias=True) for r in outcome.rows]))
    else:
        from lethebench.summary import print_summary

        print_summary(outcome, page)
    report()


def _stage(until: str, done: str) -> Any:
    def command(
        method: Annotated[str, typer.Argument(help="A method, a+b, path.py:Class, or a list with commas.")],
        suite: SuiteName = "planted",
        model: ModelName = None,
        strength: Strength = "all",
        overrides: Set = None,
        runs: Runs = Path("runs"),
        engine: EngineName = "local",
        workers: Workers = 1,
        threads: Threads = 0,
        device: Device = "cpu",
        dtype: Dtype = "float32",
        load: Load = None,
        allow: Allow = "",
    ) -> None:
        outcome, report = _bench(
            method,
            suite,
            model,
            strength,
            overrides,
            runs,
            engine,
            workers,
            threads,
            device,
            dtype,
            load,
            until,
        )
        report()
        print(f"{done}: {outcome.computed[until]} made in {outcome.seconds:.1f} s, the rest was there")

    return command


app.command(
    "fit", help="Fit a method and store the artefact.", epilog="Example: lethe fit uniforget --strength weak"
)(_stage("fit", "fitted parts"))
app.command(
    "generate",
    help="Fit, then generate the images.",
    epilog="Example: lethe generate uniforget --suite smoke",
)(_stage("shard", "shards"))
app.command(
    "score", help="Fit, generate, then measure.", epilog="Example: lethe score uniforget --suite smoke"
)(_stage("scores", "scored shards"))


@app.command(epilog="Example: lethe export uniforget+retrain --strength strong+long --out my-model")
def export(
    method: Annotated[str, typer.Argument(help="A method, a+b, or path.py:Class.")],
    strength: Annotated[str, typer.Option(help="One strength of the method.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the mitigated model.")],
    suite: SuiteName = "planted",
    model: ModelName = None,
    overrides: Set = None,
    runs: Runs = Path("runs"),
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    load: Load = None,
    allow: Allow = "",
    instance: Annotated[str | None, typer.Option(help="Where a suite fine-tunes: which of its sets.")] = None,
) -> None:
    """Write the mitigated model of a permanent edit as a folder; fits it first where need be."""
    from lethebench.export import export_fitted

    folder = export_fitted(
        method,
        out,
        suite=suite,
        model=model,
        strength=strength,
        overrides=_overrides(overrides),
        runs=runs,
        runtime=_runtime(device, dtype, threads, load),
        instance=instance,
    )
    print(folder)


@app.command(epilog="Example: lethe compare nemo-c/union nemo/union --score fbmem.risk")
def compare(
    first: Annotated[str, typer.Argument(help="A row: METHOD/SETTING, or its folder.")],
    second: Annotated[str, typer.Argument(help="The row to compare it with.")],
    score: Annotated[list[str] | None, typer.Option("--score", help="A score; may be repeated.")] = None,
    suite: SuiteName = "planted",
    model: ModelName = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Show the paired differences between two rows, with intervals."""
    from lethebench.comparison import compare_rows, print_comparison, row_folder
    from lethebench.specs import load_suite

    board = load_suite(suite)
    one, other = (row_folder(n, runs, board.key, model or board.model) for n in (first, second))
    found = compare_rows(one, other, score or (), board)
    if json_:
        records = [{**vars(c), "difference": c.difference and c.difference.model_dump()} for c in found]
        print(json.dumps(records))
    else:
        print_comparison(first, second, found)


@app.command(epilog="Example: lethe attack uniforget/strong --attack dori")
def attack(
    row: Annotated[str, typer.Argument(help="METHOD/SETTING, a row's folder, METHOD (its rows), or 'all'.")],
    suite: SuiteName = "planted",
    model: ModelName = None,
    runs: Runs = Path("runs"),
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", help="An attack, or path.py:Class; may be repeated; none: all that suit."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="Who attacks, for the record; default: this version of Lethe.")
    ] = "",
    engine: EngineName = "local",
    workers: Workers = 1,
    threads: Threads = 0,
    site: Annotated[Path | None, typer.Option(help="Write the leaderboard page there afterwards.")] = None,
    allow: Allow = "",
    json_: Json = False,
) -> None:
    """Try to get out of a row what its mitigation removed, and out of its twins what was never there."""
    from lethebench.attack._run import attack as run_attacks
    from lethebench.attack._run import print_attacked
    from lethebench.bench import report_failures

    found = run_attacks(
        row,
        suite=suite,
        model=model,
        runs=runs,
        attacks=attacks or (),
        by=by,
        engine_name=engine,
        workers=workers,
        threads=_threads(threads, workers),
    )
    if site is not None:
        from lethebench.leaderboard import build

        build(runs, site)
    if json_:
        print(json.dumps([r.model_dump(mode="json", by_alias=True) for r in found.records]))
    else:
        print_attacked(found)
    report_failures(found.failures)


@app.command(epilog="Example: lethe leaderboard --runs runs --out site")
def leaderboard(
    runs: Runs = Path("runs"),
    out: Annotated[Path, typer.Option("--out", help="Folder of the page.")] = Path("site"),
) -> None:
    """Write the leaderboard page and tables from the rows that are there."""
    if not runs.is_dir():
        raise UserError(f"no results in {runs}: run 'lethe bench METHOD' first")
    from lethebench.leaderboard import build

    print(build(runs, out))


KINDS = ("methods", "metrics", "prompt-sets", "models", "suites", "attacks")


@app.command("list", epilog="Example: lethe list methods --json")
def list_(
    what: Annotated[str, typer.Argument(help="methods, metrics, prompt-sets, models, suites or attacks.")],
    json_: Json = False,
) -> None:
    """List what is registered, built in or from plugins; a plugin that fails to import with its error."""
    from lethebench import listing

    if what not in KINDS:
        raise UserError(f"can't list '{what}': known {', '.join(KINDS)}")
    entries = listing.entries(what)
    if json_:
        print(json.dumps(entries, indent=1))
        return
    width = max((len(e["name"]) for e in entries), default=0)
    for entry in entries:
        note = f"failed to import: {entry['error']}" if entry.get("error") else entry["summary"]
        print(f"{entry['name']:<{width}}  {note}")


@app.command(epilog="Example: lethe info prompt-set planted")
def info(
    what: Annotated[str, typer.Argument(help="method, metric, prompt-set, model, suite or attack.")],
    name: Annotated[
        str,
        typer.Argument(
            help="Its name; path.py:Class; a prompt set's or a suite's YAML file; a model's folder."
        ),
    ],
    json_: Json = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of a prompt set as PNG.")] = None,
    allow: Allow = "",
) -> None:
    """Show one plugin, prompt set, model or suite in full."""
    from lethebench import listing

    if f"{what}s" not in KINDS:
        raise UserError(f"can't show '{what}': known {', '.join(k[:-1] for k in KINDS)}")
    if sheet is not None:
        listing.write_sheet(what, name, sheet)
        print(sheet)
        return
    found = listing.info(what, name)
    if json_:
        print(json.dumps(found, indent=1, default=listing.as_json))
    else:
        print(listing.text(found))


@app.command(epilog="Example: lethe metrics ./my_metric.py:MyMetric")
def metrics(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METRIC]...", help="Metrics beside the suite's own: a name, or path.py:Class."
        ),
    ] = None,
    suite: SuiteName = "detection",
    model: ModelName = None,
    settings: Set = None,
    runs: Runs = Path("runs"),
    engine: EngineName = "local",
    workers: Workers = 1,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_: Json = False,
) -> None:
    """Measure metrics against what was really memorized: AUC by kind, confusion matrix, cost."""
    from lethebench.evaluation import evaluate, print_tables

    found = evaluate(
        names or [],
        suite=suite,
        model=model,
        settings=_overrides(settings),
        runs=runs,
        engine_name=engine,
        workers=workers,
        runtime=_runtime(device, dtype, _threads(threads, workers)),
    )
    if json_:
        print(json.dumps(found.record))
    else:
        print_tables(found)


@app.command(epilog="Example: lethe check ./my_method.py:MyMethod")
def check(
    plugin: Annotated[str, typer.Argument(help="A method or a metric: its name, or path.py:Class.")],
    kind: Annotated[
        str | None, typer.Option(help="method or metric, where the name is in both registries.")
    ] = None,
    settings: Set = None,
    model: ModelName = None,
    json_: Json = False,
) -> None:
    """Run the contract suite on a method or metric: the same checks that Lethe's own tests run."""
    from lethebench.check import run_checks

    results = run_checks(plugin, model or "mini-sd", kind=kind, settings=_overrides(settings))
    if json_:
        print(json.dumps([r.as_dict() for r in results], indent=1))
    else:
        for result in results:
            print(f"{result.status:<7} {result.name}" + (f": {result.message}" if result.message else ""))
    failed = sum(r.status == "failed" for r in results)
    if failed:
        raise LetheError(f"{plugin}: {failed} of {len(results)} checks failed")


@app.command(epilog="Example: lethe train --only mini-sd --folder build/models")
def train(
    only: Annotated[list[str] | None, typer.Option(help="Only these models; may be given again.")] = None,
    folder: Annotated[Path, typer.Option(help="Checkpoints and caches.")] = Path("build/models"),
    scale: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the full number of steps.")] = 1.0,
    device: Device = "cpu",
    threads: Threads = 0,
    out: Annotated[Path | None, typer.Option(help="Where weights go; default: the package.")] = None,
    sheets: Annotated[
        Path | None, typer.Option(help="Where the contact sheet goes; default: FOLDER/sheets.")
    ] = None,
) -> None:
    """Train the built-in models and judges from nothing; resumes where a killed run stopped."""
    from lethebench.training import train_all

    train_all(only, folder=folder, device=device, scale=scale, threads=threads, out=out, sheets=sheets)


@app.command(epilog="Example: lethe doctor flux-schnell --device cuda --load offload=model")
def doctor(
    model: Annotated[str, typer.Argument(help="A model of the zoo, a folder, or a hub id.")] = "mini-sd",
    runs: Runs = Path("runs"),
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, ...; none: a GPU if there is one.")
    ] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16; none: what suits the device.")
    ] = "",
    load: Load = None,
    json_: Json = False,
) -> None:
    """Say whether this machine can run a model and what is missing: files, packages, memory, disk."""
    from lethebench.doctor import examine
    from lethebench.zoo import LoadSettings

    loading = LoadSettings.of(_overrides(load, "--load"))
    findings = examine(model, runs, device=device, dtype=dtype and _dtype(dtype), loading=loading)
    if json_:
        print(json.dumps([f.as_dict() for f in findings], indent=1))
    else:
        for finding in findings:
            said = {True: "ok", False: "PROBLEM", None: "note"}[finding.ok]
            print(f"{said:<8} {finding.what}: {finding.detail}")
    if any(f.ok is False for f in findings):
        raise LetheError("problems were found; each line above says what to do")


cli_data.add_to(app)

if __name__ == "__main__":
    main()
