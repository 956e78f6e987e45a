"""What is only hidden comes out, what is gone doesn't: the built-in model, with the exact truth as the judge."""

from __future__ import annotations

import pytest
from attack_suites import ONE_THREAD, write_suite

from lethebench.attack import AttackRecord
from lethebench.attack._run import attack
from lethebench.bench import run

PLUGINS = """
from contextlib import contextmanager
from lethebench.hooks import SamplerHooks
from lethebench.method import Family, Method

class Rewrite(SamplerHooks):
    def texts(self, texts, keys):
        return ["a dotted red cup on a beach" for _ in texts]

class Hides(Method):
    name = "hides"
    summary = "asks for something else"
    family = Family.SAMPLING

    @contextmanager
    def apply(self, model, artefact):
        yield Rewrite()

class Forgets(Method):
    name = "forgets"
    summary = "the text can't reach the picture any more"
    family = Family.WEIGHTS

    @contextmanager
    def apply(self, model, artefact):
        outputs = [m.to_out[0] for n, m in model.denoiser.named_modules() if n.endswith("attn2")]
        before = [o.weight.data for o in outputs]
        for one in outputs:
            one.weight.data = one.weight.data * 0
        yield SamplerHooks()
        for one, weight in zip(outputs, before):
            one.weight.data = weight
"""
SETTINGS = {
    "name": "hidden",
    "model": "mini-sd",
    "metrics": ["planted-truth"],
    "select": [
        {"role": role, "kinds": ["background"], "min_duplicates": 128, "images": 1}
        for role in ("trigger", "control")
    ],
    "sampler": {"scheduler": "ddim", "num_inference_steps": 8, "guidance_scale": 3.0},
    "suppression": {"score": "truth.memorized", "label": "copies"},
    "adherence": {"score": "truth.control", "label": "floor"},
    "shard_size": 4,
    "attack": {"items": 3, "set": {"dori": {"steps": 4, "batch_size": 2, "lr": 0.01, "images": 1}}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, AttackRecord]:
    folder = tmp_path_factory.mktemp("hidden")
    plugins = folder / "plugins.py"
    plugins.write_text(PLUGINS)
    suite, runs = str(write_suite(folder, **SETTINGS)), folder / "runs"
    methods = [f"{plugins}:Hides", f"{plugins}:Forgets"]
    run(methods, suite=suite, runs=runs, runtime=ONE_THREAD)
    records = {}
    for name in ("base", *methods):
        (record,) = attack(name, suite=suite, runs=runs, attacks=["dori"], threads=1).records
        records[record.method] = record
    return records


def test_base_gives_what_it_gives_without_an_attack(found: dict[str, AttackRecord]) -> None:
    base = found["base"]
    assert base.plain.value == base.memorized.value == 1
    assert base.control.value == base.plain_control.value == 0
    assert (base.excess.value, base.hidden.value) == (1, 0)


def test_what_is_hidden_by_the_text_is_found_out(found: dict[str, AttackRecord]) -> None:
    hides = found["hides"]
    assert hides.plain.value == 0  # the row looks as if nothing were left
    assert hides.memorized == found["base"].memorized and hides.control.value == 0
    assert (hides.excess.value, hides.hidden.value) == (1, 1)


def test_what_is_gone_stays_gone(found: dict[str, AttackRecord]) -> None:
    forgets = found["forgets"]
    assert forgets.plain.value == forgets.memorized.value == forgets.control.value == 0
    assert (forgets.excess.value, forgets.hidden.value) == (0, 0)
