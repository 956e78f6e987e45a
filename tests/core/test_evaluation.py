"""``lethe metrics``: a metric from a file through the real command, the record, and the section of the page."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import yaml
from made_runs import EVIL, EVIL_TEXT
from page_browser import Browser, launched
from sklearn.metrics import roc_auc_score

from lethebench import evaluation
from lethebench.bench import plan_rows
from lethebench.errors import UserError
from lethebench.evaluation import evaluate, with_metrics
from lethebench.leaderboard._build import TEMPLATES
from lethebench.leaderboard._evaluation import evaluations
from lethebench.plan import Runtime
from lethebench.prompts import Prompt, Reference, Role
from lethebench.specs import Suite, load_suite
from lethebench.store import Store
from lethebench.work import row_table

ONE_THREAD = Runtime(threads=1)
SUITE = {
    "name": "few",
    "version": "1",
    "description": "a few images of mini-sd",
    "model": "mini-sd",
    "prompt_set": "planted",
    "select": [
        {"role": "trigger", "kinds": ["verbatim"], "images": 2, "min_duplicates": 128, "limit": 3},
        {"role": "control", "kinds": ["verbatim"], "images": 2, "min_duplicates": 128, "limit": 3},
        {"role": "control", "kinds": ["hard-negative"], "images": 1, "limit": 3},
        {"role": "neutral", "images": 1, "limit": 3},
    ],
    "sampler": {"scheduler": "ddim", "num_inference_steps": 8, "guidance_scale": 3.0},
    "metrics": ["noise-magnitude"],
    "suppression": {"score": "truth.near_copy", "label": "near copies"},
    "adherence": {"score": "truth.near_copy", "label": "near copies"},
    "shard_size": 32,
    "bootstrap": 200,
}
METRIC = """
import numpy as np
from lethebench.metric import Metric, Score
from lethebench.metrics._common import asks_for_copy, reference_of
from lethebench.prompts import Role

class Toy(Metric):
    name = "toy"
    summary = "agreement with the own reference"
    source = "made for a test"
    needs = frozenset({"images", "references"})
    scores = (Score("toy.agreement", "toy_agreement", "lower", "share", (0.0, 1.0),
                    roles=frozenset({Role.TRIGGER}), help="1 less the pixel error"),)

    def measure(self, shard):
        found = np.full(len(shard), np.nan)
        for i, prompt in enumerate(shard.prompts):
            if asks_for_copy(prompt):
                references = [reference_of(shard.prompt_set, r).image / 255.0 for r in prompt.references]
                found[i] = 1 - min(np.sqrt(np.mean((shard.images[i] / 255.0 - r) ** 2)) for r in references)
        label = np.where(np.isnan(found), "", np.where(found > 0.92, "VM", "NM")).astype(object)
        return {"toy_agreement": found, "toy_label": label}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite, a metric, and what ``lethe metrics`` wrote of them (one run of the command)."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "few.yaml").write_text(yaml.safe_dump(SUITE))
    (folder / "toy.py").write_text(METRIC)
    done = lethe(folder, "toy.py:Toy")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def lethe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lethebench.cli", "metrics", *arguments]
    options = ["--suite", "few.yaml", "--runs", "runs", "--threads", "1"]
    return subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/few@1/mini-sd/metrics.json").read_text())
    return found


# --- the real command -----------------------------------------------------------------------------


def test_a_new_metric_is_measured_by_naming_it(place: Path) -> None:
    told = (place / "stdout.txt").read_text()
    assert "toy_agreement" in told and "noise_magnitude_first" in told
    assert "mini-sd on few@1: 18 images" in told
    record = record_of(place)
    assert [m["metric"] for m in record["metrics"]] == ["noise-magnitude", "toy"]
    toy = record["metrics"][1]
    (detector,) = toy["detectors"]
    assert (detector["column"], detector["end"]) == ("toy_agreement", "high")
    near = detector["against"]["near_copy"]
    assert near["auc"]["value"] == 1.0 and near["tpr"]["value"] == 1.0
    assert near["positives"] == record["near_copies"] > 0
    assert near["negatives"] == 15 - record["near_copies"], "neutral images have no reference"
    assert sum(sum(r.values()) for r in toy["labels"]["toy_label"]["confusion"].values()) == 15
    assert toy["seconds_per_image"] > 0 and toy["records"] == [] and "images" in toy["needs"]


