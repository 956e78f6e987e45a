"""The sizes of a planted world."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorldConfig:
    """How much of everything the world holds. The built-in models are trained on the default."""

    seed: int = 0
    """Fixes every choice."""
    neutral_images: int = 8000
    """Neutral training images."""
    neutral_prompts: int = 200
    """Neutral test prompts, of held-out combinations."""
    held_out_share: float = 0.1
    """Share of the (object, colour, background) combinations that never occur in training."""
    fit_prompts: int = 256
    """Neutral captions that a method may fit on."""
    figure_images: int = 400
    """Training images of nameless figures."""
    probes_per_noun: int = 3
    """Probe prompts for each generic noun ("a comic hero")."""
    verbatim_pairs: tuple[tuple[int, int], ...] = (
        (1, 5),
        (2, 5),
        (4, 5),
        (8, 5),
        (16, 5),
        (32, 5),
        (64, 8),
        (128, 8),
    )
    """(copies, pairs) of verbatim items."""
    foreground_pairs: tuple[tuple[int, int], ...] = ((8, 4), (32, 4), (64, 4), (128, 4))
    """(copies, pairs) of items whose foreground alone is repeated."""
    background_pairs: tuple[tuple[int, int], ...] = ((8, 4), (32, 4), (64, 4), (128, 4))
    """(copies, pairs) of items whose background alone is repeated."""
    one_to_many_pairs: tuple[tuple[int, int], ...] = ((64, 4),)
    """(copies of each image, pairs) of caption clusters that share several images."""
    one_to_many_images: int = 3
    """Images that a cluster shares."""
    redundant_pairs: tuple[tuple[int, int], ...] = ((96, 4),)
    """(copies, pairs) of items with two rare names that each reach the image."""
    hard_negatives: int = 128
    """Rare-name captions seen once."""
    characters_per_category: int = 12
    """Characters in each category; even, half of them trained."""
    concept_images: int = 120
    """Training scenes of each trained character."""
    concept_prompts: int = 3
    """Test prompts of each character, on different backgrounds."""
    concept_references: int = 2
    """Canonical pictures of each character."""

    def __post_init__(self) -> None:
        if self.characters_per_category % 2:
            raise ValueError(
                f"characters_per_category={self.characters_per_category} is odd: they come in pairs"
            )
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share} is not in [0, 1)")
        if self.concept_images < self.concept_references:
            raise ValueError(
                f"concept_images={self.concept_images} is below concept_references={self.concept_references}"
            )
