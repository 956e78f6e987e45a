"""Attacks on a row: was memorization removed, or only hidden?"""

from __future__ import annotations

from lethebench.attack.record import AttackRecord, Share, best_known, read_attacks

__all__ = ["AttackRecord", "Share", "best_known", "read_attacks"]
