"""Engines run jobs; the store, not the engine, is the truth."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lethebench.errors import LetheError, UserError
from lethebench.work import Job


@dataclass(frozen=True)
class Failure:
    """A job that raised: its error in one line, and the traceback."""

    job: Job
    error: str
    traceback: str

    @staticmethod
    def of(job: Job, error: Exception) -> Failure:
        """The failure of a job by the error that is being handled."""
        first = str(error).splitlines()[0] if str(error) else ""
        told = str(error) if isinstance(error, LetheError) else f"{type(error).__name__}: {first}"
        return Failure(job, told, traceback.format_exc())


class Engine(Protocol):
    """Runs jobs in any order and reports the ones that failed; one failure never stops the others."""

    def run(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> list[Failure]:
        """Perform every job; ``done`` is called after each, failed or not."""
        ...


def engine(name: str, workers: int) -> Engine:
    """The engine of that name. Raises UserError."""
    if name == "local":
        from lethebench.engines.local import LocalEngine

        return LocalEngine(workers)
    raise UserError(f"unknown engine '{name}': known local")
