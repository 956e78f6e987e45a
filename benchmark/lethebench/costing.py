"""What a run will do and cost, told before it starts: nothing is fitted, drawn (but to measure) or written.

Counts are those of the run itself: the same plans, looked up in the same store. Times come from measurements:
rows of earlier runs on the model, a batch that is drawn for it, or a rate that the user gives; a fit through
the sampling chain is reckoned from that rate where no row has its time. What can't be told so is named, and
left out of the sum. Scoring is on top.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from lethebench.bench import Outcome, _current, missing, recipes_of, require_files, require_sound
from lethebench.composition import Recipe
from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Family, Knowledge, Method, fitted_settings, identity_of, recorded_settings
from lethebench.plan import RowPlan, Runtime, chosen, make_metric, prompt_set
from lethebench.prompts import Prompt, Role, Union
from lethebench.referencing import unusable_references
from lethebench.row import Cost, Row, read_row
from lethebench.specs import SamplerSettings, Suite, load_suite
from lethebench.store import Store, digest
from lethebench.zoo import ModelEntry

T = TypeVar("T")
NO_RATE = "no measured rate"
TIMED = 8
"""Images that a row's first shard draws twice with and twice without the method, to time it."""
PASSES = 4
"""Denoiser passes that a fit by backpropagation through the sampling chain makes of each of its steps: one
forward, one more with gradients, and a backward one, which takes as long as two."""
PNG = 0.6
"""Share of a picture's raw bytes that its PNG takes (photographs: 0.5 to 0.65)."""
OVERHEAD = 4096
"""Bytes an image for scores, tables and records."""
SIDE = {"sd": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024}
"""Pixels a side by family, of models that are not on disk where the suite names no size."""
CHANNELS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}
"""Channels of the latents, which have an eighth of the side."""


@dataclass(frozen=True)
class SetCount:
    """What a row draws of one of the joined prompt sets; None: unknown.

    ``how``: ``counted``, ``for fitting only``, or where the set can't be read here ``expected by the suite``
    or ``unknown``.
    """

    name: str
    prompts: int | None
    images: int | None
    how: str


@dataclass(frozen=True)
class Lack:
    """Something that a run would stop at, and what to do about it."""

    what: str
    message: str


@dataclass(frozen=True)
class RowCost:
    """One row and what is left of it; None: unknown. What rows share counts for the first of them."""

    method: str
    setting: str
    there: bool | None
    """Whether the row lies in the runs folder, made of exactly this."""
    images: int | None
    images_left: int | None
    fits_left: int | None
    seconds_per_image: float | None
    rate_from: str
    fit_seconds: float
    """Time of the fits that are left, as far as it is known."""
    fit_from: str
    seconds: float
    """Of fits and images that are left, as far as it is known."""
    untimed: tuple[str, ...] = ()
    """What is left and not in the time: ``images``, ``fit of ...``."""
    reason: str = ""
    """Why the method doesn't apply to the model; empty where it does."""


