"""Seeds from names: every random draw of Lethe is a function of what it is for, never of global state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the SHA-256 of the parts' text, joined by a unit separator.

    >>> derive_seed("planted", "prompt-1", 0) == derive_seed("planted", "prompt-1", 0)
    True
    """
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU ``torch.Generator`` seeded by :func:`derive_seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(*parts))
