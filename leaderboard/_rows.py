"""Finding and reading rows. An invalid row is reported and hides no other."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lethebench.attack.record import AttackRecord, made_key, read_attack
from lethebench.errors import UserError
from lethebench.row import Row, read_row

if TYPE_CHECKING:
    import pandas as pd


class InvalidRowWarning(UserWarning):
    """A ``row.json`` that is not a valid row, or the second one of the same key."""


BASE = "base"


def reference_of(rows: Iterable[Row]) -> str:
    """The method that differences are from, the same for all rows of a suite; base where there are none."""
    return next((row.reference for row in rows), BASE)


def floor_of(reference: str) -> str:
    """The control that never saw what must not be drawn.

    >>> floor_of("base"), floor_of("lora")
    ('oracle', 'lora-oracle')
    """
    return "oracle" if reference == BASE else f"{reference}-oracle"


def measured(rows: Iterable[Row], method: str) -> Row | None:
    """The method's first row with results."""
    return next((row for row in rows if row.method == method and row.status == "ok"), None)


@dataclass(frozen=True)
class Entry:
    """A row, the folder that holds its images and per-image table, and the attacks on it."""

    row: Row
    folder: Path
    attacks: tuple[AttackRecord, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A file below the runs folder that could not be shown, and why. ``path`` is relative to it."""

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """All that a runs folder holds, in an order that doesn't depend on the file system."""

    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]


def scan(runs: Path) -> Results:
    """Read every row below ``runs`` and the attacks on it. A bad file becomes a :class:`Problem`."""
    entries: dict[tuple[str, str, str, str], Entry] = {}
    problems: list[Problem] = []
    read = [(path, _read(path)) for path in _row_files(runs)]
    for path, row in sorted(read, key=lambda found: (not _in_place(*found), found[0])):
        where = path.relative_to(runs).as_posix()
        if isinstance(row, str):
            problems.append(Problem(where, row))
        elif row.key in entries:
            first = entries[row.key].folder.relative_to(runs).as_posix()
            problems.append(Problem(where, f"the row {' / '.join(row.key)} is already given by {first}"))
        else:
            attacks, bad = _attacks(row, path.parent, runs)
            entries[row.key] = Entry(row, path.parent, attacks)
            problems += bad
    problems.sort(key=lambda p: p.path)
    return Results(tuple(entries[k] for k in sorted(entries)), tuple(problems))


def _read(path: Path) -> Row | str:
    """The row, or why there is none."""
    try:
        row = read_row(path)
        row.to_json()
    except UserError as error:
        return str(error).replace(str(path), "row.json")
    except ValueError:
        return "row.json holds a number that is not finite, or is not UTF-8"
    except OSError as error:
        return f"row.json can't be read: {type(error).__name__}"
    return row


def _attacks(row: Row, folder: Path, runs: Path) -> tuple[tuple[AttackRecord, ...], list[Problem]]:
    """The records beside a row, by file, and why others are not shown."""
    found, problems = [], []
    made = made_key(folder) if row.status == "ok" else None
    for path in sorted((folder / "attacks").glob("*.json")):
        record = _attack(path, row, made)
        if isinstance(record, str):
            problems.append(Problem(path.relative_to(runs).as_posix(), record))
        else:
            found.append(record)
    return tuple(found), problems


def _attack(path: Path, row: Row, made: str | None) -> AttackRecord | str:
    """The record, or why there is none."""
    try:
        record = read_attack(path)
        record.to_json()
    except UserError as error:
        return str(error).replace(str(path), path.name)
    except ValueError:
        return f"{path.name} holds a number that is not finite"
    except OSError as error:
        return f"{path.name} can't be read: {type(error).__name__}"
    named = (f"{record.suite.name}@{record.suite.version}", record.model, record.method, record.setting)
    if named != row.key:
        return f"an attack on another row: {' / '.join(named)}"
    if record.row_key != made:
        return "an attack on another result than the row that lies here: run it again"
    return record


def _in_place(path: Path, row: Row | str) -> bool:
    """Whether the row lies in the folder that its key names: of two with one key, that one is kept."""
    return not isinstance(row, str) and [unquote(p) for p in path.parts[-5:-1]] == list(row.key)


def load_rows(runs: Path) -> list[Row]:
    """Every valid row below ``runs``, ordered by key; an :class:`InvalidRowWarning` for each other."""
    found = scan(Path(runs))
    for problem in found.problems:
        warnings.warn(f"{problem.path}: {problem.reason}", InvalidRowWarning, stacklevel=2)
    return [entry.row for entry in found.entries]


