"""FlowEdit as de-memorization: the drawn image is edited from its prompt to a neutral one, without inversion.

Kulikov, Kleiner, Huberman-Spiegelglas, Michaeli, "FlowEdit: Inversion-Free Text-Based Editing Using
Pre-Trained Flow Models", ICCV 2025 (arXiv 2412.08629). Released code: fallenshadow/FlowEdit (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.method import setting
from lethebench.methods.flowedit.editing import Drawn, Editing, counted
from lethebench.registry import METHODS
from lethebench.seeding import generator

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED = {
    "sd3": {"n_max": 33 / 50, "source_guidance": 3.5, "target_guidance": 13.5},
    "flux": {"n_max": 24 / 28, "source_guidance": 1.5, "target_guidance": 5.5},
}
"""The released settings by model family (SD3_exp.yaml, FLUX_exp.yaml), ``n_max`` as a share of the steps."""


@METHODS.register
@dataclass(frozen=True)
class FlowEdit(Editing):
    """Draws the image for its prompt, then moves it by the difference of two velocities to a neutral prompt.

    At each of the last ``n_max`` steps the drawn image is noised; the velocity for its prompt is asked there,
    the one for the neutral prompt at the same point moved by the edit so far; their difference moves the
    edit (``lethebench.methods.flowedit.flow``). Only images of the target prompts are edited. UniForget's
    Figure 6 does the same on top of a pruned model: ``uniforget+flowedit``.

    Steps are given as shares, since the paper's counts (33 of 50, 24 of 28) mean nothing on a model drawn in
    4 steps. The guidance scales are classifier-free guidance on SD3 and the distilled guidance input on
    FLUX.1-dev; FLUX.1-schnell has no such input, and there they have no effect. The noise is each image's.

    Models that predict noise have no velocity along straight paths to edit with: sd and sdxl are left out.

    Unlike the released code: its SD3 branch fails for ``n_min`` above 0 (a name that isn't defined).
    """

    n_max: float | None = setting(
        None,
        "share of the steps, from the image's end, that edit: more changes more; none: the paper's, 33 of 50 "
        "on SD3 and 24 of 28 on FLUX",
        applied=True,
    )
    n_min: float = setting(
        0.0, "share of the last steps, at most n_max, that sample the neutral prompt (paper: 0)", applied=True
    )
    n_avg: int = setting(1, "draws of the noise a step that are averaged (paper: 1)", applied=True)
    source_guidance: float | None = setting(
        None, "guidance scale of the prompt; none: the paper's, 3.5 on SD3 and 1.5 on FLUX", applied=True
    )
    target_guidance: float | None = setting(
        None,
        "guidance scale of the neutral prompt; none: the paper's, 13.5 on SD3 and 5.5 on FLUX",
        applied=True,
    )

    name = "flowedit"
    summary = "Edits the drawn image from its prompt to a neutral one by the difference of their velocities."
    strengths: ClassVar = {"weak": {"n_max": 0.5}, "medium": {}, "strong": {"n_max": 1.0}}
    off: ClassVar = {"n_max": 0.0}
    citation = (
        "Kulikov, Kleiner, Huberman-Spiegelglas, Michaeli: FlowEdit: Inversion-Free Text-Based Editing Using "
        "Pre-Trained Flow Models. ICCV 2025. arXiv:2412.08629"
    )
    licence = "Apache-2.0 (written from the paper; released code: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        super().__post_init__()
        for name in ("n_max", "n_min"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a share of the steps, between 0 and 1, not {value}")
        if self.n_avg < 1:
            raise ValueError(f"n_avg must be at least 1, not {self.n_avg}")
        for name in ("source_guidance", "target_guidance"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")

    def edit(self, drawn: Drawn) -> Tensor:
        """The latents moved towards the neutral prompts."""
        from lethebench.methods.flowedit.flow import flow_edit

        n_max, of_source, of_target = (
            PUBLISHED[drawn.batch.model.family][name] if getattr(self, name) is None else getattr(self, name)
            for name in ("n_max", "source_guidance", "target_guidance")
        )
        generators = [generator("flowedit", k.suite, k.prompt.id, k.index) for k in drawn.keys]
        editing = counted(n_max, drawn.steps)
        return flow_edit(
            drawn.latents,
            drawn.levels,
            lambda latents, index: drawn.velocity(latents, index, drawn.source, of_source),
            lambda latents, index: drawn.velocity(latents, index, drawn.neutral, of_target),
            lambda: drawn.noise(generators),
            n_max=editing,
            n_min=min(counted(self.n_min, drawn.steps), editing),
            n_avg=self.n_avg,
        )