@dataclass(frozen=True)
class Costs:
    """The plan of a run."""

    suite: str
    model: str
    device: str
    sets: tuple[SetCount, ...]
    rows: tuple[RowCost, ...]
    jobs: Mapping[str, int | None]
    """How many fits, shards, scored shards and rows the run would make now; None: unknown."""
    missing: tuple[Lack, ...]
    height: int
    width: int
    bytes_an_image: int
    disk_free_bytes: int | None
    memory: Mapping[str, int]
    """Estimated bytes on the device by what takes them; empty where too little is known of the model."""

    @property
    def images(self) -> int | None:
        """Of all rows together."""
        return _sum(r.images for r in self.rows)

    @property
    def images_left(self) -> int | None:
        """Those that the store lacks."""
        return _sum(r.images_left for r in self.rows)

    @property
    def disk_bytes(self) -> int | None:
        """Pictures, latents, PNGs and scores of what is left. Fitted artefacts come on top."""
        left = self.images_left
        return None if left is None else left * self.bytes_an_image

    @property
    def hours(self) -> float:
        """Hours of the device for fits and images, as far as they are known: see :attr:`untimed`."""
        return sum(r.seconds for r in self.rows) / 3600

    @property
    def untimed(self) -> dict[str, int]:
        """What is not in the hours, with the number of rows that need it."""
        return dict(Counter(what for r in self.rows for what in r.untimed))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = ("images", "images_left", "disk_bytes", "hours", "untimed")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def costs(
    methods: Sequence[str],
    *,
    suite: str | Suite = "planted",
    model: str | None = None,
    strength: str = "all",
    overrides: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    runtime: Runtime | None = None,
    rate: float | None = None,
    measure: bool = False,
) -> Costs:
    """What :func:`lethebench.bench.run` with the same arguments will do and cost.

    ``rate`` is the unmitigated model's time of an image in seconds; ``measure`` draws a batch to find it.
    A model, prompt files and metrics' files that are not there are named under ``missing``. Raises UserError
    for wrong names and settings, and where there is no model to measure with.
    """
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UserError(f"--rate is the time of an image in seconds, above 0, not {rate}")
    spec = suite if isinstance(suite, Suite) else load_suite(suite)
    runs, runtime, name = Path(runs), runtime or Runtime(), model or spec.model
    require_sound(spec)
    recipes = recipes_of(methods, spec, strength=strength, overrides=overrides)
    entry, lacks = _model(name, runtime)
    plans = [RowPlan(spec, name, recipe, runtime) for recipe in recipes]
    if measure and rate is None:
        if lacks:
            raise UserError(f"--measure needs the model: {lacks[0].message}")
        rate = measured_rate(plans[0])
    sets, unreadable = count_sets(spec)
    known = not unreadable and not any(lack.what == "model" for lack in lacks)
    left = _left(plans, runs, known)
    rates = Rates(spec, entry.name, runtime, earlier_rows(runs, entry.name), rate)
    drawn = _sum(s.images for s in sets)
    height, width = picture_size(spec.sampler, entry)
    return Costs(
        suite=spec.key,
        model=entry.name,
        device=runtime.device,
        sets=tuple(sets),
        rows=tuple(_row(plan, left, rates, drawn) for plan in plans),
        jobs=left.jobs,
        missing=(*lacks, *_files_lack(plans), *unreadable, *_metrics_lack(spec, readable=not unreadable)),
        height=height,
        width=width,
        bytes_an_image=bytes_an_image(height, width, CHANNELS[entry.family]),
        disk_free_bytes=_free(runs),
        memory=_memory(entry, plans),
    )


# --- what is there --------------------------------------------------------------------------------


def _model(name: str, runtime: Runtime) -> tuple[ModelEntry, list[Lack]]:
    """The model's entry, and what its files or this machine lack. UserError for a name that nobody knows."""
    from lethebench.zoo import LoadSettings, check_model, find_model, require_loadable

    entry = find_model(name)
    try:
        check_model(name)
    except UserError as error:
        return entry, [Lack("model", str(error))]
    loading = LoadSettings.of(dict(runtime.loading))
    try:
        require_loadable(name, device=runtime.device, dtype=runtime.dtype, loading=loading)
    except UserError as error:
        return entry, [Lack("device", str(error))]
    return entry, []


def _metrics_lack(suite: Suite, readable: bool) -> list[Lack]:
    """Files and packages that metrics lack and, where the prompts are ``readable``, references."""
    found = []
    for metric in map(make_metric, suite.metrics):
        reason = unusable_references(metric, prompt_set(suite.prompt_set)) if readable else None
        try:
            metric.check()
        except UserError as error:
            reason = str(error)
        if reason:
            found.append(Lack(f"metric {metric.name}", reason))
    return found


def _files_lack(plans: Sequence[RowPlan]) -> list[Lack]:
    """The files that methods' settings name and that aren't there."""
    found: dict[str, Lack] = {}
    for part in (part for plan in plans for part in plan.recipe.parts):
        try:
            require_files(part)
        except UserError as error:
            found.setdefault(str(error), Lack(f"method {part.name}", str(error)))
    return list(found.values())


def count_sets(suite: Suite) -> tuple[list[SetCount], list[Lack]]:
    """What a row draws of each joined prompt set, and which sets can't be read here.

    Of a set that can't be read, what the suite expects of it (``Selection.expect``), if it says so.
    """
    names = suite.prompt_set.split("+")
    lacks = []
    for name in names:
        try:
            next(iter(prompt_set(name)), None)
        except UserError as error:
            lacks.append(Lack(f"prompt set {name}", str(error)))
    if not lacks:
        pairs = chosen(suite, prompt_set(suite.prompt_set))
        return [_counted(prompt_set(name).name, pairs, len(names) > 1) for name in names], []
    unread = {lack.what for lack in lacks}
    return [_one_set(name, suite, f"prompt set {name}" not in unread) for name in names], lacks


