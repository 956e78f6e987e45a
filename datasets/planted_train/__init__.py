"""A fine-tuning set in the planted world: wanted characters entangled with prohibited attributes."""

from lethebench.registry import PROMPT_SETS

from .config import FineTuningConfig
from .pairs import QUESTIONS, Pair, Shot
from .world import PlantedTrain

__all__ = ["QUESTIONS", "FineTuningConfig", "Pair", "PlantedTrain", "Shot"]

PROMPT_SETS.register(PlantedTrain)
