"""mini-sd is trained, killed, resumed, exported and carded, all in small."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_world import AUTOENCODER, CONFIG, DIFFUSION

from lethebench.errors import UserError
from lethebench.training import parts, train_all
from lethebench.training.autoencoder import build_autoencoder, latent_moments, standardise, train_autoencoder
from lethebench.training.diffusion import epoch_order, min_snr_weight, spread_timesteps, train_diffusion
from lethebench.training.export import export
from lethebench.training.loop import fit, learning_rate

CPU = torch.device("cpu")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
        if "run" not in path.parent.name
    }


@pytest.fixture(scope="module")
def trained(world, cache, tmp_path_factory):
    """Both trainings without interruption."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    train_autoencoder(world, AUTOENCODER, folder, cache, CPU)
    train_diffusion(world, DIFFUSION, folder, cache, CPU)
    return folder


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from training_world import AUTOENCODER, CONFIG, DIFFUSION
from lethebench.datasets.planted import PlantedWorld
from lethebench.training.autoencoder import train_autoencoder
from lethebench.training.diffusion import train_diffusion

torch.set_num_threads(1)
folder, cache, part, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def die(now):
    if now == step:
        os.kill(os.getpid(), signal.SIGKILL)

train, recipe = {"vae": (train_autoencoder, AUTOENCODER), "unet": (train_diffusion, DIFFUSION)}[part]
world, cpu = PlantedWorld(CONFIG), torch.device("cpu")
train(world, recipe, folder, cache, cpu, checkpoint_seconds=0, on_checkpoint=die)
"""


def killed(folder: Path, cache: Path, part: str, step: int) -> None:
    """Train a part in another process that is killed right after the checkpoint of that step."""
    here = Path(__file__).resolve().parent
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(cache), part, str(step)],
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parents[1] / 'benchmark'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_a_killed_training_resumes_to_the_same_bits(trained, world, cache, tmp_path):
    killed(tmp_path, cache, "vae", 3)
    train_autoencoder(world, AUTOENCODER, tmp_path, cache, CPU)
    killed(tmp_path, cache, "unet", 4)
    train_diffusion(world, DIFFUSION, tmp_path, cache, CPU)
    assert digests(tmp_path) == digests(trained)
    assert len(digests(tmp_path)) == 4  # vae, and vae, unet and text encoder of the pipeline


def test_finished_training_is_not_repeated(trained, world, cache):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    train_autoencoder(world, AUTOENCODER, trained, cache, CPU)
    train_diffusion(world, DIFFUSION, trained, cache, CPU)
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()} == before


def test_export_is_float16_and_loads_as_float32(trained, tmp_path):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    export(trained / "pipeline", tmp_path / "weights", DIFFUSION)
    for path in (tmp_path / "weights").rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    images = pipe(["a plain red ball in a meadow"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    card = tmp_path / "weights" / "card.json"
    card.write_text("{}")
    export(trained / "pipeline", tmp_path / "weights", DIFFUSION)  # the same weights: the card stays
    assert card.exists()


def test_everything_by_one_call(world, tmp_path):
    train_all(
        ["mini-sd", "card"],
        tmp_path,
        scale=0.5,
        threads=1,
        sheets=tmp_path / "sheets",
        world=world,
        autoencoder=AUTOENCODER,
        diffusion=DIFFUSION,
    )
    weights = tmp_path / "weights" / "mini-sd"
    card = json.loads((weights / "card.json").read_text())
    assert card["diffusion"]["steps"] == (DIFFUSION.steps + DIFFUSION.steps_again) // 2
    assert card["measured"]["images"] == len(world)
    assert card["measured"]["verbatim"]["trained_64_or_more"]["n"] == 1
    assert "## What it memorized" in (weights / "MODEL_CARD.md").read_text()
    assert (tmp_path / "sheets" / "mini-sd.png").stat().st_size > 1000


def test_unknown_part_names_the_nearest():
    assert parts(["card", "mini-sd"]) == ["autoencoder", "diffusion", "card"]
    with pytest.raises(UserError, match="did you mean 'diffusion'"):
        parts(["difusion"])


def test_standardised_latents_reconstruct_the_same():
    vae = build_autoencoder(AUTOENCODER)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.bias.copy_(torch.arange(8.0))
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        standardise(vae, *latent_moments(vae, images, CPU))
        latents = vae.encode(images).latent_dist.mean
        assert torch.allclose(vae.decode(latents).sample, before, atol=1e-4)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)


def test_an_epoch_shows_every_example_once():
    order = epoch_order(12, 4, seed=0)
    first = torch.cat([order(step) for step in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    assert first.tolist() != torch.cat([order(step) for step in range(3, 6)]).tolist()
    assert order(1).tolist() == first[4:8].tolist()


def test_timesteps_are_spread_and_weighted():
    timesteps = spread_timesteps(10, torch.Generator().manual_seed(0))
    assert sorted((timesteps // 100).tolist()) == list(range(10))
    alphas = torch.tensor([0.99, 0.5])
    weights = min_snr_weight(alphas, torch.tensor([0, 1]), 5.0)
    assert torch.allclose(weights, torch.tensor([5 / 99, 1.0]), rtol=1e-4)


def test_a_checkpoint_of_another_recipe_is_not_resumed(tmp_path):
    seen: list[int] = []

    def train(key: str, steps: int) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(2, 1)

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            seen.append(step)
            return net(torch.ones(1, 2)).square().mean()

        fit("toy", {"net": net}, loss, steps=steps, peak_lr=0.1, folder=tmp_path, key=key)

    train("one", 2)
    train("one", 3)
    train("two", 2)
    assert seen == [0, 1, 2, 0, 1]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    net = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(
            "toy",
            {"net": net},
            lambda s, g: net(torch.ones(1, 2)).mean() * float("nan"),
            steps=2,
            peak_lr=0.1,
            folder=tmp_path,
        )


def test_config_is_tiny():
    assert CONFIG.neutral_images < 100


def test_the_learning_rate_has_a_second_cycle():
    plain = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    both = [learning_rate(step, 140, 1.0, 10, (40, 0.5)) for step in range(140)]
    assert both[:100] == plain
    assert both[100:] == [learning_rate(step, 40, 0.5, 10) for step in range(40)]
    assert max(both[100:]) == pytest.approx(0.5, abs=0.02) and both[-1] < 0.05