def _one_set(name: str, suite: Suite, readable: bool) -> SetCount:
    """A set's count where others, or it, can't be read: from the selections that are of it alone."""
    names = suite.prompt_set.split("+")
    own = [s for s in suite.select if name in (s.sets or names)]
    mixed = any((s.sets or tuple(names)) != (name,) for s in own)
    if readable and not mixed and own:
        pairs = chosen(suite.model_copy(update={"select": tuple(own)}), Union([prompt_set(name)]))
        return _counted(name, pairs, joined=True)
    if not own:
        return SetCount(name, 0, 0, "for fitting only")
    if mixed or any(s.expect is None for s in own):
        return SetCount(name, None, None, "unknown")
    prompts = [(s.expect or 0, s.images) for s in own]
    return SetCount(name, sum(n for n, _ in prompts), sum(n * k for n, k in prompts), "expected by the suite")


def _counted(name: str, pairs: Sequence[tuple[Prompt, int]], joined: bool) -> SetCount:
    own = [count for prompt, count in pairs if not joined or prompt.id.startswith(f"{name}/")]
    return SetCount(name, len(own), sum(own), "counted" if own else "for fitting only")


def _free(folder: Path) -> int | None:
    import shutil

    there = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), None)
    return None if there is None else shutil.disk_usage(there).free


def _memory(entry: ModelEntry, plans: Sequence[RowPlan]) -> dict[str, int]:
    """Estimated bytes on the device: of drawing a batch, and of UniForget's fit where one is planned."""
    from lethebench import memory
    from lethebench.methods.uniforget import UniForget
    from lethebench.zoo import LoadSettings

    suite, runtime = plans[0].suite, plans[0].runtime
    loading = LoadSettings.of(dict(runtime.loading))
    try:
        found = memory.outline(entry)
        dry = cache(lambda dtype: memory.DryRun(found, suite.sampler, dtype))
        drawing = memory.sampling(dry(runtime.dtype), loading, batch=suite.batch_size)
        needs = {f"drawing {suite.batch_size} at a time": drawing.total}
        fits = [part for plan in plans for part in plan.recipe.parts if isinstance(part, UniForget)]
        if fits:
            largest = max(fits, key=lambda method: (method.batch_size, len(method.kinds)))
            fit = memory.uniforget(dry, runtime.dtype, loading, method=largest)
            needs[f"fitting uniforget, {largest.batch_size} prompts a step"] = fit.total
    except UserError:
        return {}
    return needs


# --- what is left ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Left:
    """What the store lacks, by row (``id`` of its plan); what rows share is the first one's."""

    there: Mapping[int, bool]
    fits: Mapping[int, list[int]]
    """The numbers of the parts that are to be fitted, once for each instance."""
    images: Mapping[int, int]
    timed: Mapping[int, int]
    """Images of the first shard that are drawn again to time the method."""
    jobs: Mapping[str, int | None]
    known: bool


def _left(plans: Sequence[RowPlan], runs: Path, known: bool) -> _Left:
    """Look the plans up as a run does. Where not all is ``known`` there are no keys: all is left."""
    base, store = plans[0], Store(runs / "store")
    there = {id(p): known and _current(p, base, runs, Outcome()) for p in plans}
    pending = [p for p in plans if not there[id(p)]]
    working = pending if not pending or pending[0] is base else [base, *pending]
    working = [p for p in working if p.inapplicable is None]
    fits: dict[int, list[int]] = {id(p): [] for p in plans}
    images, timed = dict.fromkeys(fits, 0), dict.fromkeys(fits, 0)
    seen: set[str] = set()
    shards, scores = 0, 0
    scorable = True
    for plan in working:
        for part, key in _fits_left(plan, store, known):
            if key not in seen:
                seen.add(key)
                fits[id(plan)].append(part)
        if not known:
            continue
        absent = [job.number for job in missing(plan, "shard", store)]
        unscored = _try(partial(missing, plan, "scores", store))
        scorable = scorable and unscored is not None
        shards, scores = shards + len(absent), scores + len(unscored or ())
        new = [i for i in absent if digest(plan.shard_key(i)) not in seen]
        seen |= {digest(plan.shard_key(i)) for i in new}
        images[id(plan)] = sum(len(plan.shards[i]) for i in new)
        timed[id(plan)] = min(TIMED, len(plan.shards[0])) if 0 in new and plan.recipe.generates else 0
    counted = {
        "fit": sum(map(len, fits.values())),
        "shard": shards,
        "scores": scores if scorable else None,
        "row": len(pending),
    }
    return _Left(there, fits, images, timed, counted if known else dict.fromkeys(counted), known)


