"""The local engine: this process, or several on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from lethebench.engines import Failure
from lethebench.errors import StoreError
from lethebench.work import Job, perform


@dataclass(frozen=True)
class LocalEngine:
    """Performs jobs one after another, or in ``workers`` processes that share the store."""

    workers: int = 1

    def run(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> list[Failure]:
        """Perform every job; see :class:`lethebench.engines.Engine`."""
        if self.workers <= 1 or len(jobs) <= 1:
            return self._here(jobs, done)
        return self._beside(jobs, done)

    def _here(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> list[Failure]:
        failures = []
        for job in jobs:
            failure = attempt(job)
            if failure is not None:
                failures.append(failure)
            done(job)
        return failures

    def _beside(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> list[Failure]:
        failures = []
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            for future in as_completed(futures := {pool.submit(attempt, job): job for job in jobs}):
                failure = future.result()
                if failure is not None:
                    failures.append(failure)
                done(futures[future])
        return failures


def attempt(job: Job) -> Failure | None:
    """Perform a job; its failure as a value, except where nothing can be stored any more."""
    try:
        perform(job)
    except StoreError:
        raise
    except Exception as error:
        return Failure.of(job, error)
    return None
