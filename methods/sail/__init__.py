"""SAIL: initial noise where the conditional density is less sharp.

Jeon, Kim, No, "Understanding and Mitigating Memorization in Generative Models via Sharpness of Probability
Landscapes", ICML 2025 (arXiv 2412.04140), section 5 and algorithm 2. Released code:
Dongjae0324/sharpness_memorization_diffusion, which has no licence: written from the formulas.
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
    from torch import Tensor

    from lethebench.magnitude import FirstStep
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class SAIL(FirstStepMethod):
    """Changes an image's initial noise until the text sharpens the density less there; the prompt stays.

    With d(x) the conditional minus unconditional prediction at the first step and u the direction of the
    score difference (that of -d, of length 1), the loss of an image is ``sharpness^2 + alpha |x|^2``, whose
    second term keeps the noise likely under the unit normal. ``objective`` says what the sharpness is:

    - ``paper``: ``|d| |d(x + delta u) - d(x)| / delta``, the finite difference of the product of Hessian
      difference and score difference (section 5.1). The division is in the paper's Taylor expansion and not
      in its loss; without it a perturbation normalised to ``delta`` (algorithm 2) would leave out |d|
      (on ``mini-sd`` it then hardly tells what is memorized: medians 0.43 and 0.40);
    - ``released``: ``|d(x - delta u)|``, what the code for Stable Diffusion 1.4 has: no difference, no
      squares (its loss is ``sharpness + alpha |x|``), and the perturbation against the score's difference.

    Adam moves the noise, the gradient of u included, until the sharpness is at or below the target. An image
    that is there from the start keeps its noise, bit for bit.

    The paper's alpha is the code's, for a loss without squares. With both terms squared, as the paper prints
    them, 0.05 makes the noise a third shorter in ten steps on ``mini-sd``: give a smaller one there. The
    paper's objective falls there as asked, but the magnitude hardly does, and copies stay; ``released``
    lowers both.

    Ours: the target counts in medians of neutral prompts, of the sharpness alone (the paper's, 7.6 to 9 for
    Stable Diffusion 1.4, is of the whole loss and so of the latent's size); the raw prediction stands for the
    score, whose factor is left out (in flow matching it is zero at the first step). An image keeps to its own
    noise: the code starts again from other noise, with a target that rises, where ten steps don't reach it.
    The code's u is that of the first noise at every step, and its input isn't scaled as Euler asks.

    FLUX samples without guidance: the empty prompt is asked for at the first step alone.
    """

    target: float = setting(
        1.0, "sharpness to reach, in units of `unit` (ours; paper: absolute, of the loss)", applied=True
    )
    objective: str = setting("paper", "what is minimised: paper, or released (the code's simplification)")
    delta: float = setting(1.0, "length of the perturbation (released code: 1)")
    alpha: float = setting(
        0.05, "weight of the noise's norm (paper: 0.05 on Stable Diffusion 1.4, 0.01 on 2.0)", applied=True
    )
    lr: float = setting(0.05, "Adam's learning rate (paper: 0.05)", applied=True)
    iterations: int = setting(10, "steps of the optimiser, at most (released code: 10)", applied=True)

    name = "sail"
    summary = "Optimises the initial noise until the text's sharpness at the first step is low."
    strengths: ClassVar = {
        "weak": {"target": 1.0},
        "medium": {"target": 0.75},
        "strong": {"target": 0.5},
    }
    quick: ClassVar = {"neutral_prompts": 8}
    off: ClassVar = {"iterations": 0}
    objectives: ClassVar[tuple[str, ...]] = ("paper", "released")
    citation = (
        "Jeon, Kim, No: Understanding and Mitigating Memorization in Generative Models via Sharpness of "
        "Probability Landscapes. ICML 2025. arXiv:2412.04140"
    )
    licence = "Apache-2.0 (written from the paper; released code: none)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        super().__post_init__()
        if self.objective not in self.objectives:
            raise ValueError(f"objective is {' or '.join(self.objectives)}, not '{self.objective}'")
        if self.delta <= 0:
            raise ValueError(f"delta must be above 0, not {self.delta}")
        if self.alpha < 0:
            raise ValueError(f"alpha must be at least 0, not {self.alpha}")

    def measured(self, first: FirstStep) -> Tensor:
        """The sharpness of each image's own noise."""
        from lethebench.methods.sail.hooks import sharpness

        return sharpness(first.difference, first.batch.noise, self.objective, self.delta)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change each image's noise when its batch starts."""
        from lethebench.magnitude import limit
        from lethebench.methods.sail.hooks import SAILHooks

        yield SAILHooks(self, limit(self.target, self.unit, artefact))
