"""Specs: what a suite is, validated before any work starts. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lethebench.errors import UserError
from lethebench.prompts import Role


class Spec(BaseModel):
    """A frozen record whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplerSettings(Spec):
    """How images are drawn. None means the model's own default."""

    scheduler: Literal["ddim", "euler", "flow-euler", "model"] = "model"
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=5.0, ge=0.0, le=100.0)
    height: int | None = Field(default=None, ge=8)
    width: int | None = Field(default=None, ge=8)


class Selection(Spec):
    """Some prompts of the set, and how many images of each.

    Prompts are chosen by role, by the sets that were joined (empty: all of them), by kinds and categories,
    then the first ``limit`` clusters in an order drawn from :attr:`Suite.seed_key` (None: all).
    """

    role: Role
    sets: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    images: int = Field(ge=1)
    limit: int | None = Field(default=None, ge=1)
    min_duplicates: int | None = None
    expect: int | None = Field(default=None, ge=1)
    """How many prompts these are with the published files, for plans made while those are missing."""


class Axis(Spec):
    """What the page plots and ranks by: a score and the better direction's name."""

    score: str
    label: str


class MetricSpec(Spec):
    """A metric of a suite with its settings. In YAML: its name, or ``{name: {setting: value}}``."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"name": given}
        if isinstance(given, dict) and len(given) == 1 and "name" not in given:
            ((name, settings),) = given.items()
            return {"name": name, "settings": settings or {}}
        return given

    def __str__(self) -> str:
        return self.name


class Extra(Spec):
    """Rows that a run of all methods has besides the registered ones: controls, compositions, sweeps."""

    method: str
    strength: str = "all"
    set: dict[str, Any] = Field(default_factory=dict)


class AttackSettings(Spec):
    """What ``lethe attack`` tries on the suite's rows.

    Items are prompts for what was memorized or learnt whose never-trained twin the suite draws too; one
    prompt an item, in an order drawn from the suite's key, so that a longer list contains the shorter.
    """

    items: int = Field(default=16, ge=2)
    """At most this many, each with its twin."""
    role: Role = Role.TRIGGER
    """The items' role."""
    kinds: tuple[str, ...] = ()
    min_duplicates: int | None = None
    set: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides of single attacks' settings, by attack name."""


class Suite(Spec):
    """A frozen, versioned choice of model, prompts, sampler settings and metrics."""

    name: str = Field(pattern=r"^[a-z0-9]+([-._][a-z0-9]+)*$")
    version: str
    description: str
    model: str
    prompt_set: str
    """A registered prompt set, or several joined by ``+``."""
    same_images_as: str | None = Field(default=None, pattern=r"^[^@]+@[^@]+$")
    """Another suite, as ``name@version``, whose noise and order of clusters this one takes. With the same
    sampler, images of prompts that both have are the same, and a store shares their fits and whole shards."""
    select: tuple[Selection, ...] = Field(min_length=1)
    sampler: SamplerSettings
    metrics: tuple[MetricSpec, ...] = Field(min_length=1)
    reference: str = "base"
    """The method that all rows are compared with: base, or where models are fine-tuned plain LoRA."""
    controls: dict[str, str] = Field(default_factory=dict)
    """Control methods that every run includes, each with its strength or ``all``."""
    suppression: Axis
    adherence: Axis
    shard_size: int = Field(default=64, ge=1)
    batch_size: int = Field(default=32, ge=1)
    bootstrap: int = Field(default=2000, ge=100)
    fit: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides of single methods' settings, by method name: frozen with the suite."""
    methods: tuple[Extra, ...] = ()
    """What is run where no METHOD is named: the rows of a paper's table. No row depends on it."""
    also: tuple[Extra, ...] = ()
    """What ``METHOD=all`` runs besides every registered method. No row depends on it."""
    concepts: tuple[str, ...] = ()
    """The concepts that methods are told of where they ask for names; empty: all of the prompt set."""
    train: dict[str, Any] | None = None
    """How methods of the training track fine-tune (``LoraSettings``), the same for all; None: they can't."""
    attack: AttackSettings | None = None
    """How rows are attacked; None: they can't be. No row depends on it."""

    @field_validator("train")
    @classmethod
    def _trainable(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        from lethebench.finetuning.settings import LoraSettings

        try:
            LoraSettings(**(given or {}))
        except (TypeError, UserError) as error:
            raise ValueError(str(error).replace("LoraSettings.__init__()", "train")) from error
        return given

    @model_validator(mode="after")
    def _of_one_track(self) -> Suite:
        if (self.train is None) != (self.reference == "base"):
            raise ValueError(
                "`train` and `reference` go together: a suite that fine-tunes compares with lora"
            )
        return self

    @field_validator("metrics")
    @classmethod
    def _once_each(cls, given: tuple[MetricSpec, ...]) -> tuple[MetricSpec, ...]:
        names = [m.name for m in given]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"metric '{name}' is named twice")
        return given

    @property
    def key(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def seed_key(self) -> str:
        """What noise, fits and the order of clusters are drawn from: the key of this suite or another."""
        return self.same_images_as or self.key


def load_suite(name: str) -> Suite:
    """The suite of that name in the package, or of that YAML file. Raises UserError."""
    import difflib

    import yaml

    folder = Path(__file__).parent / "suites"
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = suite_names()
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown suite '{name}': {hint}")
    try:
        found = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"suite file {path} is not YAML: {str(error).splitlines()[0]}") from error
    if isinstance(found, dict) and "extends" in found:
        found = _extended(found, path)
    try:
        return Suite.model_validate(found)
    except ValidationError as error:
        raise UserError(f"suite file {path}: {first_error(error)}") from error


def _extended(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """A suite that ``extends`` another: each of its keys in place of the other's, mappings (``fit``) by key.

    What it extends is a suite of the package, or a file beside it.
    """
    own = {key: value for key, value in given.items() if key != "extends"}
    parent, beside = str(given["extends"]), path.parent / str(given["extends"])
    if missing := {"name", "version"} - own.keys():
        raise UserError(
            f"suite file {path} extends {parent} and needs its own {' and '.join(sorted(missing))}"
        )
    if beside.resolve() == path.resolve() or parent == path.stem:
        raise UserError(f"suite file {path} extends itself")
    is_file = parent.endswith((".yaml", ".yml"))
    inherited = load_suite(str(beside) if is_file else parent).model_dump(mode="json", exclude_defaults=True)
    for key in ("controls", "fit"):
        if isinstance(own.get(key), dict):
            own[key] = {**inherited.get(key, {}), **own[key]}
    return {**inherited, **own}


def suite_names() -> list[str]:
    """The suites that the package ships."""
    return sorted(p.stem for p in (Path(__file__).parent / "suites").glob("*.yaml"))


def first_error(error: ValidationError) -> str:
    """The first validation error in one line: where (unless it is the whole), what."""
    first = error.errors()[0]
    what = first["msg"].removeprefix("Value error, ")
    return ": ".join([".".join(map(str, first["loc"])), what] if first["loc"] else [what])
