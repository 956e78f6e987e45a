"""Control: the model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from lethebench.method import Family, Method
from lethebench.registry import METHODS


@METHODS.register
@dataclass(frozen=True)
class Base(Method):
    """The unmitigated model, that every other row is compared with."""

    name = "base"
    summary = "The model as it is, unmitigated."
    family = Family.SAMPLING
    control = True
