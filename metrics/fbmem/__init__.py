"""FB-Mem: which images are memorized whole, in their foreground or in their background."""

from .metric import FBMem, FBMemAsReleased

__all__ = ["FBMem", "FBMemAsReleased"]
