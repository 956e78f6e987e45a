"""Safety guidance: equations 3 to 8 of Schramowski et al. 2023, element by element.

With unconditional, prompt's and concept's predictions u, p, c, guidance scale g and momentum nu (0 at first):

    mu    = min(1, s |p - c|)  where p - c < threshold, else 0        (eq. 6; s: ``scale``)
    gamma = mu (c - u) + momentum * nu                                (eq. 4 and 7)
    nu'   = beta nu + (1 - beta) gamma                                (eq. 8)
    e     = u + g (p - u - gamma)   after the warm-up                 (eq. 3)

gamma without g is in units of the prediction: float32 ``[B, ...]``. A velocity (v, flow matching) takes the
noise's place in all of them: of two predictions at the same latents, the difference has the noises' sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.hooks import Batch, Conditioning, SamplerHooks, Step
from lethebench.methods.sld.words import concept_of
from lethebench.sampler import encode_prompts
from lethebench.sampler import unconditional as empty_prompt

if TYPE_CHECKING:
    from lethebench.methods.sld import SLD

PAPER_STEPS = 50


def safety_term(prompt: Tensor, unconditional: Tensor, concept: Tensor, nu: Tensor, settings: SLD) -> Tensor:
    """gamma, like the predictions, of these and the momentum ``nu``."""
    difference = prompt - concept
    share = (difference.abs() * settings.scale).clamp(max=1.0)
    share = torch.where(difference >= settings.threshold, 0.0, share)
    return share * (concept - unconditional) + settings.momentum * nu


class SafetyGuidance(SamplerHooks):
    """Guides each image away from its prompt's own concept (:func:`concept_of`)."""

    def __init__(self, settings: SLD, words: Sequence[str], text: str) -> None:
        self.settings, self._words, self._text = settings, words, text

    def start(self, batch: Batch) -> Batch:
        """Encode the concepts and forget the last batch's momentum. Raises UserError without guidance."""
        self._empty: Conditioning | None = None
        self._scale = batch.settings.guidance_scale
        self._unit = 1.0
        if batch.conditioning.negative is None:
            if batch.model.family != "flux":
                raise UserError(
                    "sld needs classifier-free guidance: set the sampler's guidance_scale above 1"
                )
            self._empty = empty_prompt(batch)
            self._scale = self._unit = distilled_scale(batch)
        texts = [concept_of(t, self._words, self._text) for t in batch.texts]
        # What earlier hooks marked the prompt with (ren's mask, nemo's neurons) holds for the concept too.
        concept = encode_prompts(batch.model, texts, batch.settings)
        self._concept = replace(concept, negative=None, extra=batch.conditioning.extra)
        self._nu = torch.zeros_like(batch.noise)
        steps = batch.settings.num_inference_steps
        self._begin = self.settings.warmup * steps / PAPER_STEPS
        self._beta = self.settings.beta ** (PAPER_STEPS / steps)
        return batch

    def guidance(
        self, combined: Tensor, unconditional: Tensor | None, conditional: Tensor, step: Step
    ) -> Tensor:
        """The guided prediction less the safety term, which the concept's own prediction gives."""
        concept = self._predict(self._concept, step)
        if unconditional is None:
            assert self._empty is not None  # start saw that there is no negative conditioning
            unconditional = self._predict(self._empty, step)
        prompt, unconditional, concept = (x / self._unit for x in (conditional, unconditional, concept))
        gamma = safety_term(prompt, unconditional, concept, self._nu, self.settings)
        self._nu = self._beta * self._nu + (1 - self._beta) * gamma
        if step.index < self._begin:
            return combined
        return combined - self._scale * gamma

    @staticmethod
    def _predict(conditioning: Conditioning, step: Step) -> Tensor:
        scaled = step.batch.scale(step.latents, step.timestep)
        return step.batch.predict(scaled, step.timestep, conditioning).conditional


def distilled_scale(batch: Batch) -> float:
    """The guidance scale g of FLUX, which samples without an unconditional prediction (ours).

    Where guidance is distilled (dev), a prediction is about u + g (p - u) with the sampler's scale g, so a
    difference of two is g times theirs. Where there is none (schnell), g is 1.
    """
    scale = batch.settings.guidance_scale
    return scale if "guidance" in batch.conditioning.extra and scale > 1 else 1.0
