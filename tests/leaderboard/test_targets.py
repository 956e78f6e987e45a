"""Quality against the number of targets: which rows make the section, and what it says."""

import pytest
from made_runs import everything

from lethebench.leaderboard import build, load_rows
from lethebench.leaderboard._targets import section
from lethebench.row import Cost, Difference, Row

ADHERENCE = "clip_mini.score"


def made(base: Row, method: str, setting: str, value: float, **changes) -> Row:
    score = base.scores[ADHERENCE]
    start = score.value
    difference = Difference(value=value - start, low=value - start - 0.01, high=value - start + 0.01, p=0.5)
    scores = {ADHERENCE: score.model_copy(update={"value": value, "base_difference": difference})}
    clusters = changes.pop("clusters", None)
    kind = changes.pop("targets", "concepts")
    cost = Cost(
        fit_seconds=1.0,
        seconds_per_image=1.0,
        relative_to_base=1.0,
        peak_memory_bytes=None,
        clusters=clusters,
    )
    config = {"method": {method: {"targets": kind} if clusters else {}}}
    update = {"method": method, "setting": setting, "scores": scores, "cost": cost, "config": config}
    return base.model_copy(update={"control": False, "knowledge": ("concept-names",), **update, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Row:
    runs = tmp_path_factory.mktemp("made") / "runs"
    everything(runs)
    return next(e.row for e in scan_rows(runs) if e.row.method == "base")


def scan_rows(runs):
    from lethebench.leaderboard import scan

    return scan(runs).entries


def test_values_are_relative_to_base(base):
    start = base.scores[ADHERENCE].value
    rows = [
        base,
        made(base, "uce", "medium,count=1", start, clusters=1),
        made(base, "uce", "medium,count=12", start / 2, clusters=12),
        made(base, "uniforget", "strong", start * 0.9, knowledge=("neutral-prompts",)),
    ]
    found = section(rows, ADHERENCE, {"uce": 1, "uniforget": 2})
    (panel,) = found.panels
    assert panel.doses == (1, 12) and [line.line.name for line in panel.lines] == [
        "uce medium",
        "uniforget strong",
    ]
    low, high = (start / 2 - 0.01) / start, (start / 2 + 0.01) / start
    assert found.lines[0][:3] == (ADHERENCE, "uce", "medium")
    assert found.lines[0][3] == ((1, f"1.00 [{1 - 0.01 / start:.2f}, {1 + 0.01 / start:.2f}]"),
                                 (12, f"0.50 [{low:.2f}, {high:.2f}]"))  # fmt: skip
    assert {n for n, _ in found.lines[1][3]} == {1, 12} and "0.90" in found.lines[1][3][0][1]


def test_the_scale_is_that_of_the_swept_methods_and_names_what_lies_beyond(base):
    start = base.scores[ADHERENCE].value
    rows = [
        base,
        made(base, "uce", "medium,count=1", start, clusters=1),
        made(base, "uce", "medium,count=12", start * 0.9, clusters=12),
        made(base, "wanda", "weak", start * 0.99, knowledge=("neutral-prompts",)),
        made(base, "ecodiff", "strong", start * 3, knowledge=("neutral-prompts",)),
    ]
    found = section(rows, ADHERENCE, {"uce": 1, "wanda": 2, "ecodiff": 3})
    (panel,) = found.panels
    assert [line.line.name for line in panel.lines] == ["uce medium", "wanda weak"]
    assert panel.key == (("uce", 1), ("wanda", 2)) and panel.beyond == ("ecodiff strong 300.0 %",)
    heights = [y for line in panel.lines for _, y in line.dots]
    assert max(heights) - min(heights) > 0.3 * (panel.bottom - panel.top), "the curve fills the scale"
    assert ("ecodiff", "strong") in {line[1:3] for line in found.lines}, "the table has all"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [("uce", "medium", 12, "concepts")],
        [("uce", "medium,count=1", 1, "concepts"), ("uce", "strong", 12, "concepts")],
        [("uce", "medium,count=1", 1, "concepts"), ("uce", "medium,targets=all", 12, "all")],
        [("uce", "medium,count=1", 1, "concepts"), ("uce", "medium,count=12,lamb=2", 12, "concepts")],
    ],
)
def test_one_number_of_targets_is_no_axis(base, rows):
    found = [made(base, m, s, 0.3, clusters=n, targets=kind) for m, s, n, kind in rows]
    assert section([base, *found], ADHERENCE, {"uce": 1}) is None
    assert section(found, ADHERENCE, {"uce": 1}) is None


def test_the_page_has_the_section_only_where_there_is_one(tmp_path, base):
    runs = tmp_path / "runs"
    everything(runs)
    assert "Number of targets" not in build(runs, tmp_path / "plain").read_text()
    folder = runs / "/".join(base.key[:2]) / "uce"
    for number in (1, 8):
        row = made(base, "uce", f"medium,count={number}", 0.3, clusters=number)
        (folder / row.setting).mkdir(parents=True)
        (folder / row.setting / "row.json").write_text(row.to_json())
    assert len(load_rows(runs)) > 2
    page = build(runs, tmp_path / "swept").read_text()
    assert page.count("Number of targets</h2>") == 1 and ">uce medium<" in page
