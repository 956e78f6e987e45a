"""From a runs folder to the site: one HTML page that needs nothing else, and tables beside it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.errors import UserError
from lethebench.leaderboard._pictures import PICTURES, ImageStore
from lethebench.leaderboard._rows import Results, scan, unfinished

if TYPE_CHECKING:
    from markupsafe import Markup

    from lethebench.leaderboard._board import Board, Line
    from lethebench.leaderboard._evaluation import EvaluationTable

TEMPLATES = Path(__file__).parent / "templates"
PAGE_BYTES = 3_000_000
"""The page's size that is aimed at."""
FEWEST = 4
"""Triplets that a row keeps, however large the page."""
FILES = {
    "CSV": "leaderboard.csv",
    "JSON": "leaderboard.json",
    "Markdown": "leaderboard.md",
    "LaTeX": "leaderboard.tex",
}


def build(
    runs: Path | str,
    out: Path | str = "site",
    *,
    strengths: Mapping[str, Sequence[str]] | None = None,
    pictures: int = PICTURES,
    page_bytes: int = PAGE_BYTES,
) -> Path:
    """Write the page and the tables of every row below ``runs``; returns the path of ``index.html``.

    ``strengths`` gives methods' settings from weak to strong where their names don't tell.
    ``pictures`` is the number of image triplets a row, lowered for all rows alike, to :data:`FEWEST`
    at least, where the page would be larger than ``page_bytes``. The same input gives the same bytes.
    A row that is not valid is named on the page with its reason and hides no other. Raises UserError
    where ``out`` can't be written.
    """
    from lethebench.leaderboard import _board, _export, _latents
    from lethebench.leaderboard._evaluation import evaluations

    runs, out = Path(runs), Path(out)
    found = scan(runs)
    measured, unreadable = evaluations(runs)
    found = replace(found, problems=(*found.problems, *unreadable))
    store = ImageStore()
    boards = _board.boards(found.entries, strengths or {}, store, pictures)
    files = {
        FILES["CSV"]: _export.csv_text(boards),
        FILES["JSON"]: _export.json_text(boards, found.problems),
        FILES["Markdown"]: _export.markdown_text(boards),
        FILES["LaTeX"]: _export.latex_text(boards),
        **_latents.data_files([b.latents for b in boards if b.latents]),
    }
    content = Content(boards, found, unfinished(runs), measured)
    page = _fitted(content, store, page_bytes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in {**files, "index.html": page}.items():
            _write(out / name, text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"can't write the page to {out}: {reason}; choose another folder") from error
    return out / "index.html"


@dataclass(frozen=True)
class Content:
    """All that the page shows: boards, what can't be shown, rows not finished, what the metrics see."""

    boards: Sequence[Board]
    found: Results
    unfinished: Sequence[str]
    evaluations: Sequence[EvaluationTable]


@dataclass(frozen=True)
class Track:
    """Boards that ask the same question."""

    training: bool
    boards: Sequence[Board]

    @property
    def name(self) -> str:
        """As the page's selector shows it."""
        return "Training time" if self.training else "Mitigation"

    @property
    def about(self) -> str:
        """The question, in a line."""
        if self.training:
            return "Can a model learn the rest of its images, and not that?"
        return "Can a trained model forget what it memorized?"


def tracks(boards: Sequence[Board]) -> list[Track]:
    """The boards by track, in their order."""
    kinds = dict.fromkeys(b.training for b in boards)
    return [Track(kind, [b for b in boards if b.training == kind]) for kind in kinds]


def render(content: Content, images: Mapping[str, str]) -> str:
    """The page. Whatever comes from a row is escaped, and its policy allows only the page's own script."""
    import jinja2
    from markupsafe import Markup

    from lethebench import __version__
    from lethebench.row import SCHEMA

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["pre"] = preformatted
    js = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    text: str = environment.get_template("page.html.jinja").render(
        boards=content.boards,
        tracks=tracks(content.boards),
        problems=content.found.problems,
        unfinished=content.unfinished,
        evaluations=content.evaluations,
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        js=Markup(js),
        csp=policy(js),
        images=Markup(embedded_json(images)),
        version=__version__,
        schema=SCHEMA,
        n_rows=len(content.found.entries),
        input_sha256=input_sha256(content),
        files=FILES,
    )
    return text


def preformatted(text: str) -> Markup:
    """Text inside an element: quotes stay as they are, which is a fifth of the size of JSON.

    >>> preformatted('{"a": "</pre>"}')
    Markup('{"a": "&lt;/pre&gt;"}')
    """
    from markupsafe import Markup

    return Markup(html.escape(text, quote=False))


def policy(js: str) -> str:
    """The page's Content-Security-Policy: no network at all, and no script but this one."""
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded_json(data: Any) -> str:
    r"""JSON that is safe inside ``<script>``: no text in it can close the element or open a comment.

    >>> print(embedded_json({"a": "</script><!--"}))
    {"a":"\u003c/script\u003e\u003c!--"}
    """
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def input_sha256(content: Content) -> str:
    """A hash of what the page was made of: every row, by its key, its attacks, every ``metrics.json``."""
    digest = hashlib.sha256()
    for entry in content.found.entries:
        digest.update(entry.row.to_json().encode())
        for record in entry.attacks:
            digest.update(record.to_json().encode())
    for table in content.evaluations:
        digest.update(table.sha256.encode())
    return digest.hexdigest()


def _fitted(content: Content, store: ImageStore, limit: int) -> str:
    """The page, its triplets shortened where it would exceed the limit."""
    used = _shown(content.boards)
    page = render(content, store.uris(used))
    if len(page) <= limit or not used:
        return page
    budget = limit - (len(page) - store.size(used))
    return render(content, store.uris(_within(content.boards, store, budget)))


def _shown(boards: Sequence[Board]) -> set[str]:
    """The ids of the images that the rows show."""
    pictures = (p for board in boards for line in board.lines for p in line.pictures)
    return {i for p in pictures for i in (p.reference, p.base, p.method) if i is not None}


def _within(boards: Sequence[Board], store: ImageStore, budget: int) -> set[str]:
    """Shorten every row's triplets alike until the images fit; the ids of those that are left."""
    lines: list[Line] = [line for board in boards for line in board.lines]
    count = max(len(line.pictures) for line in lines)
    while count > FEWEST and store.size(_shown(boards)) > budget:
        count -= 1
        for line in lines:
            line.pictures = line.pictures[:count]
    return _shown(boards)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
