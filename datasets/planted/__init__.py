"""A procedural world with planted memorization: captioned 64-pixel scenes and exact ground truth."""

from lethebench.registry import PROMPT_SETS

from ._draw import COLOURS
from .backgrounds import BACKGROUNDS
from .characters import CATEGORIES, FEATURES, GENERIC_NOUNS, Character
from .config import WorldConfig
from .items import Ask, Item, TrainingExample
from .objects import OBJECTS, PATTERNS
from .scene import Backdrop, Person, Picture, Placement, Scene, Thing, caption, render, render_backdrop
from .sheet import contact_sheet
from .world import PlantedWorld, digest_captions, digest_pictures, digest_prompts

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLOURS",
    "FEATURES",
    "GENERIC_NOUNS",
    "OBJECTS",
    "PATTERNS",
    "Ask",
    "Backdrop",
    "Character",
    "Item",
    "Person",
    "Picture",
    "Placement",
    "PlantedWorld",
    "Scene",
    "Thing",
    "TrainingExample",
    "WorldConfig",
    "caption",
    "contact_sheet",
    "digest_captions",
    "digest_pictures",
    "digest_prompts",
    "render",
    "render_backdrop",
]

PROMPT_SETS.register(PlantedWorld)