def test_the_record_is_what_the_table_says(place: Path) -> None:
    """AUCs recomputed by scikit-learn from the runner's per-image table."""
    record = record_of(place)
    suite, _ = with_metrics(load_suite(str(place / "few.yaml")), [])
    (plan,) = plan_rows(["base"], suite, "mini-sd", controls=False)
    table = row_table(plan, Store(place / "runs/store"))
    copied = (table["truth_near_copy"] == 1).to_numpy()
    noise = {d["column"]: d["against"] for d in record["metrics"][0]["detectors"]}
    for column, against in noise.items():
        values = table[column].to_numpy()
        pool = (table["truth_label"] != "").to_numpy() | (table["role"] == "neutral").to_numpy()
        assert pool.all()
        assert against["near_copy"]["auc"]["value"] == pytest.approx(roc_auc_score(copied, values), abs=1e-9)
        hard = copied | (table["kind"] == "hard-negative").to_numpy()
        expected = roc_auc_score(copied[hard], values[hard])
        assert against["hard_negatives"]["auc"]["value"] == pytest.approx(expected, abs=1e-9)
        assert against["near_copy"]["negatives"] == 18 - copied.sum()
        assert against["concept"]["auc"]["value"] is None
    assert record["truth"] == table["truth_label"][table["truth_label"] != ""].value_counts().to_dict()


