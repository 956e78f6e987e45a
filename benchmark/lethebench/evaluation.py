"""``lethe metrics``: every metric's detectors measured against what was really memorized.

The base model alone is drawn on a suite with planted truth, by the ordinary runner (stored, resumed), scored
by every metric, and each detector column is held against the truth by :mod:`lethebench.metrics.meta`. A new
metric needs nothing for this but to be named.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lethebench import provenance
from lethebench.bench import plan_rows, run
from lethebench.errors import RunError, UserError
from lethebench.method import recorded_settings
from lethebench.metric import Metric, detectors
from lethebench.plan import (
    RowPlan,
    Runtime,
    chosen,
    file_name,
    judges_sha256,
    make_metric,
    metric_files,
    prompt_set,
    require_own_names,
    weights_sha256,
)
from lethebench.promptfiles.sources import VARIABLE, data_folder
from lethebench.prompts import Role
from lethebench.registry import METRICS, source_sha256
from lethebench.specs import MetricSpec, Suite, load_suite
from lethebench.store import Store, explained, write_atomic

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "lethe-metrics/1"
RECORD, TABLE = "metrics.json", "metrics.csv"
TRUTH = "planted-truth"
LABEL = "_label"
"""Columns with this ending hold VM, FM, BM or NM and get a confusion matrix."""


@dataclass(frozen=True)
class Evaluation:
    """What ``lethe metrics`` found: the record, and where it was written."""

    record: dict[str, Any]
    path: Path


def evaluate(
    metrics: Sequence[str] = (),
    *,
    suite: str | Suite = "detection",
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    engine_name: str = "local",
    workers: int = 1,
    runtime: Runtime | None = None,
) -> Evaluation:
    """Measure the suite's metrics, and those named, against the planted truth.

    ``metrics`` are registered names or ``path.py:Class``; ``settings`` are those of the one that is named.
    Writes ``metrics.json`` and ``metrics.csv`` to ``<runs>/<suite>@<version>/<model>/``. Raises UserError
    for unknown names and settings, for a named metric that can't run here, and for a suite without planted
    truth, all before any work; RunError where a metric fails on the images.
    """
    spec = suite if isinstance(suite, Suite) else load_suite(suite)
    spec, left_out = with_metrics(spec, metrics, settings)
    _require_truth(spec)
    spec = spec.model_copy(update={"reference": "base"})
    runs, runtime = Path(runs), runtime or Runtime()
    outcome = run(
        ["base"],
        suite=spec,
        model=model,
        runs=runs,
        engine_name=engine_name,
        workers=workers,
        runtime=runtime,
        until="scores",
        controls=False,
    )
    for failure in outcome.failures:
        raise RunError(
            f"{failure.job} failed: {failure.error}; mend the metric or leave it out, and run again"
        )
    (plan,) = plan_rows(["base"], spec, model or spec.model, runtime=runtime, controls=False)
    record = measured(plan, Store(runs / "store"), left_out)
    folder = runs / spec.key / file_name(plan.model_name)
    with explained(runs):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RECORD, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        write_atomic(folder / TABLE, csv_text(record).encode())
    return Evaluation(record, folder / RECORD)


# --- which metrics --------------------------------------------------------------------------------


def with_metrics(
    suite: Suite, names: Sequence[str], settings: Mapping[str, Any] | None = None
) -> tuple[Suite, dict[str, str]]:
    """The suite with the named metrics added, and why each registered metric that is left out is.

    A named metric with settings takes the place of the suite's own entry. Raises UserError for a named
    metric that is unknown or can't run here.
    """
    if settings and len(names) != 1:
        raise UserError("--set is for one metric: name the metric that it belongs to, and no other")
    asked = [MetricSpec(name=name, settings=dict(settings or {})) for name in dict.fromkeys(names)]
    for spec in asked:
        make_metric(spec).check()
    kept, left_out = [], {}
    for spec in suite.metrics:
        if any(spec.name == other.name for other in asked) and settings:
            continue
        reason = _unavailable(spec)
        if reason is None:
            kept.append(spec)
        else:
            left_out[spec.name] = reason
    kept += [spec for spec in asked if spec not in kept and spec.name not in {k.name for k in kept}]
    if not any(spec.name == TRUTH for spec in kept):
        kept.insert(0, MetricSpec(name=TRUTH))
    require_own_names(kept)
    taken = {spec.name for spec in kept}
    for name in METRICS:
        if name not in taken and name not in left_out:
            left_out[name] = _unavailable(MetricSpec(name=name)) or f"not in {suite.key}: name it to add it"
    left_out |= {name: f"failed to import: {_without_home(error)}" for name, error in METRICS.errors.items()}
    return suite.model_copy(update={"metrics": tuple(kept)}), left_out


def _unavailable(spec: MetricSpec) -> str | None:
    try:
        make_metric(spec).check()
    except UserError as error:
        return _without_home(str(error))
    return None


def _without_home(text: str) -> str:
    """The text without the folders of this machine's user: it goes into a record that is passed on."""
    return text.replace(str(data_folder()), f"${VARIABLE}").replace(str(Path.home()), "~")


