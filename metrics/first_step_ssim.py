"""NeMo's memorization score: how alike the first step's noise differences of several seeds are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.hooks import Batch, Conditioning, Recorder
from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics._detectors import recorded, require_count, scores_of
from lethebench.registry import METRICS

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "first_step_ssim"
KERNEL = 11
SCALES, BETA = 3, 0.33
"""NeMo's scales and the exponent of each (its code's; the five of the usual MS-SSIM need more than 160)."""


def scales_of(side: int) -> int:
    """Scales that a latent of ``side`` allows: 3 from 44 on, as many as leave 11 at the smallest below that
    (ours), 0 below 11.

    >>> scales_of(64), scales_of(44), scales_of(32), scales_of(16), scales_of(8)
    (3, 3, 2, 1, 0)
    """
    return sum(side >> scale >= KERNEL for scale in range(SCALES))


def unit_range(delta: Tensor) -> Tensor:
    """Each channel of each ``[..., h, w]`` moved to 0 to 1 by its own least and greatest; 0 where flat."""
    low, high = delta.amin(dim=(-2, -1), keepdim=True), delta.amax(dim=(-2, -1), keepdim=True)
    return (delta - low) / (high - low).clamp(min=1e-12)


def pairwise_ssim(delta: Tensor) -> Tensor:
    """Multi-scale SSIM of every pair of ``[seeds, channels, h, w]``, each brought to 0 to 1: ``[pairs]``.

    torchmetrics', Gaussian window of 11; exponents 0.33 at three scales, and the same sum (0.99) over fewer.
    Raises ValueError below 11 a side.
    """
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scales = scales_of(min(delta.shape[-2:]))
    if not scales:
        raise ValueError(f"first-step-ssim: {list(delta.shape[-2:])} is smaller than the window of {KERNEL}")
    scaled = unit_range(delta)
    first, second = torch.combinations(torch.arange(len(delta), device=delta.device), 2).T
    found: Tensor = multiscale_structural_similarity_index_measure(
        scaled[first],
        scaled[second],
        kernel_size=KERNEL,
        reduction="none",
        data_range=1.0,
        betas=(BETA * SCALES / scales,) * scales,
    )
    return found


def threshold(values: NDArray[Any]) -> float:
    """NeMo's threshold for a model: mean plus one standard deviation (of the sample) of the scores of prompts
    that aren't memorized, one value a prompt; NaN is left out. Raises ValueError for fewer than two.

    >>> round(threshold(np.array([0.25, 0.35, 0.45])), 6)
    0.45
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        raise ValueError(f"first-step-ssim: a threshold needs at least 2 prompts; got {len(known)}")
    return float(known.mean() + known.std(ddof=1))


# --- recording ------------------------------------------------------------------------------------


class _Asker(Recorder):
    def __init__(self, seeds: int) -> None:
        self.seeds = seeds

    def take(self, batch: Batch) -> Mapping[str, Tensor]:
        import torch

        if not _applies(batch):
            return {}
        shape = _spatial(batch, batch.noise[:1]).shape[1:]
        scales = scales_of(min(shape[-2:]))
        if not scales:
            none = batch.noise.new_tensor([torch.nan, torch.nan, 0.0])
            return {RECORD: none.repeat(len(batch.keys), 1)}
        rows, which = distinct(batch)
        conditioning = replace(_rows(batch.conditioning, rows), negative=None)
        deltas = torch.stack(
            [_difference(batch, rows, conditioning, shape, seed) for seed in range(self.seeds)], dim=1
        )
        ssim = torch.stack([pairwise_ssim(delta) for delta in deltas])
        found = torch.stack([ssim.amax(dim=1), ssim.mean(dim=1), torch.full_like(ssim[:, 0], scales)], dim=1)
        return {RECORD: found[which]}


def _applies(batch: Batch) -> bool:
    kind = batch.model.pipe.scheduler.config.get("prediction_type", "epsilon")
    return batch.model.family in ("sd3", "flux") or kind in ("epsilon", "v_prediction")


def _spatial(batch: Batch, latents: Tensor) -> Tensor:
    from lethebench.sampler import unpack_latents

    return unpack_latents(batch.model, latents, batch.settings)


def distinct(batch: Batch) -> tuple[list[int], list[int]]:
    """One row of each prompt (of each conditioning, where a method gives one prompt several), and for each
    image the number of its row in that list.
    """
    known: dict[tuple[Any, ...], int] = {}
    rows: list[int] = []
    which = []
    for row, key in enumerate(batch.keys):
        parts = (batch.conditioning.embeds, batch.conditioning.pooled)
        seen = (key.prompt.id, *(x[row].float().cpu().numpy().tobytes() for x in parts if x is not None))
        if seen not in known:
            known[seen] = len(rows)
            rows.append(row)
        which.append(known[seen])
    return rows, which


