"""How a model is loaded: what saves memory or time and may move a result a little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from lethebench.errors import UserError
from lethebench.method import check_type, setting

OFFLOADS = ("none", "model", "sequential")
QUANTISATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class LoadSettings:
    """Settings of loading, for models that don't fit or to go faster. Raises UserError.

    Recorded in the row; the defaults change nothing.
    """

    attention_slicing: bool = setting(
        False, "compute attention a slice of heads at a time: less memory, slower"
    )
    offload: str = setting(
        "none", "keep on the CPU what isn't at work: none, model (whole components) or sequential (layers)"
    )
    compile: bool = setting(False, "torch.compile the denoiser: a minute once, then faster")
    quantise: str = setting("none", "weights of denoiser and T5 encoder: none, int8 or nf4 (CUDA)")

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        for field in fields(self):
            check_type("loading", LoadSettings, field.name, getattr(self, field.name))
        for name, known in (("offload", OFFLOADS), ("quantise", QUANTISATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is one of {', '.join(known)}, not '{getattr(self, name)}'")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> LoadSettings:
        """From settings by name. Raises UserError for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise UserError(f"loading has no setting '{name}': {hint}")
        return cls(**given)
