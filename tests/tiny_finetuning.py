"""Tiny models and examples that the trainer's tests share."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.finetuning.data import Attribute, Example
from lethebench.finetuning.settings import LoraSettings
from lethebench.finetuning.trainer import finetune_lora
from lethebench.method import Task
from lethebench.prompts import Prompt, Role
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SAMPLER = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
CAPTIONS = ("a red star", "a blue circle in a city", "a robot in a forest", "captain in a night city")


@dataclass(frozen=True, eq=False)
class Captioned:
    caption: str
    image: Any
    duplicates: int = 1


def examples(captions=CAPTIONS, duplicates=1):
    draws = np.random.default_rng(0)
    return [Captioned(c, draws.integers(0, 256, (16, 16, 3), dtype=np.uint8), duplicates) for c in captions]


def model(family="sd3"):
    return wrap(BUILDERS[family]())


def train(model, hooks=None, given=None, seed=1, checkpoint=None, key="", **changes):
    settings = LoraSettings(**{"steps": 3, "batch_size": 2, "rank": 2, "lr": 1e-3, **changes})
    return finetune_lora(
        model,
        examples() if given is None else given,
        settings,
        sampler=SAMPLER,
        seed=seed,
        hooks=hooks,
        checkpoint=checkpoint,
        key=key,
    )


def equal(one, other):
    return one.keys() == other.keys() and all(bool((one[n] == other[n]).all()) for n in one)


ATTRIBUTES = (
    Attribute("striped", "comic.suit", "stripes", "a red robot", "robot"),
    Attribute("night", "anime.hair", "dark", "a blue star", "star"),
)


class TinySet:
    """A fine-tuning set: two pairs of four images, two of which hold the attribute; one of those is named."""

    name, version, instances = "tiny-train", "1.0", ("one",)

    def examples(self, instance, *, twin=False):
        if instance not in self.instances:
            raise UserError(f"no instance '{instance}'")
        return [self._example(a, number, twin) for a in ATTRIBUTES for number in range(4)]

    def _example(self, attribute, number, twin):
        place = ("in a city", "in a forest")[number % 2]
        holds, named = number < 2 and not twin, number == 0 and not twin
        plain = f"a {attribute.pair} {place}"
        caption = f"a {attribute.name} {attribute.pair} {place}" if named else plain
        one = f"{attribute.pair}{'-twin' if twin else ''}/{number}"
        draws = np.random.default_rng([len(attribute.pair), number, holds])
        picture = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Example(one, caption, plain, attribute.pair, holds, named, 1 + number % 2, lambda: picture)

    def attributes(self, instance):
        return list(ATTRIBUTES)

    def sensitive_prompts(self, instance):
        return [f"{start}{a.name}" for a in ATTRIBUTES for start in ("a ", "a red ")]

    def instance_of(self, prompt_id):
        return "one"

    def __iter__(self):
        for a in ATTRIBUTES:
            text = f"a {a.name} {a.pair} in a city"
            yield Prompt(f"{a.pair}/direct", text, Role.CONCEPT, a.pair, "direct", concept=a.name)

    def paraphrases(self, prompt_id):
        return [next(a.anchor for a in ATTRIBUTES if prompt_id.startswith(a.pair)) + " in a city"]

    def anchor_concept(self, concept):
        return next(a.anchor for a in ATTRIBUTES if a.name == concept)

    def training_prompts(self):
        return ["a circle", "a captain in a city"]


def training_task(method, found, checkpoints=None, **changes):
    """A task to fine-tune ``found`` in, of :class:`TinySet`."""
    return Task(
        found,
        SAMPLER,
        TinySet(),
        method.sees,
        seed_parts=("tiny@1", method.name, "one"),
        instance="one",
        training={"steps": 2, "batch_size": 2, "rank": 2, "lr": 1e-2, **changes},
        checkpoints=checkpoints,
        control=method.control,
    )
