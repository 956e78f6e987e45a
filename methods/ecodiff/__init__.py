"""EcoDiff: masks learnt to make a model smaller, from neutral prompts alone.

Yang Zhang, Er Jin et al., "EcoDiff: Low-Cost Pruning of Diffusion Models" (arXiv 2412.02852), code
YaNgZhAnG-V5/EcoDiff. What UniForget adapts: the masks are fitted by ``lethebench.methods.uniforget``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting
from lethebench.methods.uniforget import UniForget
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class EcoDiff(Method):
    """Prunes a stated share of the model, that which neutral prompts need least.

    Made for compression, not for forgetting: is it UniForget's objective that forgets, or does any learnt
    mask? Masks on attention heads and feed-forward neurons are learnt so that the final latents of neutral
    prompts stay what they were while the masks get small (``scripts/train.py``); then the ``keep`` largest of
    each kind stay on. UniForget differs in the kinds that are masked, in how the masks' size is averaged, and
    in a threshold in the place of the rank.

    Defaults are the release's for FLUX.1-schnell, but for its norm masks; those for SDXL are
    ``bounded=false, beta=0.5, delta_re=0.5, lr_attn=0.1, lr_ffn=0.1, chain_steps=50``. Unlike in the release,
    the masks are float32, a step averages its prompts, every prompt has noise of its own, and the norm masks'
    size is in the loss (the release adds it after the sum was formed).
    """

    keep: float = setting(
        0.8, "share of each kind's elements that stays on (paper: 0.8; on SDXL also 0.75, 0.6 and 0.5)"
    )
    scope: str = setting(
        "global",
        "rank the elements of a kind over all layers ('global', the release's demo) or in each ('local')",
    )
    attn: bool = setting(True, "mask attention heads")
    ffn: bool = setting(True, "mask feed-forward neurons")
    norm: bool = setting(
        False,
        "mask normalisation outputs (the release: on for FLUX; ours for UNets, whose norms it can't mask)",
    )
    residual: bool = setting(False, "mask hidden channels of a UNet's residual blocks (ours, as uniforget)")
    beta: float = setting(0.01, "weight of the masks' size in the loss (release: 0.01 FLUX, 0.5 SDXL, 1 SD2)")
    bounded: bool = setting(
        True, "size of sigmoid(0.4 m + 1) (release: FLUX), or off: of |m| (release: SDXL, SD3)"
    )
    init: float = setting(3.0, "initial mask parameter (release: 3; SD2 2.5, SD3 4)")
    temperature: float = setting(0.83, "temperature of the hard-concrete gate (release)")
    delta_re: float = setting(
        0.1, "damps the gate's noise (release, masking_eps: 0.1 FLUX, 0.5 UNets, 1 SD3)"
    )
    steps: int = setting(100, "optimiser steps (release: 4 epochs of 100 prompts, 4 a step)")
    prompts: int = setting(100, "neutral prompts to fit on, at most (release: 100)")
    batch_size: int = setting(4, "prompts an optimiser step (release: 4)")
    lr_attn: float = setting(0.5, "learning rate of attention masks (release: 0.5 FLUX, 0.1 SDXL)")
    lr_ffn: float = setting(0.1, "learning rate of feed-forward masks (release: 0.1)")
    lr_norm: float = setting(0.5, "learning rate of norm masks (release: 0.5)")
    lr_residual: float = setting(0.1, "learning rate of residual masks (ours)")
    weight_decay: float = setting(
        0.01, "decoupled weight decay of the mask parameters (release: AdamW's own)"
    )
    adam_eps: float = setting(1e-8, "Adam's epsilon (release: AdamW's own)")
    chain_steps: int = setting(5, "denoising steps of the chain while fitting (release: 5 FLUX, 50 UNets)")
    guidance: float | None = setting(None, "guidance scale while fitting; none takes the suite's (ours)")
    noise_per_image: bool = setting(True, "draw the gate's noise for each image (release: batches of one)")
    recompute: bool = setting(
        True, "backpropagate step by step in constant memory (release); off keeps the whole graph"
    )
    dtype: str = setting(
        "bfloat16", "type of the denoiser while fitting: bfloat16 (release), float32 or model"
    )

    name = "ecodiff"
    summary = "Learns, on neutral prompts, which share of the model can go; made to compress, not to forget."
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {"weak": {"keep": 0.8}, "medium": {"keep": 0.6}, "strong": {"keep": 0.5}}
    quick: ClassVar = {"steps": 3, "prompts": 6, "batch_size": 2, "chain_steps": 2}
    citation = (
        "Zhang, Jin, Dong, Khakzar, Torr, Stegmaier, Kawaguchi: EcoDiff: Low-Cost Pruning of Diffusion "
        "Models, arXiv 2412.02852"
    )
    licence = "Apache-2.0 (written from the paper and the release's constants: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that contradict themselves."""
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a share above 0 and up to 1, not {self.keep}")
        if self.scope not in ("global", "local"):
            raise ValueError(f"scope is 'global' or 'local', not '{self.scope}'")
        _ = self.learner

    @property
    def learner(self) -> UniForget:
        """The fit of the masks as UniForget's machinery has it; raises ValueError for what it refuses."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(UniForget)}
        objective = "ecodiff" if self.bounded else "ecodiff-raw"
        return UniForget(objective=objective, cosine=False, **{name: getattr(self, name) for name in shared})

    def fit(self, task: Task) -> Artefact:
        """Learn the masks and keep the largest."""
        from lethebench.methods.ecodiff.rank import fit

        return fit(self, task)

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Zero the weights of what is off while the context is open."""
        from lethebench.pruning import installed

        with installed(model.denoiser, artefact.tensors):
            yield SamplerHooks()
