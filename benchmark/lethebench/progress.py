"""Progress with rate and time left: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What long work reports to."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more units as done; ``note`` is shown beside the rate."""
        ...


class _Lines:
    """A line to stderr every ``every`` seconds, and one at the end."""

    def __init__(self, name: str, total: int, done: int, every: float = 15.0) -> None:
        self.name, self.total, self.done, self.first, self.every = name, total, done, done, every
        self.began = self.said = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self.said < self.every and self.done < self.total:
            return
        self.said = now
        rate = (self.done - self.first) / max(1e-9, now - self.began)
        left = (self.total - self.done) / rate if rate else 0.0
        note = f"  {note}" if note else ""
        line = f"{self.name}: {self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left{note}"
        print(line, file=sys.stderr, flush=True)


class _Rich:
    def __init__(self, bar: object, task: object) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=n, note=note)  # type: ignore[attr-defined]


@contextmanager
def progress(name: str, *, total: int, done: int = 0) -> Iterator[Bar]:
    """Show the progress of ``total`` units of work named ``name``, ``done`` of which are behind us."""
    if not sys.stderr.isatty():
        yield _Lines(name, total, done)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Rich(bar, bar.add_task(name, total=total, completed=done, note=""))
