"""Trains the built-in judges from nothing, measures them, and writes their weights and cards.

``python -m lethebench.training.judges --folder training/judges`` trains all four; a killed run goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lethebench.datasets.planted import PlantedWorld, digest_prompts
from lethebench.errors import UserError
from lethebench.judges import JUDGES, judge_class
from lethebench.judges.base import Judge, shipped_folder, write_folder
from lethebench.judges.clip import TextImageEncoder, Words
from lethebench.judges.descriptor import CopyDescriptor
from lethebench.judges.nets import ClipNet, parameters_of
from lethebench.judges.recogniser import Recogniser
from lethebench.judges.segmenter import Segmenter
from lethebench.seeding import derive_seed
from lethebench.training.judge_cards import add_generated_errors, write_card
from lethebench.training.judge_data import (
    FIGURES,
    RARE,
    TEST,
    TRAINING,
    VALIDATION,
    Pool,
    attribute_options,
    make_pool,
)
from lethebench.training.judge_generated import generated_errors
from lethebench.training.judge_losses import (
    ClipRecipe,
    CopyRecipe,
    Loss,
    Recipe,
    RecogniserRecipe,
    SegmenterRecipe,
    clip_loss,
    copy_loss,
    recogniser_loss,
    segmenter_loss,
)
from lethebench.training.judge_measures import (
    calibrate,
    measure_copies,
    measure_masks,
    measure_recogniser,
    measure_texts,
    same_kind_threshold,
)
from lethebench.training.loop import fit, recipe_key

RECIPES: dict[str, Recipe] = {
    "recogniser-mini": RecogniserRecipe(),
    "segmenter-mini": SegmenterRecipe(),
    "copy-mini": CopyRecipe(),
    "clip-mini": ClipRecipe(),
}
"""The recipes of the shipped judges."""


@dataclass(frozen=True)
class Data:
    """The world and its pools; ``figures`` are for the recogniser alone."""

    world: PlantedWorld
    training: Pool
    validation: Pool
    test: Pool
    figures: Pool


@dataclass(frozen=True)
class _Plan:
    """How one judge is made: configuration, loss, what validation adds, and what is measured."""

    config: Callable[[Data, Any], dict[str, Any]]
    loss: Callable[[Any, Data, Any, str], Loss]
    finish: Callable[[Judge, Data], dict[str, Any]]
    measure: Callable[[Any, Data], dict[str, Any]]


def train_judges(
    names: Sequence[str] = JUDGES,
    folder: str | Path = "training/judges",
    device: str = "cpu",
    scale: float = 1.0,
    *,
    output: str | Path | None = None,
    workers: int = 1,
    world: PlantedWorld | None = None,
) -> dict[str, Path]:
    """Train the named judges, resuming what ``folder`` holds, and write each with its card.

    ``output`` gets a folder for each judge (by default ``folder / "weights"``). ``scale`` shrinks
    steps and pools, for tests. Returns the folder of each judge.
    """
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise UserError(f"unknown judge {unknown[0]!r}; there are {', '.join(RECIPES)}")
    folder = Path(folder)
    target = Path(output) if output is not None else folder / "weights"
    data = gather(world or PlantedWorld(), folder, scale, workers)
    return {name: train_judge(name, data, folder / name, target / name, device, scale) for name in names}


def gather(world: PlantedWorld, folder: Path, scale: float = 1.0, workers: int = 1) -> Data:
    """The pools, read from ``folder`` or rendered into it."""
    recipes = [TRAINING, VALIDATION, TEST, FIGURES]
    if scale != 1.0:
        recipes = [recipe.scaled(scale) for recipe in recipes]
    return Data(world, *(make_pool(world, recipe, folder, workers) for recipe in recipes))


def train_judge(
    name: str, data: Data, folder: Path, output: Path, device: str = "cpu", scale: float = 1.0
) -> Path:
    """Train one judge (checkpoints in ``folder``), measure it and write it to ``output``."""
    recipe, plan = RECIPES[name], _PLANS[name]
    recipe = replace(
        recipe, steps=max(2, round(recipe.steps * scale)), steps_again=round(recipe.steps_again * scale)
    )
    kind = judge_class(name)
    config = {"judge": name} | plan.config(data, recipe)
    net = start(kind, config, recipe.seed).to(device)
    facts = fit(
        name,
        {"net": net},
        plan.loss(net, data, recipe, device),
        steps=recipe.steps + recipe.steps_again,
        peak_lr=recipe.peak_lr,
        again=(recipe.steps_again, recipe.peak_lr_again),
        folder=folder,
        warmup=min(200, recipe.steps // 4),
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        key=recipe_key(recipe, data.world.config),
    )
    write_folder(output, net, config)
    write_folder(output, net, config | plan.finish(kind.load(output, device), data))
    judge = kind.load(output, device)
    began = time.monotonic()
    figures = plan.measure(judge, data)
    card = {
        "judge": name,
        "recipe": asdict(recipe),
        "training": facts,
        "data": _data_facts(name, data),
        "parameters": parameters_of(net),
        "bytes": (output / "model.safetensors").stat().st_size,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "held_out": figures,
        "held_out_seconds": time.monotonic() - began,
    }
    write_card(output, card)
    return output


def start(kind: type[Judge], config: dict[str, Any], seed: int) -> nn.Module:
    """The network with its first random weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("judge", kind.name, seed))
        return kind.build(config)


