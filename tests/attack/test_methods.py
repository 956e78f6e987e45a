"""Every method that acts while sampling can be attacked: its hooks stand an embedding that no text has."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.attack import Subject
from lethebench.attack._trial import _Offsets
from lethebench.attack.dori import Dori
from lethebench.check import Subject as Checked
from lethebench.hooks import ImageKey
from lethebench.method import Family
from lethebench.plan import prompt_set
from lethebench.prompts import Role
from lethebench.registry import METHODS
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=3.0, height=16, width=16)
SAMPLING = [name for name, cls in METHODS.items() if cls.family is Family.SAMPLING and cls.generates]


@cache
def tiny(family: str):
    return wrap(BUILDERS[family]())


@pytest.mark.parametrize("method", SAMPLING)
def test_a_sampling_method_can_be_attacked(method: str) -> None:
    family = next(f for f in BUILDERS if f in METHODS.get(method).model_families)
    model, prompts = tiny(family), prompt_set("planted")
    checked = Checked(method, model, prompts, SETTINGS)
    asked = [p for p in prompts if p.role is Role.TRIGGER and p.duplicates == 128][:2]
    with checked.method.apply(model, checked.artefact) as hooks:
        subject = Subject(model, SETTINGS, prompts, "tiny@1", unseen=1)
        attempts = Dori(steps=2, batch_size=2, images=1).attempts(subject, asked)
        assert all(a.tries[0].offset.abs().max() > 0.05 for a in attempts)
        keys = [ImageKey("tiny@1", p, 0) for p in asked]
        own = _Offsets(model, SETTINGS, tuple(a.tries[0] for a in attempts))
        latents = sample(model, keys, SETTINGS, [own, hooks], batch_size=2).latents
    assert np.isfinite(latents).all()
