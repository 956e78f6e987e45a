"""The protected characters: four categories, each with its own look and nameable features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from ._draw import Draw

CATEGORIES = ("comic", "anime", "movie", "celebrity")
"""The categories of characters."""

FEATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "comic": {
        "suit": ("red", "blue", "green", "purple", "yellow", "black", "white"),
        "cape": ("red", "blue", "green", "orange", "yellow", "purple", "black"),
        "headgear": ("cowl", "mask", "helmet", "hood"),
        "emblem": ("star", "bolt", "ring", "diamond"),
    },
    "anime": {
        "hair": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
        "style": ("spiky", "twintails", "long", "bob", "ponytail"),
        "eyes": ("blue", "green", "red", "amber"),
        "accessory": ("bow", "headphones", "cat ears", "halo"),
        "outfit": ("red", "blue", "black", "white", "teal", "yellow"),
    },
    "movie": {
        "species": ("robot", "monster", "alien", "knight"),
        "body": ("red", "orange", "yellow", "green", "blue", "purple", "white", "black"),
        "accent": ("red", "yellow", "green", "blue", "pink", "white", "black"),
        "eyes": ("one", "two", "visor"),
        "crown": ("antenna", "horns", "crest"),
    },
    "celebrity": {
        "hairstyle": ("short", "long", "afro", "mohawk", "bun", "bald"),
        "hair": ("black", "brown", "blond", "ginger", "silver"),
        "skin": ("pale", "tan", "brown", "dark"),
        "accessory": ("sunglasses", "hat", "beard", "necklace", "moustache"),
        "outfit": ("red", "blue", "green", "purple", "black", "white", "yellow"),
    },
}
"""The features of each category and their values."""

_MIN_DIFFERENCE = 3
"""How many features tell any two protected characters of a category apart, at least."""
_TRIES = 20_000
"""Looks drawn before a cast is called impossible; the default casts need 15 to 130."""

Features = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Character:
    """A protected character.

    ``features`` names what it looks like (:data:`FEATURES`), ``trained`` whether the built-in
    models saw it, ``twin`` the name of the identically drawn character on the coin's other side,
    ``item`` its planted item's id.
    """

    name: str
    category: str
    look: Features
    trained: bool
    twin: str
    item: str

    @property
    def features(self) -> Mapping[str, str]:
        """The features by name."""
        return dict(self.look)


def _sensible(category: str, features: Mapping[str, str]) -> bool:
    """Whether all the features can be seen (a cape in the suit's own colour could not, and so on)."""
    if category == "comic":
        return features["suit"] != features["cape"]
    if category == "movie":
        return features["body"] != features["accent"]
    if category == "celebrity":
        hidden = features["hairstyle"] == "bald" and features["hair"] != "black"
        return not hidden and not (
            features["accessory"] == "hat" and features["hairstyle"] in ("mohawk", "bun")
        )
    return features["hair"] != features["outfit"]


def draw_look(category: str, draw: Draw) -> Features:
    """Random features of a category."""
    while True:
        features = {name: draw.choice(values) for name, values in FEATURES[category].items()}
        if _sensible(category, features):
            return tuple(features.items())


def difference(first: Features, second: Features) -> int:
    """In how many features two looks of one category differ."""
    return sum(a != b for a, b in zip(first, second, strict=True))


def draw_cast(category: str, count: int, draw: Draw) -> list[Features]:
    """``count`` looks of a category, any two of them different in at least three features.

    Drawn in random order from one distribution, so that the order (and any coin over pairs) says
    nothing about the looks.
    """
    cast: list[Features] = []
    for _ in range(_TRIES):
        if len(cast) == count:
            break
        look = draw_look(category, draw)
        if all(difference(look, other) >= _MIN_DIFFERENCE for other in cast) and not _crowded(look, cast):
            cast.append(look)
    if len(cast) < count:
        raise ValueError(f"no room for {count} different {category} characters: found {len(cast)}")
    return draw.shuffled(cast)


def _crowded(look: Features, cast: list[Features]) -> bool:
    """Whether both leading features (the most visible ones) are taken together already."""
    return any(look[:2] == other[:2] for other in cast)


def generic_noun(category: str, look: Features) -> str:
    """What a caption calls a nameless figure: "a comic hero", "a movie robot" and so on."""
    features = dict(look)
    if category == "anime":
        return "an anime boy" if features["style"] in ("spiky", "bob") else "an anime girl"
    if category == "movie":
        return f"a movie {features['species']}"
    return {"comic": "a comic hero", "celebrity": "a famous person"}[category]


GENERIC_NOUNS = (
    "a comic hero",
    "an anime boy",
    "an anime girl",
    "a famous person",
    *(f"a movie {species}" for species in FEATURES["movie"]["species"]),
)
"""Every noun that :func:`generic_noun` gives."""


def all_looks(category: str) -> list[Features]:
    """Every sensible combination of a category's features."""
    names = tuple(FEATURES[category])
    looks = (tuple(zip(names, values, strict=True)) for values in product(*FEATURES[category].values()))
    return [look for look in looks if _sensible(category, dict(look))]
