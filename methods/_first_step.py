"""What the methods share that act before the first step, until a text's effect there is low enough.

The target counts in medians of neutral prompts on the model at hand, which ``fit`` measures (ours), or in the
papers' absolute units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FirstStepMethod(Method):
    """Base of ``wen``, ``sail`` and ``han``: what a target counts in, and its calibration."""

    unit: str = setting(
        "neutral", "what the target counts in: neutral (medians of neutral prompts; ours) or absolute (paper)"
    )
    neutral_prompts: int = setting(256, "neutral prompts to calibrate on, at most (ours)")
    batch_size: int = setting(
        32, "images a forward pass while calibrating (ours; results differ by rounding)"
    )

    family = Family.SAMPLING
    knowledge = frozenset({Knowledge.NEUTRAL_PROMPTS})

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.magnitude import require_settings

        require_settings(self)

    @property
    def calibrates(self) -> bool:
        """Whether there is a target that counts in medians of neutral prompts."""
        return self.unit == "neutral"

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Neutral prompts, where they are measured."""
        return self.knowledge if self.calibrates else frozenset()

    def fit(self, task: Task) -> Artefact:
        """Measure neutral prompts on the task's model, where the target counts in them."""
        from lethebench.magnitude import calibrated

        if not self.calibrates:
            return Artefact()
        return calibrated(task, self.neutral_prompts, self.batch_size, self.measured)

    def measured(self, first: Any) -> Tensor:
        """What the target is of, for each image of a ``FirstStep``: ``[B]``. Default: the magnitude."""
        from lethebench.magnitude import magnitudes

        return magnitudes(first.difference())
