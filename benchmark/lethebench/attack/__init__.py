"""Attacks on a row: was what is suppressed removed, or only hidden?

- :class:`AttackRecord` is what an attack found, :func:`read_attacks` reads the records beside a row;
- :class:`Attack` is what an attack plugin derives from; ``dori``, ``linear-probe``, ``paraphrase`` and
  ``seeds`` are built in; :class:`Judge` is for one that judges by itself what came out;
- ``lethebench.attack._run.attack`` attacks rows (``lethe attack ROW``).
"""

from __future__ import annotations

from lethebench.attack.base import Attack, Attempt, Judge, Subject, Try
from lethebench.attack.record import AttackRecord, Share, best_known, read_attacks

__all__ = [
    "Attack",
    "AttackRecord",
    "Attempt",
    "Judge",
    "Share",
    "Subject",
    "Try",
    "best_known",
    "read_attacks",
]
