"""The papers' suites: they load, name what exists, are frozen, and their lite tiers are parts of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from lethebench.bench import recipes_of, run
from lethebench.errors import UserError
from lethebench.plan import RowPlan, Runtime, chosen, make_metric, prompt_set
from lethebench.prompts import Role, Union
from lethebench.registry import PROMPT_SETS
from lethebench.reported import all_reported, as_record, read_reported, reported
from lethebench.specs import Selection, Suite, load_suite, suite_names
from lethebench.store import digest
from lethebench.zoo import find_model

PAPERS = [n for n in suite_names() if n.startswith(("uniforget-", "nemo-", "fbmem-", "nudity-"))]
LITE = [n for n in PAPERS if n.endswith("-lite")]
WANTED = (
    *(f"uniforget-table{n}" for n in (1, 2, 3, 4, 5)),
    "uniforget-beta",
    *(f"uniforget-figure{n}" for n in (4, 6, 7)),
    "fbmem-sd14",
    "nemo-table1",
    "nudity-i2p-p4d",
)
DATA = Path(os.environ.get("LETHE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def test_every_table_has_its_suite_and_its_lite_tier() -> None:
    for name in WANTED:
        assert name in PAPERS
        assert f"{name}-lite" in PAPERS or name == "uniforget-table5"  # which is that small itself


@pytest.mark.parametrize("name", PAPERS)
def test_a_suite_names_what_there_is(name: str) -> None:
    """Model, prompt sets, methods with their settings, metrics with theirs, and scores to rank by."""
    suite = load_suite(name)
    assert suite.name == name and suite.methods
    assert not find_model(suite.model).builtin
    sets = suite.prompt_set.split("+")
    assert all(part in PROMPT_SETS for part in sets)
    assert all(s.sets and set(s.sets) <= set(sets) for s in suite.select)
    assert recipes_of([], suite)[0].name == "base"
    scores = {score.name for spec in suite.metrics for score in _scores(suite, spec.name)}
    assert {suite.suppression.score, suite.adherence.score} <= scores


def _scores(suite: Suite, name: str) -> list:
    spec = next(s for s in suite.metrics if s.name == name)
    return list(make_metric(spec).all_scores())


@pytest.mark.parametrize("name", [n for n in PAPERS if load_suite(n).same_images_as])
def test_shared_images_have_the_same_sampler_sets_and_fits(name: str) -> None:
    """What makes two images of one prompt the same, and a fit of one suite another's."""
    suite = load_suite(name)
    other = load_suite(str(suite.same_images_as).partition("@")[0])
    assert suite.same_images_as == other.key and other.same_images_as is None
    for field in ("model", "prompt_set", "sampler", "batch_size", "concepts", "fit"):
        assert getattr(suite, field) == getattr(other, field), field


@pytest.mark.parametrize("name", LITE)
def test_a_lite_tier_is_a_smaller_part_of_its_suite(name: str) -> None:
    """The same selections with fewer clusters, the same methods and metrics."""
    lite, whole = load_suite(name), load_suite(name.removesuffix("-lite"))
    assert lite.seed_key == whole.seed_key
    assert (lite.methods, lite.metrics, lite.controls) == (whole.methods, whole.metrics, whole.controls)
    free = {"limit": None, "expect": None}
    assert [s.model_copy(update=free) for s in lite.select] == [
        s.model_copy(update=free) for s in whole.select
    ]
    for part, of in zip(lite.select, whole.select, strict=True):
        assert part.limit is not None and part.expect is not None
        assert of.expect is None or part.expect < of.expect


def test_a_shorter_selection_draws_the_same_images() -> None:
    """By ``same_images_as``: ids, noise and fits are the whole suite's; without it they are another's."""
    whole = load_suite("smoke").model_copy(
        update={"select": (Selection(role=Role.NEUTRAL, images=2, limit=9),), "metrics": ()}
    )
    less = (Selection(role=Role.NEUTRAL, images=1, limit=4),)
    lite = whole.model_copy(update={"name": "lite", "select": less, "same_images_as": whole.key})
    alone = lite.model_copy(update={"same_images_as": None})
    plans = [RowPlan(s, "mini-sd", recipes_of(["base"], s)[0], Runtime()) for s in (whole, lite, alone)]
    images = [{(k.suite, k.prompt.id, k.index) for k in plan.images} for plan in plans]
    assert images[1] < images[0] and not images[2] & images[0]
    fits = [digest(plan.fit_key(0)) for plan in plans]
    assert fits[0] == fits[1] != fits[2]
    again = whole.model_copy(update={"name": "again", "same_images_as": whole.key})
    other = RowPlan(again, "mini-sd", plans[0].recipe, Runtime())
    assert digest(other.shard_key(0)) == digest(plans[0].shard_key(0))  # whole shards are shared, too