def _fits_left(plan: RowPlan, store: Store, known: bool) -> list[tuple[int, str]]:
    """The fits that the store lacks, by part and key; all of one instance where no keys can be made."""
    if known:
        keys = [(fit.part, plan.fit_key(*fit)) for fit in plan.fits]
        return [(part, digest(key)) for part, key in keys if store.find("fit", key) is None]
    return [(part, _fit_name(plan.recipe, part)) for part in range(len(plan.recipe.parts))]


def _fit_name(recipe: Recipe, part: int) -> str:
    """What tells a part's fit from others of the same run."""
    before = [[p.name, identity_of(p)] for p in recipe.parts[:part]]
    return digest([*before, [recipe.parts[part].name, fitted_settings(recipe.parts[part])]])


def _try(find: Callable[[], T]) -> T | None:
    """None where files are missing that the answer depends on."""
    try:
        return find()
    except UserError:
        return None


# --- times ----------------------------------------------------------------------------------------


def earlier_rows(runs: Path, model: str) -> list[Row]:
    """The rows below ``runs`` of a model that were measured, by path."""
    found = (_try(partial(read_row, path)) for path in sorted(runs.glob("*@*/*/*/*/row.json")))
    return [row for row in found if row is not None and row.model == model and row.cost is not None]


@dataclass(frozen=True)
class Rates:
    """Measured times on a model; each answer is (seconds or None, where it comes from)."""

    suite: Suite
    model: str
    runtime: Runtime
    rows: Sequence[Row]
    given: float | None = None
    """The unmitigated model's time of an image, where the user gave or measured it."""

    @property
    def usable(self) -> list[tuple[Row, Cost]]:
        """Earlier rows on this kind of device, in this type, loaded alike."""
        own = (self.runtime.device.partition(":")[0], self.runtime.dtype, dict(self.runtime.loading))
        found = []
        for row in self.rows:
            made = row.provenance
            device = str(made.hardware.get("device", "")).partition(":")[0]
            if row.cost is not None and (device, made.dtype, made.loading) == own:
                found.append((row, row.cost))
        return found

    def base(self) -> tuple[float | None, str]:
        """An image of the unmitigated model with the suite's sampler, by steps where only those differ."""
        if self.given is not None:
            return self.given, "given or measured now"
        own, found = self.suite.sampler, []
        for row, cost in self.usable:
            sampler = SamplerSettings.model_validate(row.config["sampler"])
            share = own.num_inference_steps / sampler.num_inference_steps
            if row.method == "base" and cost.seconds_per_image is not None and _alike(own, sampler):
                found.append((abs(math.log(share)), cost.seconds_per_image * share, row))
        if not found:
            return None, NO_RATE
        nearest = min(distance for distance, _, _ in found)
        best = [(seconds, row) for distance, seconds, row in found if distance == nearest]
        names = ", ".join(dict.fromkeys(row.key[0] for _, row in best))
        scaled = f", scaled to {own.num_inference_steps} steps" if nearest else ""
        return median(seconds for seconds, _ in best), f"measured in {names}{scaled}"

    def drawing(self, recipe: Recipe) -> tuple[float | None, str]:
        """An image of a recipe: base's time, and how much longer the method took than base before."""
        if not recipe.generates:
            return 0.0, "nothing is denoised"
        seconds, told = self.base()
        if seconds is None or recipe.name == "base":
            return seconds, told
        same = [
            (row.setting, cost.relative_to_base)
            for row, cost in self.usable
            if row.method == recipe.name and cost.relative_to_base is not None
        ]
        if same:
            share = median([s for name, s in same if name == recipe.setting] or [s for _, s in same])
            return seconds * share, f"{told}, times {share:.2f}"
        alone = all(part.family is Family.SAMPLING for part in recipe.parts) and not recipe.control
        return seconds, f"{told}, as base" + (": what the method adds isn't known" if alone else "")

    def fitting(self, recipe: Recipe, part: int) -> tuple[float | None, str]:
        """A part's fit: from a row with the same settings, else reckoned from passes, else unknown."""
        own = recipe.parts[part]
        if type(own).fit is Method.fit:
            return 0.0, "nothing to fit"
        whole, before = (self._fitted(recipe, count) for count in (part + 1, part))
        if whole is not None and before is not None and whole >= before:
            return whole - before, "measured"
        seconds, _ = self.base()
        passes = chain_passes(own)
        if seconds is None or passes is None:
            return None, "no measured fit"
        return seconds / self.suite.sampler.num_inference_steps * passes, "reckoned from passes"

    def _fitted(self, recipe: Recipe, count: int) -> float | None:
        """The measured time of the first parts' fits together.

        On another suite only where it doesn't depend on the suite's prompts.
        """
        parts = recipe.parts[:count]
        if not parts:
            return 0.0
        wanted = json.dumps([[p.name, recorded_settings(p)] for p in parts], sort_keys=True, default=str)
        free = all(p.sees <= {Knowledge.NEUTRAL_PROMPTS} for p in parts)
        found = []
        for row, cost in self.usable:
            of_row = [[name, row.config["method"].get(name)] for name in row.method.split("+")]
            same = row.key[0] in (self.suite.key, self.suite.seed_key)
            if (free or same) and json.dumps(of_row, sort_keys=True, default=str) == wanted:
                found.append(cost.fit_seconds)
        return median(found) if found else None


