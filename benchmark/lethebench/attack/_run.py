"""The runner of ``lethe attack``: rows -> plans -> fits -> attacks -> records beside the rows."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lethebench.attack._items import chosen_items
from lethebench.attack._shares import difference, share
from lethebench.attack._trial import (
    FACTS,
    TABLE,
    Plain,
    attack_key,
    blinded,
    copy_score,
    make_attack,
)
from lethebench.attack.base import Attack
from lethebench.attack.record import AttackRecord, made_key
from lethebench.bench import Outcome, _check_model, _row_name, _work
from lethebench.comparison import row_folder
from lethebench.composition import recipes
from lethebench.engines import Engine, Failure, engine
from lethebench.errors import UserError
from lethebench.method import recorded_settings
from lethebench.plan import RowPlan, Runtime, file_name, prompt_set
from lethebench.progress import progress
from lethebench.registry import ATTACKS, METHODS
from lethebench.row import Row, read_row
from lethebench.specs import Suite, load_suite
from lethebench.store import Store, digest, explained, write_atomic
from lethebench.work import Job


@dataclass(frozen=True)
class Target:
    """A row that is attacked: its folder and its plan, made again."""

    folder: Path
    row: Row
    plan: RowPlan
    key: str
    """``key`` of its ``made.json``."""


@dataclass(frozen=True)
class _Work:
    """One attack on one row; ``spec`` is how another process loads the attack."""

    target: Target
    spec: str
    attack: Attack
    key: dict[str, Any]

    def job(self, store: Store) -> Job:
        return replace(Job.of("attack", 0, self.target.plan, store), attack=self.spec)


@dataclass
class Attacked:
    """What ``lethe attack`` did."""

    records: list[AttackRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Rows and attacks that don't fit, each with the reason."""
    computed: int = 0
    """Attacks that the store lacked."""
    seconds: float = 0.0


def attack(
    name: str,
    *,
    suite: str | Suite = "planted",
    model: str | None = None,
    runs: str | Path = "runs",
    attacks: Sequence[str] = (),
    by: str = "",
    engine_name: str = "local",
    workers: int = 1,
    threads: int = 0,
) -> Attacked:
    """Attack a row (``METHOD/SETTING`` or its folder), a method's rows (``METHOD``) or ``all`` rows.

    Writes a record for each row and attack (default: every registered attack that can be made on the suite's
    items) beside the row. What is in the store already is not done again. Raises UserError for what the user
    must mend; of several rows or attacks, those that don't fit are left out with a word.
    """
    began = time.monotonic()
    spec, runs = suite if isinstance(suite, Suite) else load_suite(suite), Path(runs)
    chosen, runner = list(dict.fromkeys(attacks)) or list(ATTACKS), engine(engine_name, workers)
    made = {one: make_attack(one, spec) for one in chosen}
    names = [a.name for a in made.values()]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"two of the attacks are named '{twice}': run them one after the other")
    _require_known(spec, {a.name for a in made.values()})
    outcome = Attacked()
    targets = _targets(name, spec, model or spec.model, runs, threads, outcome)
    first = targets[0].plan
    copy_score(first)
    made = _suited(made, first, bool(attacks), outcome)
    store = Store(runs / "store")
    store.prepare()
    fitted = Outcome()
    _work([t.plan for t in targets], base_of(first), store, runner, fitted, "fit")
    outcome.failures += fitted.failures
    work = [_Work(t, name, a, attack_key(t.plan, a)) for t in targets for name, a in made.items()]
    outcome.computed = _run("attack", work, store, runner, outcome)
    entries = [(one, entry) for one in work if (entry := store.find("attack", one.key)) is not None]
    plain = {(id(one.target), _images(entry)): one.target for one, entry in entries}
    without = {at: _plain(target, at[1]) for at, target in plain.items()}
    _run("without the attacks", list(without.values()), store, runner, outcome)
    for one, entry in entries:
        own = store.find("attack", without[id(one.target), _images(entry)].key)
        if own is not None:
            outcome.records.append(_write(one.target, one.attack, entry, own, by or _default_by()))
    outcome.seconds = time.monotonic() - began
    return outcome


def _suited(made: dict[str, Attack], plan: RowPlan, named: bool, outcome: Attacked) -> dict[str, Attack]:
    """The attacks that can be made on the suite's items; the others are left out with a word.

    Raises UserError where the user ``named`` one of those, or none is left.
    """
    asked = [blinded(p) for item in chosen_items(plan) for p in (item.prompt, item.twin)]
    found, told = {}, []
    for spec, one in made.items():
        reason = one.unsuited(prompt_set(plan.suite.prompt_set), asked)
        if reason:
            told.append(f"attack '{one.name}' does not apply to suite {plan.suite.key}: {reason}")
        else:
            found[spec] = one
    if told and (named or not found):
        raise UserError(told[0])
    for line in told:
        print(f"lethe: left out: {line}", file=sys.stderr)
    outcome.left_out += told
    return found