def remeasure(name: str, data: Data, output: Path, device: str = "cpu") -> dict[str, Any]:
    """The held-out figures of a judge that is trained already."""
    return _PLANS[name].measure(judge_class(name).load(output, device), data)


def _data_facts(name: str, data: Data) -> dict[str, Any]:
    figures = len(data.figures) if name == Recogniser.name else 0
    return {
        "world": data.world.version,
        "world_seed": data.world.config.seed,
        "prompts_sha256": digest_prompts(data.world),
        "training_scenes": len(data.training) + figures,
        "validation_scenes": len(data.validation),
        "test_scenes": len(data.test),
    }


# --- one plan a judge ----------------------------------------------------------------------------


def _recogniser_config(data: Data, recipe: RecogniserRecipe) -> dict[str, Any]:
    options = {name: list(values) for name, values in attribute_options(data.world).items()}
    return {"widths": recipe.widths, "hidden": recipe.hidden, "options": options, "temperatures": {}}


def _clip_config(data: Data, recipe: ClipRecipe) -> dict[str, Any]:
    planted = {word for item in data.world.items if item.kind != "concept" for word in item.names} | {RARE}
    texts = [*data.world.vocabulary_captions(), *data.training.captions.reshape(-1).tolist()]
    words = Words.of(texts, recipe.text_length)
    return {
        "widths": recipe.widths,
        "features": recipe.features,
        "size": recipe.size,
        "text_width": recipe.text_width,
        "text_layers": recipe.text_layers,
        "text_heads": recipe.text_heads,
        "text_length": recipe.text_length,
        # Names of planted items stay unknown words: the judge must not know what was memorized.
        "vocabulary": [word for word in words.vocabulary if word not in planted],
    }


def _clip_loss(net: ClipNet, data: Data, recipe: ClipRecipe, device: str) -> Loss:
    vocabulary = tuple(_clip_config(data, recipe)["vocabulary"])
    return clip_loss(net, data.training, Words(vocabulary, recipe.text_length), recipe, device)


def _nothing(judge: Judge, data: Data) -> dict[str, Any]:
    return {}


_PLANS: dict[str, _Plan] = {
    Recogniser.name: _Plan(
        _recogniser_config,
        lambda net, data, recipe, device: recogniser_loss(
            net, data.training.joined(data.figures), attribute_options(data.world), recipe, device
        ),
        lambda judge, data: {"temperatures": calibrate(judge, data.validation)},
        lambda judge, data: measure_recogniser(judge, data.test),
    ),
    Segmenter.name: _Plan(
        lambda data, recipe: {"widths": recipe.widths},
        lambda net, data, recipe, device: segmenter_loss(net, data.training, recipe, device),
        _nothing,
        lambda judge, data: measure_masks(judge, data.test),
    ),
    CopyDescriptor.name: _Plan(
        lambda data, recipe: {"widths": recipe.widths, "size": recipe.size},
        lambda net, data, recipe, device: copy_loss(net, data.training, recipe, device),
        lambda judge, data: same_kind_threshold(judge, data.validation),
        lambda judge, data: measure_copies(judge, data.test),
    ),
    TextImageEncoder.name: _Plan(
        _clip_config,
        _clip_loss,
        _nothing,
        lambda judge, data: measure_texts(judge, data.test),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train judges from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--names", nargs="+", default=list(JUDGES), choices=JUDGES)
    parser.add_argument("--folder", type=Path, default=Path("training/judges"), help="checkpoints and pools")
    parser.add_argument(
        "--output", type=Path, default=None, help="where the judges go; by default the package"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1, help="processes that render the pools")
    given = parser.parse_args(arguments)
    output = given.output or shipped_folder(JUDGES[0]).parent
    train_judges(given.names, given.folder, given.device, given.scale, output=output, workers=given.workers)


if __name__ == "__main__":
    main()

__all__ = [
    "RECIPES",
    "Data",
    "add_generated_errors",
    "gather",
    "generated_errors",
    "main",
    "remeasure",
    "train_judge",
    "train_judges",
]
