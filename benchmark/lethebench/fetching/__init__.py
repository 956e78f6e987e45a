"""``lethe fetch``: the one place that downloads. A file arrives whole and as published, or not at all."""

from __future__ import annotations

from ._download import download
from ._fetch import Item, fetch, known_items

__all__ = ["Item", "download", "fetch", "known_items"]