def _run(title: str, work: Sequence[_Work], store: Store, runner: Engine, outcome: Attacked) -> int:
    """Do what the store lacks of the rows without a failure; the number that succeeded."""
    broken = {_row_name(f.job) for f in outcome.failures if not f.job.attack}
    jobs = [w.job(store) for w in work if store.find("attack", w.key) is None]
    jobs = [job for job in jobs if _row_name(job) not in broken]
    if not jobs:
        return 0
    with progress(title, total=len(jobs)) as bar:
        failed = runner.run(jobs, lambda job: bar.advance(1, str(job)))
    outcome.failures += failed
    return len(jobs) - len(failed)


def _images(entry: Path) -> int:
    """The images an item that a stored attack had."""
    return int(json.loads((entry / FACTS).read_text())["images"])


def _plain(target: Target, images: int) -> _Work:
    attack = Plain(images)
    return _Work(target, f"{Plain.name}:{images}", attack, attack_key(target.plan, attack))


def _require_known(suite: Suite, made: set[str]) -> None:
    """Raise UserError where the suite has settings of an attack that there isn't."""
    unknown = sorted(set(suite.attack.set if suite.attack else ()) - made - set(ATTACKS))
    if unknown:
        raise UserError(
            f"suite {suite.key} has settings of an attack '{unknown[0]}': known {', '.join(ATTACKS)}"
        )


def _default_by() -> str:
    from importlib.metadata import version

    return f"Lethe {version('lethebench')}"


# --- rows -----------------------------------------------------------------------------------------


def _targets(
    name: str, suite: Suite, model: str, runs: Path, threads: int, outcome: Attacked
) -> list[Target]:
    _check_model(model, Runtime(threads=threads))
    spec, method, setting = _parsed(name)
    folders = _folders(method, setting, runs, suite, model)
    if len(folders) == 1 and name != "all":
        return [row_target(folders[0], suite, model, threads, spec)]
    found = []
    for folder in folders:
        try:
            found.append(row_target(folder, suite, model, threads, spec))
        except UserError as error:
            outcome.left_out.append(str(error))
    if not found:
        raise UserError(outcome.left_out[0])
    for told in outcome.left_out:
        print(f"lethe: left out: {told}", file=sys.stderr)
    return found


_PATH = re.compile(r"(?P<spec>.*\.py:\w+(?:\+[\w.-]+)*)(?:/(?P<setting>.*))?\Z")


def _parsed(name: str) -> tuple[str | None, str, str]:
    """(how to load the method again, its name or a row's folder, setting or "")."""
    found = _PATH.match(name)
    if found is None:
        return None, name, ""
    spec = found["spec"]
    method = "+".join(METHODS.get(part).name for part in spec.split("+"))
    return spec, method, found["setting"] or ""


def _folders(name: str, setting: str, runs: Path, suite: Suite, model: str) -> list[Path]:
    """The folders of the rows of that name, base first, by method and setting."""
    from lethebench.zoo import find_model

    board = runs / suite.key / file_name(find_model(model).name)
    if name == "all":
        found = sorted(p.parent for p in board.glob("*/*/row.json"))
        if not found:
            raise UserError(f"no rows in {board}: run 'lethe bench METHOD' first")
        return sorted(found, key=lambda p: p.parent.name != "base")
    whole = f"{name}/{setting}" if setting else name
    of_method = sorted(p.parent for p in (board / file_name(name)).glob("*/row.json"))
    if of_method and not setting and not (Path(name) / "row.json").is_file():
        return of_method
    return [row_folder(whole, runs, suite.key, model)]


def row_target(folder: Path, suite: Suite, model: str, threads: int = 0, spec: str | None = None) -> Target:
    """A row with its plan, made again from ``row.json``; ``spec`` is how to load a method at a path.

    Raises UserError unless the row is of this suite and model, measured, drawn by the model, and the result
    of this version of the code.
    """
    row = read_row(folder / "row.json")
    told = f"{row.method}/{row.setting}"
    if row.key[0] != suite.key:
        raise UserError(f"{told} is a row of {row.key[0]}, not of {suite.key}: name its suite by --suite")
    if row.status != "ok":
        raise UserError(f"{told} is {row.status} ({row.reason}): only a measured row can be attacked")
    label, overrides = _settings(row)
    recipe = recipes(spec or row.method, label, overrides, suite.fit)[0]
    if not recipe.generates:
        raise UserError(f"{told} draws nothing with the model: there is nothing to attack")
    device = str(row.provenance.hardware.get("device", "cpu"))
    loading = tuple(sorted(row.provenance.loading.items()))
    plan = RowPlan(suite, model, recipe, Runtime(device, row.provenance.dtype, threads, loading))
    if plan.model_name != row.model:
        raise UserError(f"{told} is a row of model {row.model}, not {plan.model_name}: name it by --model")
    key = made_key(folder)
    if key is None or key != digest(plan.row_key(base_of(plan))):
        raise UserError(
            f"{told} was made by another version of the code, the suite or the model: "
            "run 'lethe bench' on it again, then attack"
        )
    return Target(folder, row, plan, key)


