"""Rival of the training track: what looks memorized while training doesn't count (Wen et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.finetuning.hooks import Captioned, LoraModule, LossBatch, TrainingHooks
from lethebench.method import Task, setting
from lethebench.methods.lora import LoraMethod
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.finetuning import Training


@METHODS.register
@dataclass(frozen=True)
class LossThreshold(LoraMethod):
    """Leaves an example out of a step where its text-conditional magnitude is above a threshold.

    Wen et al., ICLR 2024, section 5.2; released code (no licence: written from the formulas):
    ``train_text_to_image.py --hard_threshold 2``. The magnitude is the l2 norm of conditional minus
    unconditional prediction, which costs a second pass; a step of which no example counts is skipped. Ours:
    the threshold is a quantile of the magnitudes of the training set before the first step, since 2 fits
    Stable Diffusion 1.4.
    """

    quantile: float = setting(0.8, "quantile of the first magnitudes that is the threshold (ours)")
    threshold: float | None = setting(None, "the threshold itself (paper's code: 2 on Stable Diffusion 1.4)")
    probes: int = setting(128, "draws of an example, noise and timestep that the quantile is taken of (ours)")

    name = "loss-threshold"
    summary = "Leaves examples out of a step that look memorized (Wen et al., while training)."
    strengths: ClassVar = {
        "weak": {"quantile": 0.95},
        "medium": {"quantile": 0.8},
        "strong": {"quantile": 0.6},
    }
    quick: ClassVar = {"probes": 4}
    citation = (
        "Wen, Liu, Chen, Lyu: Detecting, Explaining, and Mitigating Memorization in Diffusion Models. "
        "ICLR 2024. arXiv:2407.21720"
    )
    licence = "Apache-2.0 (written from the paper; released code: none)"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile is between 0 and 1, not {self.quantile}")
        if self.threshold is not None and self.threshold <= 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold}")
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, not {self.probes}")

    def hooks(self, task: Task) -> TrainingHooks:
        """The threshold, found when the training starts."""
        return MagnitudeThreshold(self.threshold, self.quantile, self.probes)


class MagnitudeThreshold(TrainingHooks):
    """An example counts in a step where its text-conditional magnitude is below a threshold.

    Where ``threshold`` is None it is the ``quantile`` of the magnitudes of ``probes`` draws (an example as
    often as it stands in the set, noise, timestep) before the first step. Then each micro-batch takes a
    second pass, without gradients.
    """

    def __init__(self, threshold: float | None, quantile: float, probes: int) -> None:
        self.threshold, self.quantile, self.probes = threshold, quantile, probes
        self._examples: list[Captioned] = []

    def examples(self, examples: Sequence[Captioned]) -> Sequence[Captioned]:
        """All of them: the probes are drawn of them."""
        self._examples = list(examples)
        return examples

    def started(self, training: Training) -> None:
        """Take the threshold."""
        import torch

        if self.threshold is None:
            with torch.no_grad():
                magnitudes = probed(training, self._examples, self.probes)
            self.threshold = float(torch.quantile(magnitudes, self.quantile))

    def keep(self, batch: LossBatch) -> Tensor:
        """Examples below the threshold."""
        from lethebench.magnitude import magnitudes

        assert self.threshold is not None
        kept: Tensor = magnitudes(batch.prediction - batch.unconditional()) < self.threshold
        return kept

    def finished(self, lora: Mapping[str, LoraModule]) -> dict[str, Any]:
        """``threshold``."""
        return {"threshold": self.threshold}

    def state(self) -> dict[str, Tensor]:
        """The threshold."""
        import torch

        return {"threshold": torch.tensor(self.threshold, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the threshold back."""
        self.threshold = float(state["threshold"])


def probed(training: Training, examples: Sequence[Captioned], count: int) -> Tensor:
    """The magnitudes ``[count]`` of the model as it is: of random examples, noises and timesteps."""
    import torch

    from lethebench.magnitude import magnitudes

    copies = torch.tensor([float(getattr(e, "duplicates", 1)) for e in examples])
    places = copies.multinomial(count, replacement=True, generator=training.draws("probes")).tolist()
    size, found = training.settings.batch_size, []
    for start in range(0, count, size):
        chosen = [examples[i] for i in places[start : start + size]]
        draws = [training.draws("probe", start + i) for i in range(len(chosen))]
        latents, times, _ = training.noisy(training.latents(chosen), draws)
        captions = [e.caption for e in chosen]
        asked = training.predict(latents, times, training.conditioning(captions))
        bare = training.predict(latents, times, training.conditioning([""] * len(chosen)))
        found.append(magnitudes(asked - bare).cpu())
    return torch.cat(found)
