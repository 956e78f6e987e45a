"""Classifier-free guidance off until a transition point (Jain et al. 2025).

Also what ``opposite-guidance`` is made of: another guidance scale before each image's transition point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.errors import UserError
from lethebench.hooks import Batch, SamplerHooks, Step
from lethebench.method import Artefact, Family, Method, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.zoo import Model

CITATION = (
    "Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji: Classifier-Free Guidance inside the "
    "Attraction Basin May Cause Memorization. CVPR 2025. arXiv:2411.16738"
)
LICENCE = "Apache-2.0 (written from the paper; released code: MIT)"
UNSUPPORTED = (
    "its guidance is distilled into the model, so that no unconditional prediction is there to change"
)
POINTS = ("static", "dynamic")


def require_point(point: str, until: float) -> None:
    """Raise ValueError for a kind of transition point that isn't known, or a time outside 0 to 1000."""
    if point not in POINTS:
        raise ValueError(f"point is {' or '.join(POINTS)}, not '{point}'")
    if not 0 <= until <= 1000:
        raise ValueError(f"until is a time from 0 (image) to 1000 (noise), not {until}")


class EarlyGuidance(SamplerHooks, ABC):
    """Guides with another scale before each image's transition point.

    To the guided prediction it adds (early - scale) * (conditional - unconditional): what other methods
    changed in it stays, and the sampler's own scale as ``early`` changes nothing.
    """

    def __init__(self, early: float) -> None:
        self.early = early

    @abstractmethod
    def begin(self, batch: Batch) -> None:
        """Forget the last batch."""

    @abstractmethod
    def passed(self, difference: Tensor, step: Step) -> Tensor:
        """Which images are past their point at this step, bool ``[B]``, given conditional - unconditional."""

    def start(self, batch: Batch) -> Batch:
        """Begin anew. Raises UserError where there is no guidance to change."""
        if batch.conditioning.negative is None:
            raise UserError(
                "a guidance schedule needs classifier-free guidance: set the sampler's guidance_scale above 1"
            )
        self.begin(batch)
        return batch

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        """The prediction at each image's own scale."""
        assert unconditional is not None  # start saw the negative conditioning
        difference = conditional - unconditional
        change = (~self.passed(difference, step)).to(difference) * (self.early - step.guidance_scale)
        return combined + change.view(-1, *(1,) * (difference.dim() - 1)) * difference


class StaticPoint(EarlyGuidance):
    """The point is a time, the same for all images."""

    def __init__(self, early: float, until: float) -> None:
        super().__init__(early)
        self.until = until

    def begin(self, batch: Batch) -> None:
        """Learn the length of the model's own scale of times."""
        self._unit = 1000 / float(batch.model.pipe.scheduler.config.num_train_timesteps)

    def passed(self, difference: Tensor, step: Step) -> Tensor:
        """All images, from the first time that is ``until`` or less."""
        return difference.new_full((len(difference),), float(step.timestep) * self._unit <= self.until).bool()


class DynamicPoint(EarlyGuidance):
    """The point is the first local minimum of an image's l2 norm of conditional - unconditional.

    Seen one step late, as it rises again: guidance is on from that step. An image without one keeps the
    early scale to the end.
    """

    def begin(self, batch: Batch) -> None:
        """No image has passed."""
        self._norms: list[Tensor] = []
        self._passed = batch.noise.new_zeros(len(batch.keys)).bool()

    def passed(self, difference: Tensor, step: Step) -> Tensor:
        """The images whose norm fell and then rose, at this step or before."""
        self._norms = [*self._norms[-2:], difference.flatten(1).norm(dim=1)]
        if len(self._norms) == 3:
            before, least, now = self._norms
            self._passed = self._passed | ((before > least) & (now > least))
        return self._passed


@METHODS.register
@dataclass(frozen=True)
class GuidanceTransition(Method):
    """Leaves classifier-free guidance off until a transition point, where the attraction basin is left.

    Jain et al. 2025; released code SonyResearch/mitigating_memorization. With ``point`` ``static``
    (``generate_test_dataset_stp.py``) guidance is off at times above ``until``; ``dynamic``
    (``generate_test_dataset_dtp.py``) finds each image's own point: the first local minimum of the norm of
    conditional minus unconditional prediction, and guidance is 1 before it. The predictions are the model's
    own: velocities for v-prediction and flow matching (ours). After the point the guidance scale is the
    sampler's. The released code goes on with steps of a 200-step schedule after a static point; here the
    sampler's steps stay.

    Times are on the scale from 0 (image) to 1000 (noise), whatever the number of steps; in flow matching
    1000 times the noise's share. FLUX isn't supported: its guidance is distilled into the model.
    """

    point: str = setting("static", "static (a given time) or dynamic (each image's own)")
    until: float = setting(
        500.0, "static: the time until which guidance is off (paper: 500; 600 or 700 on Imagenette)"
    )
    early: float | None = setting(
        None, "guidance scale before the point; none: 0 if static, 1 if dynamic (released code)"
    )

    name = "guidance-transition"
    summary = "No classifier-free guidance until a transition point."
    family = Family.SAMPLING
    model_families: ClassVar = frozenset({"sd", "sdxl", "sd3"})
    unsupported_reason = UNSUPPORTED
    strengths: ClassVar = {
        "weak": {"until": 800.0},
        "dynamic": {"point": "dynamic"},
        "medium": {"until": 650.0},
        "strong": {},
    }
    citation = CITATION
    licence = LICENCE
    off: ClassVar = {"point": "static", "until": 1000.0}

    def __post_init__(self) -> None:
        """Refuse points that mean nothing."""
        require_point(self.point, self.until)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the guidance scale, each image's at its own time."""
        if self.point == "static":
            yield StaticPoint(0.0 if self.early is None else self.early, self.until)
        else:
            yield DynamicPoint(1.0 if self.early is None else self.early)
