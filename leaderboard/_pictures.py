"""The image triplets of the page: training image, base, method, on the same noise.

The images are chosen once a board, by a fixed rule that sees base only, so that no row shows its
luckiest ones and a base image is embedded once for all rows. Where the suite compares with another row, that
one stands for base.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lethebench.leaderboard._tables import LABEL, MEMORIZED_LABELS, SIMILARITY

if TYPE_CHECKING:
    import pandas as pd

PICTURES = 12
"""Triplets a row."""
SIDE = 128
"""Longest side of an embedded image; smaller ones keep their size."""
ROLE_ORDER = ("trigger",) * 4 + ("neutral", "concept") + ("trigger",) * 4 + ("control", "neutral")
"""Roles of the twelve triplets. A prefix is balanced too."""
TRAINING_ROLE_ORDER = (
    *("concept", "probe", "concept", "trigger") * 2,
    "control",
    "probe",
    "concept",
    "neutral",
)
"""The same where models are fine-tuned: what must not be learnt, what should be, training captions."""


@dataclass(frozen=True)
class Key:
    """Which image: number ``index`` of a prompt."""

    prompt_id: str
    index: int


@dataclass(frozen=True)
class Picture:
    """One triplet. Images are ids of the page's image store, or None where a file is missing."""

    reference: str | None
    base: str | None
    method: str | None
    text: str
    role: str
    kind: str
    duplicates: int | None
    correlation: float | None
    held_out: bool
    """Whether the reference was never trained: a twin, not a training image."""
    before: str
    after: str
    similarity_before: float | None
    similarity_after: float | None


@dataclass
class ImageStore:
    """Encoded images by id; the same picture is stored once."""

    _ids: dict[str, str] = field(default_factory=dict)
    _data: dict[str, bytes] = field(default_factory=dict)
    _seen: dict[Path, str | None] = field(default_factory=dict)

    def add(self, path: Path) -> str | None:
        """The id of the image at ``path``; None where it is missing or no image."""
        if path not in self._seen:
            data = _encode(path)
            self._seen[path] = None if data is None else self._insert(data)
        return self._seen[path]

    def _insert(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._ids:
            self._ids[digest] = f"i{len(self._ids)}"
            self._data[self._ids[digest]] = data
        return self._ids[digest]

    def size(self, ids: set[str]) -> int:
        """Bytes of those images on the page (base64)."""
        return sum(-(-len(self._data[i]) // 3) * 4 for i in ids)

    def uris(self, ids: set[str]) -> dict[str, str]:
        """Data URIs of those images."""
        return {
            i: "data:image/webp;base64," + base64.b64encode(data).decode()
            for i, data in self._data.items()
            if i in ids
        }


def _encode(path: Path) -> bytes | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=90, method=4)
    return buffer.getvalue()


# --- choosing -------------------------------------------------------------------------------------


def choose(table: pd.DataFrame, salt: str, count: int = PICTURES, training: bool = False) -> list[Key]:
    """The images that every row of the board shows, most telling first.

    Triggers are taken from those that base memorizes (its label is VM, FM or BM), in turn from each
    kind; within a kind prompts follow a hash of their name, one image a cluster. The rest are
    neutral, concept and control prompts. Where a role has too few, triggers fill its place. In the
    ``training`` track triggers are any captions, and concepts fill places.
    """
    order = TRAINING_ROLE_ORDER if training else ROLE_ORDER
    queues = {role: _queue(table, role, salt, training) for role in dict.fromkeys(order)}
    fill = queues["concept" if training else "trigger"]
    chosen: list[Key] = []
    for role in order:
        queue = queues[role] or fill or next((q for q in queues.values() if q), [])
        if queue:
            chosen.append(queue.pop(0))
    return chosen[:count]


def _queue(table: pd.DataFrame, role: str, salt: str, training: bool) -> list[Key]:
    found = table[_column(table, "role", "") == role]
    if role == "trigger" and not training:
        labels = _column(found, LABEL, "VM").astype(str).str.upper()
        found = found[labels.isin(MEMORIZED_LABELS)]
    elif role == "concept":
        found = found[_column(found, "trained", True).fillna(True).astype(bool)]
    by_kind: dict[str, list[Key]] = {}
    seen: set[tuple[str, str]] = set()
    for record in sorted(_records(found), key=lambda r: _hash(salt, r["prompt_id"], r["index"])):
        cluster = (str(record.get("kind", "")), str(record.get("cluster", record["prompt_id"])))
        if cluster not in seen:
            seen.add(cluster)
            by_kind.setdefault(cluster[0], []).append(Key(record["prompt_id"], record["index"]))
    turns = zip_longest(*(by_kind[k] for k in sorted(by_kind)))
    return [key for turn in turns for key in turn if key is not None]


def _column(table: pd.DataFrame, name: str, default: object) -> Any:
    import pandas as pd

    return table[name] if name in table.columns else pd.Series(default, index=table.index)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in r.items()} for r in table.to_dict("records")]


