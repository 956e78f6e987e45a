"""Reading tables of prompts exactly as they are written: every cell is text, nothing is guessed.

Separators are told, never sniffed (captions hold all of them); ``None``, ``nan`` and ``Null`` are words;
numbers and zero-padded ids stay as written; a row's place is the line that it begins on, since cells hold
newlines. Every failure is one line that names the file, the line and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethebench.errors import UserError
from lethebench.seeding import derive_seed

if TYPE_CHECKING:
    import numpy as np

Format = Literal["csv", "tsv", "jsonl", "lines", "parquet"]
TEXT = "text"
"""The one column of a file with a prompt a line."""

_ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
    ".parquet": "parquet",
}
_LFS = b"version https://git-lfs"

Mend = Callable[[list[str], int], Sequence[str] | None]
"""What to make of a ragged row, ``(cells, number of columns)``: the right number of cells, or None."""


@dataclass(frozen=True)
class Row:
    """A row's cells by column, and the line of the file (from 1) that it begins on.

    In a Parquet file the line is the row's number.
    """

    line: int
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A file's columns and rows. ``left_out`` and ``mended`` count its ragged rows."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: int = 0
    mended: int = 0

    def derived(self, derive: Callable[[Mapping[str, str]], Mapping[str, str] | None]) -> Table:
        """The table with the columns that ``derive`` makes of each row's cells; None leaves the row out.

        A ValueError of ``derive`` becomes a UserError that names the line.
        """

        def more_of(row: Row) -> Mapping[str, str] | None:
            try:
                return derive(row.cells)
            except ValueError as error:
                raise UserError(f"{self.path}: line {row.line}: {error}") from error

        found = [(row, more_of(row)) for row in self.rows]
        rows = tuple(Row(row.line, {**row.cells, **more}) for row, more in found if more is not None)
        added = next((tuple(more) for _, more in found if more is not None), ())
        left_out = self.left_out + len(found) - len(rows)
        return replace(self, columns=(*self.columns, *added), rows=rows, left_out=left_out)


def format_of(path: Path) -> Format:
    """The format that a file's ending says. Raises UserError for an unknown ending."""
    found = _ENDINGS.get(path.suffix.lower())
    if found is None:
        raise UserError(f"{path}: say its `format`: csv, tsv, jsonl, lines or parquet")
    return found


def read(
    path: Path,
    form: Format,
    *,
    separator: str | None = None,
    quoting: bool | None = None,
    blanks: bool = False,
    leave_out_ragged: bool = False,
    mend: Mend | None = None,
    at_most: int | None = None,
) -> Table:
    """The file's rows. Raises UserError, with the file, the line and what to do.

    - ``csv``: cells between separators (``,`` unless told), quoted with ``"``; ``tsv``: between tabs, quoting
      off; ``quoting`` says otherwise. ``blanks``: those after a separator are part of it (``a, b``).
      A row with another number of cells than the header is an error, unless ``mend`` makes it whole or
      ``leave_out_ragged`` is set. Empty lines between rows count for nothing.
    - ``jsonl``: an object a line. Null and missing keys read "", lists and objects their JSON.
    - ``lines``: a text a line, split on line feeds alone (other line breaks are part of the text), in the one
      column ``text``; what follows the last line feed is a line where it isn't empty.
    - ``parquet``: as ``jsonl``. Of a longer file ``at_most`` rows, drawn by their number: a shard of LAION
      has millions, which needn't fit into memory.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if form == "parquet":
        return _parquet(path, at_most)
    text = _text(path)
    if form == "lines":
        return _lines(path, text)
    if form == "jsonl":
        return _jsonl(path, text)
    quoted = form == "csv" if quoting is None else quoting
    parts = _rows(path, text, separator or ("," if form == "csv" else "\t"), quoted, blanks)
    return _tabular(path, parts, leave_out_ragged, mend)


def _text(path: Path) -> str:
    """The file's text, line ends as they are, without a byte-order mark."""
    found = path.read_bytes()
    _refuse_pointer(path, found)
    try:
        text = found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = found.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8: save the file as UTF-8 text") from error
    if not text.strip():
        raise UserError(f"{path} is empty: get it again")
    return text