def _require_truth(suite: Suite) -> None:
    """Raise UserError unless a trigger of the suite has a reference with a true mask."""
    prompts = prompt_set(suite.prompt_set)
    names = (p.references[0] for p, _ in chosen(suite, prompts) if p.role is Role.TRIGGER and p.references)
    first = next(names, None)
    if first is None or prompts.reference(first).mask is None:
        raise UserError(
            f"suite {suite.key} has no planted truth: its triggers need references with true masks; "
            "use the suite 'detection'"
        )


# --- the record -----------------------------------------------------------------------------------


def measured(plan: RowPlan, store: Store, left_out: Mapping[str, str]) -> dict[str, Any]:
    """The record of a scored row of base: what each metric sees, as JSON can hold it."""
    from lethebench.metrics.meta import CONVENTIONS
    from lethebench.work import row_table

    table = row_table(plan, store)
    commit, dirty = provenance.git_state()
    return {
        "schema": SCHEMA,
        "suite": {"name": plan.suite.name, "version": plan.suite.version},
        "model": plan.model_name,
        "images": len(table),
        "truth": {str(k): int(v) for k, v in table["truth_label"].value_counts().items() if k},
        "near_copies": int((table["truth_near_copy"] == 1).sum()),
        "conventions": CONVENTIONS,
        "metrics": [
            _metric_record(plan, store, spec, metric, table)
            for spec, metric in zip(plan.suite.metrics, plan.metrics, strict=True)
            if metric.name != TRUTH
        ],
        "left_out": dict(sorted(left_out.items())),
        "provenance": {
            "git_commit": commit,
            "dirty": dirty,
            "weights_sha256": {**weights_sha256(plan.model), **judges_sha256()},
            "packages": provenance.packages(),
            "hardware": provenance.hardware(plan.runtime.device),
            "dtype": plan.runtime.dtype,
        },
    }


def _metric_record(
    plan: RowPlan, store: Store, spec: MetricSpec, metric: Metric, table: pd.DataFrame
) -> dict[str, Any]:
    from lethebench.metrics.meta import against, label_record

    folders = [store.path("scores", plan.scores_key(i, spec)) for i in range(len(plan.shards))]
    timed = [json.loads((folder / "measured.json").read_text()) for folder in folders]
    facts = json.loads((folders[0] / "facts.json").read_text(), parse_constant=lambda _: None)
    ends = detectors(metric)
    for column in ends:
        _require_numbers(metric.name, column, table)
    labels = {
        column: record
        for column in _columns(folders[0])
        if column.endswith(LABEL) and (record := label_record(table["truth_label"], table[column].fillna("")))
    }
    found = against(table, ends, seed_parts=(plan.suite.key, "metrics"), resamples=plan.suite.bootstrap)
    return {
        "metric": metric.name,
        "version": metric.version,
        "summary": metric.summary,
        "source": metric.source,
        "settings": {k: v for k, v in recorded_settings(metric).items() if k in spec.settings},
        "facts": facts,
        "needs": sorted(metric.needs),
        "records": sorted(metric.records),
        "seconds_per_image": median(t["seconds"] / t["images"] for t in timed),
        "plugin_sha256": source_sha256(type(metric)),
        "files_sha256": metric_files(metric),
        "detectors": [{"column": c, "end": ends[c], "against": found[c]} for c in ends],
        "labels": labels,
    }


def _columns(folder: Path) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(folder / "scores.parquet").names)


def _require_numbers(metric: str, column: str, table: pd.DataFrame) -> None:
    if column not in table:
        raise RunError(f"metric '{metric}' says that '{column}' detects, but doesn't measure that column")
    if table[column].dtype.kind not in "bfiu":
        raise RunError(f"metric '{metric}' says that '{column}' detects, but it holds no numbers")


# --- as a table -----------------------------------------------------------------------------------

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("near_copy", "", "near copies"),
    ("kind", "verbatim", "VM"),
    ("kind", "foreground", "FM"),
    ("kind", "background", "BM"),
    ("kind", "one-to-many", "one-to-many"),
    ("kind", "redundant-trigger", "redundant"),
    ("concept", "", "concept"),
    ("clean", "", "vs clean"),
    ("hard_negatives", "", "vs hard neg."),
)
"""Comparison, group and heading of the AUCs that the tables show."""


