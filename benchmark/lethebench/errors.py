"""The two kinds of failure that the command line tells apart."""

from __future__ import annotations


class LetheError(Exception):
    """A failure that Lethe explains in one line. ``exit_code`` is what the command returns."""

    exit_code = 1


class UserError(LetheError):
    """The request can't be carried out as it stands: says what was wrong and what to do. Exit 2."""

    exit_code = 2


class StoreError(UserError):
    """The folder of results can't be written: the one failure that stops a run, since no job could go on."""


class RunError(LetheError):
    """Work that was rightly asked for failed while it ran. Exit 1; what was computed is kept."""


class KnowledgeError(LetheError):
    """A method asked its task for something that it doesn't declare as its knowledge."""