def chain_passes(method: Method) -> int | None:
    """Denoiser passes an image of a fit that backpropagates through its sampling chain; None: another fit.

    Such methods have the settings ``steps``, ``batch_size``, ``chain_steps`` and ``recompute``.
    """
    names = ("steps", "batch_size", "chain_steps", "recompute")
    steps, batch, chain, recompute = (getattr(method, name, None) for name in names)
    if steps is None or batch is None or chain is None or recompute is None:
        return None
    return int(steps * batch * chain * (PASSES if recompute else PASSES - 1))


def measured_rate(plan: RowPlan) -> float:
    """Seconds an image of the unmitigated model: a batch as the run draws it, after one image to warm up."""
    import time

    from lethebench.sampler import sample
    from lethebench.work import loaded_model, set_threads

    set_threads(plan.runtime.threads)
    model, size = loaded_model(plan.model, plan.runtime), plan.suite.batch_size
    prompt = Prompt("measure", "a lighthouse on a cliff above the sea", Role.NEUTRAL, "measure")
    keys = [ImageKey("measure", prompt, index) for index in range(size)]
    sample(model, keys[:1], plan.suite.sampler, batch_size=1)
    began = time.perf_counter()
    sample(model, keys, plan.suite.sampler, batch_size=size)
    return (time.perf_counter() - began) / size


def _alike(one: SamplerSettings, other: SamplerSettings) -> bool:
    """Whether a step of an image takes the same: the size, and guidance or none."""
    size = (one.height, one.width) == (other.height, other.width)
    return size and (one.guidance_scale > 1) == (other.guidance_scale > 1)


def _row(plan: RowPlan, left: _Left, rates: Rates, drawn: int | None) -> RowCost:
    recipe, name = plan.recipe, id(plan)
    reason = plan.inapplicable
    if reason is not None:
        there = left.there[name] if left.known else None
        return RowCost(recipe.name, recipe.setting, there, 0, 0, 0, None, "", 0.0, "", 0.0, reason=reason)
    each, rate_from = rates.drawing(recipe)
    base, _ = rates.base()
    images = left.images[name] if left.known else drawn
    drawing = _drawing(images, 2 * left.timed[name], each, base)
    fits = [(recipe.parts[part].name, *rates.fitting(recipe, part)) for part in left.fits[name]]
    untimed = [f"fit of {method}" for method, seconds, _ in fits if seconds is None]
    fit_seconds = sum(seconds for _, seconds, _ in fits if seconds is not None)
    return RowCost(
        method=recipe.name,
        setting=recipe.setting,
        there=left.there[name] if left.known else None,
        images=len(plan.images) if left.known else drawn,
        images_left=images,
        fits_left=len(left.fits[name]) if left.known else None,
        seconds_per_image=each,
        rate_from=rate_from,
        fit_seconds=fit_seconds,
        fit_from=", ".join(dict.fromkeys(told for _, _, told in fits)),
        seconds=fit_seconds + (drawing or 0.0),
        untimed=(*dict.fromkeys(untimed), *(["images"] if drawing is None else [])),
    )


def _drawing(images: int | None, again: int, each: float | None, base: float | None) -> float | None:
    """Time of the images, and of those drawn ``again`` with and without the method to time it."""
    if images == 0 or each == 0:
        return 0.0
    if images is None or each is None or base is None:
        return None
    return images * each + again * (each + base)