def base_of(plan: RowPlan) -> RowPlan:
    """The plan of the row that the suite compares with."""
    return replace(plan, recipe=recipes(plan.suite.reference, "all", {}, plan.suite.fit)[0])


_NAMED = re.compile(r",([\w.-]+)=")


def _settings(row: Row) -> tuple[str, dict[str, Any]]:
    """(strengths, overrides) of a row: what was overridden is in its setting's name, to what in its config.

    ``strong,steps=6`` is ``strong`` with the ``steps`` that the config records.
    """
    label, comma, rest = row.setting.partition(",")
    overrides: dict[str, Any] = {}
    for name in _NAMED.findall(comma + rest):
        part, _, setting = name.rpartition(".")
        values = [c[setting] for p, c in row.config["method"].items() if part in ("", p) and setting in c]
        if len(values) != 1:
            raise UserError(f"{row.method}/{row.setting} doesn't record its setting '{name}': bench it again")
        overrides[name] = values[0]
    return label, overrides


# --- records --------------------------------------------------------------------------------------


def _write(target: Target, attack: Attack, entry: Path, plain: Path, by: str) -> AttackRecord:
    """Write table, pictures and record beside the row, the record last; what is there as it is stays.

    Another budget or author is another record: nobody's is replaced.
    """
    record = record_of(target, attack, entry, plain, by)
    folder, name = target.folder / "attacks", f"{attack.name}-{digest([record.budget, by])[:8]}"
    files = {folder / f"{name}.parquet": (entry / TABLE).read_bytes()}
    files |= {folder / name / p.name: p.read_bytes() for p in sorted(entry.glob("*.png"))}
    files[folder / f"{name}.json"] = record.to_json().encode()
    with explained(folder):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            if not path.is_file() or path.read_bytes() != data:
                write_atomic(path, data)
    return record


def record_of(target: Target, attack: Attack, entry: Path, without: Path, by: str) -> AttackRecord:
    """The record of a stored attack and of the plain draws: see :class:`lethebench.attack.AttackRecord`."""
    plan, row = target.plan, target.row
    facts, table = json.loads((entry / FACTS).read_text()), pd.read_parquet(entry / TABLE)
    items = chosen_items(plan)
    _, _, score = copy_score(plan)
    ids = [i.prompt.id for i in items], [i.twin.id for i in items]
    memorized, control, plain, plain_control = (
        one.groupby("prompt_id")["copy"].any().loc[side].to_numpy(dtype=bool)
        for one in (table, pd.read_parquet(without / TABLE))
        for side in ids
    )
    excess = memorized.astype(float) - control
    hidden = excess - (plain.astype(float) - plain_control)
    kinds = np.array([i.prompt.kind for i in items])
    seed = (plan.suite.key, "attack", attack.name)
    return AttackRecord(
        suite=row.suite,
        model=row.model,
        method=row.method,
        setting=row.setting,
        row_key=target.key,
        attack=attack.name,
        by=by,
        how=attack.summary,
        budget={**recorded_settings(attack), "items": len(items), "images": facts["images"]},
        score=f"{attack.name}, plain by {score.name}" if "judge" in facts else score.name,
        memorized=share(memorized),
        control=share(control),
        plain=share(plain),
        plain_control=share(plain_control),
        excess=difference(excess, ids[0], plan.suite.bootstrap, (*seed, "excess")),
        hidden=difference(hidden, ids[0], plan.suite.bootstrap, (*seed, "hidden")),
        kinds={str(kind): share(memorized[kinds == kind]) for kind in np.unique(kinds)},
        facts={
            "knowledge": attack.knowledge,
            "citation": attack.citation,
            "items": ids[0],
            "twins": ids[1],
            "losses": facts["losses"],
            "pictures": facts["pictures"],
            **({"judge": facts["judge"]} if "judge" in facts else {}),
        },
        seconds=facts["seconds"],
        provenance=facts["provenance"],
    )


def print_attacked(found: Attacked) -> None:
    """A table of the records on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("row", "attack", "came out", "control", "plain", "plain control", "excess", "hidden"):
        table.add_column(heading)
    for r in found.records:
        shares = (r.memorized, r.control, r.plain, r.plain_control)
        table.add_row(
            f"{r.method}/{r.setting}",
            r.attack,
            *(f"{s.value:.2f}" for s in shares),
            *(f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" for d in (r.excess, r.hidden)),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{len(found.records)} records in {found.seconds:.1f} s; attacks computed now: {found.computed}")
