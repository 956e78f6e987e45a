"""Suites that extend others, prompt sets joined by +, and settings of loading."""

import pytest
import yaml

from lethebench.errors import UserError
from lethebench.plan import RowPlan, Runtime, manifest_sha256, prompt_set
from lethebench.prompts import Union
from lethebench.specs import load_suite
from lethebench.zoo import LoadSettings


def write(folder, name, **content):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "version": "1", **content}))
    return str(path)


def test_a_suite_takes_from_another_what_it_does_not_say(tmp_path):
    planted = load_suite("planted")
    path = write(
        tmp_path,
        "small",
        extends="planted",
        model="other",
        fit={"wen": {"lr": 0.5}, "uce": {"guide": "none"}},
    )
    found = load_suite(path)
    assert (found.key, found.model, found.select) == ("small@1", "other", planted.select)
    assert found.fit == {**planted.fit, "wen": {"lr": 0.5}, "uce": {"guide": "none"}}
    again = load_suite(write(tmp_path, "smaller", extends="small.yaml", sampler={"num_inference_steps": 3}))
    assert (again.model, again.sampler.num_inference_steps, again.sampler.scheduler) == ("other", 3, "model")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"name": "a", "version": "1", "extends": "plantd"}, "unknown suite 'plantd': did you mean planted"),
        ({"name": "a", "version": "1", "extends": "a.yaml"}, "extends itself"),
        ({"version": "1", "extends": "planted"}, "extends planted and needs its own name"),
        (
            {"name": "a", "version": "1", "extends": "planted", "sampler": {"steps": 3}},
            "sampler.steps: Extra",
        ),
    ],
)
def test_what_cannot_be_extended(tmp_path, content, says):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=says):
        load_suite(str(path))


class Small:
    version = "1"

    def __init__(self, name):
        self.name = name

    def __iter__(self):
        return (p for p, _ in zip(prompt_set("planted"), range(5), strict=False))

    def reference(self, reference_id):
        return prompt_set("planted").reference(reference_id)

    def training_prompts(self):
        return [f"{self.name} one", "both"]

    def manifest(self):
        return {"of": self.name}


def test_joined_sets_are_told_apart():
    joined = Union([Small("first"), Small("second")])
    own = list(Small("first"))
    found = list(joined)
    assert [p.id for p in found] == [f"{s}/{p.id}" for s in ("first", "second") for p in own]
    assert {p.cluster for p in found if p.id.startswith("second/")} == {f"second/{p.cluster}" for p in own}
    assert joined.training_prompts() == ["first one", "both", "second one"]
    assert joined.manifest() == {"first": {"of": "first"}, "second": {"of": "second"}}
    with_reference = next(p for p in found if p.references)
    assert (
        joined.reference(with_reference.references[0]).image
        == Small("x").reference(own[found.index(with_reference)].references[0]).image
    ).all()
    for twin in (p.twin for p in found if p.twin):
        assert twin.startswith(("first/", "second/"))


def test_sets_that_cannot_be_joined():
    with pytest.raises(UserError, match="named twice: planted\\+planted"):
        prompt_set("planted+planted")
    with pytest.raises(UserError, match="'planted-train' is for fine-tuning"):
        prompt_set("planted+planted-train")
    with pytest.raises(UserError, match="unknown prompt set 'plante'"):
        prompt_set("planted+plante")
    assert manifest_sha256("planted") != manifest_sha256("planted-train")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"offlod": "model"}, "no setting 'offlod': did you mean offload"),
        ({"offload": "disk"}, "offload is one of none, model, sequential, not 'disk'"),
        ({"quantise": "int3"}, "quantise is one of none, int8, nf4, not 'int3'"),
        ({"compile": "yes"}, "compile"),
    ],
)
def test_settings_of_loading(given, says):
    with pytest.raises(UserError, match=says):
        LoadSettings.of(given)


def test_loading_is_part_of_what_determines_a_result():
    suite = load_suite("smoke")
    from lethebench.composition import recipes

    base = recipes("base", "all", {}, suite.fit)[0]
    plain, sliced = (
        RowPlan(suite, "mini-sd", base, Runtime(loading=loading))
        for loading in ((), (("attention_slicing", True),))
    )
    assert "loading" not in plain.shard_key(0)
    assert sliced.shard_key(0)["loading"] == {"attention_slicing": True}
