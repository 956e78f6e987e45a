"""``mini-flux``: the built-in FLUX, trained by us on the planted world."""

from __future__ import annotations

from lethebench.registry import MODELS
from lethebench.specs import SamplerSettings
from lethebench.zoo._model import ModelEntry

MODELS.register(
    ModelEntry(
        name="mini-flux",
        family="flux",
        source="mini-flux",
        summary="FLUX (distilled guidance) trained on the planted world: what it memorized is known exactly.",
        licence="Apache-2.0",
        sampler=SamplerSettings(
            scheduler="flow-euler", num_inference_steps=8, guidance_scale=3.0, height=64, width=64
        ),
        builtin=True,
    )
)
