"""Copy similarity by the built-in descriptor."""

from .metric import CopyMini

__all__ = ["CopyMini"]