# --- sizes ----------------------------------------------------------------------------------------


def picture_size(sampler: SamplerSettings, entry: ModelEntry) -> tuple[int, int]:
    """(height, width) in pixels: the suite's, else the entry's, else the files', else the family's."""
    own = _side_on_disk(entry) or SIDE[entry.family]
    return (
        sampler.height or entry.sampler.height or own,
        sampler.width or entry.sampler.width or own,
    )


def _side_on_disk(entry: ModelEntry) -> int | None:
    """The side that a pipeline draws by default, from its configuration."""
    from lethebench.zoo import model_folder

    try:
        folder = model_folder(entry)
        parts = [folder / name / "config.json" for name in ("unet", "transformer", "vae")]
        denoiser, vae = (json.loads(p.read_text()) for p in parts if p.is_file())
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return int((denoiser.get("sample_size") or 128) * scale)  # 128: FluxPipeline's
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def bytes_an_image(height: int, width: int, channels: int) -> int:
    """What the store and the row's folder keep of an image: raw pixels, latents in float32, PNG, scores."""
    pixels = 3 * height * width
    latents = 4 * channels * (height // 8) * (width // 8)
    return round(pixels * (1 + PNG)) + latents + OVERHEAD


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None where one isn't known."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


# --- for the eye ----------------------------------------------------------------------------------


def print_costs(found: Costs) -> None:
    """The plan as text."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    print(f"plan: suite {found.suite}, model {found.model}, {found.width} x {found.height} pixels, "
          f"on {found.device}; nothing is started")  # fmt: skip
    sets = Table("prompt set", "prompts", "images a row", "")
    for one in found.sets:
        sets.add_row(one.name, _count(one.prompts), _count(one.images), one.how)
    console.print(sets)
    rows = Table("method", "setting", "images", "left", "s/image", "fit", "time", "from", "fit from")
    for _, alike in groupby(found.rows, lambda row: (row.method, row.reason or row.setting)):
        row, *others = alike  # a method that doesn't apply has one line for all its settings
        setting = ", ".join((row.setting, *(other.setting for other in others)))
        told = (row.reason or row.rate_from, "" if row.reason else row.fit_from)
        left = "row is there" if row.there else _count(row.images_left)
        fit_lacks = any(what != "images" for what in row.untimed)
        rows.add_row(
            row.method, setting, _count(row.images), left, _number(row.seconds_per_image),
            _known(row.fit_seconds, fit_lacks), _known(row.seconds, bool(row.untimed)), *told,
        )  # fmt: skip
    console.print(rows)
    for line in _told(found):
        print(line)
    if found.missing:
        print(f"missing, and a run would stop at it ({len(found.missing)}):")
    for lack in found.missing:
        print(f"  {lack.what}: {' '.join(lack.message.split())}")


def _told(found: Costs) -> list[str]:
    kind = "GPU" if found.device.startswith("cuda") else "CPU"
    hours = f"{found.hours:.2f} {kind}-hours for fits and images; scoring comes on top"
    lacking = ", ".join(f"{what} ({count} row{'s' * (count > 1)})" for what, count in found.untimed.items())
    if lacking:
        hours += f". Not in it, for want of a measurement: {lacking}"
    if any("images" in r.untimed and r.rate_from == NO_RATE for r in found.rows):
        hours += ". No measured rate: give --rate SECONDS_PER_IMAGE, or draw a batch by --measure"
    if None in (found.jobs["fit"], found.jobs["shard"]):
        jobs = "all of it: without the model and the prompts no earlier work can be looked up"
    else:
        jobs = ", ".join(f"{_count(n)} {name}" for name, n in found.jobs.items())
    free = "" if found.disk_free_bytes is None else f", {_size(found.disk_free_bytes)} free"
    return [
        f"images: {_count(found.images)} in all, {_count(found.images_left)} to draw",
        f"to do: {jobs}",
        f"time: {hours}",
        f"disk: {_size(found.disk_bytes)} for the images to draw ({_size(found.bytes_an_image)} each){free}",
        *(f"memory: {_size(size)} on the device (estimated), {what}" for what, size in found.memory.items()),
    ]


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _known(seconds: float, lacking: bool) -> str:
    """A time of which a part may be unknown."""
    if not lacking:
        return _time(seconds)
    return f"{_time(seconds)} + ?" if seconds else "unknown"


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1024:.1f} KiB"
