"""The first step's noise differences with neurons scaled, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lethebench.hooks import Conditioning
from lethebench.methods.nemo.neurons import Scaling
from lethebench.metrics.first_step_ssim import (
    BETA,
    KERNEL,
    SCALES,
    _rows,
    pairwise_ssim,
    scales_of,
    unit_range,
)
from lethebench.unlearning import encode, fitting_settings, prediction

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


class FirstStep:
    """What the model makes of some prompts at the first step, from the same seeds, without guidance.

    Of a prompt and seed, the difference is the predicted noise minus the noise itself, each channel brought
    to 0 to 1 (paper, section 3). The timestep is the first of DDIM with the suite's number of steps (NeMo has
    50). A prediction of v is turned into one of the noise (ours). Differences below the SSIM window's 11 a
    side are enlarged by repeating pixels (ours; only models made for tests are so small).
    """

    def __init__(
        self,
        model: Model,
        sampler: SamplerSettings,
        texts: Sequence[str],
        noise: Tensor,
        scaling: Scaling,
        batch_size: int,
    ) -> None:
        from lethebench.sampler import Chain

        self.model, self.scaling, self.batch_size = model, scaling, batch_size
        self.settings = first_step_settings(sampler, model)
        self.noise = noise.to(model.device)
        with torch.no_grad():
            self.conditioning = encode(model, texts, self.settings)
        self.timestep = Chain(model, self.conditioning, self.settings).timesteps[0]
        self.passes = 0

    @property
    def embeds(self) -> Tensor:
        """The prompts' token embeddings, ``[prompts, tokens, width]``."""
        return self.conditioning.embeds

    def differences(
        self, prompts: Sequence[int], seeds: Sequence[int], factors: Tensor | None = None
    ) -> Tensor:
        """Of R pairs of prompt and seed, with neurons multiplied by ``factors`` ``[R, total]``.

        Float32 ``[R, channels, height, width]``, 0 to 1.
        """
        self.passes += len(prompts)
        found = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            conditioning = _rows(self.conditioning, list(prompts[part]))
            if factors is not None:
                conditioning = self.scaling.marked(conditioning, factors[part])
            found.append(self._predicted(self.noise[list(seeds[part])], conditioning))
        return torch.cat(found)

    def unchanged(self) -> Tensor:
        """The differences of all prompts and seeds on the model as it is.

        Float32 ``[prompts, seeds, channels, height, width]``.
        """
        count, seeds = len(self.embeds), len(self.noise)
        prompts = [prompt for prompt in range(count) for _ in range(seeds)]
        found: Tensor = self.differences(prompts, list(range(seeds)) * count).unflatten(0, (count, seeds))
        return found

    def _predicted(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad():
            found: Tensor = prediction(self.model, noise, self.timestep, conditioning, self.settings)
        scheduler = self.model.pipe.scheduler
        if scheduler.config.get("prediction_type") == "v_prediction":
            kept = scheduler.alphas_cumprod[int(self.timestep)].to(noise)
            found = kept.sqrt() * found + (1 - kept).sqrt() * noise
        return _large_enough(unit_range(found - noise))


def first_step_settings(sampler: SamplerSettings, model: Model) -> SamplerSettings:
    """The suite's settings with DDIM and no guidance."""
    steps = sampler.num_inference_steps
    return fitting_settings(sampler.model_copy(update={"scheduler": "ddim"}), model.family, steps, 0.0)


def _large_enough(difference: Tensor) -> Tensor:
    side = min(difference.shape[-2:])
    times = -(-KERNEL // side)
    return difference if times == 1 else F.interpolate(difference, scale_factor=times)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM of each pair of differences ``[R, channels, height, width]`` in 0 to 1: ``[R]``.

    As ``metrics.first_step_ssim.pairwise_ssim`` (torchmetrics', three scales or as many as fit), for a data
    range of 1 at every scale. The released code names no range, and torchmetrics then takes the batch's own,
    anew at each scale: its values at three scales are a little lower, and depend on the batch.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scales = scales_of(min(first.shape[-2:]))
    found: Tensor = multiscale_structural_similarity_index_measure(
        first,
        second,
        kernel_size=KERNEL,
        reduction="none",
        data_range=1.0,
        betas=(BETA * SCALES / scales,) * scales,
    )
    return found.reshape(-1)


def likeness(differences: Tensor) -> Tensor:
    """For each seed, its SSIM with the seed most like it: ``[seeds]`` of ``[seeds, channels, h, w]``."""
    seeds = len(differences)
    pairs = torch.combinations(torch.arange(seeds), 2)
    table = torch.zeros(seeds, seeds)
    table[pairs[:, 0], pairs[:, 1]] = pairwise_ssim(differences).cpu().reshape(-1)
    table = table + table.T
    table.fill_diagonal_(-torch.inf)
    return table.amax(dim=1)
