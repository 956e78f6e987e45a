from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from lethebench import row as row_module
from lethebench.errors import UserError
from lethebench.row import Row, json_schema, read_row

EXAMPLE = {
    "schema": "lethe/row/1",
    "suite": {"name": "smoke", "version": "1"},
    "model": "mini-sd",
    "method": "base",
    "setting": "default",
    "status": "ok",
    "family": "sampling",
    "knowledge": [],
    "config": {},
    "seeds": {},
    "scores": {
        "clip_mini.score": {
            "value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "clusters": 5,
            "unit": "cosine", "direction": "higher", "metric": "clip-mini",
        }
    },
    "provenance": {
        "git_commit": None, "dirty": None, "plugin_sha256": {}, "weights_sha256": {}, "data_sha256": {},
        "packages": {}, "hardware": {}, "dtype": "float32", "threads": 2, "started": "x", "finished": "y",
    },
}  # fmt: skip


def test_the_shipped_schema_is_the_models_own() -> None:
    shipped = Path(row_module.__file__).parent / "schema" / "row-1.json"
    assert json.loads(shipped.read_text()) == json_schema()


def test_a_row_survives_writing_and_reading(tmp_path: Path) -> None:
    row = Row.model_validate(EXAMPLE)
    (tmp_path / "row.json").write_text(row.to_json())
    assert read_row(tmp_path / "row.json") == row
    jsonschema.validate(json.loads(row.to_json()), json_schema())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"status": "good"}, "status"),
        ({"schema": "lethe/row/0"}, "schema"),
    ],
)
def test_an_invalid_row_is_named_with_what_is_wrong(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "row.json"
    path.write_text(json.dumps({**EXAMPLE, **change}))
    with pytest.raises(UserError, match=message):
        read_row(path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(path.read_text()), json_schema())