def _hash(salt: str, prompt_id: str, index: int) -> str:
    return hashlib.sha256(f"{salt}\x1f{prompt_id}\x1f{index}".encode()).hexdigest()


# --- triplets -------------------------------------------------------------------------------------

Lookup = Mapping[Key, Mapping[str, Any]]


def lookup(table: pd.DataFrame | None, keys: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """The table's lines of the chosen images."""
    if table is None:
        return {}
    wanted = set(keys)
    found = table[table["prompt_id"].isin({k.prompt_id for k in keys})]
    lines = {Key(r["prompt_id"], r["index"]): r for r in _records(found)}
    return {k: v for k, v in lines.items() if k in wanted}


def triplets(
    keys: Sequence[Key],
    base: Lookup,
    own: Lookup,
    base_image: Callable[[Key], str | None],
    own_image: Callable[[Key], str | None],
    reference_image: Callable[[str], str | None],
) -> list[Picture]:
    """The row's triplets; an image that its table doesn't know is left out."""
    return [
        _triplet(base.get(k, {}), own[k], base_image(k), own_image(k), reference_image)
        for k in keys
        if k in own
    ]


def _triplet(
    base: Mapping[str, Any],
    own: Mapping[str, Any],
    base_image: str | None,
    own_image: str | None,
    reference_image: Callable[[str], str | None],
) -> Picture:
    reference = _text(base.get("reference")) or _text(own.get("reference"))
    return Picture(
        reference=reference_image(reference) if reference else None,
        base=base_image,
        method=own_image,
        text=_text(own.get("text")),
        role=_text(own.get("role")),
        kind=_text(own.get("kind")),
        duplicates=_whole(own.get("duplicates")),
        correlation=_number(own.get("correlation")),
        held_out=not _missing(own.get("trained")) and not own.get("trained"),
        before=_text(base.get(LABEL)).upper(),
        after=_text(own.get(LABEL)).upper(),
        similarity_before=_number(base.get(SIMILARITY)),
        similarity_after=_number(own.get(SIMILARITY)),
    )


def image_path(folder: Path, key: Key) -> Path:
    """The PNG of an image below a row's folder."""
    return named_file(folder / "images", f"{key.prompt_id}-{key.index}.png")


def named_file(folder: Path, name: str) -> Path:
    """A file of that name in the folder: its URL-quoted form where the name itself is no file name."""
    plain = folder / name
    inside = "/" not in name and "\\" not in name and not name.startswith(".")
    return plain if inside and plain.is_file() else folder / quote(name, safe="@+=,-._ ")


def _missing(value: object) -> bool:
    import pandas as pd

    return value is None or bool(pd.isna(value))  # type: ignore[call-overload]


def _text(value: object) -> str:
    return "" if _missing(value) else str(value)


def _whole(value: Any) -> int | None:
    return None if _missing(value) else int(value)


def _number(value: Any) -> float | None:
    return None if _missing(value) else float(value)
