"""``lethe attack`` on a tiny model: which rows and items, what is stored, what a second run does, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from attack_suites import ONE_THREAD, SPARING, write_suite

from lethebench.attack import read_attacks
from lethebench.attack._items import chosen_items, unseen_index
from lethebench.attack._run import Attacked, attack, base_of, row_target
from lethebench.attack._shares import share
from lethebench.attack._trial import attack_key, copy_score, make_attack
from lethebench.bench import run
from lethebench.composition import recipes
from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Task
from lethebench.plan import RowPlan
from lethebench.registry import ATTACKS
from lethebench.sampler import sample
from lethebench.seeding import derive_seed
from lethebench.specs import load_suite, suite_names
from lethebench.zoo import load_model

BOARD = "tiny@1/tiny-sd"
ATTACKED = ["planted", "planted-flux", "planted-flux-few-step", "smoke", "train", "train-smoke", "train-text"]


def attacked(name: str, suite: Path, runs: Path, **options) -> Attacked:
    return attack(name, suite=str(suite), runs=runs, threads=1, **options)


@pytest.fixture
def runs(benched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(benched, tmp_path / "runs"))


def stem_of(folder: Path, attack: str) -> Path:
    """The one record of an attack beside a row, without its suffix."""
    (found,) = folder.glob(f"attacks/{attack}-*.json")
    return found.with_suffix("")


def plainly(runs: Path, suite: Path, folder: Path, images: int) -> pd.Series:
    """Whether any of an item's first images is a copy, drawn by the row's plan without the attack's code."""
    plan = plan_of(folder, suite)
    model = load_model(plan.model)
    prompts = [p for item in chosen_items(plan) for p in (item.prompt, item.twin)]
    keys = [ImageKey(plan.suite.key, p, k) for p in prompts for k in range(images)]
    artefacts = [part.fit(Task(model, plan.suite.sampler, None, frozenset())) for part in plan.recipe.parts]
    with plan.recipe.apply(model, artefacts) as hooks:
        drawn = sample(model, keys, plan.suite.sampler, hooks, batch_size=plan.suite.batch_size)
    bright = drawn.images.reshape(len(keys), -1).mean(1) > 127
    return pd.Series(bright, index=[k.prompt.id for k in keys]).groupby(level=0).any()


def plan_of(folder: Path, suite: Path) -> RowPlan:
    spec = load_suite(str(suite))
    return row_target(folder, spec, spec.model).plan


# --- which items ---


def test_items_are_pairs_of_the_row_in_an_order_of_the_suites(benched: Path, tiny_suite: Path) -> None:
    plan = plan_of(benched / BOARD / "base/default", tiny_suite)
    items = chosen_items(plan)
    drawn = {k.prompt.id for k in plan.images}
    assert [i.prompt.kind for i in items] == ["background", "verbatim"] * 2
    for item in items:
        assert {item.prompt.id, item.twin.id} <= drawn
        assert (item.prompt.trained, item.twin.trained) == (True, False)
        assert item.prompt.twin == item.twin.id and item.prompt.duplicates == item.twin.duplicates == 128
    assert len({i.prompt.cluster for i in items}) == 4
    more = plan.suite.model_copy(update={"attack": plan.suite.attack.model_copy(update={"items": 99})})
    every = chosen_items(RowPlan(more, plan.model, plan.recipe, plan.runtime))
    assert every[:4] == items and len(every) == 12
    verbatim = [i.prompt.cluster for i in every if i.prompt.kind == "verbatim"]
    assert verbatim == sorted(verbatim, key=lambda c: derive_seed("attack", "tiny@1", c))
    assert unseen_index(plan) == 1


def test_the_attack_block_is_in_no_row_key(benched: Path, tiny_suite: Path) -> None:
    plan = plan_of(benched / BOARD / "base/default", tiny_suite)
    without = RowPlan(plan.suite.model_copy(update={"attack": None}), plan.model, plan.recipe, plan.runtime)
    assert without.row_key(base_of(without)) == plan.row_key(base_of(plan))


# --- records ---


