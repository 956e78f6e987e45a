"""Tiny denoisers with inputs, and a task of neutral prompts."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_pipelines import seeded, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.method import Task
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)


@dataclass
class Tiny:
    """A pipeline in float64 with inputs of its denoiser."""

    name: str
    pipe: Any
    inputs: dict

    @property
    def denoiser(self):
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    def output(self, denoiser=None):
        with torch.no_grad():
            return (denoiser or self.denoiser)(**self.inputs, return_dict=False)[0]


def tiny(name: str) -> Tiny:
    pipe = BUILDERS[name]()
    draws = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    time = torch.tensor([500.0, 500.0])
    inputs = {
        "sd": lambda: {
            "sample": normal(2, 4, 8, 8),
            "timestep": time,
            "encoder_hidden_states": normal(2, 16, 16),
        },
        "sdxl": lambda: {
            "sample": normal(2, 4, 8, 8),
            "timestep": time,
            "encoder_hidden_states": normal(2, 16, 32),
            "added_cond_kwargs": {"text_embeds": normal(2, 16), "time_ids": normal(2, 6)},
        },
        "sd3": lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "timestep": time,
            "encoder_hidden_states": normal(2, 16, 32),
            "pooled_projections": normal(2, 32),
        },
        "flux": lambda: {
            "hidden_states": normal(2, 16, 16),
            "timestep": time / 1000,
            "encoder_hidden_states": normal(2, 20, 32),
            "pooled_projections": normal(2, 16),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(20, 3),
        },
    }[name]()
    made = Tiny(name, pipe, inputs)
    made.denoiser.requires_grad_(False).double().eval()
    with torch.no_grad():  # biases and adaptive norms start at zero, where masking them changes nothing
        for parameter in made.denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    return made


@pytest.fixture(params=list(BUILDERS))
def any_tiny(request):
    return tiny(request.param)


@pytest.fixture
def make_tiny():
    return tiny


class Neutral:
    """A prompt set that has training prompts only: everything else fails."""

    def training_prompts(self):
        things = [(c, t) for c in ("red", "blue", "striped") for t in ("star", "circle", "robot")]
        return [f"a {colour} {thing} in a night city" for colour, thing in things]

    def __iter__(self):
        raise AssertionError("the method looked at the test prompts")


def task_for(method, model=None, seed="test"):
    return Task(model or wrap(tiny_sd()), SETTINGS, Neutral(), method.knowledge, seed_parts=(seed,))


@pytest.fixture
def make_task():
    return task_for


@pytest.fixture
def make_model():
    """A wrapped model of a family, its weights moved so that masks on biases and adaptive norms matter."""

    def make(name):
        pipe = tiny(name).pipe
        (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).float()
        return wrap(pipe)

    return make


@pytest.fixture
def random_masks():
    from lethebench.pruning import find_sites

    def make(denoiser, share, seed=0):
        with seeded(seed):
            return {s.name: torch.rand(s.size) >= share for s in find_sites(denoiser)}

    return make
