"""Negative guidance until a transition point (Jain et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import Batch, SamplerHooks, Step
from lethebench.method import Artefact, Family, Method, setting
from lethebench.methods.guidance_transition import (
    CITATION,
    LICENCE,
    UNSUPPORTED,
    EarlyGuidance,
    StaticPoint,
    require_point,
)
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.zoo import Model


class PrepassPoint(EarlyGuidance):
    """The point is found on a chain that is drawn with the early guidance to its end, before the real one.

    ``early`` None is minus the sampler's guidance scale.
    """

    def __init__(self, early: float | None) -> None:
        super().__init__(0.0 if early is None else early)
        self._opposite = early is None

    def begin(self, batch: Batch) -> None:
        """Draw the chain and find each image's first step of ordinary guidance."""
        if self._opposite:
            self.early = -batch.settings.guidance_scale
        self._first = transition_steps(turns(batch, self.early))

    def passed(self, difference: Tensor, step: Step) -> Tensor:
        """The images whose step it is, or was."""
        return step.index >= self._first


def turns(batch: Batch, scale: float) -> Tensor:
    """1 - cosine of the latents before and after each step at a guidance scale, float64 ``[B, steps]``.

    The chain starts from the batch's noise and conditioning; hooks of other methods play no part in it.
    Raises UserError for a scheduler that remembers earlier steps.
    """
    import torch

    from lethebench.sampler import Chain

    chain = Chain(batch.model, batch.conditioning, batch.settings, batch.keys)
    latents, found = chain.initial(batch.noise), []
    for index in range(chain.steps):
        _, unconditional, conditional = chain.predict(index, latents)
        assert unconditional is not None
        guided = unconditional + scale * (conditional - unconditional)
        after = chain.advance(index, latents, guided)
        before, now = (x.flatten(1).cpu().double() for x in (latents, after))
        found.append(1 - torch.cosine_similarity(before, now))
        latents = after
    return torch.stack(found, dim=1)


def transition_steps(turns: Tensor) -> Tensor:
    """The released code's choice of a step among the local minima of ``turns`` ``[B, steps]``: int ``[B]``.

    The first; the second where the first is step 1 and there are more; a tenth of the steps, one at least,
    where there is none (released code: step 5 of 50).
    """
    inner = turns[:, 1:-1]
    least = (inner < turns[:, :-2]) & (inner < turns[:, 2:])
    found = [[i + 1 for i, here in enumerate(row) if here] for row in least.tolist()]
    none = max(1, round(turns.shape[1] / 10))
    chosen = [steps[1] if steps[:1] == [1] and len(steps) > 1 else (steps or [none])[0] for steps in found]
    return turns.new_tensor(chosen).long()


@METHODS.register
@dataclass(frozen=True)
class OppositeGuidance(Method):
    """Guides away from the prompt until a transition point, to leave the attraction basin sooner.

    Jain et al. 2025; released code SonyResearch/mitigating_memorization. With ``point`` ``static``
    (``generate_test_dataset_stp.py``) guidance is negative at times above ``until``. ``dynamic``
    (``generate_test_dataset-opposite_guidance.py``) first draws each image with negative guidance to the end;
    the point is the first local minimum of how far a step turns the latents (1 - cosine of the latents before
    and after it). After the point the guidance scale is the sampler's.

    Unlike the released code: the sampler's steps stay (there 200 from the point on); the early scale is the
    same at every step (there the dynamic script flips its sign each time, and ends at the point by
    ``exit(0)``). Times are on the scale from 0 to 1000, and FLUX isn't supported, as for
    ``guidance-transition``. The dynamic point doubles the cost, and needs a scheduler without memory: DDIM or
    Euler.
    """

    point: str = setting("static", "static (a given time) or dynamic (each image's own)")
    until: float = setting(650.0, "static: the time until which guidance is negative (paper: 650)")
    early: float | None = setting(
        None,
        "guidance scale before the point; none: -2 if static, minus the sampler's if dynamic (released code)",
    )

    name = "opposite-guidance"
    summary = "Negative classifier-free guidance until a transition point."
    family = Family.SAMPLING
    model_families: ClassVar = frozenset({"sd", "sdxl", "sd3"})
    unsupported_reason = UNSUPPORTED
    # The dynamic point is the strongest where it comes late: on mini-sd at step 16 of 20.
    strengths: ClassVar = {
        "weak": {"until": 900.0},
        "medium": {"until": 800.0},
        "strong": {},
        "dynamic": {"point": "dynamic"},
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
            yield StaticPoint(-2.0 if self.early is None else self.early, self.until)
        else:
            yield PrepassPoint(self.early)
