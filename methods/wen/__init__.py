"""Wen et al.: a prompt embedding that lowers the text-conditional magnitude of the first step.

Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024
(arXiv 2407.21720), inference-time mitigation. Released code: YuxinWenRick/diffusion_memorization
(``aug_prompt`` of local_sd_pipeline.py), which has no licence: written from the formulas.
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
class Wen(FirstStepMethod):
    """Changes an image's token embeddings until its text-conditional magnitude at the first step is low.

    The magnitude is the norm of conditional minus unconditional prediction. AdamW moves the conditional
    embedding down its gradient for a few steps, and stops as soon as the magnitude is at or below the target;
    an image that is there from the start is left as it is, bit for bit.

    The gradient of the first token (CLIP's begin token) is zero; AdamW's weight decay multiplies it, like all
    others, by ``1 - lr * weight_decay`` a step (0.995 after ten at the defaults), as in the released code.
    FLUX's T5 has no begin token: all move. Pooled embeddings (SDXL, SD 3, FLUX) stay, so the magnitude may
    have a floor there.

    The released code's loss is the norm over all of a prompt's images at once, which grows with the square
    root of their number, and they share one embedding. Here each image has its own norm, embedding and stop.
    The code's target (3 for four images on Stable Diffusion 1.4) fits one model, size and number of images;
    ours counts in medians of neutral prompts on the model at hand, calibrated by ``fit``. The code's optional
    penalty on the embedding's change, off there by default, is left out.

    FLUX samples without guidance: the empty prompt is asked for at the first step alone, to have a magnitude.
    """

    target: float = setting(
        1.0,
        "magnitude to reach, in units of `unit` (ours; paper's code: absolute, 3 for four images)",
        applied=True,
    )
    lr: float = setting(0.05, "AdamW's learning rate (released code: 0.05)", applied=True)
    iterations: int = setting(10, "steps of the optimiser, at most (paper: 10)", applied=True)
    weight_decay: float = setting(0.01, "AdamW's (released code: its default, 0.01)", applied=True)

    name = "wen"
    summary = "Optimises the prompt embedding until the first step's text-conditional magnitude is low."
    strengths: ClassVar = {
        "weak": {"target": 1.0},
        "medium": {"target": 0.75},
        "strong": {"target": 0.5},
    }
    quick: ClassVar = {"neutral_prompts": 8}
    off: ClassVar = {"iterations": 0}
    citation = (
        "Wen, Liu, Chen, Lyu: Detecting, Explaining, and Mitigating Memorization in Diffusion Models. "
        "ICLR 2024. arXiv:2407.21720"
    )
    licence = "Apache-2.0 (written from the paper; released code: none)"

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change each image's embeddings when its batch starts."""
        from lethebench.magnitude import limit
        from lethebench.methods.wen.hooks import WenHooks

        yield WenHooks(self, limit(self.target, self.unit, artefact))
