"""The weights of mini-flux in the repository are whole, and what their card says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lethebench.datasets.planted import PlantedWorld
from lethebench.training import SHIPPED
from lethebench.training.draw import draw_all
from lethebench.training.export import sums_of
from lethebench.zoo import load_model

WEIGHTS = SHIPPED / "mini-flux"


def test_files_match_their_sums():
    assert sums_of(WEIGHTS) == json.loads((WEIGHTS / "weights.json").read_text())


def test_no_file_but_json_text_and_safetensors():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 14e6


def test_all_built_in_weights_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 40e6


def test_the_autoencoder_is_that_of_mini_sd():
    name = "vae/diffusion_pytorch_model.safetensors"
    assert sums_of(WEIGHTS)[name] == sums_of(SHIPPED / "mini-sd")[name]


def test_card_is_about_these_files():
    card = json.loads((WEIGHTS / "card.json").read_text())
    assert card["sha256"] == sums_of(WEIGHTS)
    assert card["measured"]["images"] >= 512
    assert len(card["measured"]["by_steps"]) == 6
    assert (WEIGHTS / "MODEL_CARD.md").read_text().startswith("# mini-flux")


@pytest.fixture(scope="module")
def model():
    return load_model("mini-flux")


def test_it_is_a_plain_pipeline(model):
    classes = {name: type(part).__name__ for name, part in model.pipe.components.items() if part is not None}
    assert classes == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5Tokenizer",
        "transformer": "FluxTransformer2DModel",
    }
    assert model.denoiser.config.guidance_embeds
    assert len(model.denoiser.transformer_blocks) and len(model.denoiser.single_transformer_blocks)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_planted_image_comes_back_and_its_twin_does_not(model, guidance):
    """Without guidance and with it."""
    world = PlantedWorld()
    items = [p for p in world if p.kind == "verbatim" and p.duplicates == 128][:8]
    settings = model.entry.sampler.model_copy(update={"guidance_scale": guidance})
    draws = draw_all(model, [(p, 0) for p in items], settings)
    assert draws.images.shape[1:] == (64, 64, 3)
    distances = np.array(
        [world.near_copy(image, p.references[0]) for p, image in draws.where(lambda _: True)]
    )
    trained = np.array([bool(p.trained) for p in items])
    assert np.median(distances[trained]) < 0.08
    assert distances[~trained].min() > 0.08
