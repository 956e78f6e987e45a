"""Attacks on a row: was memorization removed, or only hidden?

- :class:`AttackRecord` is what an attack found, :func:`read_attacks` reads the records beside a row;
- :class:`Attack` is what an attack plugin derives from; ``dori``, ``paraphrase`` and ``seeds`` are built in;
- ``lethebench.attack._run.attack`` attacks rows (``lethe attack ROW``).
"""

from __future__ import annotations

from lethebench.attack.base import Attack, Attempt, Subject, Try
from lethebench.attack.record import AttackRecord, Share, best_known, read_attacks

__all__ = [
    "Attack",
    "AttackRecord",
    "Attempt",
    "Share",
    "Subject",
    "Try",
    "best_known",
    "read_attacks",
]