def test_records_say_what_the_tables_hold(runs: Path, tiny_suite: Path) -> None:
    found = attacked("random-tokens/weak", tiny_suite, runs, by="me")
    folder = runs / BOARD / "random-tokens/weak"
    assert found.records == read_attacks(folder)
    assert [r.attack for r in found.records] == ["dori", "paraphrase", "seeds"]
    for record in found.records:
        stem = stem_of(folder, record.attack)
        table = pd.read_parquet(stem.with_suffix(".parquet"))
        budget = table.groupby("prompt_id").size()
        assert len(budget) == 8 and set(budget) == {SPARING[record.attack]["images"]}
        assert record.budget["images"] == SPARING[record.attack]["images"] and record.budget["items"] == 4
        items, twins = record.facts["items"], record.facts["twins"]
        out = table.groupby("prompt_id")["bright"].max() > 0
        shares = [float(out.loc[side].mean()) for side in (items, twins)]
        own = plainly(runs, tiny_suite, folder, SPARING[record.attack]["images"])
        plain = [float(own.loc[side].mean()) for side in (items, twins)]
        assert [record.memorized.value, record.control.value] == shares
        assert [record.plain.value, record.plain_control.value] == plain
        assert record.excess.value == pytest.approx(shares[0] - shares[1])
        assert record.hidden.value == pytest.approx(shares[0] - shares[1] - plain[0] + plain[1])
        for one in (record.memorized, record.control):
            assert one.low <= one.value <= one.high and one.n == 4
        for one in (record.excess, record.hidden):
            assert one.low <= one.value <= one.high
        assert set(record.kinds) == {"background", "verbatim"}
        kinds = table[table["prompt_id"].isin(items)].groupby("kind")["prompt_id"].nunique()
        assert {kind: s.n for kind, s in record.kinds.items()} == kinds.to_dict()
        assert (record.by, record.score) == ("me", "bright.share")
        assert record.attack in record.provenance.plugin_sha256
        for name in record.facts["pictures"]:
            assert (stem / name).is_file()
    curves = next(r for r in found.records if r.attack == "dori").facts["losses"]
    assert {side: len(curve) for side, curve in curves.items()} == {"memorized": 2, "control": 2}


def test_tables_hold_what_was_asked(runs: Path, tiny_suite: Path) -> None:
    attacked("base", tiny_suite, runs)
    tables = {
        name: pd.read_parquet(stem_of(runs / BOARD / "base/default", name).with_suffix(".parquet"))
        for name in SPARING
    }
    own = pd.read_parquet(runs / BOARD / "base/default/images.parquet").set_index("prompt_id")["text"]
    for name, table in tables.items():
        changed = table["text"].to_numpy() != own.loc[table["prompt_id"]].to_numpy()
        assert changed.all() == changed.any() == (name == "paraphrase")
    assert set(tables["seeds"]["index"]) == {1, 2} and set(tables["dori"]["index"]) == {0, 1}
    pairs = tables["dori"][["item", "prompt_id"]].drop_duplicates()
    assert (pairs.groupby("item").size() == 2).all()


def test_a_second_attack_computes_nothing_and_a_damaged_entry_is_made_again(
    runs: Path, tiny_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}

    first = attacked("random-tokens/weak", tiny_suite, runs)
    assert first.computed == 3
    before = state()
    second = attacked("random-tokens/weak", tiny_suite, runs)
    assert second.computed == 0 and second.records == first.records and state() == before
    stem_of(runs / BOARD / "random-tokens/weak", "seeds").with_suffix(".json").unlink()
    assert attacked("random-tokens/weak", tiny_suite, runs).computed == 0
    assert len(read_attacks(runs / BOARD / "random-tokens/weak")) == 3
    for table in (runs / "store/attack").rglob("images.parquet"):
        table.write_bytes(b"")
    again = attacked("random-tokens/weak", tiny_suite, runs)
    assert again.computed == 3 and "damaged attack entry" in capsys.readouterr().err
    assert [r.memorized for r in again.records] == [r.memorized for r in first.records]


