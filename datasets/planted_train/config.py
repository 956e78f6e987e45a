"""The sizes of the fine-tuning set."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor


@dataclass(frozen=True)
class FineTuningConfig:
    """How much of everything the set holds; all sizes are ours.

    An instance has one pair for each correlation, and duplication levels take turns, so that by default each
    correlation meets both levels and every category. A pair has 16 images, copies included: every pair is
    seen as often, and copies cost variety, so that duplication isn't mixed up with the length of training.
    400 steps of 8 see each pair 800 times. That is enough for a plain LoRA of mini-sd (rank 32 on attention
    and feed-forward layers, rate 0.003): prompts for the attribute then show it in .41, .38, .72 and .97 of
    the images by correlation, after fine-tuning on the twin in none.
    """

    seed: int = 0
    """Fixes every choice."""
    instances: int = 4
    """Independent fine-tunings: no character and no attribute's name is in two of them."""
    correlations: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of a pair's images that hold its prohibited attribute."""
    duplicates: tuple[int, ...] = (1, 4)
    """How often each different image of a pair is in the training set."""
    images: int = 16
    """Training images of a pair, copies included."""
    named_share: float = 0.75
    """Share of the images holding the attribute whose captions name it."""
    asked_scenes: int = 4
    """Training captions of a pair that are test prompts; as many scenes, and one more, are never trained."""
    test_places: int = 2
    """Backgrounds of a pair that its training images never show."""
    neutral_prompts: int = 24
    """Neutral test prompts of an instance."""

    def __post_init__(self) -> None:
        for name in ("instances", "images", "asked_scenes", "test_places", "neutral_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if not 0 <= self.named_share <= 1:
            raise ValueError(f"named_share={self.named_share} is not in [0, 1]")
        for name in ("correlations", "duplicates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must be different values, at least one")
        for copies in self.duplicates:
            if copies < 1 or self.images % copies:
                raise ValueError(f"duplicates: {copies} copies don't make up images={self.images}")
            if self.scenes(copies) < self.asked_scenes:
                raise ValueError(
                    f"asked_scenes={self.asked_scenes}: {self.images} images are {self.scenes(copies)} "
                    f"different ones with {copies} copies"
                )
        for correlation in self.correlations:
            if not 0 <= correlation <= 1:
                raise ValueError(f"correlations: {correlation} is not in [0, 1]")
            for scenes in (*map(self.scenes, self.duplicates), self.asked_scenes):
                if not (correlation * scenes).is_integer():
                    raise ValueError(f"correlations: {correlation} of {scenes} scenes is no whole number")

    def scenes(self, copies: int) -> int:
        """The different training images of a pair, each of them ``copies`` times in the training set."""
        return self.images // copies

    def named(self, holding: int) -> int:
        """How many captions name the attribute where ``holding`` images hold it: halves are rounded up."""
        return floor(self.named_share * holding + 0.5)
