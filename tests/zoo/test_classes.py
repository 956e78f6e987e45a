"""Each class of model: saved to disk, loaded by path, mitigated, pruned, saved and loaded again."""

import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES

from lethebench.composition import recipes
from lethebench.export import export
from lethebench.hooks import ImageKey
from lethebench.method import Task
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import load_model

CLASSES = ("sd", "sd-v", "sdxl", "sd3", "flux-schnell", "flux-dev")
METHODS = {
    "uniforget": {"steps": 3, "prompts": 4, "batch_size": 2, "chain_steps": 2, "lr_ffn": 4.0, "lr_norm": 4.0},
    "uce": {"count": 1},
    "esd": {"steps": 2, "count": 1, "chain_steps": 2},
    "random-tokens": {},
}
"""UniForget, a closed-form edit, a gradient method and a sampling-time method."""


class World:
    """A memorized caption and neutral ones."""

    name = "test"
    prompts = (
        Prompt("t0", "robot, a red star in a city", Role.TRIGGER, "t0"),
        Prompt("c0", "captain in a forest", Role.CONCEPT, "c0", concept="captain"),
    )

    def __iter__(self):
        return iter(self.prompts)

    def paraphrases(self, prompt_id):
        return ["a circle in a city"]

    def anchor_concept(self, concept):
        return "a star"

    def training_prompts(self):
        return [f"a {colour} {thing}" for colour in ("red", "blue", "striped") for thing in ("star", "city")]


@pytest.fixture(scope="module", params=CLASSES)
def loaded(request, tmp_path_factory):
    """A class's name, and its pipeline as loaded from disk."""
    folder = tmp_path_factory.mktemp("classes") / request.param
    PIPELINES[request.param]().save_pretrained(folder)
    return request.param, load_model(str(folder))


def settings_for(name):
    guidance = {"flux-schnell": 0.0, "flux-dev": 3.5}.get(name, 4.0)
    return SamplerSettings(num_inference_steps=2, guidance_scale=guidance, height=16, width=16)


def drawn(model, name, hooks=()):
    wanted = [ImageKey("test@1", prompt, 0) for prompt in World.prompts]
    return sample(model, wanted, settings_for(name), hooks).latents


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_a_loaded_folder(loaded, method, tmp_path):
    name, model = loaded
    (recipe,) = recipes(method, "strong" if method != "random-tokens" else "all", METHODS[method])[-1:]
    part = recipe.parts[0]
    artefact = part.fit(Task(model, settings_for(name), World(), part.sees, seed_parts=("test",)))
    base = drawn(model, name)
    with recipe.apply(model, [artefact]) as hooks:
        changed = drawn(model, name, hooks)
    assert np.isfinite(changed).all() and np.abs(changed - base).max() > 1e-4
    assert np.array_equal(drawn(model, name), base), "the model is as it was"
    if method == "uniforget":
        again = load_model(str(export(model, recipe, [artefact], tmp_path / "pruned")))
        assert (tmp_path / "pruned" / "pruning.json").is_file()
        count = [sum(p.numel() for p in m.denoiser.parameters()) for m in (again, model)]
        assert count[0] < count[1]
        np.testing.assert_allclose(drawn(again, name), changed, atol=2e-4)
        assert again.dtype is torch.float32
