"""The contract suite of metrics.

A check is a function ``check_*(subject)`` that raises AssertionError with what is wrong. They run on a few
planted prompts of every role, shown as their own references (copies) or as fresh renderings of the same
captions. What a metric needs of the sampling (latents, noise norms, recordings) is drawn by the model in a
few steps; a metric gets what it declares and nothing more.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lethebench.check._common import (
    model_state,
    named_checks,
    random_states,
    same_model,
    same_random_states,
)
from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import settings_of
from lethebench.metric import Metric, Score, Shard, configure_metric, detectors
from lethebench.prompts import Prompt, PromptSet, Role
from lethebench.registry import METRICS
from lethebench.specs import SamplerSettings

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.sampler import Samples
    from lethebench.zoo import Model

SUITE = "check@1"
NEEDS = frozenset({"images", "references", "masks", "prompts", "latents", "noise_norm", "recorded"})
SAMPLED = frozenset({"latents", "noise_norm", "recorded"})
"""Of these, what only drawing gives."""
TOLERANCE = 1e-4
"""Absolute and relative: networks in float32 round differently with the size of a batch. Texts are equal."""
_SAMPLER = SamplerSettings(scheduler="model", num_inference_steps=4, guidance_scale=3.0)
_SCORE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*\Z")
_KINDS = ("verbatim", "foreground", "background", "one-to-many", "redundant-trigger", "caption")
_INDEXED = ("images", "latents", "noise_norm")


class Image(NamedTuple):
    """A prompt, the image's number, and whether the image is a copy of the prompt's reference."""

    prompt: Prompt
    number: int
    copied: bool


class Subject:
    """The metric under check with a shard of images, measured once and shared.

    ``model`` gives the model that draws, and is called only where the metric needs something of the sampling.
    """

    def __init__(
        self,
        spec: str,
        model: Callable[[], Model],
        prompts: PromptSet,
        settings: Mapping[str, Any] | None = None,
        sampler: SamplerSettings = _SAMPLER,
    ) -> None:
        self.spec, self.prompts, self.sampler, self._load = spec, prompts, sampler, model
        self.cls: type[Metric] = METRICS.get(spec)
        self.settings = dict(settings or {})
        configure_metric(self.cls, self.settings)

    def make(self) -> Metric:
        """The metric, made anew."""
        return configure_metric(self.cls, self.settings)

    @cached_property
    def metric(self) -> Metric:
        """The metric that the checks share."""
        return self.make()

    @cached_property
    def model(self) -> Model:
        """The model that draws."""
        return self._load()

    @cached_property
    def chosen(self) -> list[Image]:
        """A copy of each planted kind, and pictures of every role that are no copies."""
        prompts = list(self.prompts)

        def first(count: int, role: Role, *kinds: str, trained: bool | None = None) -> list[Prompt]:
            fits = [p for p in prompts if p.role is role and (not kinds or p.kind in kinds)]
            return [p for p in fits if trained is None or p.trained is trained][:count]

        copies = [p for kind in _KINDS for p in first(1, Role.TRIGGER, kind)]
        copies += first(2, Role.CONCEPT) + first(1, Role.CONTROL, "concept", "direct")
        others = copies[:2] + first(2, Role.CONTROL, *_KINDS, trained=False)
        others += first(1, Role.CONTROL, "hard-negative") + first(3, Role.NEUTRAL) + first(1, Role.PROBE)
        return [Image(p, 0, True) for p in copies] + [Image(p, 1, False) for p in others]

    @cached_property
    def drawn(self) -> Samples:
        """The chosen prompts drawn by the model, recorded."""
        return self.draw(self.chosen, [self.metric])

    def draw(self, images: Sequence[Image], metrics: Iterable[Metric], batch_size: int = 8) -> Samples:
        """Draw images with the recorders of metrics."""
        from lethebench.sampler import sample

        keys = [ImageKey(SUITE, image.prompt, image.number) for image in images]
        recorders = [made for metric in metrics if (made := metric.recorder()) is not None]
        return sample(self.model, keys, self.sampler, recorders=recorders, batch_size=batch_size)

    @cached_property
    def shard(self) -> Shard:
        """The images with what the metric declares that it needs."""
        from lethebench.metrics._common import reference_of
        from lethebench.metrics._world import fresh_picture

        pictures = [
            reference_of(self.prompts, image.prompt.references[0]).image
            if image.copied
            else fresh_picture(self.prompts, image.prompt, f"check/{image.prompt.id}").image
            for image in self.chosen
        ]
        needs, extra = self.cls.needs, {}
        if needs & SAMPLED:
            extra = {"latents": self.drawn.latents, "noise_norm": self.drawn.noise_norm}
            extra = {name: values for name, values in extra.items() if name in needs}
        return Shard(
            np.stack(pictures),
            tuple(image.prompt for image in self.chosen),
            tuple(image.number for image in self.chosen),
            self.prompts,
            recorded=dict(self.drawn.recorded) if "recorded" in needs else {},
            **extra,
        )

    @cached_property
    def columns(self) -> dict[str, Any]:
        """What the metric measures on the shard."""
        return dict(self.metric.measure(self.shard))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The per-image table as the runner makes it."""
        return self.frame(self.columns)

    def frame(self, columns: Mapping[str, Any]) -> pd.DataFrame:
        """What is known of the shard's images, and these columns."""
        import pandas as pd

        from lethebench.work import columns_frame, known_frame

        keys = [ImageKey(SUITE, image.prompt, image.number) for image in self.chosen]
        return pd.concat([known_frame(keys), columns_frame(columns, len(keys), self.cls.name)], axis=1)

    def valued(self) -> Iterable[tuple[Score, pd.DataFrame]]:
        """Each score with the images that it is about and that have a value, where there are some."""
        from lethebench.stats import valued

        for score in self.metric.all_scores():
            rows = valued(score, self.table)
            if len(rows):
                yield score, rows