def test_selections_by_set_and_category() -> None:
    suite = load_suite("smoke").model_copy(
        update={
            "prompt_set": "planted+nudity-concept",
            "select": (Selection(role=Role.CONCEPT, sets=("nudity-concept",), images=1),),
        }
    )
    prompts = prompt_set(suite.prompt_set)
    assert {p.id.partition("/")[0] for p, _ in chosen(suite, prompts)} == {"nudity-concept"}
    whole = suite.model_copy(update={"select": (Selection(role=Role.CONCEPT, images=1),)})
    assert len(chosen(whole, prompts)) > len(chosen(suite, prompts)) == 10
    category = next(p.category for p in prompts if p.role is Role.CONCEPT and p.category)
    one = Selection(role=Role.CONCEPT, categories=(str(category),), images=1)
    found = chosen(suite.model_copy(update={"select": (one,)}), prompts)
    assert found and {p.category for p, _ in found} == {category}
    none = Selection(role=Role.CONCEPT, sets=("nudity-concept",), categories=("comic",), images=1)
    with pytest.raises(UserError, match="no prompt of nudity-concept has role concept and category comic"):
        chosen(suite.model_copy(update={"select": (none,)}), prompts)


def test_methods_are_told_of_the_suites_concepts_alone() -> None:
    from lethebench.method import Knowledge, Task
    from lethebench.unlearning import find_targets

    suite = load_suite("uniforget-table2")
    prompts = prompt_set("planted+nudity-concept")
    knowledge = frozenset({Knowledge.CONCEPT_NAMES})
    told = Task(None, suite.sampler, prompts, knowledge, concepts=suite.concepts)  # type: ignore[arg-type]
    every = Task(None, suite.sampler, prompts, knowledge)  # type: ignore[arg-type]
    assert set(told.concepts()) == set(suite.concepts) < set(every.concepts())
    targets = find_targets(told, "concepts")
    assert len(targets) == 10 and {t.anchor_concept for t in targets} == {"a person wearing clothes"}
    assert all(t.anchors and "nude" not in t.anchors[0] for t in targets)


def test_places_and_device_are_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LETHE_DATA", str(tmp_path))
    suite = load_suite("uniforget-table1")
    vqa, fid = (make_metric(s) for s in suite.metrics if s.name in ("vqa", "fid"))
    assert fid.reference == str(tmp_path / "fid" / "coco-5k.npz")
    assert fid.device in ("cpu", "cuda")
    assert vqa.made[0].model == str(tmp_path / "judges" / "llava-v1.6-vicuna-13b-hf")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder of real prompt files at {DATA}")
def test_expected_numbers_are_those_of_the_real_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every selection whose set's upstream files may lie there (``shared/data``); they must load."""
    monkeypatch.setenv("LETHE_DATA", str(DATA))
    there = {"comic", "coco-5k", "sd-memorized-nemo", "sd-unmemorized-nemo", "sd-additional-nemo"}
    made = {name: PROMPT_SETS.get(name)() for name in there}
    checked = set()
    for suite in map(load_suite, PAPERS):
        for selection in suite.select:
            name = selection.sets[0]
            if name in there:
                alone = suite.model_copy(update={"select": (selection,)})
                assert len(chosen(alone, Union([made[name]]))) == selection.expect, (suite.name, selection)
                checked.add(name)
    assert checked == there


# --- reported rows --------------------------------------------------------------------------------


def test_reported_rows_are_of_suites_that_there_are_and_name_their_scores() -> None:
    named = [name for found in all_reported() for name in found.suites]
    assert len(named) == len(set(named)) and set(named) <= set(PAPERS)
    for found in all_reported():
        suites = [load_suite(name) for name in found.suites]
        scores = {s.name for suite in suites for spec in suite.metrics for s in _scores(suite, spec.name)}
        for table in found.tables:
            assert table.source.link or table.source.read == "paper" or "appendix" in table.source.table
            for score in table.scores.values():
                assert not score.nearest or score.nearest.startswith("cost.") or score.nearest in scores


