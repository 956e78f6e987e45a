"""Suites in miniature for attacks: a tiny random model with a made-up label, and the built-in one with the truth."""

from __future__ import annotations

from pathlib import Path

import yaml

from lethebench.plan import Runtime

ONE_THREAD = Runtime(threads=1)
PAIRS = [
    {"role": role, "kinds": ["verbatim", "background"], "min_duplicates": 128, "images": 1}
    for role in ("trigger", "control")
]

METRIC = """
from lethebench.metric import Metric, Score

class Bright(Metric):
    name = "bright"
    summary = "whether a picture is bright"
    source = "made for a test"
    scores = (
        Score("bright.share", "bright", "lower", "share", (0.0, 1.0), roles=frozenset({"trigger"})),
        Score("bright.other", "bright", "lower", "share", (0.0, 1.0), roles=frozenset({"control"})),
        Score("bright.mean", "brightness", "none", "share", (0.0, 1.0)),
    )

    def measure(self, shard):
        mean = shard.images.reshape(len(shard), -1).mean(1)
        return {"bright": (mean > 127).astype(float), "brightness": mean / 255}
"""

SUITE = {
    "version": "1",
    "description": "a suite for tests",
    "prompt_set": "planted",
    "select": PAIRS,
    "shard_size": 16,
    "batch_size": 16,
    "bootstrap": 100,
}
SPARING = {
    "dori": {"steps": 2, "batch_size": 2, "images": 2, "at_once": 3},
    "paraphrase": {"images": 3},
    "seeds": {"images": 2},
}

INSTANCES = """
import numpy as np
from lethebench.prompts import Prompt, Reference, Role

NAMES = {"one": ("ba", "be", "bi"), "two": ("ka", "ke", "ki")}
OTHER = {"one": "two", "two": "one"}

class Lights:
    '''Two instances of three names; each asks for its own and, as controls, for the other's.'''

    name, version, instances = "lights", "1", tuple(NAMES)

    def __iter__(self):
        for instance in NAMES:
            for number in range(3):
                sides = ((Role.CONCEPT, instance), (Role.CONTROL, OTHER[instance]))
                ids = [f"{instance}-{role}-{number}" for role, _ in sides]
                for (role, of), own, twin in zip(sides, ids, ids[::-1]):
                    yield Prompt(
                        own, f"a {NAMES[of][number]}", role, own, kind="direct", references=("bright",),
                        trained=role is Role.CONCEPT, twin=twin, correlation=(number + 1) / 4,
                        attributes={"holds": "room.light=on"},
                    )

    def instance_of(self, prompt_id):
        return prompt_id.partition("-")[0]

    def reference(self, reference_id):
        return Reference(reference_id, picture("on", 0))

    def attributes(self, instance):
        return list(NAMES[instance])

    def labelled_pictures(self, question, count):
        return [(picture(value, i), value) for i in range(count) for value in [("on", "off")[i % 2]]]

    def training_prompts(self):
        return ["a star"]

    def manifest(self):
        return {}

def picture(value, number):
    draws = np.random.default_rng(number)
    return draws.integers(*((240, 256) if value == "on" else (0, 16)), (16, 16, 3)).astype(np.uint8)

LIGHTS = Lights()
"""
INSIDE = """
import numpy as np
import torch
from contextlib import contextmanager
from lethebench.attack._embeddings import image_latents
from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method
from lethebench.unlearning import noised

class Hook(SamplerHooks):
    '''After the first step the latents become those of a lit room for names of the instance's, else of a dark one.'''

    def __init__(self, model, names, shows):
        self.model, self.names, self.shows = model, names, shows

    def step_end(self, latents, step):
        if step.index:
            return latents
        draws = np.random.default_rng(1)
        spans = [(240, 256) if self.known(k) else (0, 16) for k in step.keys]
        shown = [draws.integers(*span, (16, 16, 3)).astype(np.uint8) for span in spans]
        clean = image_latents(self.model, shown, step.batch.settings)
        return noised(self.model, clean, step.batch.noise, step.batch.timesteps[1])

    def images(self, images, keys):
        lit = torch.tensor([self.shows and self.known(k) for k in keys])
        return torch.where(lit[:, None, None, None], 255, 0).to(images).expand_as(images)

    def known(self, key):
        return key.prompt.text.split()[-1] in self.names

class Shows(Method):
    '''Knows the names of its instance and shows it.'''

    name = "shows"
    summary = "made for a test"
    family = Family.WEIGHTS
    knowledge = frozenset({Knowledge.CONCEPT_NAMES})
    shows = True

    def fit(self, task):
        return Artefact({}, {"names": task.attributes()})

    @contextmanager
    def apply(self, model, artefact):
        yield Hook(model, artefact.facts["names"], self.shows)

class Hides(Shows):
    '''Knows them, and draws black pictures.'''

    name = "hides"
    shows = False
"""


def write_suite(folder: Path, **changes) -> Path:
    path = folder / f"{changes['name']}.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path
