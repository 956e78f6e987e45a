"""Whether what is to be fetched fits on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from lethebench.errors import UserError


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of the folder (there already or not) has less free than ``needed``."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {told_bytes(free)} free, and {told_bytes(needed)} are to be fetched: "
            "free some space or name another folder with --to"
        )


def told_bytes(count: int) -> str:
    """A number of bytes as a reader likes it.

    >>> told_bytes(174), told_bytes(1376625), told_bytes(24 * 10**9)
    ('174 B', '1.4 MB', '24.0 GB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
