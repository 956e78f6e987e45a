"""What prompt sets and metrics agree on about references that may be descriptors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError

if TYPE_CHECKING:
    from lethebench.metric import Metric
    from lethebench.prompts import PromptSet, Reference

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Descriptor:
    """What makes the vectors that a metric compares.

    ``name`` says model and preprocessing (``copy-mini``, ``sscd:nemo-320``), ``weights`` is the SHA-256 of
    what was learnt ("" where nothing was). ``preprocessing`` says in words what ``name`` stands for.
    """

    name: str
    weights: str
    preprocessing: str = field(default="", compare=False)


@dataclass(frozen=True)
class Described:
    """A reference of which only descriptors are kept: float32 ``[d]`` of unit length, by what made them."""

    id: str
    vectors: Mapping[Descriptor, Floats]

    def by(self, descriptor: Descriptor) -> Floats:
        """The vector made by that descriptor. Raises UserError where there is none."""
        if descriptor in self.vectors:
            return self.vectors[descriptor]
        names = sorted({own.name for own in self.vectors})
        if descriptor.name in names:
            raise UserError(
                f"reference {self.id} was indexed with other weights of {descriptor.name}: make the index "
                "again by `lethe index`"
            )
        raise UserError(
            f"reference {self.id} is there only as a descriptor of {', '.join(names)}, and {descriptor.name} "
            "is asked for: make an index of it by `lethe index`, or change the metric's settings"
        )


class References(Protocol):
    """Where the references of a prompt set are."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all references, sorted."""
        ...

    def __contains__(self, reference_id: object) -> bool: ...

    def reference(self, reference_id: str) -> Reference:
        """The image. KeyError for an unknown id; UserError where only descriptors are kept of it."""
        ...

    def described(self, reference_id: str) -> Described | None:
        """The vectors that are kept of it; None where the image is there. KeyError for an unknown id."""
        ...

    def manifest(self) -> dict[str, Any]:
        """What is there, with the SHA-256 that scores depend on; no paths."""
        ...


def described(prompts: PromptSet, reference_id: str) -> Described | None:
    """What the prompt set keeps of a reference in place of its image; None where the image is there."""
    own: Any = getattr(prompts, "described", None)
    found: Described | None = None if own is None else own(reference_id)
    return found


def unusable_references(metric: Metric, prompts: PromptSet) -> str | None:
    """Why the metric doesn't apply to the prompt set's references; None where it does.

    A metric that compares with references doesn't where there are none; one that needs their images doesn't
    where a set has only descriptors; one that compares descriptors doesn't where another made them. Reads no
    image.
    """
    if not {"references", "masks"} & metric.needs:
        return None
    ids = sorted({name for prompt in prompts for name in prompt.references})
    if not ids:
        return (
            f"metric '{metric.name}' does not apply: no prompt of '{prompts.name}' has a reference here; put "
            "images, or an index of them (`lethe index`), into SET/references of the data folder"
        )
    kept = [one for one in (described(prompts, name) for name in ids) if one is not None]
    if not kept:
        return None
    own = metric.descriptor()
    if own is None:
        return (
            f"metric '{metric.name}' does not apply: the references of prompt set '{prompts.name}' are "
            "descriptors only, and it needs their images"
        )
    try:
        for one in kept:
            one.by(own)
    except UserError as error:
        return f"metric '{metric.name}' does not apply: {error}"
    return None
