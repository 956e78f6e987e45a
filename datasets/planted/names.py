"""Invented rare names: pronounceable words that no caption uses for anything else."""

from __future__ import annotations

from collections.abc import Iterator

from ._draw import Draw

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "gr",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "pl",
    "qu",
    "r",
    "sk",
    "t",
    "tr",
    "v",
    "vr",
    "w",
    "y",
    "z",
    "zh",
    "th",
    "sn",
    "fl",
    "h",
)
_VOWELS = ("a", "e", "i", "o", "u")
_MIDDLES = (
    "lb",
    "lph",
    "lk",
    "rv",
    "rx",
    "nv",
    "nx",
    "mv",
    "sk",
    "zz",
    "kt",
    "rg",
    "lv",
    "ng",
    "rd",
    "bl",
    "dr",
    "xt",
    "vr",
    "mb",
    "lm",
    "sp",
    "gz",
    "phr",
    "rn",
)
_CODAS = (
    "x",
    "v",
    "k",
    "z",
    "th",
    "m",
    "rn",
    "lf",
    "x",
    "nk",
    "q",
    "zo",
    "vu",
    "xa",
    "rix",
    "dax",
    "bu",
    "ko",
)
_UNWANTED = ("jizz", "fuk", "dik", "kok", "nig", "rap", "kum", "tit", "pis")
"""Beginnings that would read badly."""


def invent_names(*key: object) -> Iterator[str]:
    """An endless stream of different names, fixed by the key; no two share their first four letters."""
    draw = Draw(*key, "names")
    starts: set[str] = set()
    while True:
        name = draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_MIDDLES)
        name += draw.choice(_VOWELS) + draw.choice(_CODAS)
        if name[:4] in starts or name.startswith(_UNWANTED):
            continue
        starts.add(name[:4])
        yield name
