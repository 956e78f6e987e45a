"""NeMo: the value neurons of cross-attention that a memorized prompt needs, found and turned off.

Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, "Finding NeMo: Localizing Neurons Responsible For
Memorization in Diffusion Models", NeurIPS 2024 (arXiv 2406.02366). Released code:
ml-research/localizing_memorization_in_diffusion_models (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class NeMo(Method):
    """Turns off, for each memorized prompt, the few value neurons that its copy needs.

    1. A prompt's score is the SSIM of its first step's noise differences from several seeds, without guidance
       (``lethebench.methods.nemo.score``); seeds that are no more like another than the model's threshold are
       left out, and a prompt without any keeps all its neurons.
    2. Initial selection: neurons whose activation is unusual (z-score above theta against neutral prompts),
       with the k most active of each layer; theta falls and k grows until no seed's difference is like the
       unchanged model's.
    3. Refinement: layers, then single neurons, that aren't needed for this come back.

    With ``mode`` ``per-prompt`` (the paper's) each image of a fitted prompt is drawn with that prompt's
    neurons multiplied by ``scale``, in both halves of guidance; a prompt that wasn't fitted gets nothing, and
    the text alone decides which it is. ``union`` scales all found neurons for every prompt, in the weights.

    Unlike the released code: the score is taken at the first timestep (the code's loop goes on to the second
    without a scheduler step, with the first's latents); the threshold is calibrated without guidance (the
    code: 7, its halves swapped when they are combined); a neuron is in a selection once.

    On ``mini-sd``, whose memory is in the up blocks, too, the paper's layers don't bring the SSIM below the
    threshold even with all their neurons off: give ``up_blocks`` there.
    """

    targets: str = setting("all", "what to unlearn: triggers (memorized prompts), concepts or all (ours)")
    count: int = setting(0, "clusters of targets (items, concepts) to unlearn, 0 for all")
    seeds: int = setting(10, "seeds of a prompt's score (paper: 10)")
    threshold: float | None = setting(
        None,
        "SSIM that says memorized; none: the model's own, mean + 1 std on neutral prompts (SD 1.4: 0.428)",
    )
    calibration_prompts: int = setting(
        256, "neutral prompts that the threshold is calibrated on, at most (released code: 50 000)"
    )
    neutral_prompts: int = setting(50_000, "neutral prompts for the z-scores, at most (paper: 50 000)")
    theta: float = setting(5.0, "first z-score above which a neuron is selected (paper: 5)")
    theta_step: float = setting(0.25, "how much theta falls each time (paper: 0.25)")
    theta_min: float = setting(1.0, "theta that ends the search before it is tried (released code: 1)")
    stop_ssim: float | None = setting(
        None, "SSIM with the unchanged model at which enough is off; none: the threshold (paper)"
    )
    group: int = setting(1, "neurons that refinement gives back at a time (paper: 1; more is faster)")
    top_k: bool = setting(True, "also select each layer's k most active, k growing from 0 by 1 (paper)")
    up_blocks: bool = setting(
        False, "take the up blocks' value layers, too (ours; paper: down and mid blocks)"
    )
    batch_size: int = setting(64, "images a forward pass while fitting (ours; results differ by rounding)")
    dtype: str = setting(
        "model", "type of the denoiser while fitting: model (ours), or bfloat16 (released code: float16)"
    )
    mode: str = setting(
        "per-prompt",
        "per-prompt (each prompt's own neurons while it is drawn; paper) or union (all of them for good)",
        applied=True,
    )
    selection: str = setting(
        "refined", "which neurons: refined, or initial (before refinement: paper's Table 4)", applied=True
    )
    common: float = setting(
        0.0,
        "least share of the prompts (those with neurons) that need a neuron of the union (ours; paper: any)",
        applied=True,
    )
    scale: float = setting(0.0, "what deactivated neurons are multiplied by (paper: 0)", applied=True)

    name = "nemo"
    summary = "Turns off the value neurons of cross-attention that each memorized prompt needs."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.NEUTRAL_PROMPTS, Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES})
    model_families: ClassVar = frozenset({"sd", "sdxl"})
    unsupported_reason = (
        "it looks for neurons of the cross-attention to the prompt, which joint-attention transformers lack"
    )
    strengths: ClassVar = {
        "weak": {"scale": 0.5},
        "per-prompt": {},
        "initial": {"selection": "initial"},
        "union": {"mode": "union"},
    }
    quick: ClassVar = {"count": 2, "seeds": 3, "calibration_prompts": 4, "neutral_prompts": 16, "theta": 1.75}
    modes: ClassVar[tuple[str, ...]] = ("per-prompt", "union")
    citation = (
        "Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch: Finding NeMo: Localizing Neurons Responsible "
        "For Memorization in Diffusion Models, NeurIPS 2024 (arXiv 2406.02366)"
    )
    licence = "Apache-2.0 (written from the paper; released code: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        if self.mode not in self.modes:
            raise ValueError(f"mode is {' or '.join(self.modes)}, not '{self.mode}'")
        if self.selection not in ("refined", "initial"):
            raise ValueError(f"selection is refined or initial, not '{self.selection}'")
        if self.dtype not in ("model", "bfloat16"):
            raise ValueError(f"dtype is model or bfloat16, not '{self.dtype}'")
        for name, least in (
            ("seeds", 2),
            ("calibration_prompts", 2),
            ("neutral_prompts", 2),
            ("batch_size", 1),
            ("group", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.theta_step <= 0:
            raise ValueError(f"theta_step must be above 0, not {self.theta_step}")
        for name in ("scale", "common"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, not {getattr(self, name)}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """Neutral prompts, and those of what is unlearnt."""
        seen = {Knowledge.NEUTRAL_PROMPTS}
        if self.targets in ("triggers", "all"):
            seen.add(Knowledge.MEMORIZED_PROMPTS)
        if self.targets in ("concepts", "all"):
            seen.add(Knowledge.CONCEPT_NAMES)
        return frozenset(seen)

    def fit(self, task: Task) -> Artefact:
        """Find each target prompt's neurons."""
        from lethebench.methods.nemo.fit import fit

        return fit(self, task)

    def facts(self, artefact: Artefact) -> Mapping[str, Any]:
        """The facts of the neurons that ``selection`` and ``common`` take."""
        from lethebench.methods.nemo.fit import common, facts_at

        return facts_at(self.selection, artefact, lambda masks: common(masks, self.common))

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Scale the neurons while the context is open: each prompt's own, or all of them in the weights."""
        from lethebench.methods.nemo.fit import installed

        with installed(self, model, artefact.tensors) as hooks:
            yield hooks
