"""A user's own file by a small YAML spec."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image
from promptfiles import made

from lethebench.errors import UserError
from lethebench.promptfiles.consent import VARIABLE, OptIn, allow, require_allowed
from lethebench.promptfiles.sets import load_spec
from lethebench.prompts import Role

OWN = {
    "name": "mine",
    "file": "own.csv",
    "separator": ";",
    "columns": {"prompt": "Caption", "id": "Index", "label": "type"},
    "labels": {"VM": {"role": "trigger", "kind": "verbatim"}, "TM": "control"},
}


@pytest.fixture
def load(tmp_path):
    """Loads a spec with changes beside a made file."""
    made.write(tmp_path, "own.csv", made.NEMO)

    def loaded(content=None, **changes):
        if content is not None:
            made.write(tmp_path, changes.get("file", "own.csv"), content)
        spec = {key: value for key, value in {**OWN, **changes}.items() if value is not None}
        return load_spec(made.write(tmp_path, "mine.yaml", yaml.safe_dump(spec)))

    return loaded


def simple(**changes):
    return {"separator": None, "labels": None, "columns": {}, "role": "neutral", **changes}


def test_columns_and_labels(load):
    prompts = load(attributes={"address": "URL"})
    assert [(p.id, p.role, p.kind) for p in prompts] == [
        ("0030727993", Role.TRIGGER, "verbatim"),
        ("12", Role.CONTROL, "tm"),
        ("7", Role.TRIGGER, "verbatim"),
        ("8", Role.CONTROL, "tm"),
    ]
    assert next(iter(prompts)).attributes == {"address": "https://a.example/1.jpg"}
    manifest = prompts.manifest()
    assert (manifest["name"], manifest["version"], manifest["prompts"]) == ("mine", "1", 4)
    assert manifest["files"][0]["file"] == "own.csv"
    assert load(attributes={}).manifest()["prompts_sha256"] != manifest["prompts_sha256"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", "Prompts,n\na b,1\nc,2\n"),
        ("a.tsv", "text\tn\na b\t1\nc\t2\n"),
        ("a.jsonl", [{"caption": "a b"}, {"caption": "c"}]),
        ("a.parquet", [{"Caption": "a b"}, {"Caption": "c"}]),
        ("a.txt", "a b\nc\n"),
    ],
)
def test_every_format_with_the_usual_names(load, file, content):
    assert [(p.id, p.text, p.kind) for p in load(content, **simple(file=file))] == [
        ("1", "a b", "neutral"),
        ("2", "c", "neutral"),
    ]


def test_templates_limit_and_clusters(load):
    names = "name,group\n" + "".join(f"n{i},g{i % 2}\n" for i in range(6))
    concepts = simple(
        role="concept", templates=["a {x} b", "c {x}"], anchor="it", columns={"cluster": "group"}
    )
    prompts = load(names, **concepts, limit=3)
    assert len(prompts) == 6
    assert {p.cluster for p in prompts} <= {"g0", "g1"}
    first = next(iter(prompts))
    assert (first.text, first.id[-2:]) == (f"a {first.concept} b", "-1")
    assert prompts.paraphrases(first.id) == ["a it b", "c it"]
    assert {p.id for p in load(names, **concepts, limit=2)} < {p.id for p in prompts}


def test_a_concept_beside_the_prompt(load):
    table = "prompt,who,kind\na cat by Bo,Bo,art\n"
    [prompt] = load(table, **simple(role="probe", columns={"concept": "who", "category": "kind"}))
    assert (prompt.text, prompt.concept, prompt.category, prompt.role) == (
        "a cat by Bo",
        "Bo",
        "art",
        Role.PROBE,
    )


def test_training_prompts_are_neutral_and_apart(load):
    rows = "".join(f"caption {i},{'n' if i % 2 else 't'}\n" for i in range(40))
    labelled = simple(role=None, labels={"n": "neutral", "t": "trigger"}, columns={"label": "l"})
    prompts = load("prompt,l\n" + rows, **labelled, training=5)
    assert len(prompts.training_prompts()) == 5
    assert all(int(text.split()[1]) % 2 for text in prompts.training_prompts())
    assert len(prompts) == 35
    assert not {p.text for p in prompts} & set(prompts.training_prompts())


def test_references_are_listed_or_named_by_id(load, tmp_path):
    for name in ("a/1.png", "b.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "pictures" / name)
    own = simple(references="pictures", columns={"references": "shown"})
    prompts = load("prompt,id,shown\nx,1,a/1.png | b\ny,b,\n", **own)
    assert {p.id: p.references for p in prompts} == {"1": ("a/1", "b"), "b": ("b",)}
    assert prompts.reference("a/1").image.shape == (4, 6, 3)
    assert prompts.described("b") is None
    with pytest.raises(UserError, match=r"line 2 names the reference 'gone\.png', which isn't among"):
        load("prompt,id,shown\nx,1,gone.png\n", **own)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colums": {}}, "colums: Extra inputs are not permitted"),
        ({"columns": {"promt": "a"}}, r"columns\.promt: Extra inputs are not permitted"),
        ({"name": "My Set"}, "name: String should match pattern"),
        ({"file": None}, "file: Field required"),
        ({"role": "trigger"}, "say either the `role` of all prompts or what their `labels` mean"),
        ({"labels": None}, "say either the `role` of all prompts or what their `labels` mean"),
        ({"columns": {}}, "say which column holds the labels"),
        ({"labels": {"VM": "memorised"}}, r"labels\.VM\.role: Input should be"),
        (
            {"labels": {"VM": "trigger"}},
            r"own\.csv: line 3 has the label 'TM', whose meaning isn't known: known are VM",
        ),
        (
            {"separator": ","},
            r"own\.csv: line 2 has 2 cells where the header has 1: mend it, check the separator",
        ),
        ({"separator": "; "}, "separator: String should have at most 1 character"),
        (
            {"columns": {"prompt": "Captions", "label": "type"}},
            r"has no column 'Captions' \(for `prompt`\): it has '', 'Caption'",
        ),
        ({"format": "excel"}, "format: Input should be"),
        ({"file": "gone.csv"}, r"prompt set 'mine': there is no file .*gone\.csv"),
        (
            {"templates": ["a photo"], "role": "concept", "labels": None},
            "'a photo' needs one place in braces",
        ),
        ({"limit": 0}, "limit: Input should be greater than or equal to 1"),
        ({"references": "nowhere"}, "there are no references at"),
        ({"attributes": {"a": "b"}}, r"has no column 'b' \(for `a`\)"),
    ],
)
def test_bad_specs_are_one_line(load, changes, says):
    with pytest.raises(UserError, match=says) as raised:
        load(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "changes", "says"),
    [
        (
            "a,b\n1,2\n",
            {},
            r"which column holds the prompts\? It has 'a', 'b'; say `columns: \{prompt: \.\.\}`",
        ),
        ("prompt,caption\n1,2\n", {}, "columns 'prompt' and 'caption' may both be the prompt"),
        ("prompt\n\n", {}, "no prompts in own.csv$"),
        ("prompt,n\na,1\n  ,2\n", {}, "line 3 asks for nothing: fill it in"),
        ("prompt,id\na,1\nb,1\n", {}, r"line 3 has the id '1' of .*own\.csv: line 2: ids must differ"),
        ("a,b\n1,2\n", {"templates": ["x {n}"]}, "which column holds the prompts"),
        ("prompt\na\n", {"training": 3}, r"no prompts in own\.csv but those held out"),
    ],
)
def test_bad_files_are_one_line(load, content, changes, says):
    with pytest.raises(UserError, match=says) as raised:
        load(content, **simple(**changes))
    assert "\n" not in str(raised.value)


def test_rows_without_a_prompt_may_be_left_out(load):
    prompts = load("prompt,n\na,1\n  ,2\n", **simple(empty="skip"))
    assert prompts.manifest()["rows"] == {"empty": 1, "read": 2}


def test_files_that_are_no_specs(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml not found"):
        load_spec(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="is not YAML"):
        load_spec(made.write(tmp_path, "a.yaml", "a: [\n"))
    with pytest.raises(UserError, match="Input should be a valid dictionary"):
        load_spec(made.write(tmp_path, "b.yaml", "- a\n"))


def test_what_is_allowed_is_named(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    require_allowed(None, "it")
    with pytest.raises(
        UserError, match="it holds names of living persons: allow it with --allow living-persons"
    ):
        require_allowed(OptIn.LIVING_PERSONS, "it")
    allow("living-persons")
    allow("unsafe")
    require_allowed(OptIn.LIVING_PERSONS, "it")
    require_allowed(OptIn.UNSAFE, "it")
    with pytest.raises(UserError, match="--allow knows no 'everything': give unsafe or living-persons"):
        allow("everything")
