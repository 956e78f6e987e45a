"""Han et al.: initial noise from which the sampling leaves the attraction basin early.

Han, Kim, Joo, Hong, Lee, "Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion
Models", NeurIPS 2025 (arXiv 2510.08625), section 3.2 and algorithm 1. Released code:
hygnhan/init_noise_diffusion_memorization, which has no licence: written from the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, setting
from lethebench.methods._first_step import FirstStepMethod
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class Han(FirstStepMethod):
    """Changes an image's initial noise until the text moves the first prediction little; the prompt stays.

    With d(x) the conditional minus unconditional prediction at the first step:

    - ``per-sample``: AdamW moves the noise down the gradient of |d| until it is at or below the target. An
      image that is there from the start keeps its noise, bit for bit.
    - ``batch-wise`` (algorithm 1): ``adjustments`` times x becomes ``x - gamma (d(x + rho d / |d|) - d(x))``,
      without gradients; then guidance is off while the timestep is above ``tau``. The name says that one
      setting serves a whole batch: the paper's formula and code treat each image alone, and so do we. Every
      image is changed, memorized or not.

    Ours: the target counts in medians of neutral prompts on the model at hand (paper: 0.9 on Stable Diffusion
    1.4), and the steps are fewer (paper: up to 1000, each a pass through the denoiser and back, over which
    weight decay alone would shrink the noise by a tenth at lr 0.01). ``rho`` is for latents of 4 x 64 x 64,
    whose noise is 128 long; on others it is the same share of the noise. The code doesn't scale the
    batch-wise input as Euler asks; ours is scaled.

    FLUX samples without guidance: the empty prompt is asked for at the first step, and in batch-wise mode its
    prediction takes the prompt's place while the timestep is above ``tau``.
    """

    mode: str = setting("per-sample", "per-sample or batch-wise")
    target: float = setting(
        0.5,
        "per-sample: magnitude to reach, in units of `unit` (ours; paper: absolute, 0.9 on SD 1.4)",
        applied=True,
    )
    lr: float = setting(0.01, "per-sample: AdamW's learning rate (paper: 0.01, SD 2: 0.1)", applied=True)
    iterations: int = setting(50, "per-sample: steps, at most (ours; paper: 1000)", applied=True)
    weight_decay: float = setting(0.01, "per-sample: AdamW's (released code: its default)", applied=True)
    adjustments: int = setting(2, "batch-wise: adjustments M (paper: 2, SD 2: 4)", applied=True)
    gamma: float = setting(0.7, "batch-wise: strength of an adjustment (paper: 0.7)", applied=True)
    rho: float = setting(50.0, "batch-wise: length of the perturbation (paper: 50, SD 2: 30)", applied=True)
    tau: float = setting(
        900.0,
        "batch-wise: timestep (of 1000) above which guidance is off (paper: 900, SD 2: 917)",
        applied=True,
    )

    name = "han"
    summary = "Optimises the initial noise until the first step's text-conditional magnitude is low."
    strengths: ClassVar = {
        "weak": {"target": 1.0},
        "medium": {"target": 0.75},
        "strong": {"target": 0.5},
    }
    quick: ClassVar = {"neutral_prompts": 8, "iterations": 3}
    off: ClassVar = {"iterations": 0}
    modes: ClassVar[tuple[str, ...]] = ("per-sample", "batch-wise")
    citation = (
        "Han, Kim, Joo, Hong, Lee: Adjusting Initial Noise to Mitigate Memorization in Text-to-Image "
        "Diffusion Models. NeurIPS 2025. arXiv:2510.08625"
    )
    licence = "Apache-2.0 (written from the paper; released code: none)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        super().__post_init__()
        if self.mode not in self.modes:
            raise ValueError(f"mode is {' or '.join(self.modes)}, not '{self.mode}'")
        for name in ("adjustments", "gamma", "rho"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")

    @property
    def calibrates(self) -> bool:
        """Whether a target is to be counted in medians of neutral prompts."""
        return self.mode == "per-sample" and self.unit == "neutral"

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change each image's noise when its batch starts."""
        from lethebench.magnitude import limit
        from lethebench.methods.han.hooks import BatchWise, PerSample

        if self.mode == "batch-wise":
            yield BatchWise(self)
        else:
            yield PerSample(self, limit(self.target, self.unit, artefact))