def take(shard: Shard, rows: Sequence[int]) -> Shard:
    """Some images of a shard, in that order."""
    at = list(rows)
    return dataclasses.replace(
        shard,
        prompts=tuple(shard.prompts[i] for i in at),
        indices=tuple(shard.indices[i] for i in at),
        recorded={name: values[at] for name, values in shard.recorded.items()},
        **{n: getattr(shard, n)[at] for n in _INDEXED if getattr(shard, n) is not None},
    )


# --- what the class says --------------------------------------------------------------------------


def check_declares_its_facts(subject: Subject) -> None:
    """Name, one-line summary, source, version and what it needs are declared with the right types."""
    cls = subject.cls
    name = getattr(cls, "name", None)
    assert isinstance(name, str) and re.fullmatch(r"[a-z0-9]+([-._][a-z0-9]+)*", name), (
        f"`name` is {name!r}: lower case, digits, '-' and '.'"
    )
    for fact in ("summary", "source", "version"):
        value = getattr(cls, fact, "")
        assert isinstance(value, str) and value.strip(), f"declare `{fact}` as a text"
        assert "\n" not in value, f"`{fact}` must be one line"
    unknown = sorted(set(cls.needs) - NEEDS)
    assert not unknown, f"`needs` holds '{next(iter(unknown), '')}': known {', '.join(sorted(NEEDS))}"
    assert bool(cls.records) <= ("recorded" in cls.needs), "it `records`: add 'recorded' to `needs`"


def check_scores_are_declared(subject: Subject) -> None:
    """Score names are dotted and nobody else's; direction, bounds, unit and help are in order."""
    scores = subject.metric.all_scores()
    assert isinstance(scores, tuple) and scores, "declare `scores`, a tuple of Score"
    names = [score.name for score in scores]
    others = {s.name: n for n, cls in METRICS.items() if n != subject.cls.name for s in cls.scores}
    for score in scores:
        where = f"score '{score.name}'"
        assert _SCORE.match(score.name), f"{where}: use lower case, digits, '_' and '.'"
        assert names.count(score.name) == 1, f"{where} is declared twice"
        assert score.name not in others, f"{where} belongs to metric '{others.get(score.name)}'"
        assert score.direction in ("lower", "higher", "none"), f"{where}: direction {score.direction!r}"
        low, high = score.bounds
        assert low < high, f"{where}: bounds {score.bounds} are not low < high"
        assert score.unit, f"{where} has no unit"
        assert score.help, f"{where} has no help"


def check_set_valued_scores_are_named(subject: Subject) -> None:
    """``set_valued`` names scores, and where it names some ``aggregate`` is overridden."""
    cls = subject.cls
    unknown = sorted(set(cls.set_valued) - {score.name for score in subject.metric.all_scores()})
    assert not unknown, f"`set_valued` names '{next(iter(unknown), '')}', which is no score"
    assert not cls.set_valued or cls.aggregate is not Metric.aggregate, (
        "`set_valued` names scores, but `aggregate` is the mean: override it"
    )


