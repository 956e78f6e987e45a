"""RF-Inversion as de-memorization: the drawn image is inverted to noise and drawn again for a neutral prompt.

Rout, Chen, Ruiz, Caramanis, Shakkottai, Chu, "Semantic Image Inversion and Editing using Rectified Stochastic
Differential Equations", ICLR 2025 (arXiv 2410.10792). Released code: LituRout/RF-Inversion and diffusers'
examples/community/pipeline_flux_rf_inversion.py (both Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from lethebench.method import setting
from lethebench.methods.flowedit.editing import Drawn, Editing, counted
from lethebench.registry import METHODS
from lethebench.seeding import generator

if TYPE_CHECKING:
    from torch import Tensor


@METHODS.register
@dataclass(frozen=True)
class RFInversion(Editing):
    """Inverts the drawn image without a prompt, then draws a neutral prompt from there, held near the image.

    The inversion goes from the image to noise by the empty prompt's velocity, pulled by ``gamma`` towards
    each image's own normal noise; the drawing goes back by the neutral prompt's, pulled by ``eta`` towards
    the image in the steps from ``start`` to ``stop`` (``lethebench.methods.rf_inversion.flow``). Only images
    of the target prompts are edited.

    Published for FLUX.1-dev. It works on SD3 as well, whose field is of the same kind; there the guidance is
    classifier-free, and the inversion has none. FLUX.1-schnell takes no guidance. Models that predict noise
    have no velocity along straight paths: sd and sdxl are left out.

    Unlike the released code: the inversion goes back through the drawing's own noise levels. The release
    takes the drawing's step sizes from the noisy end and asks the model at times i / (steps + 1), which
    aren't its latents' levels, so that gamma = 1 doesn't end at the noise. Its decay of eta, off by default,
    is left out.
    """

    share: float = setting(
        1.0,
        "share of the steps, from the image's end, that are inverted and drawn again (released code: "
        "`strength`, 1)",
        applied=True,
    )
    gamma: float = setting(
        0.5, "pull of the inversion to noise, 0 to 1: more forgets more (released: 0.5)", applied=True
    )
    eta: float = setting(
        0.9, "pull of the drawing to the image, 0 to 1: more keeps more (released: 0.9)", applied=True
    )
    start: float = setting(0.0, "share of the steps after which eta begins (released: 0)", applied=True)
    stop: float = setting(
        0.25, "share of the steps after which eta ends (released: 7 of 28; at most 1)", applied=True
    )
    source_guidance: float = setting(
        0.0, "guidance input of the inversion on FLUX.1-dev (released: 0)", applied=True
    )
    target_guidance: float | None = setting(
        None, "guidance scale of the drawing; none: the sampler's (released: 3.5, FLUX.1-dev's)", applied=True
    )

    name = "rf-inversion"
    summary = "Inverts the drawn image to noise and draws a neutral prompt from there, held near the image."
    strengths: ClassVar = {"weak": {"stop": 0.5}, "medium": {}, "strong": {"eta": 0.0}}
    off: ClassVar = {"share": 0.0}
    citation = (
        "Rout, Chen, Ruiz, Caramanis, Shakkottai, Chu: Semantic Image Inversion and Editing using Rectified "
        "Stochastic Differential Equations. ICLR 2025. arXiv:2410.10792"
    )
    licence = "Apache-2.0 (written from the paper; released code: Apache-2.0)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        super().__post_init__()
        for name in ("share", "gamma", "eta", "start", "stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, not {getattr(self, name)}")
        if self.start > self.stop:
            raise ValueError(f"start is {self.start}, after stop, {self.stop}")
        for name in ("source_guidance", "target_guidance"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")

    def edit(self, drawn: Drawn) -> Tensor:
        """The latents inverted, and drawn again for the neutral prompts."""
        from lethebench.methods.rf_inversion.flow import controlled, inverted

        count, steps = counted(self.share, drawn.steps), drawn.steps
        if count == 0:
            return drawn.latents
        first = steps - count
        levels = drawn.levels[first:]
        rising = levels[::-1]
        guidance = self.target_guidance
        if guidance is None:
            guidance = drawn.batch.settings.guidance_scale
        generators = [generator("rf-inversion", k.suite, k.prompt.id, k.index) for k in drawn.keys]
        noised = inverted(
            drawn.latents,
            drawn.noise(generators),
            lambda latents, index: drawn.velocity(latents, steps - index, drawn.empty, self.source_guidance),
            [(level, after - level) for level, after in pairwise(rising)],
            self.gamma,
        )
        on = range(counted(self.start, steps), counted(self.stop, steps))
        return controlled(
            noised,
            drawn.latents,
            lambda latents, index: drawn.velocity(latents, first + index, drawn.neutral, guidance),
            levels,
            [self.eta if index in on else 0.0 for index in range(count)],
        )