def test_all_rows_but_those_that_draw_nothing(
    runs: Path, tiny_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = attacked("all", tiny_suite, runs, attacks=["seeds"])
    rows = [(r.method, r.setting) for r in found.records]
    assert rows == [
        ("base", "default"),
        ("oracle", "default"),
        *(("random-tokens", s) for s in ("weak", "weak,tokens=3")),
    ]
    assert found.left_out == ["blank/default draws nothing with the model: there is nothing to attack"]
    assert "left out: blank/default" in capsys.readouterr().err
    oracle = pd.read_parquet(stem_of(runs / BOARD / "oracle/default", "seeds").with_suffix(".parquet"))
    text = oracle.groupby("prompt_id")["text"].first()
    for item, twin in oracle[["item", "prompt_id"]].drop_duplicates().query("item != prompt_id").to_numpy():
        assert text[item] == text[twin]  # the oracle draws the twin in the item's place


def test_a_method_alone_means_its_rows_and_overrides_are_the_rows_own(runs: Path, tiny_suite: Path) -> None:
    found = attacked("random-tokens", tiny_suite, runs, attacks=["seeds"])
    assert [r.setting for r in found.records] == ["weak", "weak,tokens=3"]
    plan = plan_of(runs / BOARD / "random-tokens/weak,tokens=3", tiny_suite)
    assert plan.recipe.parts[0].tokens == 3
    folder = str(runs / BOARD / "random-tokens/weak,tokens=3")
    assert attacked(folder, tiny_suite, runs, attacks=["seeds"]).records == found.records[1:]


def test_nobodys_record_is_replaced(
    runs: Path, tiny_suite: Path, tiny_settings: dict, tmp_path: Path
) -> None:
    one = attacked("base", tiny_suite, runs, attacks=["seeds"], by="Alice").records
    more = {**tiny_settings["attack"], "set": {"seeds": {"images": 3}}}
    larger = write_suite(tmp_path, **{**tiny_settings, "attack": more})
    two = attacked("base", larger, runs, attacks=["seeds"], by="Alice").records
    three = attacked("base", tiny_suite, runs, attacks=["seeds"]).records
    found = read_attacks(runs / BOARD / "base/default")
    assert len(found) == 3 and all(record in found for record in (*one, *two, *three))


def test_which_score_labels_a_copy_is_in_the_key(benched: Path, tiny_suite: Path) -> None:
    plan = plan_of(benched / BOARD / "base/default", tiny_suite)
    suite = plan.suite.model_copy(
        update={"suppression": plan.suite.suppression.model_copy(update={"score": "bright.other"})}
    )
    other = RowPlan(suite, plan.model, plan.recipe, plan.runtime)
    seeds = make_attack("seeds", suite)
    assert attack_key(plan, seeds) != attack_key(other, seeds)


NOSY = """
from dataclasses import dataclass
from lethebench.attack import Attack, Attempt, Try

@dataclass(frozen=True)
class Nosy(Attack):
    name = "nosy"
    summary = "looks which prompts were trained"
    knowledge = "what it can see"

    def attempts(self, subject, asked):
        told = {(p.role, p.trained, p.twin, p.duplicates, p.kind, p.cluster) for p in asked}
        assert len(asked) == 8 and len(told) == 1, told
        return [Attempt((Try(7),))] * 8
"""


def test_an_attack_is_not_told_which_prompts_are_twins(runs: Path, tiny_suite: Path, tmp_path: Path) -> None:
    (tmp_path / "nosy.py").write_text(NOSY)
    found = attacked("base", tiny_suite, runs, attacks=[f"{tmp_path}/nosy.py:Nosy"])
    assert len(found.records) == 1 and not found.failures


def test_two_attacks_of_one_name_are_refused(benched: Path, tiny_suite: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(NOSY)
    with pytest.raises(UserError, match="two of the attacks are named 'nosy'"):
        attacked("base", tiny_suite, benched, attacks=[f"{tmp_path}/{n}.py:Nosy" for n in ("one", "two")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"excess": {"value": 0.9, "low": 0.8, "high": 1.0, "p": 0.5}}, "excess is 0.9"),
        ({"hidden": {"value": 0.9, "low": 0.8, "high": 1.0, "p": 0.5}}, "hidden is 0.9"),
        ({"control": {"value": 0.1, "low": 0.9, "high": 0.0, "n": 4}}, "outside its interval"),
        ({"plain": {"value": 0.0, "low": 0.0, "high": 0.9, "n": 1}}, "different numbers of items"),
        ({"attack": "../../x"}, "attack"),
        ({"by": ""}, "by"),
    ],
)
def test_a_record_that_does_not_add_up_is_refused(
    runs: Path, tiny_suite: Path, changes: dict, message: str
) -> None:
    attacked("base", tiny_suite, runs, attacks=["seeds"])
    path = stem_of(runs / BOARD / "base/default", "seeds").with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=f"is not a valid attack record: .*{message}"):
        read_attacks(runs / BOARD / "base/default")


