"""AMG: guidance away from the nearest training image, its caption, and too specific a prompt.

Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024 (arXiv 2404.00922). Released code:
chenchen-usyd/AMG-sd (OpenRAIL-M), which needs a public retrieval service that is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class AMG(Method):
    """Guides an image away from its nearest reference, at the steps where it is too much like it.

    At each step sigma_t is how like the predicted clean image is to the nearest reference of a local index.
    Above the threshold lambda_t the guided prediction changes by G_spe + G_dup + G_sim:

    - despecification, G_spe = -s1 (e(x, y) - e(x)), s1 = max(min(c1 sigma, s0 - 1), 0): less of the prompt;
    - caption de-duplication, G_dup = -s2 (e(x, y_N) - e(x)), s2 = max(min(c2 sigma, s0 - s1 - 1), 0): away
      from the nearest reference's caption y_N;
    - dissimilarity, G_sim = c3 sqrt(1 - abar) grad_{x_t} sigma: away from the nearest reference itself. By
      default c3 grows as in the released code (``ramp``): a constant hardly acts at the late steps.

    s0 is the guidance scale. sigma is a cosine of copy descriptors (Eq. 9), or minus the distance relative to
    the neighbours' (nL2, Eq. 8; never positive, so that only G_sim acts). Other predictions than of noise are
    changed so that the clean image changes as it would by the paper's formula. FLUX has no unconditional
    prediction and is asked for the empty prompt's: where guidance is distilled (dev) a difference of
    predictions is divided by s0; where there is none (schnell) s0 is 1 and only G_sim acts (both ours).

    Unlike the released code: all terms come from one prediction and stand under the threshold, as in the
    paper (there G_spe acts wherever sigma is positive, G_sim's gradient is taken after the others, and
    G_dup, once on, stays for ten steps); references and predicted images are described alike; no images are
    left out at the beginning of a run. The threshold is relative to neutral prompts (ours), since
    another descriptor's cosines aren't SSCD's.

    The default settings, with the released code's constants, are strength ``strong``; more changes little on
    mini-sd. There it is G_sim that acts: less guidance alone doesn't stop a copy, and a concept's images are
    seldom like single references.
    """

    descriptor: str = setting(
        "copy-mini",
        "what is compared: copy-mini (built in, ours), sscd (paper: LAION), or by distance pixels (paper: "
        "CIFAR-10) or latents (ours: needs no decoding)",
    )
    sscd: str = setting("", "SSCD's TorchScript file, for descriptor sscd", place=True)
    preset: str = setting("amg-224", "SSCD's preprocessing: a preset of metric sscd (released code: amg-224)")
    index: str = setting(
        "", "file of your own reference index ('': made from the suite's training images)", place=True
    )
    captions: bool = setting(
        True, "whether the captions of the training images are known: without them there is no G_dup (ours)"
    )
    alpha: float = setting(0.5, "alpha of nL2 (paper: 0.5)")
    neighbours: int = setting(50, "neighbours k of nL2 (paper: 50)")
    schedule: str = setting(
        "neutral",
        "threshold lambda_t: neutral (quantile of neutral images at the step; ours), or from low to high, "
        "parabolic (paper) or exponential (released code)",
    )
    calibration_prompts: int = setting(
        64, "neutral prompts that the threshold is calibrated on, at most (ours)"
    )
    quantile: float = setting(
        0.95, "quantile of neutral images' sigma that is the threshold (ours)", applied=True
    )
    low: float = setting(
        0.3, "lambda_t at the noisiest step, else than neutral (released code: 0.3)", applied=True
    )
    high: float = setting(
        0.4, "lambda_t at the last step, else than neutral (released code: 0.4)", applied=True
    )
    c1: float | None = setting(
        None,
        "scale of G_spe; none: (s0 - 1) / 0.5 (released code; paper's number not known here)",
        applied=True,
    )
    c2: float | None = setting(
        None,
        "scale of G_dup; none: (s0 - s1 - 1) / 0.3 (released code; paper's number not known here)",
        applied=True,
    )
    c3: float = setting(100.0, "scale of G_sim (released code: 100; paper's not known here)", applied=True)
    ramp: float = setting(
        170.0,
        "c3 also grows with sigma - lambda_t and as e^((1000 - t) / ramp) (released code: 170, and sigma - "
        "0.3; 0: a constant c3, as the paper writes it)",
        applied=True,
    )
    min_duplicates: int = setting(
        0,
        "duplicates that the nearest reference needs for G_dup (paper: 0; released code: above 20)",
        applied=True,
    )
    gradient: str = setting(
        "image",
        "what G_sim's gradient flows through: image (decoder and descriptor, the prediction held fixed; "
        "released code) or denoiser (as well; slower)",
        applied=True,
    )

    name = "amg"
    summary = "Guidance away from the nearest training image, its caption and too specific a prompt."
    family = Family.SAMPLING
    knowledge = frozenset(
        {
            Knowledge.NEUTRAL_PROMPTS,
            Knowledge.TRAINING_IMAGES,
            Knowledge.MEMORIZED_PROMPTS,
            Knowledge.CONCEPT_NAMES,
            Knowledge.REFERENCE_INDEX,
        }
    )
    strengths: ClassVar = {
        "weak": {"c3": 10.0},
        "medium": {"c3": 30.0},
        "strong": {},
    }
    quick: ClassVar = {"calibration_prompts": 4}
    off: ClassVar = {"c1": 0.0, "c2": 0.0, "c3": 0.0}
    citation = "Chen, Liu, Xu: Towards Memorization-Free Diffusion Models, CVPR 2024 (arXiv 2404.00922)"
    licence = "Apache-2.0 (written from the paper; released code: OpenRAIL-M)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        for name, known in (
            ("descriptor", ("copy-mini", "sscd", "latents", "pixels")),
            ("schedule", ("neutral", "parabolic", "exponential")),
            ("gradient", ("image", "denoiser")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {', '.join(known)}, not '{getattr(self, name)}'")
        if self.descriptor == "sscd":
            from lethebench.metrics.sscd import PRESETS

            if not self.sscd:
                raise ValueError("descriptor sscd needs its TorchScript file: set sscd")
            if self.preset not in PRESETS:
                raise ValueError(f"preset is one of {', '.join(PRESETS)}, not '{self.preset}'")
        for name in ("neighbours", "calibration_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile is between 0 and 1, not {self.quantile}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")
        for name in ("c1", "c2", "c3", "ramp", "min_duplicates"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """The index or the training images, their captions, and neutral prompts for a relative threshold."""
        seen = {Knowledge.NEUTRAL_PROMPTS} if self.schedule == "neutral" else set()
        if self.index:
            return frozenset(seen | {Knowledge.REFERENCE_INDEX})
        seen.add(Knowledge.TRAINING_IMAGES)
        if self.captions:
            seen |= {Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES}
        return frozenset(seen)

    def fit(self, task: Task) -> Artefact:
        """Make or read the index, and calibrate the threshold."""
        from lethebench.methods.amg.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Guide away from the index while the context is open."""
        from lethebench.methods.amg.fit import hooks

        yield hooks(self, model, artefact)
