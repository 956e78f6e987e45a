"""A world and nets so small that a whole training takes seconds."""

from __future__ import annotations

from lethebench.datasets.planted import WorldConfig
from lethebench.training.autoencoder import AutoencoderRecipe
from lethebench.training.diffusion import DiffusionRecipe

CONFIG = WorldConfig(
    neutral_images=24,
    neutral_prompts=2,
    fit_prompts=4,
    figure_images=4,
    probes_per_noun=1,
    verbatim_pairs=((1, 1), (64, 1)),
    foreground_pairs=((8, 1),),
    background_pairs=((8, 1),),
    one_to_many_pairs=((8, 1),),
    redundant_pairs=((8, 1),),
    hard_negatives=2,
    characters_per_category=2,
    concept_images=2,
    concept_prompts=1,
)
AUTOENCODER = AutoencoderRecipe(
    widths=(8, 8, 8), latent_channels=4, groups=4, steps=6, batch=4, fresh=8, unseen=4
)
DIFFUSION = DiffusionRecipe(
    widths=(16, 16),
    head_width=8,
    compiled=False,
    groups=4,
    text_width=16,
    text_layers=1,
    text_heads=2,
    steps=6,
    steps_again=4,
    batch=4,
    inference_steps=2,
)
