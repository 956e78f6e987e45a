"""``mini-sd``: the built-in Stable Diffusion, trained by us on the planted world."""

from __future__ import annotations

from lethebench.registry import MODELS
from lethebench.specs import SamplerSettings
from lethebench.zoo._model import ModelEntry

MODELS.register(
    ModelEntry(
        name="mini-sd",
        family="sd",
        source="mini-sd",
        summary="Stable Diffusion trained on the planted world: what it memorized is known exactly.",
        licence="Apache-2.0",
        sampler=SamplerSettings(scheduler="ddim", num_inference_steps=20, guidance_scale=3.0),
        builtin=True,
    )
)
