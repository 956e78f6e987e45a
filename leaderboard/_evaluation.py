"""What ``lethe metrics`` found, for the page: each metric against the planted truth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethebench.leaderboard import _format as fmt
from lethebench.leaderboard._rows import Problem

RECORD = "metrics.json"
SCHEMA = "lethe-metrics/1"
_AUC = fmt.NumberFormat(3)
_RATE = fmt.NumberFormat(1, percent=True)


@dataclass(frozen=True)
class Figure:
    """One number of the table with its interval, and how many images it is from."""

    text: str = ""
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class DetectorLine:
    """One detector column of a metric."""

    metric: str
    summary: str
    column: str
    low: bool
    """Whether low values say memorized."""
    figures: tuple[Figure, ...]
    tpr: Figure
    cost: str
    recording: bool


@dataclass(frozen=True)
class Labels:
    """A confusion matrix: ``counts`` has a line for each true label."""

    metric: str
    column: str
    names: tuple[str, ...]
    counts: tuple[tuple[str, tuple[int, ...]], ...]
    summary: str


@dataclass(frozen=True)
class EvaluationTable:
    """The section of one suite and model."""

    id: str
    sha256: str
    """Of the record's file."""
    suite: str
    model: str
    images: int
    truth: str
    headings: tuple[tuple[str, str], ...]
    """Heading and what it compares."""
    lines: tuple[DetectorLine, ...]
    copies: tuple[str, ...]
    by_copies: tuple[tuple[str, str, tuple[Figure, ...]], ...]
    labels: tuple[Labels, ...]
    left_out: tuple[str, ...]
    conventions: Mapping[str, str]


def evaluations(runs: Path) -> tuple[list[EvaluationTable], list[Problem]]:
    """Every ``<suite>@<version>/<model>/metrics.json`` below ``runs``, and those that can't be shown."""
    tables: list[EvaluationTable] = []
    problems: list[Problem] = []
    for path in sorted(Path(runs).glob(f"*@*/*/{RECORD}")):
        try:
            tables.append(_table(path.read_bytes(), f"metrics-{len(tables)}"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            where, what = path.relative_to(runs).as_posix(), type(error).__name__
            told = what if isinstance(error, OSError) else f"{what}: {error}"
            problems.append(
                Problem(where, f"not a record of 'lethe metrics' ({told}); run 'lethe metrics' again")
            )
    return tables, problems


def _table(file: bytes, id: str) -> EvaluationTable:
    from lethebench.evaluation import COLUMNS

    record = json.loads(file)

    if record["schema"] != SCHEMA:
        raise ValueError(f"schema {record['schema']!r} is not {SCHEMA!r}")
    found = [(metric, detector) for metric in record["metrics"] for detector in metric["detectors"]]
    copies = sorted({int(c) for _, detector in found for c in detector["against"].get("duplicates", {})})
    wanted = {name for name, _, _ in COLUMNS} | {"tpr", "duplicates"}
    conventions = {name: str(record["conventions"][name]) for name in wanted}
    labels = [
        _labels(metric["metric"], column, labels)
        for metric in record["metrics"]
        for column, labels in metric["labels"].items()
    ]
    return EvaluationTable(
        id=id,
        sha256=hashlib.sha256(file).hexdigest(),
        suite=f"{record['suite']['name']}@{record['suite']['version']}",
        model=str(record["model"]),
        images=int(record["images"]),
        truth=", ".join(f"{count:,} {label}" for label, count in sorted(record["truth"].items())),
        headings=tuple((heading, conventions[name]) for name, _, heading in COLUMNS),
        lines=tuple(_line(metric, detector, COLUMNS) for metric, detector in found),
        copies=tuple(map(str, copies)),
        by_copies=tuple(
            (
                metric["metric"],
                detector["column"],
                tuple(_figure(detector, "duplicates", str(c)) for c in copies),
            )
            for metric, detector in found
        ),
        labels=tuple(labels),
        left_out=tuple(record["left_out"]),
        conventions=conventions,
    )


def _line(
    metric: Mapping[str, Any], detector: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]
) -> DetectorLine:
    return DetectorLine(
        metric=metric["metric"] + "".join(f" {k}={v}" for k, v in sorted(metric["settings"].items())),
        summary=metric["summary"],
        column=detector["column"],
        low=detector["end"] == "low",
        figures=tuple(_figure(detector, name, group) for name, group, _ in columns),
        tpr=_figure(detector, "near_copy", what="tpr"),
        cost=_cost(float(metric["seconds_per_image"])),
        recording=bool(metric["records"]),
    )


def _cost(seconds: float) -> str:
    """Seconds an image as milliseconds.

    >>> _cost(0.0421), _cost(0.00001), _cost(2.5)
    ('42 ms', '< 1 ms', '2,500 ms')
    """
    return "< 1 ms" if seconds < 0.001 else f"{seconds * 1000:,.0f} ms"


def _figure(detector: Mapping[str, Any], comparison: str, group: str = "", what: str = "auc") -> Figure:
    from lethebench.evaluation import cell

    record = cell(detector, comparison, group)
    found, number = record[what], _AUC if what == "auc" else _RATE
    if found["value"] is None:
        return Figure(note="no value: the metric doesn't apply to these images, or one side has none")
    note = f"{record['positives']:,} images against {record['negatives']:,}"
    return Figure(number(found["value"]), number.interval(found["low"], found["high"]), note)


def _labels(metric: str, column: str, record: Mapping[str, Any]) -> Labels:
    names = tuple(record["confusion"])
    shares = {
        "the same label": record["accuracy"],
        "memorized called memorized": record["memorized"]["sensitivity"],
        "others called memorized": record["memorized"]["false_positive_rate"],
    }
    return Labels(
        metric=metric,
        column=column,
        names=names,
        counts=tuple((t, tuple(int(record["confusion"][t][x]) for x in names)) for t in names),
        summary="; ".join(
            f"{name} {fmt.percent(value)}" for name, value in shares.items() if value is not None
        ),
    )