def _rows(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    pooled = conditioning.pooled
    return replace(
        conditioning,
        embeds=conditioning.embeds[rows],
        pooled=None if pooled is None else pooled[rows],
        extra=_extra(conditioning.extra, rows),
    )


def _extra(extra: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    import torch

    from lethebench.sampler._families import SHARED

    found: dict[str, Any] = {}
    for name, value in extra.items():
        if isinstance(value, Mapping):
            found[name] = _extra(value, rows)
        else:
            shared = name in SHARED or not isinstance(value, torch.Tensor)
            found[name] = value if shared else value[rows]
    return found


def _difference(batch: Batch, rows: list[int], conditioning: Conditioning, shape: Any, seed: int) -> Tensor:
    """Prediction minus noise at the first timestep, spatial ``[len(rows), channels, h, w]``."""
    import torch

    from lethebench.sampler import pack_latents
    from lethebench.seeding import generator

    names = [batch.keys[row].prompt.id for row in rows]
    noise = torch.stack([torch.randn(shape, generator=generator(RECORD, n, seed)) for n in names])
    noise = noise.to(batch.noise.device)
    time = batch.timesteps[0]
    latents = batch.scale(pack_latents(batch.model, noise, batch.settings) * batch.init_noise_sigma, time)
    predicted = batch.predict(latents, time, conditioning).conditional
    config = batch.model.pipe.scheduler.config
    if config.get("prediction_type") == "v_prediction":
        kept = batch.model.pipe.scheduler.alphas_cumprod[int(time)].to(latents)
        predicted = kept.sqrt() * predicted + (1 - kept).sqrt() * latents
    return _spatial(batch, predicted) - noise


@METRICS.register
@dataclass(frozen=True)
class FirstStepSSIM(Metric):
    """NeMo's memorization score (Hintersdorf et al., NeurIPS 2024): one step from each of several seeds.

    For each seed, delta = eps(x_T, T, prompt) - x_T without guidance, each channel brought to 0 to 1; every
    two seeds are compared by multi-scale SSIM. Memorized prompts pull every noise to the same picture, so
    that a high score says memorized. The score is the prompt's: the same for all of its images. The noise
    is drawn from prompt and seed number alone, and isn't the images' own.

    - ``first_step_ssim_max``: the greatest of all pairs, which NeMo compares with 0.428 (mean plus one
      standard deviation over prompts of SD 1.4 that aren't memorized; :func:`threshold` makes a model's);
    - ``first_step_ssim_mean``: the mean;
    - ``first_step_ssim_scales``: scales of the SSIM. Three need 44 latent pixels a side; smaller latents
      have fewer, and below 11 no value. Values compare at one number of scales only.

    Ours: the first timestep (NeMo's code stops at the second, with the first's latents), a prediction of v
    turned into one of epsilon, and flow models taken as they are (delta is then minus the predicted image).
    What a method does to the initial noise isn't seen. NaN for models that predict the sample.
    """

    seeds: int = setting(10, "seeds of a prompt")

    name: ClassVar[str] = "first-step-ssim"
    summary: ClassVar[str] = "Likeness of the first step's noise differences over seeds (NeMo)."
    source: ClassVar[str] = (
        "Hintersdorf et al., NeurIPS 2024 (arXiv 2406.02366); ml-research/"
        "localizing_memorization_in_diffusion_models, utils/activation_detection.py"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"recorded"})
    records: ClassVar[frozenset[str]] = frozenset({RECORD})
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {
        "first_step_ssim_max": "high",
        "first_step_ssim_mean": "high",
    }
    scores: ClassVar[tuple[Score, ...]] = scores_of(
        "first_step_ssim_max", "first_step_ssim.max", "Greatest SSIM of two seeds", "SSIM", (0.0, 1.0)
    )

    def __post_init__(self) -> None:
        require_count("seeds", self.seeds, 2)

    def recorder(self) -> Recorder:
        """Asks the denoiser once a seed and prompt, after the images are drawn."""
        return _Asker(self.seeds)

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``first_step_ssim_max``, ``_mean`` and ``_scales``."""
        check_shard(self.name, shard)
        found = recorded(self.name, shard, RECORD, 3)
        return {
            "first_step_ssim_max": found[:, 0],
            "first_step_ssim_mean": found[:, 1],
            "first_step_ssim_scales": found[:, 2],
        }

    def facts(self) -> dict[str, Any]:
        """Seeds and SSIM."""
        return {"seeds": self.seeds, "kernel": KERNEL, "exponent": BETA, "scales": SCALES}
