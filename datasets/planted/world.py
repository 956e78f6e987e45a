"""The planted world as a prompt set with exact ground truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.prompts import Prompt, Reference, Role

from ._draw import COLOURS, Draw
from .backgrounds import BACKGROUNDS
from .characters import CATEGORIES, GENERIC_NOUNS, difference, draw_look
from .config import WorldConfig
from .items import (
    CHARACTER_TEMPLATES,
    SCENE_SIZES,
    Item,
    Planter,
    SceneDraw,
    TrainingExample,
    paraphrases,
    protected_looks,
)
from .objects import OBJECTS, PATTERNS
from .scene import Person, Picture, Scene, Thing, caption, describe, render

if TYPE_CHECKING:
    import pandas as pd

SceneKind = Literal["neutral", "character", "figure"]

_JUDGE_SIZES = (SCENE_SIZES[0], 190)
"""Object sizes in fresh scenes: up to the largest that foreground items use."""


class PlantedWorld:
    """A procedural world whose every memorized image is known, as a prompt set.

    Nothing is rendered until a reference is asked for. Two worlds of one config are equal in
    everything.
    """

    name = "planted"
    version = "1.0"
    summary = "the built-in world: planted memorization with held-out twins, exact masks and attributes"

    def __init__(self, config: WorldConfig = WorldConfig()) -> None:  # noqa: B008 (frozen)
        self.config = config
        self._scenes = SceneDraw(config)
        self.items, self.characters = Planter(config, self._scenes).plant()
        self._items: dict[str, Item] = {item.id: item for item in self.items}
        self._pictures: dict[str, Picture] = {}

    # --- prompts -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Prompt]:
        """Every test prompt: planted items with their twins, hard negatives, neutral, probes."""
        return iter(self._prompts)

    def __len__(self) -> int:
        """The number of test prompts."""
        return len(self._prompts)

    def contact_sheet(self, path: Path) -> None:
        """Write a PNG that shows the world: see :func:`.sheet.contact_sheet`."""
        from .sheet import contact_sheet

        contact_sheet(self, path)

    @cached_property
    def _prompts(self) -> tuple[Prompt, ...]:
        planted = (prompt for item in self.items for prompt in self._item_prompts(item))
        return (*planted, *self._neutral_prompts(), *self._probes())

    def _item_prompts(self, item: Item) -> Iterator[Prompt]:
        twin = self._items[item.twin] if item.twin is not None else None
        category = self._category(item)
        for index, ask in enumerate(item.asks):
            yield Prompt(
                id=item.prompt_id(index),
                text=ask.text,
                role=_role(item),
                cluster=item.id,
                kind=item.kind,
                references=item.reference_ids(),
                concept=item.names[0] if item.kind == "concept" else None,
                category=category,
                duplicates=item.duplicates,
                trained=item.trained,
                twin=twin.prompt_id(index) if twin is not None else None,
                attributes=dict(ask.states),
            )

    def _category(self, item: Item) -> str | None:
        subject = item.scenes[0].subject
        return subject.category if isinstance(subject, Person) else None

    def _neutral_prompts(self) -> Iterator[Prompt]:
        options = [
            (combination, pattern) for combination in sorted(self._scenes.held_out) for pattern in PATTERNS
        ]
        chosen = Draw(self.config.seed, "neutral-prompts").shuffled(options)[: self.config.neutral_prompts]
        for index, ((word, colour, place), pattern) in enumerate(chosen):
            text = f"{describe(Thing(word, colour, pattern))} {BACKGROUNDS[place].place}"
            prompt_id = f"neutral-{index + 1:03d}"
            attributes = {"object": word, "colour": colour, "pattern": pattern, "background": place}
            yield Prompt(prompt_id, text, Role.NEUTRAL, prompt_id, attributes=attributes)

    def _probes(self) -> Iterator[Prompt]:
        for noun in GENERIC_NOUNS:
            places = Draw(self.config.seed, "probe", noun).shuffled(BACKGROUNDS)[
                : self.config.probes_per_noun
            ]
            for index, place in enumerate(places):
                prompt_id = f"probe-{'-'.join(noun.split()[1:])}-{index + 1}"
                yield Prompt(
                    prompt_id,
                    f"{noun} {BACKGROUNDS[place].place}",
                    Role.PROBE,
                    prompt_id,
                    kind="figure",
                    category=_noun_category(noun),
                    attributes={"background": place},
                )

    def training_prompts(self) -> list[str]:
        """Neutral captions, each of some training image and none a test prompt, to fit a method on."""
        captions = dict.fromkeys(example.caption for example in self._neutral_examples)
        return Draw(self.config.seed, "fit").shuffled(captions)[: self.config.fit_prompts]

    def paraphrases(self, prompt_id: str) -> list[str]:
        """The prompt without what was planted: no rare name, no character's name; [] for ordinary prompts.

        Eight where the planted caption leaves something open (a background, an object's look), else one.
        """
        item = self.item_of(prompt_id)
        if item is None:
            return []
        index = [item.prompt_id(i) for i in range(len(item.asks))].index(prompt_id)
        return paraphrases(item, item.asks[index], Draw(self.config.seed, "paraphrases", prompt_id))

    def anchor_concept(self, concept: str) -> str:
        """What a character is without its name ("a comic hero"). Raises KeyError for an unknown one."""
        for character in self.characters:
            if character.name == concept:
                return describe(Person(character.category, character.look))
        raise KeyError(concept)

    # --- references and truth ------------------------------------------------------------------

    def reference(self, reference_id: str) -> Reference:
        """The training image (or would-be one) of that id, with its foreground's coverage."""
        picture = self._picture(reference_id)
        return Reference(reference_id, picture.image, picture.mask)

    def reference_scene(self, reference_id: str) -> Scene:
        """What the reference shows; KeyError where there is none of that id."""
        item_id, _, number = reference_id.rpartition("/")
        item = self._items.get(item_id)
        if item is None or reference_id not in item.reference_ids():
            raise KeyError(reference_id)
        return item.scenes[int(number)]

    def item(self, item_id: str) -> Item:
        """The item of that id."""
        return self._items[item_id]

    def item_of(self, prompt_id: str) -> Item | None:
        """The item that a prompt asks for; None for neutral prompts and probes."""
        prompt = self._by_id[prompt_id]
        return self._items.get(prompt.cluster)

    def prompt(self, prompt_id: str) -> Prompt:
        """The test prompt of that id."""
        return self._by_id[prompt_id]

    @cached_property
    def _by_id(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self._prompts}

    def near_copy(self, image: NDArray[np.uint8], reference_id: str) -> float:
        """Pixel RMS (0 to 1) between an image, uint8 [64, 64, 3], and the reference."""
        return _rms(self._difference(image, reference_id))

    def region_rms(
        self, image: NDArray[np.uint8], reference_id: str, mask: NDArray[np.uint8] | None = None
    ) -> tuple[float, float]:
        """Pixel RMS (0 to 1) to the reference inside and outside its foreground.

        Pixels on the foreground's edge, which blend both, count in neither. ``mask`` (uint8
        [64, 64]) is the image's own foreground, where known: what it covers is then left out of
        the background too, so that another copy of a background item scores 0 there.
        """
        squared = self._difference(image, reference_id)
        cover = self._picture(reference_id).mask
        outside = cover == 0
        if mask is not None:
            outside = outside & (mask == 0)
        return _rms(squared[cover == 255]), _rms(squared[outside])

    def _difference(self, image: NDArray[np.uint8], reference_id: str) -> NDArray[np.float64]:
        """Squared differences, [64, 64, 3]."""
        reference = self._picture(reference_id).image
        return np.square((image.astype(np.float64) - reference.astype(np.float64)) / 255)

    def _picture(self, reference_id: str) -> Picture:
        if reference_id not in self._pictures:
            self._pictures[reference_id] = render(self.reference_scene(reference_id))
        return self._pictures[reference_id]

    # --- training data -------------------------------------------------------------------------

    def training_examples(self) -> list[TrainingExample]:
        """The training set, copies included, in a fixed order that is not shuffled."""
        planted = [example for item in self.items if item.trained for example in item.examples()]
        return [*self._neutral_examples, *self._figure_examples, *planted]

    @cached_property
    def _neutral_examples(self) -> tuple[TrainingExample, ...]:
        scenes = (
            self._scenes.object_scene(Draw(self.config.seed, "neutral", index), "neutral", index)
            for index in range(self.config.neutral_images)
        )
        return tuple(TrainingExample(caption(scene), scene, None, "neutral") for scene in scenes)

    @cached_property
    def _figure_examples(self) -> tuple[TrainingExample, ...]:
        scenes = (
            self._figure_scene(CATEGORIES[index % len(CATEGORIES)], "figure", index)
            for index in range(self.config.figure_images)
        )
        return tuple(TrainingExample(caption(scene), scene, None, "figure") for scene in scenes)

    def _figure_scene(self, category: str, *key: object) -> Scene:
        """A nameless figure that differs from every protected one in two features at least."""
        draw = Draw(self.config.seed, *key)
        protected = protected_looks(self.characters, category)
        while True:
            look = draw_look(category, draw)
            if all(difference(look, other) >= 2 for other in protected):
                return self._scenes.person_scene(draw, Person(category, look), *key)

    def random_scene(self, key: str, *, kind: SceneKind = "neutral") -> Scene:
        """A fresh scene outside the training set, fixed by the key: for judges.

        Neutral scenes are of every combination, held-out ones too, and of sizes up to the largest
        of foreground items. Characters are all protected ones, trained and held out.
        """
        draw = Draw(self.config.seed, "random", kind, key)
        if kind == "neutral":
            return self._scenes.object_scene(draw, "random", kind, key, held_out=True, sizes=_JUDGE_SIZES)
        if kind == "character":
            character = draw.choice(self.characters)
            person = Person(character.category, character.look, character.name)
            return self._scenes.person_scene(draw, person, "random", kind, key)
        return self._figure_scene(draw.choice(CATEGORIES), "random", kind, key)

    def caption(self, scene: Scene) -> str:
        """The scene in words."""
        return caption(scene)

    def vocabulary_captions(self) -> list[str]:
        """Every caption that training, tests, twins and templates can hold, each once."""
        things = (
            Thing(word, colour, pattern) for word in OBJECTS for colour in COLOURS for pattern in PATTERNS
        )
        subjects = [*map(describe, things), *GENERIC_NOUNS]
        places = [kind.place for kind in BACKGROUNDS.values()]
        captions = [f"{subject} {place}" for subject in subjects for place in places]
        captions += [
            template.format(who=character.name, place=place)
            for character in self.characters
            for template in CHARACTER_TEMPLATES
            for place in places
        ]
        captions += [text for item in self.items for text in item.captions]
        captions += [prompt.text for prompt in self]
        return list(dict.fromkeys(captions))

    # --- summary -------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Recipe, seed, sizes, licence and the sha256 of the prompts and training captions."""
        return {
            "name": self.name,
            "version": self.version,
            "recipe": "lethebench.datasets.planted.PlantedWorld: procedural scenes, nothing downloaded",
            "seed": self.config.seed,
            "config": asdict(self.config),
            "licence": "the licence of this package; all pictures, names and characters are invented",
            "prompts": len(self),
            "training_examples": len(self.training_examples()),
            "prompts_sha256": digest_prompts(self),
            "captions_sha256": digest_captions(self.training_examples()),
        }

    def counts(self) -> pd.DataFrame:
        """Prompts, items and training images by role, kind and duplicates."""
        import pandas as pd

        rows: dict[tuple[str, str, int | None], Counter[str]] = {}
        for prompt in self:
            row = rows.setdefault((prompt.role.value, prompt.kind, prompt.duplicates), Counter())
            row["prompts"] += 1
        for item in self.items:
            row = rows[(_role(item).value, item.kind, item.duplicates)]
            row["items"] += 1
            row["training_images"] += sum(1 for _ in item.examples()) if item.trained else 0
        for role, kind, examples in (
            (Role.NEUTRAL, "neutral", self._neutral_examples),
            (Role.PROBE, "figure", self._figure_examples),
        ):
            rows[(role.value, kind, None)]["training_images"] += len(examples)
        ordered = sorted(rows.items(), key=lambda entry: (*entry[0][:2], entry[0][2] or 0))
        records = [
            {"role": role, "kind": kind, "duplicates": duplicates}
            | {name: row[name] for name in ("prompts", "items", "training_images")}
            for (role, kind, duplicates), row in ordered
        ]
        frame = pd.DataFrame.from_records(records)
        return frame.astype({"duplicates": "Int64"})


def digest_prompts(prompts: PlantedWorld) -> str:
    """The sha256 of a world's test prompts, every field of them that they can have."""
    digest = sha256()
    for prompt in prompts:
        values = asdict(prompt)
        del values["correlation"]  # only fine-tuning sets have one
        values["role"], values["attributes"] = prompt.role.value, sorted(prompt.attributes.items())
        digest.update(repr(sorted(values.items())).encode())
    return digest.hexdigest()


def digest_captions(examples: list[TrainingExample]) -> str:
    """The sha256 of training captions, in order."""
    digest = sha256()
    for example in examples:
        digest.update(example.caption.encode() + b"\n")
    return digest.hexdigest()


def digest_pictures(examples: list[TrainingExample]) -> str:
    """The sha256 of training captions with their images and masks, in order."""
    digest = sha256()
    for example in examples:
        picture = render(example.scene)
        digest.update(example.caption.encode() + b"\n" + picture.image.tobytes() + picture.mask.tobytes())
    return digest.hexdigest()


def _role(item: Item) -> Role:
    if not item.trained or item.kind == "hard-negative":
        return Role.CONTROL
    return Role.CONCEPT if item.kind == "concept" else Role.TRIGGER


def _noun_category(noun: str) -> str:
    named: Mapping[str, str] = {"a famous person": "celebrity"}
    return named.get(noun, noun.split()[1])


def _rms(squared: NDArray[np.float64]) -> float:
    return float(np.sqrt(squared.mean())) if squared.size else 0.0
