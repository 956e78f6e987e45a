"""What ``lethe list`` and ``lethe info`` show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lethebench.errors import UserError
from lethebench.registry import ATTACKS, METHODS, METRICS, MODELS, PROMPT_SETS, Registry
from lethebench.specs import load_suite, suite_names

REGISTRIES: dict[str, Registry[Any]] = {
    "methods": METHODS,
    "metrics": METRICS,
    "prompt-sets": PROMPT_SETS,
    "models": MODELS,
    "attacks": ATTACKS,
}


def entries(what: str) -> list[dict[str, Any]]:
    """One record for each registered thing of a kind: name, summary, or the error of its import."""
    if what == "suites":
        return [{"name": n, "summary": load_suite(n).description} for n in suite_names()]
    registry = REGISTRIES[what]
    found = [{"name": name, **_facts(what, item)} for name, item in registry.items()]
    broken = [
        {"name": name, "summary": "", "error": error} for name, error in sorted(registry.errors.items())
    ]
    return found + broken


def _facts(what: str, item: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"summary": getattr(item, "summary", "")}
    if what == "methods":
        facts |= {
            "family": str(item.family),
            "knowledge": sorted(map(str, item.knowledge)),
            "strengths": list(item.strengths),
            "control": item.control,
            "model_families": sorted(item.model_families),
            "unsupported_reason": item.unsupported_reason,
        }
    if what == "metrics":
        facts |= {"scores": [s.name for s in item.scores], "needs": sorted(item.needs)}
    if what == "attacks":
        facts |= {"knowledge": item.knowledge}
    if what == "models":
        facts |= {"family": item.family, "builtin": item.builtin}
    return facts


def info(what: str, name: str) -> dict[str, Any]:
    """All that is known of one thing, registered or of the user's own. Raises UserError."""
    if what == "suite":
        return _suite(name)
    item = _item(what, name)
    found = {"name": item.name, **_facts(f"{what}s", item)}
    if what == "method":
        found |= _method(item)
    elif what == "metric":
        found |= _metric(item)
    elif what == "attack":
        found |= {"citation": item.citation, "settings": _settings(item)}
    elif what == "model":
        found |= {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    else:
        found |= _prompt_set(item)
    return found


def _item(what: str, name: str) -> Any:
    """A plugin, by name or ``path.py:Class``; a prompt set, also by YAML file; a model, also by folder."""
    if what == "prompt-set":
        from lethebench.plan import prompt_set

        return prompt_set(name)
    if what == "model":
        from lethebench.zoo import find_model

        return find_model(name)
    return REGISTRIES[f"{what}s"].get(name)


def _suite(name: str) -> dict[str, Any]:
    from lethebench.reported import as_record, reported

    suite = load_suite(name)
    found = reported(suite.name)
    return suite.model_dump(mode="json") | (as_record(found) if found is not None else {})


def _metric(item: Any) -> dict[str, Any]:
    from lethebench.metric import detectors

    return {
        "version": item.version,
        "source": item.source,
        "settings": _settings(item),
        "detectors": {column: f"{end} says memorized" for column, end in detectors(item()).items()},
        "records": sorted(item.records),
        "scores": {s.name: f"{s.unit}, better {s.direction}: {s.help}" for s in item.scores},
    }


def _settings(item: Any) -> dict[str, str]:
    """Each setting with its default and help."""
    fields = dataclasses.fields(item) if dataclasses.is_dataclass(item) else ()
    return {f.name: f"{f.default!r}: {f.metadata.get('help', '')}" for f in fields}


def _method(item: Any) -> dict[str, Any]:
    return {
        "citation": item.citation,
        "licence": item.licence,
        "strengths": {k: dict(v) for k, v in item.strengths.items()},
        "settings": _settings(item),
    }


def _prompt_set(prompts: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"version": prompts.version, "manifest": prompts.manifest()}
    counts = getattr(prompts, "counts", None)
    if counts is not None:
        found["counts"] = counts()
    return found


def write_sheet(what: str, name: str, path: Path) -> None:
    """Write a prompt set's contact sheet. Raises UserError where there is none."""
    from lethebench.plan import prompt_set

    if what != "prompt-set":
        raise UserError("only a prompt set has a contact sheet: lethe info prompt-set NAME --sheet FILE.png")
    prompts = prompt_set(name)
    draw = getattr(prompts, "contact_sheet", None)
    if draw is None:
        raise UserError(f"prompt set '{name}' has no contact sheet")
    draw(path)


def text(record: dict[str, Any]) -> str:
    """A record as indented text; tables as tables."""
    lines = []
    for key, value in record.items():
        if hasattr(value, "to_string"):
            lines += [f"{key}:", value.to_string(index=False)]
        elif isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {k}: {v}" for k, v in value.items()]
        elif isinstance(value, list):
            lines.append(f"{key}: {', '.join(map(str, value))}")
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines)


def as_json(value: Any) -> Any:
    """What JSON can't hold: a table as a list of records, anything else as its text."""
    if hasattr(value, "to_json"):
        return json.loads(value.to_json(orient="records"))
    return str(value)
