"""Prompt sets made of files: the registered ones, and a user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.errors import UserError
from lethebench.promptfiles.consent import require_allowed
from lethebench.promptfiles.readers import Row, Table, format_of, read
from lethebench.promptfiles.sources import SOURCES, local_file
from lethebench.promptfiles.specs import USUAL, FileSpec, Layout, Meaning, fill, load_file_spec
from lethebench.prompts import Prompt, Reference, Role, plainly
from lethebench.seeding import derive_seed
from lethebench.store import digest, known_sha256

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.referencing import Described, References


@dataclass(frozen=True)
class Item:
    """A row that asks for something: ``asks`` is its text, or with templates the concept."""

    id: str
    asks: str
    meaning: Meaning
    cluster: str
    concept: str | None
    category: str | None
    references: tuple[str, ...]
    attributes: Mapping[str, str]


@dataclass
class _Drawn:
    """What became of the rows."""

    test: list[Item] = field(default_factory=list)
    training: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class FilePromptSet:
    """A prompt set of upstream files in the data folder, read when it is first asked.

    A registered set derives from it, names its ``files`` (of :data:`.sources.SOURCES`; the first holds the
    prompts) and their ``layout``, and may replace the methods :meth:`tables`, :meth:`mend`,
    :meth:`templates`, :meth:`order` and :meth:`rewordings`. Files whose hash isn't the known one are refused,
    unless ``pinned`` is false; the manifest says both hashes.

    Rows of one text (or concept) and one seed count once. References are what lies in
    ``<data folder>/<name>/references``, images or an index: a prompt has those whose id is its row's, or
    begins with it and a slash.
    """

    name: str
    version: str = "1.0"
    summary: str = ""
    files: tuple[str, ...] = ()
    layout: Layout

    def __init__(self, *, pinned: bool = True) -> None:
        self.pinned = pinned

    # --- what a set may replace ----------------------------------------------------------------

    def tables(self) -> Sequence[Table]:
        """The tables whose rows are the set's items, in order."""
        return [self.read(self.files[0])]

    def mend(self, cells: list[str], columns: int) -> Sequence[str] | None:
        """A ragged row made whole; None where it can't be."""
        return None

    def templates(self) -> Sequence[str]:
        """The texts with a place for the concept; none where rows are texts themselves."""
        return self.layout.templates

    def order(self, item: Item) -> Any:
        """Where an item stands in the order that ``limit`` and ``training`` cut: drawn by its id."""
        return derive_seed("prompt set", self.name, self.layout.seed, item.id)

    def rewordings(self) -> Mapping[str, Sequence[str]]:
        """The paraphrases of items by id, as published."""
        return {}

    # --- the prompt set ------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Prompt]:
        """Every test prompt, in the files' order. Raises UserError for what is wrong with the files."""
        return iter(self._prompts)

    def __len__(self) -> int:
        """The number of test prompts."""
        return len(self._prompts)

    def training_prompts(self) -> Sequence[str]:
        """The texts held out for fitting, none of them a test prompt's."""
        return self._drawn.training

    def paraphrases(self, prompt_id: str) -> Sequence[str]:
        """The published paraphrases of a prompt; for a concept, the templates with the anchor filled in."""
        item = self._item_of[prompt_id]
        found = [text for text in self._rewordings.get(item.id, ()) if text != item.asks]
        if self.layout.anchor and self._templates:
            found += [fill(template, self.layout.anchor) for template in self._templates]
        return found

    def anchor_concept(self, concept: str) -> str:
        """What stands for the concept without its name; "" where the set doesn't say or know it."""
        return self.layout.anchor if concept in self._concepts else ""

    def reference(self, reference_id: str) -> Reference:
        """The image of that id; KeyError where there is none, UserError where only descriptors are kept."""
        return self._references_or_none(reference_id).reference(reference_id)

    def described(self, reference_id: str) -> Described | None:
        """What is kept of a reference in place of its image; None where the image is there."""
        return self._references_or_none(reference_id).described(reference_id)

    def manifest(self) -> dict[str, Any]:
        """Files with their origin and hashes, layout, what became of the rows, and the prompts' SHA-256."""
        drawn = self._drawn
        texts = [[prompt.id, list(self.paraphrases(prompt.id))] for prompt in self]
        return {
            "name": self.name,
            "version": self.version,
            "files": [self._file_record(name) for name in self.files],
            "layout": self.layout.model_dump(mode="json", exclude_defaults=True),
            "templates": list(self._templates),
            "rows": {what: count for what, count in sorted(drawn.counts.items()) if count},
            "prompts": len(self),
            "training_prompts": len(self.training_prompts()),
            "prompts_sha256": digest([_record(replace(prompt, references=())) for prompt in self]),
            "training_sha256": digest(list(self.training_prompts())),
            "paraphrases_sha256": digest([found for found in texts if found[1]]),
            "references": None if self._references is None else self._references.manifest(),
        }

    def counts(self) -> pd.DataFrame:
        """Prompts and clusters by role and kind."""
        import pandas as pd

        frame = pd.DataFrame([(str(p.role), p.kind, p.id, p.cluster) for p in self])
        frame.columns = pd.Index(["role", "kind", "prompts", "clusters"])
        return frame.groupby(["role", "kind"], as_index=False).nunique()

    # --- files ---------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """Where one of the set's files lies. Raises UserError: not there, not allowed, or another file."""
        source = SOURCES[name]
        require_allowed(source.opt_in, f"prompt set '{self.name}'")
        path = local_file(source, self.name)
        if self.pinned and source.sha256 is not None and known_sha256(path) != source.sha256:
            raise UserError(
                f"{path} isn't the file that prompt set '{self.name}' is made of (its SHA-256 begins "
                f"{known_sha256(path)[:12]}, not {source.sha256[:12]}): run `lethe fetch "
                f"{self.name}` for that one, or describe your own by a spec"
            )
        return path

    def read(self, name: str, **settings: Any) -> Table:
        """One of the set's files as a table; ``settings`` of the reader in place of the layout's."""
        layout, path = self.layout, self.path(name)
        own = {
            "separator": layout.separator,
            "quoting": layout.quoting,
            "blanks": layout.blanks,
            "leave_out_ragged": layout.ragged == "skip",
            "mend": self.mend,
        }
        form = (layout.format if name == self.files[0] else None) or format_of(path)
        return read(path, form, **{**own, **settings})

    def _file_record(self, name: str) -> dict[str, Any]:
        source, path = SOURCES[name], self.path(name)
        return {
            "file": name,
            "repository": source.repository,
            "path": source.path,
            "commit": source.commit,
            "licence": source.licence,
            "sha256": {"expected": source.sha256, "found": known_sha256(path)},
            "bytes": path.stat().st_size,
        }

    # --- rows to prompts -----------------------------------------------------------------------

    @cached_property
    def _templates(self) -> tuple[str, ...]:
        return tuple(self.templates())

    @cached_property
    def _rewordings(self) -> Mapping[str, Sequence[str]]:
        return self.rewordings()

    @cached_property
    def _references(self) -> References | None:
        from lethebench.referencing import find_references

        return find_references(self.name)

    def _references_or_none(self, reference_id: str) -> References:
        if self._references is None:
            raise KeyError(reference_id)
        return self._references

    @cached_property
    def _drawn(self) -> _Drawn:
        """Items once each, in the files' order: training held out, then as many as the limit says."""
        drawn = _Drawn()
        items = list(self._once(drawn.counts))
        order = sorted(items, key=self.order)
        neutral = {i.asks: i.cluster for i in reversed(order) if i.meaning.role is Role.NEUTRAL}
        held = dict(list(neutral.items())[: self.layout.training])
        clusters, said = set(held.values()), {plainly(text) for text in held}
        free = [item for item in order if plainly(item.asks) not in said and item.cluster not in clusters]
        chosen = {item.id for item in free[: self.layout.limit]}
        drawn.test = [item for item in items if item.id in chosen]
        drawn.training = list(held)
        if not drawn.test:
            raise UserError(
                f"prompt set '{self.name}': no prompts in {', '.join(self.files)}"
                + (" but those held out" if held else "")
            )
        return drawn

    def _once(self, counts: Counter[str]) -> Iterator[Item]:
        """Every row's item; a row that asks what another did, with the same seed, is left out."""
        lines: dict[str, str] = {}
        first: dict[str, str] = {}
        seen: set[tuple[str, str]] = set()
        number = 0
        for table in self.tables():
            cells = _Cells(table, self.layout, bool(self._templates))
            counts.update(read=len(table.rows) + table.left_out, left_out=table.left_out, mended=table.mended)
            for row in table.rows:
                number += 1
                where = f"{table.path}: line {row.line}"
                asks = cells.asks(row)
                if not asks.strip():
                    counts["empty"] += self._allowed_empty(where)
                    continue
                key = (asks, cells.of(row, "seed"))
                if key in seen:
                    counts["repeated"] += 1
                    continue
                seen.add(key)
                item_id = cells.of(row, "id") or str(number)
                if item_id in lines:
                    raise UserError(
                        f"{where} has the id '{item_id}' of {lines[item_id]}: ids must differ "
                        "(`columns: {id: ..}`)"
                    )
                lines[item_id] = where
                first.setdefault(asks, item_id)
                yield self._item(item_id, asks, first[asks], cells, row, where)

    def _allowed_empty(self, where: str) -> int:
        if self.layout.empty == "skip":
            return 1
        raise UserError(f"{where} asks for nothing: fill it in, or leave such rows out (`empty: skip`)")

    def _item(self, item_id: str, asks: str, first: str, cells: _Cells, row: Row, where: str) -> Item:
        concept = asks if self._templates else cells.of(row, "concept")
        seed = cells.of(row, "seed")
        kept = {name: row.cells[column] for name, column in self.layout.attributes.items()}
        return Item(
            id=item_id,
            asks=asks,
            meaning=self._meaning(cells.of(row, "label"), where),
            cluster=cells.of(row, "cluster") or first,
            concept=concept or None,
            category=cells.of(row, "category") or self.layout.category,
            references=self._listed(item_id, cells.of(row, "references"), where),
            attributes={name: value for name, value in {**kept, "seed": seed}.items() if value},
        )

    @cached_property
    def _meanings(self) -> dict[str, Meaning]:
        """What each label means; without labels, what "" does."""
        layout = self.layout
        if layout.role is not None:
            return {"": Meaning(role=layout.role, kind=layout.kind or str(layout.role))}
        return {
            label: Meaning(role=found.role, kind=found.kind or label.lower())
            for label, found in layout.labels.items()
        }

    def _meaning(self, label: str, where: str) -> Meaning:
        found = self._meanings.get("" if self.layout.role is not None else label)
        if found is None:
            raise UserError(
                f"{where} has the label '{label}', whose meaning isn't known: known are "
                f"{', '.join(self.layout.labels)}"
            )
        return found

    def _listed(self, item_id: str, named: str, where: str) -> tuple[str, ...]:
        """The ids of an item's references: those that the row names, or those named by the row's id."""
        if not named:
            known = self._references
            whole = (item_id,) if known is not None and item_id in known else ()
            return whole or self._references_by_item.get(item_id, ())
        ids = [name.strip() for name in named.split("|") if name.strip()]
        from lethebench.referencing import reference_id

        known = self._references
        found = [i if known is None or i in known else reference_id(i) for i in ids]
        for name, asked in zip(found, ids, strict=True):
            if known is None or name not in known:
                raise UserError(
                    f"{where} names the reference '{asked}', which isn't among the set's references"
                )
        return tuple(found)

    @cached_property
    def _references_by_item(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for one in () if self._references is None else self._references.ids:
            item_id = one.partition("/")[0]
            found[item_id] = (*found.get(item_id, ()), one)
        return found

    @cached_property
    def _concepts(self) -> frozenset[str | None]:
        return frozenset(item.concept for item in self._drawn.test)

    @cached_property
    def _prompts(self) -> tuple[Prompt, ...]:
        return tuple(prompt for prompt, _ in self._pairs)

    @cached_property
    def _item_of(self) -> dict[str, Item]:
        return {prompt.id: item for prompt, item in self._pairs}

    @cached_property
    def _pairs(self) -> list[tuple[Prompt, Item]]:
        return [(prompt, item) for item in self._drawn.test for prompt in self._made(item)]

    def _made(self, item: Item) -> Iterator[Prompt]:
        texts = [fill(template, item.asks) for template in self._templates] or [item.asks]
        for number, text in enumerate(texts, 1):
            yield Prompt(
                id=item.id if len(texts) == 1 else f"{item.id}-{number}",
                text=text,
                role=item.meaning.role,
                cluster=item.cluster,
                kind=item.meaning.kind or "",
                references=item.references,
                concept=item.concept,
                category=item.category,
                attributes=item.attributes,
            )


class UserPromptSet(FilePromptSet):
    """A user's own prompt set: a file and a spec beside it."""

    def __init__(self, spec: FileSpec, folder: Path) -> None:
        super().__init__()
        self.name, self.version, self.layout = spec.name, spec.version, spec
        self.summary = f"your own: {spec.file}"
        self.files = (spec.file,)
        self._spec, self._folder = spec, folder

    def path(self, name: str) -> Path:
        """The file, beside the spec."""
        path = self._folder / name
        if not path.is_file():
            raise UserError(f"prompt set '{self.name}': there is no file {path}")
        return path

    def _file_record(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        return {"file": name, "sha256": {"found": known_sha256(path)}, "bytes": path.stat().st_size}

    @cached_property
    def _references(self) -> References | None:
        from lethebench.referencing import open_references

        named = self._spec.references
        return None if named is None else open_references(self._folder / named)


def load_spec(path: str | Path) -> UserPromptSet:
    """The prompt set that a YAML file describes (:class:`.specs.FileSpec`), read to the last row.

    Raises UserError for what is wrong with the spec or its file, before any long work.
    """
    place = Path(path).expanduser()
    made = UserPromptSet(load_file_spec(place), place.parent)
    made.manifest()
    return made


class _Cells:
    """A table's cells by what they hold, after the layout's columns or their usual names."""

    def __init__(self, table: Table, layout: Layout, templated: bool) -> None:
        self._table, told = table, layout.columns
        self._column = {name: getattr(told, name) for name in type(told).model_fields}
        for name, column in (*self._column.items(), *layout.attributes.items()):
            if column is not None and column not in table.columns:
                raise UserError(
                    f"{table.path} has no column '{column}' (for `{name}`): it has "
                    f"{', '.join(map(repr, table.columns))}; check the separator too"
                )
        asks = "concept" if templated and (told.concept or not told.prompt) else "prompt"
        for name in ("id", "seed", asks):
            self._column[name] = self._column[name] or self._usual(name)
        if self._column[asks] is None and asks == "concept":
            asks = "prompt"
            self._column[asks] = self._usual(asks)
        if self._column[asks] is None:
            raise UserError(
                f"{table.path}: which column holds the {asks}s? It has "
                f"{', '.join(map(repr, table.columns))}; say `columns: {{{asks}: ..}}` or check the separator"
            )
        self._asks, self._templated = asks, templated

    def _usual(self, name: str) -> str | None:
        found = [column for column in self._table.columns if column.lower() in USUAL[name]]
        if len(found) > 1:
            raise UserError(
                f"{self._table.path}: columns {' and '.join(map(repr, found))} may both be the {name}: "
                f"say `columns: {{{name}: ..}}`"
            )
        return found[0] if found else None

    def of(self, row: Row, name: str) -> str:
        """The row's cell; "" where the table has no such column."""
        column = self._column[name]
        return "" if column is None else row.cells[column]

    def asks(self, row: Row) -> str:
        """What the row asks for, as written; a concept without blanks around it."""
        found = self.of(row, self._asks)
        return found.strip() if self._templated else found


def _record(prompt: Prompt) -> dict[str, Any]:
    """Every field of a prompt as JSON can hold it."""
    return {**vars(prompt), "role": str(prompt.role), "attributes": dict(sorted(prompt.attributes.items()))}
