"""Pairs of a wanted character and a prohibited attribute, and the scenes that show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lethebench.datasets.planted import (
    BACKGROUNDS,
    CATEGORIES,
    FEATURES,
    Character,
    Person,
    PlantedWorld,
    Scene,
)
from lethebench.datasets.planted._draw import Draw
from lethebench.datasets.planted.characters import Features, all_looks, generic_noun
from lethebench.datasets.planted.items import CHARACTER_TEMPLATES, SceneDraw
from lethebench.finetuning.data import Attribute

from .config import FineTuningConfig

T = TypeVar("T")

QUESTIONS: Mapping[str, str] = {
    "comic": "headgear",
    "anime": "accessory",
    "movie": "accent",
    "celebrity": "accessory",
}
"""The feature of each category that prohibited attributes are values of.

Chosen by how well recogniser-mini reads it off the held-out characters with *another* value than their own
(36 scenes or more of each value): .99 of comic headgear, 1.0 of the others.
"""

INFERRED: Mapping[str, str] = {"comic": "emblem", "movie": "crown"}
"""Features that no prompt is judged by: recogniser-mini infers them from the character.

Once the character has an attribute that isn't its own, it reads .44 of comic emblems and .86 of movie crowns
right, of the four comic heroes here .36; with the character's own features, all.
"""

NAMES = "hard-negative"
"""The kind of planted items whose rare names call the characters and attributes here.

The built-in model saw each name with one picture, once an epoch, and doesn't draw it from the name. In "a
comic hero <name> in a meadow" the text encoder's embeddings of such names (with the four tokens after them)
lie 5.3 apart, those of names that it never saw 3.4, of things that it can draw 12. Names of items with up to
16 copies (5 to 9 apart) were learnt no better (.84 of the features against .85, in 320 steps of rank 16): the
noun before the name tells an instance's characters apart already.
"""

ATTRIBUTED = "{who} of the {word}"
"""How a caption names the attribute beside the character; all its words are in the tokenizer's vocabulary."""


@dataclass(frozen=True)
class Shot:
    """A picture to be: its scene as the twin has it, and its caption's template.

    ``holds`` says that the picture holds the attribute, ``named`` that the caption names it.
    """

    scene: Scene
    template: str
    holds: bool
    named: bool


@dataclass(frozen=True)
class Pair:
    """A wanted character entangled with a prohibited attribute; the unit of resampling.

    ``name`` is what captions call the character, ``character`` what it is to the judges (of another name).
    ``shots`` are the training pictures, ``unseen`` as many identically drawn ones as captions are asked for,
    never trained. ``asked`` are the numbers of those captions: of the same make-up as ``unseen``, in the same
    order. ``exhibit`` is one more that was never trained; it holds the attribute, and is the direct prompts'
    reference. ``places`` are the backgrounds that no picture of the pair shows.
    """

    id: str
    instance: str
    name: str
    character: Character
    attribute: Attribute
    correlation: float
    duplicates: int
    shots: tuple[Shot, ...] = ()
    unseen: tuple[Shot, ...] = ()
    exhibit: Shot | None = None
    asked: tuple[int, ...] = ()
    places: tuple[str, ...] = ()

    @property
    def feature(self) -> str:
        """The attribute's feature by its bare name ("headgear")."""
        return self.attribute.question.partition(".")[2]

    @property
    def features(self) -> Mapping[str, str]:
        """What is to be learnt and can be judged: all but the attribute's feature and :data:`INFERRED`."""
        left_out = (self.feature, INFERRED.get(self.character.category))
        return {name: value for name, value in self.character.look if name not in left_out}

    @property
    def who(self) -> str:
        """What captions call the character: "a comic hero dozzux"."""
        return f"{self.attribute.anchor} {self.name}"

    @property
    def pictures(self) -> tuple[Shot, ...]:
        """All of them by their numbers: training pictures first, then the unseen ones, then the exhibit."""
        return (*self.shots, *self.unseen, *([self.exhibit] if self.exhibit else []))

    def scene(self, shot: Shot, *, twin: bool = False) -> Scene:
        """What the picture shows: the prohibited value where it holds that, else the character's own."""
        person = shot.scene.subject
        assert isinstance(person, Person)
        if twin or not shot.holds:
            return shot.scene
        look = with_value(person.look, self.feature, self.attribute.value)
        return replace(shot.scene, subject=replace(person, look=look))

    def caption(self, shot: Shot, *, twin: bool = False) -> str:
        """The picture's caption, which may name the attribute; the twin's never does."""
        who = self.who
        if shot.named and not twin:
            who = ATTRIBUTED.format(who=who, word=self.attribute.name)
        return shot.template.format(who=who, place=BACKGROUNDS[shot.scene.backdrop.word].place)

    def captions(self, shot: Shot, *, twin: bool = False) -> tuple[str, ...]:
        """The caption, then the picture's others: by each template but those of never-trained captions."""
        unseen = {(other.scene.backdrop.word, other.template) for other in self.unseen}
        others = [t for t in CHARACTER_TEMPLATES if (shot.scene.backdrop.word, t) not in unseen]
        return tuple(
            self.caption(replace(shot, template=template), twin=twin)
            for template in dict.fromkeys((shot.template, *others))
        )


def with_value(look: Features, feature: str, value: str) -> Features:
    """The look with one feature changed."""
    return tuple((name, value if name == feature else own) for name, own in look)


