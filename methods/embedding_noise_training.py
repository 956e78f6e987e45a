"""Rival of the training track: Gaussian noise on the captions' embeddings (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.finetuning.hooks import TrainingHooks
from lethebench.method import Task, setting
from lethebench.methods._inserted_words import CITATION, LICENCE
from lethebench.methods.embedding_noise import noisy
from lethebench.methods.lora import LoraMethod
from lethebench.registry import METHODS

if TYPE_CHECKING:
    import torch

    from lethebench.hooks import Conditioning


@METHODS.register
@dataclass(frozen=True)
class EmbeddingNoiseTraining(LoraMethod):
    """Adds new Gaussian noise to a caption's embeddings each time that its image is seen.

    "Gaussian noise" (GN) of Somepalli et al. 2023, mitigation while training; ``--rand_noise_lam`` of
    somepago/DCR. On every token, padding included, and on the empty prompt of a dropped caption; pooled
    embeddings, which Stable Diffusion 1.x and 2.x have not, get noise of the same scale (ours). The scale is
    absolute: CLIP's last hidden state has a standard deviation of about 1 an element. Images are drawn
    without noise.
    """

    scale: float = setting(0.1, "standard deviation of the noise (the released code's at inference: 0.1)")

    name = "embedding-noise-training"
    summary = "Gaussian noise on the captions' embeddings while training (Somepalli et al.)."
    strengths: ClassVar = {"weak": {"scale": 0.1}, "medium": {"scale": 0.5}, "strong": {"scale": 2.0}}
    citation = CITATION
    licence = LICENCE

    def __post_init__(self) -> None:
        """Refuse a negative scale."""
        if self.scale < 0:
            raise ValueError(f"scale must be 0 or more, not {self.scale}")

    def hooks(self, task: Task) -> TrainingHooks:
        """The noise, drawn anew each time."""
        return NoisyEmbeddings(self.scale)


@dataclass
class NoisyEmbeddings(TrainingHooks):
    """Adds ``scale`` times unit normal noise to what the denoiser sees of each caption."""

    scale: float

    def embeddings(self, conditioning: Conditioning, draws: Sequence[torch.Generator]) -> Conditioning:
        """The noisy conditioning."""
        return noisy(conditioning, self.scale, draws)