def cell(detector: Mapping[str, Any], comparison: str, group: str = "") -> Mapping[str, Any]:
    """One comparison of a detector's record; a record without values where it isn't there."""
    found: Any = detector["against"].get(comparison, {})
    found = found.get(group) if group else found
    empty = {"value": None, "low": None, "high": None}
    return found or {"auc": empty, "accuracy": empty, "tpr": empty, "positives": 0, "negatives": 0}


def _flat(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for metric in record["metrics"]:
        for detector in metric["detectors"]:
            for comparison, value in detector["against"].items():
                grouped = value.items() if comparison in ("kind", "duplicates") else [("", value)]
                for group, found in grouped:
                    yield {
                        "metric": metric["metric"],
                        "column": detector["column"],
                        "end": detector["end"],
                        "comparison": comparison,
                        "group": group,
                        **{f"auc_{k}".removesuffix("_value"): v for k, v in found["auc"].items()},
                        **{f"accuracy_{k}".removesuffix("_value"): v for k, v in found["accuracy"].items()},
                        **{f"tpr_{k}".removesuffix("_value"): v for k, v in found["tpr"].items()},
                        "positives": found["positives"],
                        "negatives": found["negatives"],
                        "seconds_per_image": metric["seconds_per_image"],
                    }


def csv_text(record: Mapping[str, Any]) -> str:
    """One line for each metric, column and comparison; an empty field where there is no value."""
    lines = list(_flat(record))
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def print_tables(evaluation: Evaluation) -> None:
    """The AUCs, the curve over copies, the confusion matrices, and what was left out."""
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    record = evaluation.record
    truth = ", ".join(f"{count} {label}" for label, count in sorted(record["truth"].items()))
    suite = f"{record['suite']['name']}@{record['suite']['version']}"
    console.print(
        f"{record['model']} on {suite}: {record['images']} images, {record['near_copies']} near copies; "
        f"truth: {truth}"
    )
    console.print(_auc_table(record))
    console.print(
        "AUC with its 95 % interval. VM to redundant: images with a copied region against others of the same "
        "kind of item. Concept: trained against held-out characters, not what the image shows. TPR: near "
        "copies against everything, at the last threshold with under 1 % false positives. Empty: no value."
    )
    console.print(_copies_table(record))
    for metric in record["metrics"]:
        for column, labels in metric["labels"].items():
            console.print(_confusion_table(metric["metric"], column, labels))
    silent = [m["metric"] for m in record["metrics"] if not m["detectors"]]
    if silent:
        console.print(f"without a column that detects: {', '.join(silent)}")
    for name, reason in record["left_out"].items():
        console.print(f"left out: {name}: {reason}", markup=False)
    console.print(f"record: {evaluation.path}", soft_wrap=True)


def _number(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ""
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f}\n{found['low']:.2f}-{found['high']:.2f}"


def _detectors(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for metric in record["metrics"]:
        for detector in metric["detectors"]:
            yield metric, detector


def _auc_table(record: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="What each metric sees", show_lines=True)
    for heading in ("metric", "column", *(c[2] for c in COLUMNS), "TPR", "s / image", "recording"):
        table.add_column(heading, overflow="fold")
    for metric, detector in _detectors(record):
        table.add_row(
            metric["metric"],
            detector["column"] + (" (low)" if detector["end"] == "low" else ""),
            *(_number(cell(detector, comparison, group)["auc"]) for comparison, group, _ in COLUMNS),
            _number(cell(detector, "near_copy")["tpr"]),
            f"{metric['seconds_per_image']:.4f}",
            "yes" if metric["records"] else "",
        )
    return table


def _copies_table(record: Mapping[str, Any]) -> Any:
    from rich.table import Table

    copies = sorted({int(c) for _, d in _detectors(record) for c in d["against"].get("duplicates", {})})
    table = Table(title="AUC on verbatim items by number of copies")
    for heading in ("metric", "column", *map(str, copies)):
        table.add_column(heading, overflow="fold")
    for metric, detector in _detectors(record):
        found = (cell(detector, "duplicates", str(c))["auc"] for c in copies)
        table.add_row(
            metric["metric"],
            detector["column"],
            *("" if f["value"] is None else f"{f['value']:.3f}" for f in found),
        )
    return table


def _confusion_table(metric: str, column: str, labels: Mapping[str, Any]) -> Any:
    from rich.table import Table

    share = labels["memorized"]
    told = [
        f"{what} {value:.1%}"
        for what, value in (
            ("same label", labels["accuracy"]),
            ("sensitivity", share["sensitivity"]),
            ("false positives", share["false_positive_rate"]),
        )
        if value is not None
    ]
    table = Table(title=f"{metric}: {column}", caption="; ".join(told))
    for heading in ("truth", *labels["confusion"]):
        table.add_column(heading)
    for truth, counts in labels["confusion"].items():
        table.add_row(truth, *(str(counts[label]) for label in labels["confusion"]))
    return table