def test_the_table_beside_the_record_has_a_line_for_each_figure(place: Path) -> None:
    with (place / "runs/few@1/mini-sd/metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    (line,) = [x for x in lines if x["column"] == "toy_agreement" and x["comparison"] == "near_copy"]
    near = record_of(place)["metrics"][1]["detectors"][0]["against"]["near_copy"]
    assert float(line["auc"]) == near["auc"]["value"] and float(line["auc_low"]) == near["auc"]["low"]
    assert int(line["positives"]) == near["positives"]
    assert {x["group"] for x in lines if x["comparison"] == "kind"} >= {"verbatim", "one-to-many"}


def test_a_second_run_draws_nothing_and_says_the_same(place: Path) -> None:
    before = record_of(place)
    shards = {p: p.stat().st_mtime_ns for p in (place / "runs/store").rglob("*") if p.is_file()}
    done = lethe(place, "toy.py:Toy", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == before
    assert {p: p.stat().st_mtime_ns for p in (place / "runs/store").rglob("*") if p.is_file()} == shards
    assert not list((place / "runs").glob("few@1/*/*/*/row.json")), "base of this suite is no leaderboard row"


def test_a_metric_that_fails_is_one_line(place: Path) -> None:
    (place / "bad.py").write_text(
        METRIC.replace("Toy", "Bad").replace("toy", "bad").replace("found = np.full", "found = np.fill")
    )
    done = lethe(place, "bad.py:Bad")
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("lethe: ")]
    assert "numpy" in line and "mend the metric or leave it out" in line
    assert "Traceback" not in done.stderr


# --- which metrics, and what is refused -----------------------------------------------------------

UNAVAILABLE = METRIC.replace("Toy", "Gone").replace('"toy"', '"gone"') + (
    "\n    def check(self):\n        from lethebench.errors import UserError\n"
    "        raise UserError('metric gone needs gone.pt')\n"
)


def suite(*metrics: Any) -> Suite:
    return Suite.model_validate({**SUITE, "metrics": list(metrics) or ["noise-magnitude"]})


def test_a_metric_that_cannot_run_is_left_out_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "gone.py").write_text(UNAVAILABLE)
    spec = f"{tmp_path / 'gone.py'}:Gone"
    found, left_out = with_metrics(suite(spec, "copy-mini"), [])
    assert [m.name for m in found.metrics] == ["planted-truth", "copy-mini"]
    assert left_out[spec] == "metric gone needs gone.pt"
    assert left_out["fbmem"] == "not in few@1: name it to add it"
    with pytest.raises(UserError, match=r"metric gone needs gone\.pt"):
        evaluate([spec], suite=suite(), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_two_metrics_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(METRIC.replace('"toy"', '"copy-mini"'))
    with pytest.raises(UserError, match="are both metric 'copy-mini': rename one of them"):
        with_metrics(suite("copy-mini"), [f"{tmp_path / 'toy.py'}:Toy"])


def test_settings_are_for_the_one_metric_that_is_named() -> None:
    found, _ = with_metrics(suite("noise-magnitude"), ["noise-magnitude"], {"first": 2})
    assert [(m.name, m.settings) for m in found.metrics] == [
        ("planted-truth", {}),
        ("noise-magnitude", {"first": 2}),
    ]
    found, _ = with_metrics(suite("noise-magnitude", "copy-mini"), ["copy-mini", "copy-mini", "fbmem"])
    assert [m.name for m in found.metrics] == ["planted-truth", "noise-magnitude", "copy-mini", "fbmem"]


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (["fbmen"], {}, "unknown metric 'fbmen': did you mean fbmem"),
        (["noise-magnitude"], {"frist": 2}, "did you mean 'first'?"),
        (["noise-magnitude", "fbmem"], {"first": 2}, "--set is for one metric"),
        ([], {"first": 2}, "--set is for one metric"),
        (["uniforget"], {}, "unknown metric 'uniforget'"),
        (["no.py:X"], {}, "file not found"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(
    tmp_path: Path, names: list[str], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as found:
        evaluate(names, suite=suite(), settings=settings, runs=tmp_path / "runs")
    assert words in str(found.value)
    assert not (tmp_path / "runs").exists()


def test_a_suite_without_truth_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        name, version = "plain", "1"

        def __iter__(self):
            return iter([Prompt("a", "a star", Role.TRIGGER, "a", references=("r",))])

        def reference(self, name: str) -> Reference:
            return Reference(name, np.zeros((8, 8, 3), np.uint8))

    monkeypatch.setattr(evaluation, "prompt_set", lambda name: Plain())
    plain = suite().model_copy(update={"select": (suite().select[0].model_copy(update={"kinds": (), "min_duplicates": None}),)})  # fmt: skip
    with pytest.raises(UserError, match="no planted truth"):
        evaluate([], suite=plain, runs=tmp_path / "runs")


def test_the_packages_suite_measures_what_needs_no_download() -> None:
    found, left_out = with_metrics(load_suite("detection"), [])
    names = [m.name for m in found.metrics]
    assert names[0] == "planted-truth"
    assert set(names) >= {"fbmem", "copy-mini", "vqa-mini", "noise-magnitude"}
    assert not set(names) & set(left_out)


# --- the page -------------------------------------------------------------------------------------


def figure(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    auc = {"value": value, "low": low, "high": high}
    return {"auc": auc, "accuracy": dict(auc), "tpr": dict(auc), "positives": 1200, "negatives": 34}


def made_record() -> dict[str, Any]:
    against = {
        "near_copy": figure(0.987, 0.951, 0.999),
        "clean": figure(0.99, 0.98, 1.0),
        "hard_negatives": figure(0.5, 0.4, 0.6),
        "concept": figure(None),
        "kind": {"verbatim": figure(0.912)},
        "duplicates": {"8": figure(0.7), "128": figure(1.0, 0.9, 1.0)},
    }
    metric = {
        "metric": "toy",
        "settings": {},
        "summary": EVIL_TEXT,
        "records": ["x"],
        "seconds_per_image": 0.0421,
        "detectors": [{"column": "toy_column", "end": "low", "against": against}],
        "labels": {
            "toy_label": {
                "confusion": {t: dict.fromkeys(("VM", "NM"), 3) for t in ("VM", "NM")},
                "accuracy": 0.5,
                "memorized": {"sensitivity": 0.5, "false_positive_rate": None},
            }
        },
    }
    evil = {**metric, "metric": EVIL, "labels": {}, "detectors": [{**metric["detectors"][0], "column": EVIL}]}
    from lethebench.metrics.meta import CONVENTIONS

    return {
        "schema": "lethe-metrics/1",
        "suite": {"name": "detection", "version": "1"},
        "model": "mini-sd",
        "images": 1002,
        "truth": {"VM": 200, "NM": 400},
        "near_copies": 200,
        "conventions": CONVENTIONS,
        "metrics": [metric, evil],
        "left_out": {"sscd": "needs /somewhere/private.pt"},
    }


def page(folder: Path, runs: Path) -> Path:
    """The partial in a bare page with the site's style."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    text = environment.from_string(
        '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<style>{{ css|safe }}</style><main>{% include "evaluation.html.jinja" %}</main>'
    ).render(evaluations=evaluations(runs)[0], css=css)
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "runs/detection@1/mini-sd/metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made_record()))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with launched(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def test_the_section_shows_each_metric(browser: Browser, made: Path, tmp_path: Path) -> None:
    browser.open(page(tmp_path, made))
    cells = browser.js(
        "return [...document.querySelector('table.detectors tbody tr').cells].map(c => c.innerText)"
    )
    assert cells[0] == "toy" and cells[1] == "toy_column (low)"
    assert cells[2].split() == ["0.987", "0.951–0.999"]
    assert cells[3] == "0.912" and cells[4] == "", "a kind without a value is empty"
    heads = browser.js(
        "return [...document.querySelectorAll('table.detectors thead th')].map(c => c.innerText)"
    )
    assert len(heads) == len(cells)
    assert cells[heads.index("TPR at 1 % FPR")].split() == ["98.7", "%", "95.1–99.9"]
    assert cells[heads.index("Cost an image")] == "42 ms" and cells[-1] == "needed"
    said = browser.js("return document.body.innerText")
    assert "1,002 images (400 NM, 200 VM)" in said and "Not measured here: sscd." in said
    assert "private" not in browser.js("return document.documentElement.outerHTML")
    note = browser.js("return document.querySelector('table.detectors td.num').title")
    assert note == "1,200 images against 34"
    assert "Labels of toy against the truth: the same label 50.0 %; memorized called memorized 50.0 %" in said


def test_texts_of_plugins_are_text(browser: Browser, made: Path, tmp_path: Path) -> None:
    browser.open(page(tmp_path, made))
    rows = browser.js(
        "return [...document.querySelectorAll('table.detectors th[scope=row]')].map(c => c.innerText)"
    )
    assert rows == ["toy", EVIL]
    assert browser.js("return window.pwned === undefined && !document.querySelector('[onerror], img')")
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_section_fits_a_phone(browser: Browser, made: Path, tmp_path: Path, dark: bool) -> None:
    browser.open(page(tmp_path, made), width=375, dark=dark)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.overflow() <= 0
    scrolled = browser.js(
        "const s = document.querySelector('.inner-scroll'); s.scrollLeft = 200; return [s.scrollLeft, s.tabIndex]"
    )
    assert scrolled == [200, 0], "the table scrolls, by keyboard too"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting property name"),
        (json.dumps({**made_record(), "schema": "lethe-metrics/9"}), "lethe-metrics/9"),
        (json.dumps({k: v for k, v in made_record().items() if k != "metrics"}), "metrics"),
        ("[]", "not a record"),
        (json.dumps({**made_record(), "conventions": {}}), "KeyError"),
        (json.dumps({**made_record(), "images": float("inf")}), "OverflowError"),
    ],
)
def test_a_damaged_record_is_named_and_hides_no_other(made: Path, text: str, words: str) -> None:
    bad = made / "broken@1/mini-sd/metrics.json"
    bad.parent.mkdir(parents=True)
    bad.write_text(text)
    tables, problems = evaluations(made)
    assert [t.suite for t in tables] == ["detection@1"]
    (problem,) = problems
    assert problem.path == "broken@1/mini-sd/metrics.json"
    assert words in problem.reason and "run 'lethe metrics' again" in problem.reason


def test_no_records_give_no_section(tmp_path: Path) -> None:
    assert evaluations(tmp_path) == ([], [])
    assert "<section" not in page(tmp_path, tmp_path).read_text()
