"""From a suite and methods to the rows, shards and keys of a run. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from lethebench.composition import Recipe
from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Knowledge, Method, fitted_settings, identity_of, places_of, settings_of
from lethebench.metric import Metric, configure_metric
from lethebench.prompts import Prompt, PromptSet, Union
from lethebench.provenance import (
    DECISIVE,
    FITTING_CODE,
    SAMPLER_CODE,
    SCORING,
    SCORING_CODE,
    code_sha256,
    packages,
)
from lethebench.registry import METRICS, PROMPT_SETS, source_sha256
from lethebench.row import SCHEMA
from lethebench.seeding import derive_seed
from lethebench.specs import MetricSpec, Selection, Suite
from lethebench.store import digest, known_sha256


def file_name(name: str) -> str:
    """A name as one file name, URL-quoted where it must be.

    >>> file_name("verbatim-064-03-a/0")
    'verbatim-064-03-a%2F0'
    """
    return quote(name, safe="@+=,-._ ")


@dataclass(frozen=True)
class Runtime:
    """What may move a result without being part of what is asked: recorded in the row."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    """Processor threads; 0 means the physical cores."""
    loading: tuple[tuple[str, Any], ...] = ()
    """How the model is loaded where that isn't the default: settings of ``zoo.LoadSettings``, by name."""


@lru_cache(maxsize=32)
def prompt_set(name: str) -> PromptSet:
    """The registered prompt set, made once a process; of several, joined by ``+``, their union.

    A user's own set is named by its YAML file (``promptfiles.specs``).
    """
    if "+" in name:
        return Union([prompt_set(part) for part in name.split("+")])
    if name.endswith((".yaml", ".yml")):
        from lethebench.promptfiles.sets import load_spec

        return load_spec(name)
    found = PROMPT_SETS.get(name)
    made: PromptSet = found() if isinstance(found, type) else found
    return made


@lru_cache(maxsize=32)
def manifest_sha256(name: str, references: bool = True) -> str:
    """The SHA-256 of a prompt set's manifest and of the source that makes it.

    Without ``references``, that of what doesn't depend on the user's own images or indexes of them.
    """
    sources = [source_sha256(type(prompt_set(part))) for part in name.split("+")]
    manifest = prompt_set(name).manifest()
    if not references:
        manifest = _without_references(manifest)
    return digest([manifest, sources[0] if len(sources) == 1 else sources])


