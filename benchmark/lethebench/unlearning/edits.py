"""Changes of a model's weights: made inside a context, kept as an artefact, put on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lethebench.zoo import Model

EDIT = "edit."
"""Prefix of an artefact's tensors: what is added to a parameter, by ``<component>.<parameter>``."""

COMPONENTS = ("denoiser", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What a parameter's name may start with."""


def component(model: Model, name: str) -> nn.Module:
    """The module that a name's first part stands for. Raises KeyError where the model has none."""
    found = model.denoiser if name == "denoiser" else getattr(model.pipe, name, None)
    if name not in COMPONENTS or found is None:
        raise KeyError(f"{model.name} has no component '{name}'")
    return found  # type: ignore[no-any-return]


def parameter(model: Model, name: str) -> nn.Parameter:
    """The parameter ``<component>.<parameter>``. Raises KeyError where there is none."""
    part, _, rest = name.partition(".")
    try:
        return component(model, part).get_parameter(rest)
    except AttributeError as error:
        raise KeyError(f"{model.name} has no parameter '{name}'") from error


@dataclass
class Editable:
    """Parameters that may be trained or assigned while :func:`editable` is open."""

    model: Model
    parameters: dict[str, nn.Parameter]
    before: dict[str, Tensor]

    def changes(self) -> dict[str, Tensor]:
        """What was added to each parameter, as an artefact's tensors (those that didn't change left out)."""
        found = {}
        for name, value in self.parameters.items():
            difference = value.detach() - self.before[name]
            if bool(difference.any()):
                found[EDIT + name] = difference.cpu()
        return found

    def facts(self) -> dict[str, Any]:
        """``parameters_changed``: the changed entries, as a share of the denoiser's parameters."""
        changed = sum(
            int((value.detach() != self.before[name]).sum()) for name, value in self.parameters.items()
        )
        total = sum(p.numel() for p in self.model.denoiser.parameters())
        return {"parameters_changed": changed / total, "changed_entries": changed}


@contextmanager
def editable(model: Model, names: Sequence[str]) -> Iterator[Editable]:
    """Let the named parameters be trained (they require gradients) or assigned; then restore them.

    Bit for bit. Names are ``<component>.<parameter>``. Gradients are on inside, as a runner may have
    them off.
    """
    parameters = {name: parameter(model, name) for name in dict.fromkeys(names)}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    wanted = {name: value.requires_grad for name, value in parameters.items()}
    try:
        for value in parameters.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            yield Editable(model, parameters, before)
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.requires_grad_(wanted[name])
                value.grad = None
                value.copy_(before[name])


@contextmanager
def applied(model: Model, tensors: Mapping[str, Tensor], share: float = 1.0) -> Iterator[None]:
    """Add ``share`` of an artefact's changes to the weights while the context is open; then restore them.

    Bit for bit, and for any share: 0 is the identity. Tensors without the prefix ``edit.`` are left alone.
    """
    changes = {n.removeprefix(EDIT): value for n, value in tensors.items() if n.startswith(EDIT)}
    parameters = {name: parameter(model, name) for name in changes}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        with torch.no_grad():
            for name, value in parameters.items():
                value.add_(changes[name].to(value), alpha=share)
        yield
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
