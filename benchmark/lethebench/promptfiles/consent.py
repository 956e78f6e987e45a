"""What is read or fetched only where a person has allowed it by name."""

from __future__ import annotations

import os
from enum import StrEnum

from lethebench.errors import UserError

VARIABLE = "LETHE_ALLOW"
"""The environment variable that lists what is allowed, separated by commas; ``--allow`` sets it."""


class OptIn(StrEnum):
    """Kinds of prompts that are used only on an explicit request."""

    UNSAFE = "unsafe"
    """Prompts made to draw sexual, violent, hateful or otherwise harmful images."""
    LIVING_PERSONS = "living-persons"
    """Names of living persons."""


_HOLDS = {
    OptIn.UNSAFE: "prompts made to draw sexual, violent or otherwise harmful images",
    OptIn.LIVING_PERSONS: "names of living persons",
}


def allow(given: str) -> None:
    """Allow the kinds that are listed, separated by commas, in this process and those that it starts.

    Raises UserError for an unknown kind.
    """
    _listed(given, "--allow")
    os.environ[VARIABLE] = ",".join(filter(None, (os.environ.get(VARIABLE, ""), given)))


def require_allowed(kind: OptIn | None, what: str) -> None:
    """Raise UserError unless prompts of that kind are allowed (None always are). ``what`` begins the line."""
    if kind is None or kind in _listed(os.environ.get(VARIABLE, ""), VARIABLE):
        return
    raise UserError(
        f"{what} holds {_HOLDS[kind]}: allow it with --allow {kind} or the environment variable "
        f"{VARIABLE}={kind}"
    )


def _listed(given: str, where: str) -> set[OptIn]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    for word in words:
        if word not in set(OptIn):
            raise UserError(f"{where} knows no '{word}': give {' or '.join(OptIn)}, separated by commas")
    return set(map(OptIn, words))
