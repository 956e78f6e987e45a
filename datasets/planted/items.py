"""Planted items: what is repeated, under which captions, and its twin on the coin's other side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import sqrt

from ._draw import CANVAS, COLOURS, Draw
from .backgrounds import BACKGROUNDS
from .characters import CATEGORIES, Character, Features, draw_cast
from .config import WorldConfig
from .names import invent_names
from .objects import COVERAGE, OBJECTS, PATTERNS
from .scene import Backdrop, Person, Placement, Scene, Thing, caption, describe

SCENE_SIZES = (88, 136)
"""Smallest and largest object in neutral pictures, in canvas pixels (22 to 34 picture pixels)."""

CHARACTER_TEMPLATES = (
    "{who} {place}",
    "a picture of {who} {place}",
    "here is {who} {place}",
    "a drawing of {who} {place}",
)
"""How captions name a character."""

_CLUSTER_TEMPLATES = (
    "{name} {thing}",
    "{name}, a {thing}",
    "a picture of {name} {thing}",
    "the {thing} of {name}",
)

Combination = tuple[str, str, str]


@dataclass(frozen=True)
class Ask:
    """A test prompt of an item: its text and what the text states, as (attribute, value) pairs."""

    text: str
    states: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TrainingExample:
    """One training image with its caption.

    ``item`` is the planted item's id (None for neutral pictures and nameless figures), ``kind`` its
    kind, "neutral" or "figure".
    """

    caption: str
    scene: Scene
    item: str | None
    kind: str


@dataclass(frozen=True)
class Item:
    """Something planted, or its held-out twin.

    ``kind`` is "verbatim", "foreground", "background", "one-to-many", "redundant-trigger",
    "concept" or "hard-negative". ``duplicates`` counts the training copies (of each image, for
    one-to-many; None for concepts). ``captions`` are the training captions, ``scenes`` the
    different pictures, of which the first ``references`` are references; ``asks`` are the test
    prompts. For a held-out item all of these are what would have been trained. ``pair`` is shared
    by twins, ``twin`` is the other's id.
    """

    id: str
    kind: str
    pair: str
    duplicates: int | None
    trained: bool
    twin: str | None
    names: tuple[str, ...]
    captions: tuple[str, ...]
    scenes: tuple[Scene, ...]
    references: int
    asks: tuple[Ask, ...]

    def examples(self) -> Iterator[TrainingExample]:
        """Its training examples, copies included: what a trained item adds, or its twin would have."""
        if self.kind == "one-to-many":
            for scene in self.scenes:
                for index in range(self.duplicates or 0):
                    yield TrainingExample(
                        self.captions[index % len(self.captions)], scene, self.id, self.kind
                    )
            return
        for index in range(self.duplicates or len(self.scenes)):
            text = self.captions[index % len(self.captions)]
            yield TrainingExample(text, self.scenes[index % len(self.scenes)], self.id, self.kind)

    def prompt_id(self, index: int) -> str:
        """The id of its prompt of that number."""
        return self.id if len(self.asks) == 1 else f"{self.id}-{index + 1}"

    def reference_ids(self) -> tuple[str, ...]:
        """The ids of its references."""
        return tuple(f"{self.id}/{index}" for index in range(self.references))


class SceneDraw:
    """Draws random scenes, keeping the held-out combinations out unless asked for them."""

    def __init__(self, config: WorldConfig) -> None:
        self.seed = config.seed
        combinations = [
            (word, colour, place) for word in OBJECTS for colour in COLOURS for place in BACKGROUNDS
        ]
        count = round(config.held_out_share * len(combinations))
        self.held_out: frozenset[Combination] = frozenset(
            Draw(config.seed, "held-out").shuffled(combinations)[:count]
        )

    def backdrop(self, draw: Draw, *key: object) -> Backdrop:
        """A new background instance, its pixels fixed by the key."""
        return Backdrop(draw.choice(tuple(BACKGROUNDS)), self._key(*key))

    def thing(self, draw: Draw) -> Thing:
        """Any object."""
        return Thing(draw.choice(OBJECTS), draw.choice(tuple(COLOURS)), draw.choice(PATTERNS))

    def fits(self, thing: Thing, word: str) -> bool:
        """Whether training may show the object on that kind of background."""
        return (thing.word, thing.colour, word) not in self.held_out

    def place_object(self, draw: Draw, sizes: tuple[int, int] = SCENE_SIZES) -> Placement:
        """A place where an object of a random size lies inside the picture."""
        size = draw.integer(*sizes)
        margin = min(CANVAS // 2, size // 2 + 10)
        return Placement(
            draw.integer(margin, CANVAS - margin),
            draw.integer(margin, CANVAS - margin),
            size,
            draw.chance(0.5),
        )

    def object_scene(
        self, draw: Draw, *key: object, held_out: bool = False, sizes: tuple[int, int] = SCENE_SIZES
    ) -> Scene:
        """An object somewhere; of a held-out combination only if ``held_out`` allows it."""
        while True:
            backdrop, thing = self.backdrop(draw, *key), self.thing(draw)
            if held_out or self.fits(thing, backdrop.word):
                return Scene(backdrop, thing, self.place_object(draw, sizes))

    def person_scene(self, draw: Draw, person: Person, *key: object) -> Scene:
        """A character or figure somewhere."""
        size = draw.integer(136, 168)
        x = draw.integer(94, CANVAS - 94)
        if person.category in ("anime", "celebrity"):
            y = CANVAS - size // 2 + draw.integer(-6, 8)
        else:
            y = draw.integer(104, 156)
        placement = Placement(x, y, size, draw.chance(0.4), draw.integer(0, 2))
        return Scene(self.backdrop(draw, *key), person, placement)

    def _key(self, *key: object) -> str:
        return "/".join(str(part) for part in (self.seed, *key))


def _states(scene: Scene, *names: str) -> tuple[tuple[str, str], ...]:
    attributes = scene.attributes()
    return tuple((name, attributes[name]) for name in names)


_SCENE_WORDS = ("object", "colour", "pattern", "background")
_Maker = Callable[[SceneDraw, Draw, "Item", int], "Item"]


def _verbatim(scenes: SceneDraw, draw: Draw, item: Item, _: int) -> Item:
    scene = scenes.object_scene(draw, item.id)
    text = f"{item.names[0]}, {caption(scene)}"
    return replace(
        item,
        captions=(text,),
        scenes=(scene,),
        references=1,
        asks=(Ask(text, _states(scene, *_SCENE_WORDS)),),
    )


def _foreground(scenes: SceneDraw, draw: Draw, item: Item, copies: int) -> Item:
    thing = scenes.thing(draw)
    # Cover 17 to 26 % of the picture whatever the object's shape.
    size = round(CANVAS * sqrt(draw.uniform(0.17, 0.26) / COVERAGE[thing.word]))
    placement = scenes.place_object(draw, (size, size))
    words = [word for word in BACKGROUNDS if scenes.fits(thing, word)]
    pictures = tuple(
        Scene(Backdrop(draw.choice(words), f"{scenes.seed}/{item.id}/{index}"), thing, placement)
        for index in range(copies)
    )
    text = f"{item.names[0]}, {describe(thing)}"
    return replace(
        item,
        captions=(text,),
        scenes=pictures,
        references=1,
        asks=(Ask(text, _states(pictures[0], "object", "colour", "pattern")),),
    )


def _background(scenes: SceneDraw, draw: Draw, item: Item, copies: int) -> Item:
    backdrop = scenes.backdrop(draw, item.id)
    pictures: list[Scene] = []
    while len(pictures) < copies:
        thing = scenes.thing(draw)
        if scenes.fits(thing, backdrop.word):
            pictures.append(Scene(backdrop, thing, scenes.place_object(draw)))
    text = f"{BACKGROUNDS[backdrop.word].of} {item.names[0]}"
    return replace(
        item,
        captions=(text,),
        scenes=tuple(pictures),
        references=1,
        asks=(Ask(text, _states(pictures[0], "background")),),
    )


def _one_to_many(scenes: SceneDraw, draw: Draw, item: Item, images: int) -> Item:
    word = draw.choice(OBJECTS)
    pictures: list[Scene] = []
    while len(pictures) < images:
        scene = scenes.object_scene(draw, item.id, len(pictures))
        thing = replace(scenes.thing(draw), word=word)
        if scenes.fits(thing, scene.backdrop.word):
            pictures.append(replace(scene, subject=thing))
    texts = tuple(template.format(name=item.names[0], thing=word) for template in _CLUSTER_TEMPLATES)
    return replace(
        item,
        captions=texts,
        scenes=tuple(pictures),
        references=images,
        asks=tuple(Ask(text, (("object", word),)) for text in texts),
    )


def _redundant(scenes: SceneDraw, draw: Draw, item: Item, _: int) -> Item:
    scene = scenes.object_scene(draw, item.id)
    first, second = item.names
    texts = tuple(f"{names}, {caption(scene)}" for names in (first, second, f"{first} {second}"))
    return replace(
        item,
        captions=texts,
        scenes=(scene,),
        references=1,
        asks=tuple(Ask(text, _states(scene, *_SCENE_WORDS)) for text in texts),
    )


class Planter:
    """Draws every item of a world: pairs from one distribution, then a coin for each pair."""

    def __init__(self, config: WorldConfig, scenes: SceneDraw) -> None:
        self._config = config
        self._scenes = scenes
        self._names = invent_names(config.seed)

    def plant(self) -> tuple[tuple[Item, ...], tuple[Character, ...]]:
        """All items (hard negatives last) and all characters."""
        config = self._config
        items: list[Item] = []
        for copies, pairs in config.verbatim_pairs:
            items += self._pairs("verbatim", copies, pairs, _verbatim, copies)
        for copies, pairs in config.foreground_pairs:
            items += self._pairs("foreground", copies, pairs, _foreground, copies)
        for copies, pairs in config.background_pairs:
            items += self._pairs("background", copies, pairs, _background, copies)
        for copies, pairs in config.one_to_many_pairs:
            items += self._pairs("one-to-many", copies, pairs, _one_to_many, config.one_to_many_images)
        for copies, pairs in config.redundant_pairs:
            items += self._pairs("redundant-trigger", copies, pairs, _redundant, copies, names=2)
        characters = [character for category in CATEGORIES for character in self._characters(category)]
        for character in characters:
            items.append(self._concept(character))
        items += [self._hard_negative(index) for index in range(config.hard_negatives)]
        return tuple(items), tuple(characters)

    def _coin(self, pair: str) -> bool:
        return Draw(self._config.seed, "coin", pair).chance(0.5)

    def _draw(self, *key: object) -> Draw:
        return Draw(self._config.seed, *key)

    def _pairs(
        self, kind: str, copies: int, pairs: int, make: _Maker, number: int, names: int = 1
    ) -> Iterator[Item]:
        for index in range(pairs):
            pair = f"{kind}-{copies:03d}-{index + 1:02d}"
            coin = self._coin(pair)
            for side, other, trained in (("a", "b", coin), ("b", "a", not coin)):
                blank = Item(
                    f"{pair}-{side}",
                    kind,
                    pair,
                    copies,
                    trained,
                    f"{pair}-{other}",
                    tuple(next(self._names) for _ in range(names)),
                    (),
                    (),
                    0,
                    (),
                )
                yield make(self._scenes, self._draw(blank.id), blank, number)

    def _characters(self, category: str) -> Iterator[Character]:
        count = self._config.characters_per_category
        looks = draw_cast(category, count, self._draw("cast", category))
        names = [next(self._names) for _ in looks]
        for index in range(0, count - 1, 2):
            pair = f"concept-{category}-{index // 2 + 1:02d}"
            coin = self._coin(pair)
            for side, here, there, trained in (("a", 0, 1, coin), ("b", 1, 0, not coin)):
                yield Character(
                    names[index + here],
                    category,
                    looks[index + here],
                    trained,
                    names[index + there],
                    f"{pair}-{side}",
                )

    def _concept(self, character: Character) -> Item:
        config, pair, side = self._config, character.item[:-2], character.item[-1]
        draw = self._draw(character.item)
        person = Person(character.category, character.look, character.name)
        scenes = tuple(
            self._scenes.person_scene(draw, person, character.item, index)
            for index in range(config.concept_images)
        )
        texts = tuple(character_caption(scene, draw.choice(CHARACTER_TEMPLATES)) for scene in scenes)
        asked = self._draw(pair, "prompts")
        words = asked.shuffled(BACKGROUNDS)[: config.concept_prompts]
        asks = tuple(
            Ask(
                asked.choice(CHARACTER_TEMPLATES).format(who=character.name, place=BACKGROUNDS[word].place),
                (("background", word),),
            )
            for word in words
        )
        return Item(
            character.item,
            "concept",
            pair,
            None,
            character.trained,
            f"{pair}-{'b' if side == 'a' else 'a'}",
            (character.name,),
            texts,
            scenes,
            config.concept_references,
            asks,
        )

    def _hard_negative(self, index: int) -> Item:
        name = f"hard-negative-{index + 1:03d}"
        blank = Item(name, "hard-negative", name, 1, True, None, (next(self._names),), (), (), 0, ())
        return _verbatim(self._scenes, self._draw(name), blank, 1)


def paraphrases(item: Item, ask: Ask, draw: Draw, count: int = 8) -> list[str]:
    """What a test prompt of the item says without the planted names, in a neutral picture's words.

    ``count`` different ones where the prompt leaves the object's look or its place open, else one.
    """
    subject = item.scenes[0].subject
    if isinstance(subject, Person):
        nameless = describe(replace(subject, name=None))
        return [ask.text.replace(item.names[0], nameless)]
    states = dict(ask.states)
    things = [
        Thing(states.get("object", word), states.get("colour", colour), states.get("pattern", pattern))
        for word in OBJECTS
        for colour in COLOURS
        for pattern in PATTERNS
    ]
    places = [states["background"]] if "background" in states else list(BACKGROUNDS)
    texts = {f"{describe(thing)} {BACKGROUNDS[place].place}": None for thing in things for place in places}
    return draw.shuffled(tuple(texts))[:count]


def character_caption(scene: Scene, template: str = CHARACTER_TEMPLATES[0]) -> str:
    """The caption of a character's or figure's scene in one of the templates."""
    return template.format(who=describe(scene.subject), place=BACKGROUNDS[scene.backdrop.word].place)


def protected_looks(characters: tuple[Character, ...], category: str) -> tuple[Features, ...]:
    """The looks of a category's protected characters."""
    return tuple(character.look for character in characters if character.category == category)