def _without_references(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest, or several by name, without what says which references there are."""
    return {
        name: _without_references(part) if isinstance(part, dict) else part
        for name, part in manifest.items()
        if name != "references"
    }


def weights_sha256(model: str) -> dict[str, str]:
    """The SHA-256 of each weights file of a model."""
    from lethebench.zoo import weights_sha256 as of_files

    return of_files(model)


def builtin_folder(name: str) -> Path:
    """Where the package keeps a built-in model's weights."""
    return Path(__file__).parent / "weights" / name


def judges_sha256() -> dict[str, str]:
    """The SHA-256 of each built-in judge's weights, as recorded beside them."""
    found = {}
    for record in sorted(builtin_folder("").glob("*-mini/weights.json")):
        for name, value in json.loads(record.read_text()).items():
            found[f"{record.parent.name}/{name}"] = value
    return found


def make_metric(spec: MetricSpec) -> Metric:
    """The metric of a suite with its settings. Raises UserError.

    In texts, ``${data}`` is the data folder, and ``${device}`` is cuda where torch sees one, else cpu.
    """
    return configure_metric(METRICS.get(spec.name), _filled_in(spec.settings))


def _filled_in(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled_in(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled_in(part) for part in value]
    if not isinstance(value, str):
        return value
    if "${data}" in value:
        from lethebench.promptfiles.sources import data_folder

        value = value.replace("${data}", str(data_folder()))
    if "${device}" in value:
        import torch

        value = value.replace("${device}", "cuda" if torch.cuda.is_available() else "cpu")
    return value


def require_own_names(specs: Sequence[MetricSpec]) -> None:
    """Raise UserError where two specs (a name and a path, say) are metrics of one name."""
    named: dict[str, str] = {}
    for spec in specs:
        name = make_metric(spec).name
        if name in named:
            raise UserError(f"{named[name]} and {spec.name} are both metric '{name}': rename one of them")
        named[name] = spec.name


def metric_files(metric: Metric) -> dict[str, str]:
    """The SHA-256 of each file that determines the metric's values."""
    return {name: known_sha256(path) for name, path in metric.weights().items()}


def setting_files(method: Method) -> dict[str, str]:
    """The SHA-256 of each file that a method's settings name (those declared as places)."""
    found = settings_of(method)
    places = {name: Path(found[name]) for name in places_of(method) if found[name]}
    return {name: known_sha256(path) for name, path in places.items() if path.is_file()}


def chosen(suite: Suite, prompts: PromptSet) -> list[tuple[Prompt, int]]:
    """The suite's (prompt, number of images), in the prompt set's order.

    Where a selection is limited, clusters are taken in an order drawn from the suite's seed key, so that
    a longer list contains the shorter one.
    """
    found: dict[str, tuple[Prompt, int]] = {}
    for selection in suite.select:
        for prompt in _selected(selection, suite, prompts):
            found[prompt.id] = (prompt, max(selection.images, found.get(prompt.id, (prompt, 0))[1]))
    order = {p.id: i for i, p in enumerate(prompts)}
    return sorted(found.values(), key=lambda pair: order[pair[0].id])


def _selected(selection: Selection, suite: Suite, prompts: PromptSet) -> Iterator[Prompt]:
    fits = [
        p
        for p in prompts
        if p.role is selection.role
        and (not selection.sets or _set_of(p, prompts) in selection.sets)
        and (not selection.kinds or p.kind in selection.kinds)
        and (not selection.categories or p.category in selection.categories)
        and (selection.min_duplicates is None or (p.duplicates or 0) >= selection.min_duplicates)
    ]
    if not fits:
        raise UserError(
            f"suite {suite.key}: no prompt of {'+'.join(selection.sets) or suite.prompt_set} has role "
            f"{selection.role}"
            + (f" and kind {', '.join(selection.kinds)}" if selection.kinds else "")
            + (f" and category {', '.join(selection.categories)}" if selection.categories else "")
        )
    clusters = sorted({p.cluster for p in fits}, key=lambda c: derive_seed("select", suite.seed_key, c))
    kept = set(clusters[: selection.limit])
    return (p for p in fits if p.cluster in kept)


def _set_of(prompt: Prompt, prompts: PromptSet) -> str:
    """The set that a prompt is of: of those that were joined, the one that its id begins with."""
    return prompt.id.partition("/")[0] if isinstance(prompts, Union) else prompts.name


_OF_OTHERS = {"metrics", "also", "methods", "fit", "attack"}
"""Parts of a suite that a row depends on by its own settings and scores only, or not at all."""


_SEES_IMAGES = {Knowledge.TRAINING_IMAGES, Knowledge.REFERENCE_INDEX}


class PlannedFit(NamedTuple):
    """The fit of a part of the recipe for an instance of the prompt set ("" where it has none)."""

    part: int
    instance: str


@dataclass(frozen=True)
class RowPlan:
    """One row to be: a recipe on a model in a suite, split into shards."""

    suite: Suite
    model: str
    recipe: Recipe
    runtime: Runtime

    @cached_property
    def images(self) -> list[ImageKey]:
        """Every image of the row: noise is fixed by the original prompt, so rows are paired."""
        prompts = prompt_set(self.suite.prompt_set)
        by_id = {p.id: p for p in prompts}
        keys = []
        for prompt, count in chosen(self.suite, prompts):
            drawn = self._drawn(prompt, by_id)
            keys += [ImageKey(self.suite.seed_key, drawn, k) for k in range(count)]
        return keys

    def _drawn(self, prompt: Prompt, by_id: Mapping[str, Prompt]) -> Prompt:
        other = self.recipe.substitute(prompt, by_id)
        if other is prompt:
            return prompt
        return replace(
            prompt,
            text=other.text,
            references=other.references,
            attributes=other.attributes,
            concept=other.concept,
        )

    @cached_property
    def inapplicable(self) -> str | None:
        """Why the recipe doesn't apply to the model, or to one that is loaded so; None where it does."""
        from lethebench.zoo import LoadSettings, family_of

        loading = LoadSettings.of(dict(self.runtime.loading))
        refusals = (loading.refusal(p.name, str(p.family)) for p in self.recipe.parts)
        return self.recipe.unsupported(family_of(self.model)) or next(filter(None, refusals), None)

    @cached_property
    def instances(self) -> tuple[str, ...]:
        """The prompt set's instances that are drawn of, for each of which methods are fitted anew.

        ("",) where the set has none.
        """
        known = getattr(prompt_set(self.suite.prompt_set), "instances", None)
        if known is None:
            return ("",)
        drawn = {self.instance_of(key.prompt.id) for key in self.images}
        return tuple(one for one in known if one in drawn)

    @cached_property
    def fits(self) -> list[PlannedFit]:
        """Every fit of the row: each part of the recipe for each instance."""
        return [PlannedFit(part, one) for part in range(len(self.recipe.parts)) for one in self.instances]

    @cached_property
    def shards(self) -> list[tuple[ImageKey, ...]]:
        """The images in pieces of the suite's shard size, in order; each of one instance."""
        return [keys for _, keys in self._shards]

    def instance(self, shard: int) -> str:
        """The instance that a shard's images are of."""
        return self._shards[shard][0]

    @cached_property
    def _shards(self) -> list[tuple[str, tuple[ImageKey, ...]]]:
        size, of = self.suite.shard_size, self.instance_of
        groups = {one: [key for key in self.images if of(key.prompt.id) == one] for one in self.instances}
        return [
            (one, tuple(keys[i : i + size]))
            for one, keys in groups.items()
            for i in range(0, len(keys), size)
        ]

    def instance_of(self, prompt_id: str) -> str:
        """The instance that a prompt is of."""
        prompts: Any = prompt_set(self.suite.prompt_set)
        return str(prompts.instance_of(prompt_id)) if hasattr(prompts, "instances") else ""

    @cached_property
    def metrics(self) -> list[Metric]:
        """The suite's metrics, in its order."""
        return [make_metric(spec) for spec in self.suite.metrics]

    @cached_property
    def _recorders(self) -> list[Any]:
        """What determines the recorded part of a shard."""
        watching = [m for m in self.metrics if m.records]
        return [[*self._metric_key(m), packages(SCORING), sorted(m.records)] for m in watching]

    def _metric_key(self, metric: Metric) -> list[Any]:
        cls = type(metric)
        return [metric.name, cls.version, source_sha256(cls), identity_of(metric), metric_files(metric)]

    @cached_property
    def _common(self) -> dict[str, Any]:
        return {
            "weights": weights_sha256(self.model),
            "sampler": self.suite.sampler.model_dump(mode="json"),
            "batch_size": self.suite.batch_size,
            "code": code_sha256(*SAMPLER_CODE),
            "packages": packages(DECISIVE),
            "device": self.runtime.device.partition(":")[0],
            "dtype": self.runtime.dtype,
            **({"loading": dict(self.runtime.loading)} if self.runtime.loading else {}),
            **({"max_tokens": self._max_tokens} if self._max_tokens else {}),
        }

    @cached_property
    def _max_tokens(self) -> int | None:
        from lethebench.zoo import find_model

        return find_model(self.model).max_tokens

    def fit_key(self, part: int, instance: str = "") -> dict[str, Any]:
        """All that determines a part's fit for an instance: the parts before it, as applied, included.

        Settings that only ``apply`` reads don't count for the part itself, so that strengths share its fit.
        """
        sources = self.recipe.sources()
        before = [[p.name, identity_of(p), sources[p.name]] for p in self.recipe.parts[:part]]
        own = self.recipe.parts[part]
        seen = frozenset().union(*(p.sees for p in self.recipe.parts[: part + 1]))
        return {
            **self._common,
            "what": "fit",
            "suite": self.suite.seed_key,
            "prompts": manifest_sha256(self.suite.prompt_set, bool(_SEES_IMAGES & seen)),
            "fitting": code_sha256(*FITTING_CODE),
            "judges": judges_sha256(),
            "parts": [*before, [own.name, fitted_settings(own), sources[own.name]]],
            "files": [setting_files(p) for p in self.recipe.parts[: part + 1]],
            **({"instance": instance} if instance else {}),
            **({"concepts": self.suite.concepts} if self.suite.concepts else {}),
            **self._training,
        }

    @property
    def _training(self) -> dict[str, Any]:
        """What determines a fit beside the rest where models are fine-tuned."""
        if self.suite.train is None:
            return {}
        return {
            "training": self.suite.train,
            "trainer": code_sha256("finetuning"),
            "trained_by": packages(("peft", "accelerate")),
        }

    def shard_key(self, shard: int) -> dict[str, Any]:
        """All that determines a shard's images."""
        images = [[k.prompt.id, k.prompt.text, k.index] for k in self.shards[shard]]
        fits = [digest(self.fit_key(i, self.instance(shard))) for i in range(len(self.recipe.parts))]
        key = {
            **self._common,
            "what": "shard",
            "suite": self.suite.seed_key,
            "fits": fits,
            "applied": [identity_of(p) for p in self.recipe.parts],
            "images": images,
        }
        return {**key, "recorders": self._recorders} if self._recorders else key

    def scores_key(self, shard: int, metric: MetricSpec) -> dict[str, Any]:
        """All that determines a metric's values on a shard."""
        return {
            "what": "scores",
            "shard": digest(self.shard_key(shard)),
            "references": [list(k.prompt.references) for k in self.shards[shard]],
            "prompts": manifest_sha256(self.suite.prompt_set),
            "metric": self._metric_key(self.metrics[self.suite.metrics.index(metric)]),
            "judges": judges_sha256(),
            "packages": packages(SCORING),
            "code": code_sha256(*SCORING_CODE),
        }

    def row_key(self, base: RowPlan) -> dict[str, Any]:
        """All that determines the row but its timings."""
        scores = [
            [digest(self.scores_key(i, m)) for m in self.suite.metrics] for i in range(len(self.shards))
        ]
        paired = [digest(base.shard_key(i)) for i in range(len(base.shards))]
        return {
            "what": "row",
            "schema": SCHEMA,
            "suite": self.suite.model_dump(mode="json", exclude=_OF_OTHERS),
            "model": self.model,
            "setting": self.recipe.setting,
            "scores": scores,
            "base": paired,
            "runner": code_sha256("bench.py", "row.py", "plan.py", "stats.py", "two_sample.py", "work.py"),
        }

    @property
    def model_name(self) -> str:
        """The model's short name."""
        from lethebench.zoo import find_model

        return find_model(self.model).name

    def folder(self, runs: Path) -> Path:
        """Where the row is written: ``<suite>@<version>/<model>/<method>/<setting>`` (URL-quoted)."""
        names = (self.suite.key, self.model_name, self.recipe.name, self.recipe.setting)
        return runs.joinpath(*map(file_name, names))