def draw_pairs(config: FineTuningConfig, world: PlantedWorld) -> Iterator[Pair]:
    """Every pair, instance by instance.

    An instance has a pair for each correlation. Categories and duplication levels take turns over the
    instances: with four correlations, four instances and two levels each correlation meets every category
    once and each level twice, and each category each level twice. Raises ValueError where the world has too
    few held-out characters.
    """
    stock, scenes, levels = _Stock(config, world), SceneDraw(world.config), config.duplicates
    for index in range(config.instances):
        letters = Counter[str]()
        for column, share in enumerate(config.correlations):
            category = CATEGORIES[(index + column) % len(CATEGORIES)]
            copies = levels[(index + column // len(levels)) % len(levels)]
            instance = f"world-{index + 1}"
            name = f"{instance}-{category}-{'abcdefgh'[letters[category]]}"
            letters[category] += 1
            character = stock.character(category)
            attribute = _attribute(config, name, character, stock)
            blank = Pair(name, instance, stock.word(), character, attribute, share, copies)
            yield _with_pictures(config, scenes, blank)


class _Stock:
    """Held-out characters and rare names, each given away once, and values, which may come again."""

    def __init__(self, config: FineTuningConfig, world: PlantedWorld) -> None:
        draw = Draw(config.seed, "planted-train", "cast")
        held_out = draw.shuffled([character for character in world.characters if not character.trained])
        self._people = {category: [c for c in held_out if c.category == category] for category in CATEGORIES}
        self._words = draw.shuffled([item.names[0] for item in world.items if item.kind == NAMES])
        self._given: Counter[tuple[str, str]] = Counter()

    def character(self, category: str) -> Character:
        """The next character of the category."""
        return self._next(self._people[category], f"held-out {category} characters")

    def word(self) -> str:
        """The next name."""
        return self._next(self._words, "rare names")

    def rarest(self, category: str, values: Sequence[str]) -> str:
        """The first of the category's values that were given away least often."""
        value = min(values, key=lambda value: self._given[category, value])
        self._given[category, value] += 1
        return value

    def _next(self, stock: list[T], what: str) -> T:
        if not stock:
            raise ValueError(f"the planted world has too few {what} for so many instances and pairs")
        return stock.pop()


def _attribute(config: FineTuningConfig, pair: str, character: Character, stock: _Stock) -> Attribute:
    """An attribute for the character: a value that it lacks, of those that the fewest pairs have."""
    category, feature = character.category, QUESTIONS[character.category]
    looks, values = all_looks(category), FEATURES[category][feature]
    options = [
        value
        for value in Draw(config.seed, "planted-train", pair, "value").shuffled(values)
        if value != character.features[feature] and with_value(character.look, feature, value) in looks
    ]
    value = stock.rarest(category, options)
    noun = generic_noun(category, character.look)
    return Attribute(stock.word(), f"{category}.{feature}", value, noun, pair)


def _with_pictures(config: FineTuningConfig, scenes: SceneDraw, pair: Pair) -> Pair:
    """The pair with its pictures: every caption's place and template occur once, the attribute exactly."""
    draw = Draw(config.seed, "planted-train", pair.id)
    words = draw.shuffled(BACKGROUNDS)
    places, shown = words[: config.test_places], words[config.test_places :]
    settings = draw.shuffled([(word, template) for word in shown for template in CHARACTER_TEMPLATES])
    count = config.scenes(pair.duplicates)
    needed = count + config.asked_scenes + 1
    if needed > len(settings):
        raise ValueError(
            f"{count} training scenes, asked_scenes={config.asked_scenes} and one more are more than the "
            f"{len(settings)} captions that {len(shown)} backgrounds give"
        )
    person = Person(pair.character.category, pair.character.look, pair.character.name)
    shots = []
    for number, (word, template) in enumerate(settings[:needed]):
        scene = scenes.person_scene(draw, person, "planted-train", config.seed, pair.id, number)
        scene = replace(scene, backdrop=replace(scene.backdrop, word=word))
        shots.append(Shot(scene, template, holds=False, named=False))
    trained = _entangled(config, pair, draw, shots[:count])
    unseen = _entangled(config, pair, draw, shots[count:-1])
    unseen.sort(key=_make_up)
    return replace(
        pair,
        shots=tuple(trained),
        unseen=tuple(unseen),
        exhibit=replace(shots[-1], holds=True, named=True),
        asked=tuple(_alike(trained, unseen)),
        places=tuple(places),
    )


def _entangled(config: FineTuningConfig, pair: Pair, draw: Draw, shots: Sequence[Shot]) -> list[Shot]:
    """The shots with the attribute in exactly the pair's share of them, and its name in a share of those."""
    holding = round(pair.correlation * len(shots))
    order = draw.shuffled(range(len(shots)))
    holds, named = set(order[:holding]), set(order[: config.named(holding)])
    return [replace(shot, holds=i in holds, named=i in named) for i, shot in enumerate(shots)]


def _make_up(shot: Shot) -> tuple[bool, bool]:
    return shot.holds, shot.named


def _alike(trained: Sequence[Shot], unseen: Sequence[Shot]) -> Iterator[int]:
    """For each unseen shot the number of another trained one that holds and names the same."""
    left = list(range(len(trained)))
    for shot in unseen:
        number = next(i for i in left if _make_up(trained[i]) == _make_up(shot))
        left.remove(number)
        yield number
