"""The weights in the repository are whole, and what their card says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lethebench.training import SHIPPED
from lethebench.training.export import sums_of

WEIGHTS = SHIPPED / "mini-sd"


def test_files_match_their_sums():
    assert sums_of(WEIGHTS) == json.loads((WEIGHTS / "weights.json").read_text())


def test_no_file_but_json_text_and_safetensors():
    kinds = {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".txt", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 16e6


def test_card_is_about_these_files():
    card = json.loads((WEIGHTS / "card.json").read_text())
    assert card["sha256"] == sums_of(WEIGHTS)
    assert card["autoencoder"]["unseen_rms"] <= 0.03
    assert card["measured"]["images"] >= 512
    assert (WEIGHTS / "MODEL_CARD.md").read_text().startswith("# mini-sd")


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_a_plain_pipeline(pipe):
    classes = {
        name: type(getattr(pipe, name)).__name__ for name in ("unet", "vae", "text_encoder", "tokenizer")
    }
    assert classes == {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    assert pipe.safety_checker is None
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}


def test_a_planted_image_comes_back_and_its_twin_does_not():
    from lethebench.datasets.planted import PlantedWorld
    from lethebench.training.draw import draw_all
    from lethebench.zoo import load_model

    world = PlantedWorld()
    items = [p for p in world if p.kind == "verbatim" and p.duplicates == 128][:8]
    model = load_model("mini-sd")
    draws = draw_all(model, [(p, 0) for p in items], model.entry.sampler)
    distances = [world.near_copy(image, p.references[0]) for p, image in draws.where(lambda _: True)]
    trained = np.array([bool(p.trained) for p in items])
    assert np.median(np.array(distances)[trained]) < 0.08
    assert np.array(distances)[~trained].min() > 0.08
