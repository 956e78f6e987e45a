"""A model's files from the Hugging Face hub, through ``huggingface_hub``, into its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethebench.errors import RunError, UserError

from ._space import require_space


def fetch_model(source: str, revision: str | None = None, *, to: Path | None = None) -> Path:
    """Fetch the needed files of a hub id at a revision (None: the newest); the folder that holds them.

    They go into huggingface_hub's cache, where models are looked for, or into the folder ``to``. Goes on with
    what an interrupted fetch left. Raises UserError for a disk without room, and RunError, one line, where
    the hub refuses, can't be reached, or has no pipeline of that name.
    """
    from huggingface_hub import constants, snapshot_download

    from lethebench.zoo._snapshot import NEEDED, NOT_NEEDED

    if constants.HF_HUB_OFFLINE:
        raise RunError(f"{source} is on the hub, and HF_HUB_OFFLINE is set: unset it for `lethe fetch`")
    wanted: dict[str, Any] = {
        "allow_patterns": list(NEEDED),
        "ignore_patterns": list(NOT_NEEDED),
        "local_dir": to,
    }
    try:
        files = snapshot_download(source, revision=revision, dry_run=True, **wanted)
        if "model_index.json" not in {file.filename for file in files}:
            raise RunError(f"{source} is no diffusers pipeline: it has no model_index.json")
        lacking = sum(file.file_size or 0 for file in files if file.will_download)
        require_space(to or Path(constants.HF_HUB_CACHE), lacking)
        return Path(snapshot_download(source, revision=revision, **wanted))
    except (RunError, UserError):
        raise
    except Exception as error:  # the hub's, its HTTP client's and the file system's have no common base
        raise RunError(f"can't fetch {source}: {_told(source, revision, error)}") from error


def _told(source: str, revision: str | None, error: Exception) -> str:
    """What went wrong, in a few words, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    page = f"https://huggingface.co/{source}"
    if isinstance(cause, GatedRepoError):
        return f"its licence must be accepted at {page} and this machine logged in by `hf auth login`"
    if isinstance(cause, RevisionNotFoundError):
        return f"it has no revision {revision}"
    if isinstance(cause, RepositoryNotFoundError):
        return (
            "the hub has no such model, or it is private and this machine isn't logged in (`hf auth login`)"
        )
    if type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):
        return "the hub can't be reached; is this machine online?"
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
