"""The row: one result, as every reader of Lethe validates it (``schema/row-1.json``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lethebench.errors import UserError
from lethebench.specs import Spec, first_error

SCHEMA = "lethe/row/1"


class Difference(Spec):
    """Method minus base on the same prompts and noise, with its 95 % interval and p-value."""

    value: float
    low: float
    high: float
    p: float = Field(ge=0, le=1)


class ScoreRecord(Spec):
    """A score with its 95 % interval. ``n`` counts images, ``clusters`` what was resampled."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    unit: str
    direction: Literal["lower", "higher", "none"]
    bounds: tuple[float, float] | None = None
    help: str = ""
    judge: str | None = None
    question: str | None = None
    metric: str
    base_difference: Difference | None = None


class Slice(Spec):
    """A score on part of the images."""

    where: dict[str, str | int | float | bool]
    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int


class Cost(Spec):
    """What the row took; a fit that is done for several instances counts once.

    Sparsity and parameters changed are shares of 0 to 1 (of a composition's parts the latter is the sum, at
    most 1). ``targets`` prompts of ``clusters`` items or concepts were unlearnt. Of a training-time method
    ``step_relative_to_plain`` is an optimiser step's time relative to plain LoRA's, by turns in one process
    (the median over instances), and ``training_state_bytes`` what it held beside the LoRA and its optimiser.
    """

    fit_seconds: float
    fit_peak_memory_bytes: int | None = None
    seconds_per_image: float | None
    relative_to_base: float | None
    peak_memory_bytes: int | None
    parameters_changed: float | None = None
    sparsity: float | None = None
    targets: int | None = None
    clusters: int | None = None
    deactivated: dict[str, float] = Field(default_factory=dict)
    step_relative_to_plain: float | None = None
    training_state_bytes: int | None = None


class SuiteKey(Spec):
    """Which suite, in which version."""

    name: str
    version: str


class Provenance(Spec):
    """What the result was made with."""

    git_commit: str | None
    dirty: bool | None
    plugin_sha256: dict[str, str]
    weights_sha256: dict[str, str]
    data_sha256: dict[str, str]
    packages: dict[str, str]
    hardware: dict[str, str | int | float]
    dtype: str
    threads: int
    loading: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """How the model was loaded where that isn't the default (``zoo.LoadSettings``)."""
    started: str
    finished: str


class Row(Spec):
    """(suite version, model, method, setting) and everything that was measured of it."""

    schema_: Literal["lethe/row/1"] = Field(default="lethe/row/1", alias="schema")
    suite: SuiteKey
    model: str
    method: str
    setting: str
    status: Literal["ok", "failed", "not-applicable"]
    reason: str | None = None
    control: bool = False
    family: str
    knowledge: tuple[str, ...]
    summary: str = ""
    citation: str = ""
    config: dict[str, Any]
    seeds: dict[str, Any]
    axes: dict[str, dict[str, str]] = Field(default_factory=dict)
    reference: str = "base"
    """The method whose row the differences are from."""
    scores: dict[str, ScoreRecord]
    slices: tuple[Slice, ...] = ()
    metrics: dict[str, dict[str, Any]] = Field(default_factory=dict)
    cost: Cost | None = None
    provenance: Provenance
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(suite@version, model, method, setting)."""
        return (f"{self.suite.name}@{self.suite.version}", self.model, self.method, self.setting)

    def to_json(self) -> str:
        """The row as it is written: sorted keys, two spaces."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_row(path: Path) -> Row:
    """A row from its file. Raises UserError naming the file and the first thing that is wrong."""
    try:
        return Row.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(f"{path} is not a valid row: {first_error(error)}") from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a row, which the package ships as ``schema/row-1.json``."""
    schema = Row.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}