METHOD = """
from contextlib import contextmanager
from dataclasses import dataclass
from lethebench.method import Artefact, Family, Method, setting
from lethebench.hooks import SamplerHooks

@dataclass(frozen=True)
class Mine(Method):
    scale: float = setting(1.0, "a number")
    name = "mine"
    summary = "a plugin in a file"
    family = Family.SAMPLING

    def fit(self, task):
        return Artefact()
"""
ATTACK = """
from dataclasses import dataclass
from lethebench.attack import Attack, Attempt, Try
from lethebench.method import setting

@dataclass(frozen=True)
class Odd(Attack):
    spare: bool = setting(False, "fewer tries of the first")
    name = "odd"
    summary = "a plugin in a file"
    knowledge = "nothing"

    def attempts(self, subject, asked):
        return [Attempt((Try(7),) * (1 if self.spare and not i else 2)) for i, _ in enumerate(asked)]
"""


def test_plugins_by_path(runs: Path, tiny_settings: dict, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "odd.py").write_text(ATTACK)
    suite = write_suite(tmp_path, **tiny_settings)
    method, other = f"{tmp_path}/mine.py:Mine", f"{tmp_path}/odd.py:Odd"
    options = {"overrides": {"scale": 0.5}, "suite": str(suite), "runs": runs, "runtime": ONE_THREAD}
    run([method], **options)
    with pytest.raises(UserError, match="unknown method 'mine'"):
        attacked("mine", suite, runs)
    for name in (method, f"{method}/default,scale=0.5"):
        (record,) = attacked(name, suite, runs, attacks=[other]).records
        assert (record.method, record.setting, record.attack) == ("mine", "default,scale=0.5", "odd")
    settings = {**tiny_settings["attack"], "set": {"odd": {"spare": True}}}
    sparing = write_suite(tmp_path, **{**tiny_settings, "attack": settings})
    found = attacked("base", sparing, runs, attacks=[other, "seeds"])
    assert [r.attack for r in found.records] == ["seeds"]  # the other attack goes on
    assert "made 8 attempts of [1, 2] tries for 8 prompts" in found.failures[0].error