def rows_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each row, scores flattened.

    Columns: ``suite version model method setting reference status reason control family knowledge warnings``,
    then for each score ``<name>`` (its value), ``<name>.low .high .n .difference .difference_low
    .difference_high .p``, then ``cost.*``. What was not measured is missing (NaN), never zero.
    """
    import pandas as pd

    flat = [_flat(row) for row in rows]
    columns = dict.fromkeys(c for row in flat for c in row)
    return pd.DataFrame(flat, columns=sorted(columns, key=_column_order))


_FIRST = (
    "suite",
    "version",
    "model",
    "method",
    "setting",
    "reference",
    "status",
    "reason",
    "control",
    "family",
    "knowledge",
    "warnings",
)
_SUFFIXES = ("", "low", "high", "n", "difference", "difference_low", "difference_high", "p")


def _column_order(name: str) -> tuple[int, str, int]:
    if name in _FIRST:
        return (0, "", _FIRST.index(name))
    if name.startswith("cost."):
        return (2, name, 0)
    score, _, suffix = name.rpartition(".")
    return (1, score, _SUFFIXES.index(suffix)) if suffix in _SUFFIXES[1:] else (1, name, 0)


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "suite": row.suite.name,
        "version": row.suite.version,
        "model": row.model,
        "method": row.method,
        "setting": row.setting,
        "reference": row.reference,
        "status": row.status,
        "reason": row.reason or "",
        "control": row.control,
        "family": row.family,
        "knowledge": " ".join(row.knowledge),
        "warnings": "; ".join(row.warnings),
    }
    for name, score in sorted(row.scores.items()):
        flat |= {name: score.value, f"{name}.low": score.low, f"{name}.high": score.high}
        flat[f"{name}.n"] = score.n
        if score.base_difference is not None:
            d = score.base_difference
            flat |= {f"{name}.difference": d.value, f"{name}.difference_low": d.low}
            flat |= {f"{name}.difference_high": d.high, f"{name}.p": d.p}
    if row.cost is not None:
        cost = row.cost.model_dump(mode="json")
        deactivated = cost.pop("deactivated")
        flat |= {f"cost.{k}": v for k, v in cost.items()}
        flat |= {f"cost.deactivated.{k}": v for k, v in sorted(deactivated.items())}
    return flat


def _row_files(runs: Path) -> Iterator[Path]:
    """``<suite>@<version>/<model>/<method>/<setting>/row.json``; suite folders are known by their ``@``."""
    for suite in sorted(p for p in runs.glob("*@*") if p.is_dir()):
        yield from sorted(suite.glob("*/*/*/row.json"))


def unfinished(runs: Path) -> list[str]:
    """Folders at the depth of a row without a ``row.json``: a run that was stopped before its end."""
    folders = (f for suite in sorted(runs.glob("*@*")) for f in sorted(suite.glob("*/*/*")))
    return [f.relative_to(runs).as_posix() for f in folders if f.is_dir() and not (f / "row.json").is_file()]


# --- the order of settings ------------------------------------------------------------------------

_STRENGTH_WORDS = (
    ("off", "none", "zero"),
    ("minimal", "tiny", "lightest", "weakest"),
    ("weak", "low", "light", "mild", "small", "soft"),
    ("default", "medium", "mid", "middle", "moderate", "normal"),
    ("strong", "high", "heavy", "large", "hard"),
    ("full", "max", "maximal", "extreme", "strongest"),
)
_RANK = {word: i for i, words in enumerate(_STRENGTH_WORDS) for word in words}


def in_strength_order(settings: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """Settings from the weakest to the strongest: as ``known`` has them, else by words and numbers.

    >>> in_strength_order(["strong", "weak", "medium"])
    ['weak', 'medium', 'strong']
    >>> in_strength_order(["10-tokens", "4-tokens", "1-token"])
    ['1-token', '4-tokens', '10-tokens']
    >>> in_strength_order(["b", "a"], known=["b", "a"])
    ['b', 'a']
    """
    place = {name: i for i, name in enumerate(known)}
    return sorted(settings, key=lambda s: (place.get(s, len(place)), _natural(s)))


def _natural(setting: str) -> list[tuple[int, float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|[^\W\d]+", setting.lower())
    return [_part(p) for p in parts] + [(9, 0.0, setting)]


def _part(part: str) -> tuple[int, float, str]:
    if part[0].isdigit():
        return (1, float(part), "")
    return (0, float(_RANK[part]), "") if part in _RANK else (2, 0.0, part)
