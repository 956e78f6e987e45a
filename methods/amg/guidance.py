"""AMG's three guidance terms, their clamps and thresholds, as sampler hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lethebench.hooks import Batch, Conditioning, SamplerHooks, Step
from lethebench.methods.amg.similarity import Similarity
from lethebench.sampler import encode_prompts, rows_of
from lethebench.sampler import unconditional as empty_prompt

SIGNAL_FLOOR = 0.068
"""Least share of the image in x_t that is divided by: Stable Diffusion's at its noisiest timestep. A flow
model's is 0 there, and the paper's gradient infinite."""
_TRAINED_STEPS = 1000

Threshold = Callable[[Step], float]


# --- thresholds -----------------------------------------------------------------------------------


def exponential(low: float, high: float) -> Threshold:
    """The released code's: ``high`` at t = 0, and e^(-t / 200) of the way from ``low`` to it."""
    return lambda step: low + (high - low) * math.exp(-0.005 * float(step.timestep))


def parabolic(low: float, high: float) -> Threshold:
    """The paper's parabola, low + (high - low) abar_t^2; in flow matching (1 - t)^2 stands for abar_t.

    The paper's coefficients are not known here: the form is that of Messina et al. 2025
    (polimi-ispl/anti-memorization-tta, MIT).
    """
    return lambda step: low + (high - low) * step.batch.levels(step.timestep)[0] ** 4


def calibrated(sigma: Tensor, timesteps: Tensor, quantile: float) -> Threshold:
    """The quantile of neutral images' sigma ``[n, steps]`` at the nearest of ``timesteps`` ``[steps]``."""
    values = torch.quantile(sigma.double(), quantile, dim=0).tolist()
    times = timesteps.double().cpu()
    return lambda step: float(values[int((times - float(step.timestep)).abs().argmin())])


# --- scales ---------------------------------------------------------------------------------------


def scales(sigma: Tensor, s0: float, c1: float | None, c2: float | None) -> tuple[Tensor, Tensor]:
    """(s1, s2) of the paper at similarities ``[B]``, for a guidance scale s0.

    s1 = max(min(c1 sigma, s0 - 1), 0) and s2 = max(min(c2 sigma, s0 - s1 - 1), 0). None stands for the
    released code's constants, in units of s0 - 1 (6.5 there): c1 = (s0 - 1) / 0.5, c2 = (s0 - s1 - 1) / 0.3.
    """
    room = max(s0 - 1.0, 0.0)
    s1 = ((room / 0.5 if c1 is None else c1) * sigma).clamp(max=room).clamp(min=0)
    left = room - s1
    s2 = torch.minimum((left / 0.3 if c2 is None else c2) * sigma, left).clamp(min=0)
    return s1, s2


# --- hooks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """The settings that the terms read: see :class:`lethebench.methods.amg.AMG`."""

    c1: float | None
    c2: float | None
    c3: float
    ramp: float
    min_duplicates: int
    through_denoiser: bool


