"""How a model is loaded: what saves memory or time and may move a result a little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from lethebench.errors import UserError
from lethebench.method import check_type, setting

OFFLOADS = ("none", "model", "sequential")
SAMPLING = "sampling"
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
    quantise: str = setting(
        "none", "weights of denoiser and T5 encoder: none, int8 (torchao) or nf4 (bitsandbytes, CUDA)"
    )
    checkpointing: bool = setting(
        False, "compute the denoiser's activations twice where gradients are needed: far less memory, slower"
    )

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        for field in fields(self):
            check_type("loading", LoadSettings, field.name, getattr(self, field.name))
        for name, known in (("offload", OFFLOADS), ("quantise", QUANTISATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is one of {', '.join(known)}, not '{getattr(self, name)}'")
        if self.compile and self.offload != "none":
            raise UserError(f"compile=true doesn't go with offload={self.offload}: leave one of them out")

    def refusal(self, method: str, family: str) -> str | None:
        """Why a method of a family (``sampling``, ``weights``, ``training``) can't run on a model loaded so.

        Weights that are packed or elsewhere can't be read, edited or trained: only methods that act while
        sampling can. None where the method can run.
        """
        found = [f"{n}={v}" for n in ("quantise", "offload") if (v := getattr(self, n)) != "none"]
        if not found or family == SAMPLING:
            return None
        return (
            f"{method} reads or changes the model's weights, which {' and '.join(found)} "
            f"{'packs' if self.quantise != 'none' else 'keeps elsewhere'}: leave it out of --load"
        )

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