def _refuse_pointer(path: Path, found: bytes) -> None:
    if found.startswith(_LFS):
        raise UserError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` where it came from")


def _lines(path: Path, text: str) -> Table:
    parts = text.split("\n")
    if not parts[-1]:
        parts.pop()
    rows = (Row(number, {TEXT: part.removesuffix("\r")}) for number, part in enumerate(parts, 1))
    return Table(path, (TEXT,), tuple(rows))


def _rows(
    path: Path, text: str, separator: str, quoted: bool, blanks: bool
) -> Iterator[tuple[int, list[str]]]:
    """Each row's first line and cells, the header first."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=blanks,
        strict=True,
    )
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: the row from line {line} on can't be read ({error}): mend its quotes, or say "
            f"`quoting: {str(not quoted).lower()}`"
        ) from error


def _tabular(path: Path, parts: Iterator[tuple[int, list[str]]], leave_out: bool, mend: Mend | None) -> Table:
    _, header = next(parts)
    columns = tuple(name.strip() for name in header)
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{path}: line 1 names column '{name}' twice: rename one")
    rows, left_out, mended = [], 0, 0
    for line, cells in parts:
        whole: Sequence[str] | None = cells
        if len(cells) != len(columns):
            whole = mend(cells, len(columns)) if mend else None
            if whole is not None:
                mended += 1
            elif leave_out:
                left_out += 1
            else:
                raise UserError(
                    f"{path}: line {line} has {len(cells)} cells where the header has {len(columns)}: "
                    "mend it, check the separator, or leave such rows out (`ragged: skip`)"
                )
        if whole is not None:
            rows.append(Row(line, dict(zip(columns, whole, strict=True))))
    return Table(path, columns, tuple(rows), left_out, mended)


def _jsonl(path: Path, text: str) -> Table:
    rows = []
    for line, part in enumerate(text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            found = json.loads(part, parse_int=str, parse_float=str, parse_constant=_missing)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {line} is not JSON ({error.msg}): give one object a line"
            ) from error
        if not isinstance(found, dict):
            raise UserError(f"{path}: line {line} is no JSON object: give one object a line")
        rows.append((line, found))
    return _records(path, rows)


def _parquet(path: Path, at_most: int | None) -> Table:
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_LFS)))
    rows: list[tuple[int, Mapping[str, Any]]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            drawn, begins = _drawn_rows(table.metadata.num_rows, at_most), 0
            for batch in table.iter_batches():
                first, last = np.searchsorted(drawn, (begins, begins + batch.num_rows))
                inside = drawn[first:last]
                rows += zip((inside + 1).tolist(), batch.take(inside - begins).to_pylist(), strict=True)
                begins += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a Parquet file that can be read ({reason}): get it again") from error
    return _records(path, rows)


def _drawn_rows(count: int, at_most: int | None) -> np.ndarray:
    """The rows to read of so many, in order."""
    import numpy as np

    if at_most is None or count <= at_most:
        return np.arange(count)
    order = np.random.RandomState(derive_seed("rows of a file", count) % 2**32).permutation(count)
    return np.sort(order[:at_most])


def _records(path: Path, found: Sequence[tuple[int, Mapping[str, Any]]]) -> Table:
    columns = tuple(dict.fromkeys(name for _, record in found for name in record))
    rows = (Row(line, {name: _cell(record.get(name)) for name in columns}) for line, record in found)
    return Table(path, columns, tuple(rows))


def _missing(_: str) -> None:
    """What JSON's ``NaN`` stands for."""


def _cell(value: Any) -> str:
    """A value as text: "" for null and for a number that is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