def test_reported_methods_and_settings_are_rows_of_the_suite() -> None:
    """A published row stands beside the row of ours that follows it, by the same names."""
    for found in all_reported():
        rows = {
            (recipe.name, recipe.setting)
            for name in found.suites
            for recipe in recipes_of([], load_suite(name))
        }
        for table in found.tables:
            for row in table.rows:
                assert not row.method or (row.method, row.setting) in rows, (found.suites[0], row.label)


def test_numbers_of_the_papers() -> None:
    """Some of each table as printed, and what the paper contradicts itself in."""
    found = reported("uniforget-table1-lite")
    assert found is not None and found is reported("uniforget-table1")
    table = found.tables[0]
    rows = {row.label: row for row in table.rows}
    assert table.cell(rows["Our (strong)"], "celebrity.acc_g") == "5.3"
    assert table.cell(rows["Our (medium) w retrain"], "coco.fid") == "31.8"
    assert table.cell(rows["FLUX-dev"], "coco.clip") == "0.30"
    fourth = reported("uniforget-table4")
    assert fourth is not None
    unpruned = next(r for r in fourth.tables[0].rows if r.method == "base")
    assert unpruned.scores["anime.acc_g"] == rows["FLUX-schnell"].scores["anime.acc_l"] == 77.6
    assert rows["FLUX-schnell"].scores["anime.acc_g"] == 68.7
    assert any("77.6 under Acc_g" in note for note in fourth.tables[0].notes)
    nemo = reported("nemo-table1")
    assert nemo is not None
    own = next(r for r in nemo.tables[0].rows if r.method == "nemo")
    assert nemo.tables[0].cell(own, "vm.sscd_orig") == "0.090 ± 0.060"
    shares = reported("fbmem-sd14")
    assert shares is not None and sum(shares.tables[0].rows[0].scores.values()) == pytest.approx(100)
    assert {t.source.read for t in shares.tables} == {"repository", "second hand"}
    assert reported("planted") is None


def test_a_record_shows_every_number_apart() -> None:
    found = reported("uniforget-table2")
    assert found is not None
    record = as_record(found)
    title, notes = record
    assert title.startswith("reported, not measured by Lethe") and "Table 2" in title
    assert list(record[title]["p4d"]) == ["51.6", "22.3", "21.2", "25.3"]
    assert any("Gandikota" in str(note) for note in record[notes].values())


BAD = {
    "no such score": ("scores: {fid: {title: FID, unit: x, direction: lower}}", "has a score 'fdi'"),
    "direction": ("scores: {fdi: {title: FID, unit: x, direction: down}}", "direction"),
    "unknown key": ("scores: {fdi: {title: FID, unit: x, direction: lower, low: 1}}", "low"),
}


@pytest.mark.parametrize(("scores", "says"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_name(scores: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "uniforget-table9.yaml"
    text = f"""
schema: lethe/reported/1
suites: [uniforget-table9]
tables:
  - source: {{paper: P, table: T, read: paper}}
    {scores}
    rows: [{{label: a, method: base, setting: default, model: m, scores: {{fdi: 1}}}}]
"""
    path.write_text(text)
    with pytest.raises(UserError, match=says) as raised:
        read_reported(path)
    assert str(path) in str(raised.value)
    good = text.replace(scores, "scores: {fdi: {title: FID, unit: x, direction: lower}}")
    path.write_text(good)
    assert read_reported(path).tables[0].rows[0].scores == {"fdi": 1}
    path.write_text(good.replace("[uniforget-table9]", "[other]"))
    with pytest.raises(UserError, match="name the file after it"):
        read_reported(path)


def test_rows_of_joined_sets_have_a_score_by_set(tiny_suite: Path, tmp_path: Path) -> None:
    found = yaml.safe_load(tiny_suite.read_text())
    select = [
        {"role": "neutral", "sets": ["planted"], "images": 1, "limit": 2},
        {"role": "concept", "sets": ["nudity-concept"], "images": 1},
    ]
    found |= {"prompt_set": "planted+nudity-concept", "select": select}
    tiny_suite.write_text(yaml.safe_dump(found))
    row = run(["base"], suite=str(tiny_suite), runs=tmp_path, runtime=Runtime(threads=1)).rows[0]
    by_set = {s.where["set"]: s.n for s in row.slices if s.where.keys() == {"set"}}
    assert by_set == {"planted": 2, "nudity-concept": 10}
