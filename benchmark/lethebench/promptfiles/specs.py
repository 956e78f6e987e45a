"""What a file of prompts holds: the user's small YAML file, and the same facts of the registered sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lethebench.errors import UserError
from lethebench.promptfiles.readers import Format
from lethebench.prompts import Role
from lethebench.specs import Spec, first_error

_FIELD = re.compile(r"\{(\w+)\}")


class Columns(Spec):
    """Which column holds what. What isn't said is looked for under its usual names (:data:`USUAL`)."""

    prompt: str | None = None
    concept: str | None = None
    """What to ask for: with templates, the text is made of it."""
    id: str | None = None
    """Without one, a row's id is its number in the file."""
    label: str | None = None
    cluster: str | None = None
    """The unit of resampling; without it, rows that ask for the same share one."""
    category: str | None = None
    seed: str | None = None
    references: str | None = None
    """Ids or file names of the images that the prompt may reproduce, separated by ``|``."""


USUAL: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "prompts", "caption", "text"),
    "concept": ("concept", "name"),
    "id": ("image_id", "coco_id", "case_number", "id"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
}
"""The usual names of columns, in lower case."""


class Meaning(Spec):
    """What a label says of a prompt. In YAML: a role, or ``{role: .., kind: ..}``."""

    role: Role
    kind: str | None = None
    """None: the label itself, in lower case."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"role": given} if isinstance(given, str) else given


class Layout(Spec):
    """How a file is read (as :func:`.readers.read` says), and what its rows are.

    ``labels`` gives each label of the file its meaning: one that isn't named there is an error. Without
    labels every prompt has ``role`` and ``kind``.
    """

    format: Format | None = None
    """None: as the file's ending says."""
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    quoting: bool | None = None
    blanks: bool = False
    """Whether blanks after a separator are part of it."""
    ragged: Literal["error", "skip"] = "error"
    empty: Literal["error", "skip"] = "error"
    """What to do with a row that asks for nothing."""
    columns: Columns = Columns()
    attributes: dict[str, str] = Field(default_factory=dict)
    """Attributes to keep, by name, each with its column; empty cells are left out."""
    role: Role | None = None
    kind: str | None = None
    """None: the role's name."""
    category: str | None = None
    """The category of all prompts, where no column holds it."""
    labels: dict[str, Meaning] = Field(default_factory=dict)
    templates: tuple[str, ...] = ()
    """Texts with one place in braces for the concept: a prompt each."""
    anchor: str = ""
    """What stands for a concept without its name ("a comic hero"), for methods that need it."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many rows, in an order drawn from name and seed: a longer list contains the shorter."""
    seed: int = 0
    training: int = Field(default=0, ge=0)
    """Rows of role neutral held out for methods to fit on: the last of the same order."""

    @field_validator("templates")
    @classmethod
    def _with_one_place(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for template in given:
            require_place(template)
        return given

    @model_validator(mode="after")
    def _says_what_prompts_are(self) -> Layout:
        if bool(self.labels) == (self.role is not None):
            raise ValueError("say either the `role` of all prompts or what their `labels` mean")
        if self.labels and self.columns.label is None:
            raise ValueError("say which column holds the labels (`columns: {label: ..}`)")
        return self


class FileSpec(Layout):
    """A user's prompt set in a file; paths are beside the spec's own file."""

    name: str = Field(pattern=r"^[a-z0-9]+([-._][a-z0-9]+)*$")
    version: str = "1"
    file: str
    references: str | None = None
    """A folder of images or an index; without a column for them, a prompt's are those named by its id."""


def require_place(template: str) -> str:
    """The template, where it has one place in braces. Raises ValueError."""
    if len(_FIELD.findall(template)) != 1:
        raise ValueError(f"'{template}' needs one place in braces, as in 'a photo of {{concept}}'")
    return template


def fill(template: str, concept: str) -> str:
    """The template with the concept in its place.

    >>> fill("a photo of {name}", "Mickey Mouse")
    'a photo of Mickey Mouse'
    """
    return _FIELD.sub(lambda _: concept, template)


def load_file_spec(path: Path) -> FileSpec:
    """The spec in a YAML file. Raises UserError, with the key that is wrong."""
    if not path.is_file():
        raise UserError(f"prompt set file {path} not found")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"prompt set file {path} is not YAML: {str(error).splitlines()[0]}") from error
    try:
        return FileSpec.model_validate(found)
    except ValidationError as error:
        raise UserError(f"prompt set file {path}: {first_error(error)}") from error
