"""The contract suites of methods and metrics: what ``lethe check`` runs, and what Lethe's own tests run."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, Literal

from lethebench.check import methods, metrics
from lethebench.check._common import Result, run_all
from lethebench.check.methods import Subject, applicable, checks
from lethebench.errors import UserError
from lethebench.plan import prompt_set
from lethebench.registry import METHODS, METRICS

__all__ = ["Result", "Subject", "applicable", "checks", "kind_of", "methods", "metrics", "run_checks"]

Kind = Literal["method", "metric"]
_REGISTRIES: dict[Kind, Any] = {"method": METHODS, "metric": METRICS}


def run_checks(
    spec: str,
    model: str = "mini-sd",
    prompts: str | None = None,
    *,
    kind: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Every check on a method or metric, a registered name or ``path.py:Class``.

    ``settings`` are a metric's; ``prompts`` names the prompt set (none: a metric's own). Raises
    UserError for an unknown name, setting or kind.
    """
    from lethebench.zoo import load_model

    if kind_of(spec, kind) == "method":
        if settings:
            raise UserError("a method is checked at its weakest strength: --set is for metrics")
        method = Subject(spec, load_model(model), prompt_set(prompts or "planted"))
        return run_all(method, methods.checks(), methods.applicable)
    shown = prompt_set(prompts or METRICS.get(spec).shown)
    metric = metrics.Subject(spec, lambda: load_model(model), shown, settings)
    return run_all(metric, metrics.checks(), metrics.applicable)


def kind_of(spec: str, kind: str | None = None) -> Kind:
    """Whether a name or ``path.py:Class`` is a method or a metric. Raises UserError if neither, or both."""
    if kind not in (None, *_REGISTRIES):
        raise UserError(f"unknown kind '{kind}': known {', '.join(_REGISTRIES)}")
    refused: dict[Kind, UserError] = {}
    for name, registry in _REGISTRIES.items():
        if kind in (None, name):
            try:
                registry.get(spec)
            except UserError as error:
                refused[name] = error
    found = [name for name in _REGISTRIES if kind in (None, name) and name not in refused]
    if len(found) > 1:
        raise UserError(f"'{spec}' is a method and a metric: say which with --kind method or --kind metric")
    if not found:
        raise UserError(_neither(spec, refused))
    return found[0]


def _neither(spec: str, refused: Mapping[Kind, UserError]) -> str:
    messages = [str(error) for error in refused.values()]
    if len(messages) == 1:
        return messages[0]
    if any(f"'{spec}' failed to import" in m for m in messages):
        return next(m for m in messages if "failed to import" in m)
    if all("must derive from" in m for m in messages):
        return f"{spec} is neither a method nor a metric: derive it from Method or Metric of lethebench"
    if ".py" in spec:
        return messages[0]
    hints = [m.partition(": did you mean ")[2].rstrip("?") for m in messages if "did you mean" in m]
    near = [name for hint in hints for name in hint.split(" or ")]
    near.sort(key=lambda name: -SequenceMatcher(None, spec, name).ratio())
    known = "'lethe list methods' and 'lethe list metrics'"
    hint = f"did you mean {' or '.join(near[:3])}?" if near else known
    return f"unknown method or metric '{spec}': {hint}"