def check_constructor_only_stores(subject: Subject) -> None:
    """Settings are fields of a frozen dataclass; a part handed in (a judge, say) is stored as it is."""
    cls = subject.cls
    made = cls()
    if dataclasses.is_dataclass(cls):
        assert cls.__dataclass_params__.frozen, "the dataclass must be frozen"  # type: ignore[attr-defined]
        expected = {f.name: f.default for f in dataclasses.fields(cls)}
    else:
        own = [p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"]
        named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        expected = {p.name: p.default for p in named}
        for name, default in expected.items():
            assert default is None, (
                f"`{name}` looks like a setting that no suite can set: make it a field of a frozen dataclass"
            )
    for name, default in expected.items():
        assert getattr(made, name, _MISSING) == default, f"the constructor doesn't store `{name}` as given"


def check_settings_have_help(subject: Subject) -> None:
    """Every setting has help text, and its value survives JSON."""
    if not dataclasses.is_dataclass(subject.cls):
        return
    for field in dataclasses.fields(subject.cls):
        assert field.metadata.get("help"), (
            f"setting `{field.name}` has no help: use lethebench.method.setting"
        )
    for name, value in settings_of(subject.metric).items():
        assert _as_json(value) == value, f"setting `{name}` is {value!r}, which JSON doesn't give back"


def check_pickles(subject: Subject) -> None:
    """The metric travels to another process (plugins given by path are found there by path)."""
    if not subject.cls.__module__.startswith("lethe_plugin_"):
        assert settings_of(pickle.loads(pickle.dumps(subject.metric))) == settings_of(subject.metric)


def check_says_what_is_missing(subject: Subject) -> None:
    """``check`` passes, or raises UserError with one line."""
    try:
        subject.make().check()
    except UserError as error:
        told = str(error).strip()
        assert told and "\n" not in told, "`check` must say in one line what to do"


# --- what it measures -----------------------------------------------------------------------------


def check_columns_are_measured(subject: Subject) -> None:
    """Every column that a score, ``detects`` or ``reads`` names is there, one value an image."""
    columns, count = subject.columns, len(subject.shard)
    for name, values in columns.items():
        assert isinstance(values, np.ndarray), f"column '{name}' is no numpy array"
        assert len(values) == count, f"column '{name}' has {len(values)} values for {count} images"
        assert values.ndim <= 2, f"column '{name}' has {values.ndim} axes: one value or vector an image"
        texts = values.dtype.kind in "OU" and all(isinstance(v, str) for v in values.tolist())
        assert texts or values.dtype.kind in "bfiu", f"column '{name}' holds neither numbers nor texts"
    for score in subject.metric.all_scores():
        assert score.column in columns, f"score '{score.name}' reads '{score.column}', which isn't measured"
    for name in subject.cls.reads or ():
        assert name in columns, f"`reads` names '{name}', which isn't measured"
    known = subject.frame({}).columns
    for name in columns:
        assert name not in known, f"column '{name}' is what the runner calls something else: rename it"


def check_detectors_are_measured(subject: Subject) -> None:
    """The columns that tell memorized images hold a number an image, and say which end is memorized."""
    for column, end in detectors(subject.metric).items():
        assert column in subject.columns, f"'{column}' detects, but isn't measured"
        assert end in ("high", "low"), f"'{column}' detects at its end {end!r}: say high or low"
        values = subject.columns[column]
        assert values.ndim == 1 and values.dtype.kind in "bfiu", f"'{column}' detects, but holds no numbers"


def check_gives_a_value(subject: Subject) -> None:
    """Some score has a value on planted copies, fresh scenes and characters."""
    assert any(True for _ in subject.valued()), "no score has a value on any of the check's images"


def check_is_deterministic(subject: Subject) -> None:
    """The same images twice give the same values, bit for bit, by a metric made anew."""
    _same_columns(subject.columns, subject.make().measure(subject.shard), "measured again", tolerance=0.0)


def check_batches_do_not_matter(subject: Subject) -> None:
    """Images measured one by one have the values that they have together."""
    singles = [subject.metric.measure(take(subject.shard, [i])) for i in range(len(subject.shard))]
    for name in subject.columns:
        assert all(name in single for single in singles), f"column '{name}' is missing for single images"
    joined = {name: [value for single in singles for value in single[name]] for name in subject.columns}
    _same_columns(subject.columns, joined, "measured one by one")


def check_order_does_not_matter(subject: Subject) -> None:
    """Images measured backwards have the values that they have forwards."""
    backwards = list(range(len(subject.shard)))[::-1]
    found = subject.metric.measure(take(subject.shard, backwards))
    _same_columns(subject.columns, {k: v[backwards] for k, v in found.items()}, "measured backwards")


def check_no_images(subject: Subject) -> None:
    """No images give the same columns, empty."""
    found = subject.metric.measure(take(subject.shard, []))
    assert set(found) == set(subject.columns), (
        f"no images give the columns {', '.join(sorted(found)) or 'none'}, others "
        f"{', '.join(sorted(subject.columns))}"
    )
    for name, values in found.items():
        assert len(values) == 0, f"no images give {len(values)} values of '{name}'"


def check_one_image(subject: Subject) -> None:
    """One image gives one value of each column, and aggregates to a number or none."""
    single = subject.metric.measure(take(subject.shard, [0]))
    assert set(single) == set(subject.columns), "one image gives other columns than several"
    for name, values in single.items():
        assert len(values) == 1, f"one image gives {len(values)} values of '{name}'"
    for score, rows in subject.valued():
        _number(subject.metric, score, rows.iloc[:1])


def check_refuses_wrong_input(subject: Subject) -> None:
    """Wrong arrays and parts of different lengths are one line of ValueError that names the metric."""
    for what, shard in _wrong(subject).items():
        try:
            subject.metric.measure(shard)
        except ValueError as error:
            told = str(error)
            assert subject.cls.name in told, f"{what}: the error doesn't name the metric: {told}"
            assert "\n" not in told.strip(), f"{what}: the error has several lines"
        except Exception as error:
            raise AssertionError(
                f"{what}: {type(error).__name__} ({error}) in place of a ValueError that says what was wrong"
            ) from error
        else:
            raise AssertionError(f"{what}: measured without an error")


def check_nan_gives_no_value(subject: Subject) -> None:
    """A latent, noise norm or recording that is NaN (sampling diverged, no guidance) makes no number.

    The image has no value in the columns that depend on it, or the metric refuses it by a ValueError.
    """
    shard = take(subject.shard, range(3))
    expected = subject.metric.measure(shard)
    parts = {name: getattr(shard, name) for name in ("latents", "noise_norm")} | dict(shard.recorded)
    for name, values in parts.items():
        if values is None or values.dtype.kind != "f":
            continue
        bad = values.copy()
        bad[0] = np.nan
        change: dict[str, Any] = {"recorded": {**shard.recorded, name: bad}}
        try:
            found = subject.metric.measure(
                dataclasses.replace(shard, **(change if name in shard.recorded else {name: bad}))
            )
        except ValueError as error:
            assert subject.cls.name in str(error), (
                f"NaN in {name}: the error doesn't name the metric: {error}"
            )
            continue
        for column, was in expected.items():
            if was.dtype.kind == "f":
                now = np.asarray(found[column][0])
                assert np.isnan(now).all() or np.array_equal(now, was[0], equal_nan=True), (
                    f"NaN in {name} makes '{column}' {now.ravel()[0]}: give NaN, or raise ValueError"
                )


def check_missing_recordings_give_no_value(subject: Subject) -> None:
    """Where nothing was drawn, and so nothing recorded, the recorded columns have no value."""
    bare = dataclasses.replace(subject.shard, latents=None, noise_norm=None, recorded={})
    found = subject.metric.measure(bare)
    assert set(found) == set(subject.columns), "without recordings the columns are others"
    for column, was in subject.columns.items():
        if was.dtype.kind == "f" and len(was):
            now = np.asarray(found[column], dtype=float)
            kept = np.isnan(now) | (now == was if now.shape == was.shape else False)
            assert kept.all(), f"without recordings '{column}' is {now[~kept].ravel()[0]}: give NaN"


def check_values_are_inside_bounds(subject: Subject) -> None:
    """The values of a mean score, and every aggregate, are inside the score's bounds."""
    from lethebench.stats import is_mean

    for score, rows in subject.valued():
        found = [_number(subject.metric, score, rows)]
        if is_mean(subject.metric, score):
            found += rows[score.column].astype(float).tolist()
        low, high = score.bounds
        outside = [v for v in found if np.isfinite(v) and not low - TOLERANCE <= v <= high + TOLERANCE]
        assert not outside, f"score '{score.name}': {next(iter(outside), 0)} is outside {low} to {high}"


def check_aggregates(subject: Subject) -> None:
    """Aggregates are numbers, means where nothing else is declared, and don't depend on the table's order."""
    from lethebench.stats import is_mean

    for score, rows in subject.valued():
        before = rows.copy()
        value = _number(subject.metric, score, rows)
        assert rows.equals(before), f"`aggregate` changes the table of score '{score.name}'"
        again = _number(subject.metric, score, rows.iloc[::-1].reset_index(drop=True))
        assert np.isclose(value, again, rtol=1e-6, atol=1e-9, equal_nan=True), (
            f"score '{score.name}' is {value} forwards and {again} backwards"
        )
        if is_mean(subject.metric, score):
            mean = rows[score.column].astype(float).mean()
            assert np.isclose(value, mean, rtol=1e-9, atol=1e-9), (
                f"score '{score.name}' is {value}, the mean {mean}: name it in `set_valued`"
            )


def check_columns_survive_parquet(subject: Subject) -> None:
    """The columns are the same after they were written and read."""
    import pandas as pd

    from lethebench.work import columns_frame

    written = io.BytesIO()
    try:
        frame = columns_frame(subject.columns, len(subject.shard), subject.cls.name)
        frame.to_parquet(written, index=False)
    except Exception as error:
        raise AssertionError(f"the columns can't be written as Parquet: {error}") from error
    read = pd.read_parquet(io.BytesIO(written.getvalue()))
    again = {}
    for name, values in subject.columns.items():
        column = read[name].to_numpy()
        again[name] = np.stack([np.asarray(v) for v in column]) if values.ndim > 1 else column
    _same_columns(subject.columns, again, "after Parquet", tolerance=0.0)


def check_facts_survive_json(subject: Subject) -> None:
    """``facts`` and ``compare`` give what JSON can hold."""
    for name, record in (
        ("facts", subject.metric.facts()),
        ("compare", subject.metric.compare(subject.table, subject.table)),
    ):
        assert isinstance(record, dict), f"`{name}` must give a dict"
        assert _as_json(record) is not _MISSING, f"`{name}` gives what JSON can't hold: {record!r:.200}"


def check_leaves_its_input(subject: Subject) -> None:
    """Measuring changes no array of the shard."""
    before = take(subject.shard, range(len(subject.shard)))
    subject.metric.measure(subject.shard)
    parts = {name: getattr(subject.shard, name) for name in _INDEXED} | dict(subject.shard.recorded)
    was = {name: getattr(before, name) for name in _INDEXED} | dict(before.recorded)
    for name, values in parts.items():
        same = values is None or np.array_equal(values, was[name], equal_nan=values.dtype.kind == "f")
        assert same, f"measuring changes the shard's {name}"


def check_leaves_global_random_state(subject: Subject) -> None:
    """Measuring and aggregating use no global random state."""
    _ = subject.columns
    before = random_states()
    subject.make().measure(subject.shard)
    for score, rows in subject.valued():
        _number(subject.metric, score, rows)
    same_random_states(before)


def check_weights_are_files(subject: Subject) -> None:
    """What ``weights`` names is there."""
    for name, path in subject.metric.weights().items():
        assert path.is_file(), f"weights '{name}' are no file: {path}"


# --- what it records ------------------------------------------------------------------------------


def check_records_what_it_says(subject: Subject) -> None:
    """The recorder gives the names of ``records`` and nothing else, an array of numbers an image."""
    made, names = subject.metric.recorder(), set(subject.cls.records)
    assert (made is not None) == bool(names), "`recorder` gives one exactly where `records` names something"
    if made is None:
        return
    found = subject.drawn.recorded
    took, said = (", ".join(sorted(of)) or "nothing" for of in (found, names))
    assert took == said, f"the recorder takes {took}, `records` says {said}"
    for name, values in found.items():
        assert len(values) == len(subject.chosen), f"'{name}' has {len(values)} values, not one an image"
        assert values.dtype.kind in "bfiu", f"'{name}' holds no numbers"


def check_recording_changes_nothing(subject: Subject) -> None:
    """Images and latents are the same bit for bit with and without the recorder, and the model too."""
    few = subject.chosen[:4]
    before = model_state(subject.model)
    bare, watched = subject.draw(few, []), subject.draw(few, [subject.metric])
    assert np.array_equal(bare.images, watched.images), "recording changes the images"
    assert np.array_equal(bare.latents, watched.latents), "recording changes the latents"
    same_model(before, model_state(subject.model), "by recording")


def check_recorded_batches_do_not_matter(subject: Subject) -> None:
    """Images drawn one by one give the recordings that they give together."""
    few = subject.chosen[:4]
    together, singly = (subject.draw(few, [subject.metric], batch_size=n).recorded for n in (4, 1))
    _same_columns(together, singly, "recorded one by one", tolerance=10 * TOLERANCE)


# --- helpers --------------------------------------------------------------------------------------

_MISSING = object()


def _wrong(subject: Subject) -> dict[str, Shard]:
    """Shards that a metric with these needs must refuse."""
    shard, needs = take(subject.shard, range(3)), subject.cls.needs
    found: dict[str, Any] = {}
    if "images" in needs:
        found |= {
            "images of floats": {"images": shard.images / 255.0},
            "images with NaN": {"images": np.full(shard.images.shape, np.nan)},
            "images without channels": {"images": shard.images[..., 0]},
            "images as lists": {"images": shard.images[:, :2, :2].tolist()},
            "more prompts than images": {"images": shard.images[:2]},
        }
    if "latents" in needs and shard.latents is not None:
        found["more images than latents"] = {"latents": shard.latents[:2]}
    if "noise_norm" in needs and shard.noise_norm is not None:
        found |= {
            "noise norms of one axis": {"noise_norm": shard.noise_norm[:, 0]},
            "more images than noise norms": {"noise_norm": shard.noise_norm[:2]},
        }
    for name in sorted(subject.cls.records):
        fewer = {**shard.recorded, name: shard.recorded[name][:2]}
        found[f"more images than recordings of {name}"] = {"recorded": fewer}
    return {what: dataclasses.replace(shard, **change) for what, change in found.items()}


def _number(metric: Metric, score: Score, rows: pd.DataFrame) -> float:
    value = metric.aggregate(score, rows)
    assert isinstance(value, (float, np.floating)), f"score '{score.name}' aggregates to {value!r}, no float"
    assert not np.isinf(value), f"score '{score.name}' aggregates to {value}"
    return float(value)


def _same_columns(
    expected: Mapping[str, Any], found: Mapping[str, Any], when: str, tolerance: float = TOLERANCE
) -> None:
    """Raise AssertionError for the first value that differs: numbers by more than the tolerance.

    A vector without a value may be of any length.
    """
    assert set(expected) == set(found), f"other columns {when}"
    for name, values in expected.items():
        assert len(values) == len(found[name]), f"column '{name}' has {len(found[name])} values {when}"
        for old, new in zip(values, found[name], strict=True):
            if isinstance(old, str):
                assert old == new, f"column '{name}' says {new!r} {when}, not {old!r}"
                continue
            a, b = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
            if np.isnan(a).all() and np.isnan(b).all():
                continue
            assert a.shape == b.shape, f"column '{name}' has vectors of {b.shape} {when}, not {a.shape}"
            same = np.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert same.all(), f"column '{name}' differs by {np.abs(a - b)[~same].max():.3g} {when}"


def _as_json(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return _MISSING


_STATIC = frozenset(
    {
        "declares_its_facts",
        "scores_are_declared",
        "set_valued_scores_are_named",
        "constructor_only_stores",
        "settings_have_help",
        "pickles",
        "says_what_is_missing",
    }
)
"""Checks that need no images and no weights."""
_OF_SAMPLING = ("nan_gives_no_value", "missing_recordings_give_no_value")
_OF_RECORDERS = ("recording_changes_nothing", "recorded_batches_do_not_matter")


def checks() -> dict[str, Callable[[Subject], None]]:
    """Every check by its name without ``check_``, in the order of this file."""
    return named_checks(globals())


def applicable(subject: Subject, name: str) -> str | None:
    """Why a check doesn't apply, or None."""
    if name in _STATIC:
        return None
    try:
        subject.metric.check()
    except UserError as error:
        return f"the metric can't run here: {error}"
    if name in _OF_SAMPLING and not subject.cls.needs & SAMPLED:
        return "the metric needs nothing of the sampling"
    if name in _OF_RECORDERS and not subject.cls.records:
        return "the metric records nothing"
    return None
