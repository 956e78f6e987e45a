"""One file over HTTP: continued where it stopped, checked, then put in its place."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from lethebench.errors import RunError
from lethebench.progress import progress
from lethebench.store import file_sha256

TIMEOUT = (10.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
_CHUNK = 1 << 16
_KIB = 1024
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""


class _LocalOnly(HTTPAdapter):
    """Plain HTTP to this machine and to no other, redirections included."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if urlsplit(request.url or "").hostname != "127.0.0.1":
            raise requests.exceptions.InvalidSchema(f"{request.url} is not https")
        return super().send(request, *args, **kwargs)


class _CutError(Exception):
    """The answer didn't come whole; another try may go on from where it stopped."""


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    tries: int = 5,
    wait: float = 1.0,
    timeout: tuple[float, float] = TIMEOUT,
) -> str:
    """Download to ``path``; the SHA-256 of what came.

    The bytes go to ``<path>.part``, which a later call continues (HTTP Range; all is sent again by a server
    that knows no ranges, and of a file whose sum isn't known), and take their name when the sum is right.
    Raises RunError, one line: after ``tries`` that brought no whole answer (the pauses between them double
    from ``wait`` seconds), for an answer that another try wouldn't change, and for another sum than
    ``sha256`` or more bytes than ``size``.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if sha256 is None:
        part.unlink(missing_ok=True)  # nothing would tell bytes of another version
    continued = _length(part) > 0
    _receive(url, part, size, tries, wait, timeout)
    if continued and sha256 not in (None, file_sha256(part)):  # what was there may be of another version
        part.unlink()
        _receive(url, part, size, tries, wait, timeout)
    found = file_sha256(part)
    if sha256 not in (None, found):
        part.unlink()
        raise RunError(
            f"what {url} gave is not the published file (SHA-256 {found}, not {sha256}): nothing is kept"
        )
    part.replace(path)
    return found


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _receive(
    url: str, part: Path, size: int | None, tries: int, wait: float, timeout: tuple[float, float]
) -> None:
    """Bring ``part`` to its full length."""
    told = ""
    with requests.Session() as session:
        session.mount("http://", _LocalOnly())
        for number in range(tries):
            if number:
                time.sleep(wait * 2 ** (number - 1))
            try:
                return _ask(session, url, part, size, timeout)
            except (
                requests.exceptions.InvalidSchema,
                requests.exceptions.InvalidURL,
                requests.exceptions.MissingSchema,
            ) as error:
                raise RunError(f"can't fetch {url}: {error}") from error
            except (_CutError, requests.RequestException) as error:
                told = _told(error)
    kept = _length(part)
    then = f"; {kept} bytes are kept, and the same command goes on from there" if kept else ""
    raise RunError(f"can't fetch {url}: {told} ({tries} tries){then}")


def _ask(
    session: requests.Session, url: str, part: Path, size: int | None, timeout: tuple[float, float]
) -> None:
    """One request for what is missing. Raises _CutError where the answer isn't whole."""
    have = _length(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        status, span = answer.status_code, answer.headers.get("Content-Range", "")
        if status == 416 and span.endswith(f"/{have}"):
            return  # nothing is missing
        if status == 416 or (status == 206 and not span.startswith(f"bytes {have}-")):
            part.unlink(missing_ok=True)
            raise _CutError("the server has another part than was asked for")
        if status in _TRANSIENT:
            raise _CutError(f"the server answers {status} {answer.reason}")
        if status not in (200, 206):
            raise RunError(f"can't fetch {url}: the server answers {status} {answer.reason}")
        _write(answer, part, have if status == 206 else 0, size)


def _write(answer: requests.Response, part: Path, done: int, size: int | None) -> None:
    """Write the answer's bytes after the ``done`` that are there. Raises _CutError where some are missing."""
    length = answer.headers.get("Content-Length", "")
    plain = length.isdecimal() and "Content-Encoding" not in answer.headers
    total = done + int(length) if plain else size
    name = f"{part.name.removesuffix('.part')}, KiB"
    shown = (
        progress(name, total=total // _KIB, done=done // _KIB) if total and total >= _KIB else nullcontext()
    )
    with part.open("ab" if done else "wb") as file, shown as bar:
        for chunk in answer.iter_content(_CHUNK):
            if size is not None and done + len(chunk) > size:
                file.truncate(0)
                raise RunError(f"{answer.url} sends more than the {size} bytes of the published file")
            file.write(chunk)
            if bar is not None:
                bar.advance((done + len(chunk)) // _KIB - done // _KIB)
            done += len(chunk)
    if total is not None and done < total:
        raise _CutError(f"the connection ended after {done} of {total} bytes")


def _told(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate was not accepted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy can't be reached"
    if isinstance(error, requests.ConnectionError):
        return "no connection; is this machine online?"
    return str(error) or type(error).__name__