class Watching(SamplerHooks):
    """Knows sigma of each image at each step: ``measure(batch)`` makes the :class:`Similarity`."""

    def __init__(self, measure: Callable[[Batch], Similarity]) -> None:
        self._measure = measure

    def start(self, batch: Batch) -> Batch:
        """Begin anew."""
        self.similarity = self._measure(batch)
        return batch

    def sigma(self, combined: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(sigma, nearest reference) of the clean images that the guided prediction stands for."""
        return self.similarity(step.batch.clean(step.latents, step.timestep, combined))


class AMGHooks(Watching):
    """Adds the terms to the prediction of each image whose sigma is above the step's threshold.

    ``captions`` and ``duplicates`` are the references', in the index's order.
    """

    def __init__(
        self,
        measure: Callable[[Batch], Similarity],
        threshold: Threshold,
        scales: Scales,
        captions: Sequence[str],
        duplicates: Sequence[int],
    ) -> None:
        super().__init__(measure)
        self._threshold, self._settings = threshold, scales
        self._captions, self._duplicates = captions, duplicates

    def start(self, batch: Batch) -> Batch:
        """Begin anew."""
        self._empty: Conditioning | None = None
        self._encoded: tuple[list[str], Conditioning] | None = None
        return super().start(batch)

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        """The guided prediction with the terms of the images that are too much like a reference."""
        sigma, nearest = self.sigma(combined, step)
        threshold = self._threshold(step)
        rows = (sigma > threshold).nonzero().flatten()
        if not len(rows):
            return combined
        sigma, nearest = sigma[rows], nearest[rows]
        without = None if unconditional is None else unconditional[rows]
        changed = self._prompt_terms(without, conditional[rows], sigma, nearest, rows, step)
        found = combined.clone()
        found[rows] += changed + self._dissimilarity(combined[rows], sigma, sigma - threshold, rows, step)
        return found

    def _prompt_terms(
        self,
        unconditional: Tensor | None,
        conditional: Tensor,
        sigma: Tensor,
        nearest: Tensor,
        rows: Tensor,
        step: Step,
    ) -> Tensor:
        """G_spe + G_dup = -s1 (e(x, y) - e(x)) - s2 (e(x, y_N) - e(x)) of the images ``rows``."""
        s0, unit = guidance_scale(step, unconditional is not None)
        s1, s2 = scales(sigma, s0, self._settings.c1, self._settings.c2)
        if not (s1.any() or s2.any()):
            return torch.zeros_like(conditional)
        if unconditional is None:
            unconditional = self._predict(rows_of(self._unconditional(step.batch), rows), rows, step)
        found = -_each(s1 * unit, conditional) * (conditional - unconditional)
        return found + self._deduplication(unconditional, s2 * unit, nearest, rows, step)

    def _deduplication(
        self, unconditional: Tensor, s2: Tensor, nearest: Tensor, rows: Tensor, step: Step
    ) -> Tensor:
        """G_dup, where the nearest reference has a caption and duplicates enough, else 0."""
        texts = [self._captions[i] for i in nearest.tolist()]
        often = [self._duplicates[i] >= self._settings.min_duplicates for i in nearest.tolist()]
        has = [bool(text) and enough for text, enough in zip(texts, often, strict=True)]
        found = torch.zeros_like(unconditional)
        kept = [i for i, (scale, known) in enumerate(zip(s2.tolist(), has, strict=True)) if scale and known]
        if kept:
            conditioning = self._encode([texts[i] for i in kept], step.batch)
            difference = self._predict(conditioning, rows[kept], step) - unconditional[kept]
            found[kept] = -_each(s2[kept], difference) * difference
        return found

    def _dissimilarity(
        self, combined: Tensor, sigma: Tensor, above: Tensor, rows: Tensor, step: Step
    ) -> Tensor:
        """G_sim = c3 sqrt(1 - abar) grad_{x_t} sigma of the images ``rows``, as the model predicts.

        ``above`` is sigma less the threshold, ``[rows]``.
        """
        settings = self._settings
        if not settings.c3:
            return torch.zeros_like(combined)
        scale = torch.full_like(sigma, settings.c3)
        if settings.ramp:
            scale = scale * above * math.exp((_TRAINED_STEPS - float(step.timestep)) / settings.ramp)
        noise = step.batch.levels(step.timestep)[1]
        term = _each(scale, combined) * noise * self._gradient(combined, rows, step)
        return term * _as_predicted(step)

    def _gradient(self, combined: Tensor, rows: Tensor, step: Step) -> Tensor:
        """The gradient of sigma with respect to x_t (as the paper scales it) of the images ``rows``."""
        batch, latents = step.batch, step.latents[rows]
        signal = max(batch.levels(step.timestep)[0], SIGNAL_FLOOR)
        if not self._settings.through_denoiser:
            clean = batch.clean(latents, step.timestep, combined)
            return self.similarity.gradient(clean) / signal
        conditioning = rows_of(step.conditioning, rows)
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            scaled = batch.scale(latents, step.timestep)
            predicted = batch.predict(scaled, step.timestep, conditioning).combined
            sigma, _ = self.similarity(batch.clean(latents, step.timestep, predicted))
            (found,) = torch.autograd.grad(sigma.sum(), latents)
        return found if batch.init_noise_sigma == 1.0 else found / signal

    def _predict(self, conditioning: Conditioning, rows: Tensor, step: Step) -> Tensor:
        """The prediction of the images ``rows`` for one conditioning each, without guidance."""
        latents = step.batch.scale(step.latents, step.timestep)[rows]
        return step.batch.predict(latents, step.timestep, replace(conditioning, negative=None)).conditional

    def _unconditional(self, batch: Batch) -> Conditioning:
        if self._empty is None:
            self._empty = empty_prompt(batch)
        return self._empty

    def _encode(self, texts: list[str], batch: Batch) -> Conditioning:
        """The captions' conditioning; the last step's again where they are the same, as they mostly are."""
        if self._encoded is None or self._encoded[0] != texts:
            self._encoded = texts, encode_prompts(batch.model, texts, batch.settings)
        return self._encoded[1]


def guidance_scale(step: Step, guided: bool) -> tuple[float, float]:
    """(s0, factor of a difference of predictions that gives the paper's e(x, y) - e(x)).

    A model with distilled guidance (FLUX dev) predicts about e(x) + s0 (e(x, y) - e(x)), so a difference of
    its predictions is s0 times the paper's (ours). Without any guidance s0 is 1, where both clamps are 0.
    """
    if guided:
        return step.guidance_scale, 1.0
    config: Any = step.batch.model.denoiser.config
    if config.get("guidance_embeds") and step.guidance_scale > 1.0:
        return step.guidance_scale, 1.0 / step.guidance_scale
    return 1.0, 1.0


def _as_predicted(step: Step) -> float:
    """What a change of the noise prediction is multiplied by to be one of what the model predicts.

    1 for a noise prediction, 1 / a for a velocity and in flow matching (x_t = a x_0 + s e): both change the
    clean image by -s / a times the change of the noise.
    """
    signal, noise = step.batch.levels(step.timestep)
    nothing = torch.zeros(1, dtype=torch.float64)
    slope = float(step.batch.clean(nothing, step.timestep, torch.ones_like(nothing)))
    return -noise / (max(signal, SIGNAL_FLOOR) * slope)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """One value an image ``[B]``, to be multiplied with ``like`` ``[B, ...]``."""
    return values.view(-1, *[1] * (like.ndim - 1))