@pytest.mark.parametrize(("count", "n"), [(0, 16), (1, 2), (5, 16), (16, 16)])
def test_intervals_are_wilsons(count: int, n: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    found = share(np.arange(n) < count)
    assert (found.value, found.n) == (count / n, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(count, n, method="wilson"), abs=1e-6)


def test_the_suites_that_rank_methods_can_be_attacked() -> None:
    assert {n for n in suite_names() if load_suite(n).attack is not None} == set(ATTACKED)


@pytest.mark.parametrize("name", ATTACKED)
def test_a_suites_attacks_are_set_right(name: str) -> None:
    suite = load_suite(name)
    assert suite.attack is not None
    plan = RowPlan(suite, suite.model, recipes("base")[0], ONE_THREAD)
    assert len(chosen_items(plan)) == suite.attack.items
    assert set(suite.attack.set) <= set(ATTACKS)
    for one in ATTACKS:
        make_attack(one, suite)
    copy_score(plan)


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unifroget/strong", {}, "no row of unifroget"),
        ("random-tokens/strong", {}, "random-tokens has no row 'strong' there: known weak"),
        ("blank", {}, "blank/default draws nothing"),
        ("base", {"attacks": ["doir"]}, "unknown attack 'doir': did you mean dori"),
        ("base", {"model": "mini-ds"}, "mini-ds"),
        ("base", {"engine_name": "ray"}, "unknown engine"),
    ],
)
def test_a_bad_name_is_one_clear_line(
    benched: Path, tiny_suite: Path, name: str, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        attacked(name, tiny_suite, benched, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": None}, "suite tiny@1 doesn't say what to attack"),
        ({"attack": {"kinds": ["foreground"]}}, "draws 0 trained items"),
        ({"attack": {"items": 1}}, "attack.items"),
        (
            {"attack": {"set": {"dori": {"stepz": 3}}}},
            "attack 'dori' has no setting 'stepz': did you mean 'steps'",
        ),
        ({"attack": {"set": {"dori": {"steps": -1}}}}, "attack 'dori': steps must be a whole number from 0"),
        ({"attack": {"set": {"dori": {"dtype": "int8"}}}}, "dtype must be float32 or bfloat16"),
        ({"attack": {"set": {"doir": {}}}}, "settings of an attack 'doir': known dori"),
        ({"version": "2"}, "base/default is a row of tiny@1, not of tiny@2"),
        ({"bootstrap": 200}, "base/default was made by another version"),
    ],
)
def test_a_suite_that_doesnt_fit_is_one_clear_line(
    benched: Path, tiny_settings: dict, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("(", "\\(")) as caught:
        suite = write_suite(tmp_path, **{**tiny_settings, **changes})
        attacked(str(benched / BOARD / "base/default"), suite, benched)
    assert "\n" not in str(caught.value)


def test_a_score_that_labels_no_image_is_refused(runs: Path, tiny_settings: dict, tmp_path: Path) -> None:
    mean = {"suppression": {"score": "bright.mean", "label": "brightness"}, "name": "mean"}
    suite = write_suite(tmp_path, **{**tiny_settings, **mean})
    run(["base"], suite=str(suite), runs=runs, runtime=ONE_THREAD, controls=False)
    with pytest.raises(UserError, match=r"bright\.mean is no share of images"):
        attacked("base", suite, runs)


def test_rows_that_failed_or_were_made_by_other_code(runs: Path, tiny_suite: Path) -> None:
    row = runs / BOARD / "base/default/row.json"
    record = json.loads(row.read_text())
    row.write_text(json.dumps({**record, "status": "failed", "reason": "no memory"}))
    with pytest.raises(UserError, match=r"base/default is failed \(no memory\)"):
        attacked("base", tiny_suite, runs)
    row.write_text(json.dumps(record))
    made = row.with_name("made.json")
    made.write_text(json.dumps({**json.loads(made.read_text()), "key": "0" * 64}))
    with pytest.raises(UserError, match="bench' on it again, then attack"):
        attacked("base", tiny_suite, runs)
    made.unlink()
    with pytest.raises(UserError, match="bench' on it again, then attack"):
        attacked("base", tiny_suite, runs)


def test_the_command_with_two_workers(runs: Path, tiny_suite: Path, tmp_path: Path) -> None:
    here = attacked(
        "base", tiny_suite, Path(shutil.copytree(runs, tmp_path / "copy")), attacks=["dori", "seeds"]
    )
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "lethebench.cli",
        "attack",
        "base",
        "--suite",
        str(tiny_suite),
        "--runs",
        str(runs),
    ]
    command += [
        "--attack",
        "dori",
        "--attack",
        "seeds",
        "--workers",
        "2",
        "--threads",
        "1",
        "--site",
        str(site),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert [r["attack"] for r in found] == ["dori", "seeds"] and found[0]["by"].startswith("Lethe ")
    assert [r["excess"] for r in found] == [r.excess.model_dump() for r in here.records]
    assert "attack: 2/2" in done.stderr and (site / "index.html").is_file()
    failed = subprocess.run(
        [*command, "--attack", "no"], capture_output=True, text=True, timeout=300, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("lethe: unknown attack 'no'") and failed.stderr.count("\n") == 1
