"""UniForget: learnt masks that forget what was memorized, from neutral prompts alone.

Er Jin, Yang Zhang et al., "Unconsciously Forget: Mitigating Memorization Without Knowing What is being
Memorized" (the paper). No code was published; the mask machinery is that of EcoDiff (arXiv 2412.02852) by the
same authors. Every setting whose value is ours says so.
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
class UniForget(Method):
    """Prunes what neutral prompts don't need.

    Masks on the denoiser's feed-forward neurons, normalisation outputs and (UNets) hidden channels of the
    residual blocks are learnt so that the final latents of neutral prompts stay what they were while as many
    elements as possible go off (paper, eq. 3). What served memorized images only is lost with them. The masks
    are then made binary and their parts removed for good.

    Kinds of mask: ``lethebench.pruning.sites``. The paper masks FLUX, whose adaptive norms a UNet lacks, and
    which has no residual convolutions; for UNets ``norm`` means LayerNorm outputs and ``residual`` is added,
    since most of their weights are there (both our choice).
    """

    beta: float = setting(
        2.0, "weight of the masks' size in the loss; the paper's 1, 2 and 5 are weak, medium, strong"
    )
    ffn: bool = setting(True, "mask feed-forward neurons")
    norm: bool = setting(True, "mask normalisation outputs")
    residual: bool = setting(
        True, "mask hidden channels of a UNet's residual blocks (ours: no effect on transformers)"
    )
    attn: bool = setting(False, "mask attention heads (off in the paper: its Table 4)")
    objective: str = setting(
        "uniforget",
        "sparsity term: 'uniforget' (mean over all elements), 'ecodiff' (by layer), or 'ecodiff-raw' (by "
        "layer, of the mask parameters themselves)",
    )
    init: float = setting(3.0, "initial mask parameter (EcoDiff's FLUX configuration; the paper doesn't say)")
    temperature: float = setting(
        0.83, "temperature of the hard-concrete gate (EcoDiff's; the paper doesn't say)"
    )
    stretch_low: float = setting(-0.1, "lower end of the stretched gate before it is clamped to 0")
    stretch_high: float = setting(1.1, "upper end of the stretched gate before it is clamped to 1")
    delta_re: float = setting(0.5, "damps the gate's noise (paper, appendix C)")
    noise_per_image: bool = setting(
        True,
        "draw the gate's noise for each image, not for the batch (ours; EcoDiff's batches hold one image)",
    )
    gamma: float = setting(0.4, "slope of the relaxed mask in the sparsity term (paper, eq. 4)")
    delta: float = setting(1.0, "offset of the relaxed mask in the sparsity term (paper, eq. 4)")
    threshold: float = setting(
        0.0, "mask parameters above it stay on (ours: where the gate without noise is 1/2)"
    )
    steps: int = setting(60, "optimiser steps (the paper's 2000 are for 12 billion parameters)")
    prompts: int = setting(256, "neutral prompts to fit on, at most (paper: 256)")
    batch_size: int = setting(6, "prompts an optimiser step (paper: 20)")
    lr_ffn: float = setting(0.25, "learning rate of feed-forward masks (paper: 0.5)")
    lr_norm: float = setting(0.25, "learning rate of norm masks (paper: 0.5)")
    lr_residual: float = setting(0.25, "learning rate of residual masks (ours)")
    lr_attn: float = setting(0.25, "learning rate of attention masks (EcoDiff's FLUX configuration: 0.5)")
    weight_decay: float = setting(0.01, "decoupled weight decay of the mask parameters (paper: 1e-2)")
    adam_eps: float = setting(
        1e-12, "Adam's epsilon (ours: far below a gradient of beta / number of elements)"
    )
    cosine: bool = setting(True, "anneal the learning rates to 0 along a cosine (paper)")
    chain_steps: int = setting(
        5, "denoising steps of the chain while fitting (EcoDiff's FLUX configuration: 5)"
    )
    guidance: float | None = setting(None, "guidance scale while fitting; none takes the suite's (ours)")
    recompute: bool = setting(
        True, "backpropagate step by step in constant memory; off keeps the whole graph"
    )
    dtype: str = setting(
        "bfloat16", "type of the denoiser while fitting: bfloat16, float32 or model (masks: float32)"
    )

    name = "uniforget"
    summary = (
        "Learns, on neutral prompts, which parts of the model can go; what was memorized goes with them."
    )
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {"weak": {"beta": 1.0}, "medium": {"beta": 2.0}, "strong": {"beta": 5.0}}
    quick: ClassVar = {"steps": 3, "prompts": 6, "batch_size": 2, "chain_steps": 2}
    citation = (
        "Jin, Zhang, Mou, Dong, Decker, Kawaguchi, Stegmaier: Unconsciously Forget: Mitigating Memorization "
        "Without Knowing What is being Memorized"
    )
    licence = "Apache-2.0 (written from the paper; EcoDiff's constants: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that contradict themselves."""
        if not self.kinds:
            raise ValueError("no kind of mask is on: switch on ffn, norm, residual or attn")
        if self.objective not in ("uniforget", "ecodiff", "ecodiff-raw"):
            raise ValueError(f"objective is 'uniforget', 'ecodiff' or 'ecodiff-raw', not '{self.objective}'")
        if self.dtype not in ("bfloat16", "float32", "model"):
            raise ValueError(f"dtype is 'bfloat16', 'float32' or 'model', not '{self.dtype}'")
        for name in ("steps", "prompts", "batch_size", "chain_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.stretch_low >= 0 or self.stretch_high <= 1:
            raise ValueError(f"the stretch ({self.stretch_low}, {self.stretch_high}) must enclose 0 and 1")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of mask that are on."""
        return tuple(kind for kind in ("ffn", "norm", "residual", "attn") if getattr(self, kind))

    def fit(self, task: Task) -> Artefact:
        """Learn the masks and make them binary."""
        from lethebench.methods.uniforget.fit import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Zero the weights of what is off while the context is open.

        The output is that of the physically smaller model (``lethebench.pruning.shrink``); zeros leave every
        module under its name, for methods that are applied on top.
        """
        from lethebench.pruning import installed

        with installed(model.denoiser, artefact.tensors):
            yield SamplerHooks()
