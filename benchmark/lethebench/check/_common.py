"""What the contract suites of methods and metrics share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """The outcome of one check: ``passed``, ``failed`` or ``skipped`` with the reason."""

    name: str
    status: str
    message: str = ""

    def as_dict(self) -> dict[str, str]:
        """As JSON."""
        return dataclasses.asdict(self)


def named_checks(module: Mapping[str, Any]) -> dict[str, Callable[[Any], None]]:
    """A module's ``check_*`` functions by their names without ``check_``, in the order of the file."""
    return {
        name.removeprefix("check_"): function
        for name, function in module.items()
        if name.startswith("check_") and inspect.isfunction(function)
    }


def run_all(
    subject: Any,
    checks: Mapping[str, Callable[[Any], None]],
    applicable: Callable[[Any, str], str | None],
) -> list[Result]:
    """Every check on a subject. One that doesn't apply says why; one that raises has failed."""
    results = []
    for name, function in checks.items():
        try:
            reason = applicable(subject, name)
            if reason is not None:
                results.append(Result(name, "skipped", reason))
                continue
            function(subject)
            results.append(Result(name, "passed"))
        except Exception as error:
            what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            results.append(Result(name, "failed", " ".join(what.split())))
    return results


def random_states() -> dict[str, object]:
    """The global random states of torch, Python and numpy."""
    import random

    import numpy as np
    import torch

    of_numpy: Any = np.random.get_state()  # noqa: NPY002
    return {
        "torch": bytes(torch.get_rng_state().numpy()),
        "Python": random.getstate(),
        "numpy": (of_numpy[1].tobytes(), *of_numpy[2:]),
    }


def same_random_states(before: Mapping[str, object]) -> None:
    """Raise AssertionError where a global random state moved since ``before``."""
    for name, state in random_states().items():
        assert state == before[name], f"{name}'s global random state was used"


def model_state(model: Any) -> dict[str, Any]:
    """A model's parameters, hooks, processors and modes, to be compared by :func:`same_model`."""
    import torch

    found: dict[str, Any] = {}
    for name, part in sorted(model.pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            found |= {f"{name}.{k}": v.detach().clone() for k, v in part.state_dict().items()}
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules())
            found[f"{name} hooks"] = hooks
            found[f"{name} training"] = part.training
            found[f"{name} gradients"] = [p.requires_grad for p in part.parameters()]
            found[f"{name} processors"] = [getattr(m, "processor", None) for m in part.modules()]
    return found


def same_model(before: Mapping[str, Any], after: Mapping[str, Any], when: str) -> None:
    """Raise AssertionError unless two states of a model are the same, bit for bit."""
    import torch

    assert before.keys() == after.keys(), f"the model's parameters have other names {when}"
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, f"the model's {key} changed {when}"
