"""The pools of fresh scenes that the judges are trained and measured on.

A pool is rendered once and cached. Its scenes are drawn by the planted world's ``random_scene``
under the pool's own keys, so that training, validation and test pools share no scene with each
other nor with the pictures that the diffusion models are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lethebench.datasets.planted import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    FEATURES,
    GENERIC_NOUNS,
    OBJECTS,
    PATTERNS,
    Person,
    PlantedWorld,
    Scene,
    Thing,
    digest_prompts,
    render,
    render_backdrop,
)
from lethebench.datasets.planted.characters import all_looks, difference
from lethebench.datasets.planted.items import CHARACTER_TEMPLATES, protected_looks
from lethebench.datasets.planted.scene import describe
from lethebench.judges.recogniser import NONE
from lethebench.seeding import derive_seed

T = TypeVar("T")

RARE = "qzxqzx"
"""A word outside every vocabulary: stands for the rare names of planted items in training captions."""

KINDS = ("object", "character", "figure", "near miss", "backdrop")
"""What a row of a pool shows. A near miss is a nameless figure two features away from a character."""


@dataclass(frozen=True)
class PoolRecipe:
    """How many scenes a pool holds; all sizes are ours.

    Objects and characters come in families of ``family`` fresh pictures of the same kind: the same
    object, colour, pattern and kind of background (or the same character on the same kind of
    background), drawn anew in instance, place, size and pose.
    """

    name: str
    object_families: int = 2750
    character_families: int = 2250
    figures: int = 3000
    near_misses: int = 3000
    backdrops: int = 1000
    family: int = 4

    def scaled(self, scale: float) -> PoolRecipe:
        """A smaller pool, for tests."""
        sizes: dict[str, Any] = {
            key: max(4, round(value * scale)) if value else 0
            for key, value in asdict(self).items()
            if key not in _FIXED
        }
        return replace(self, **sizes)


_FIXED = ("name", "family")

TRAINING = PoolRecipe("train")
FIGURES = PoolRecipe("figures", 0, 0, 9000, 0, 0)
"""More nameless figures for the recogniser: with the training pool alone it learns their small features
by heart (hairstyles .98 on the pool, .93 on other scenes)."""
VALIDATION = PoolRecipe("validation", 160, 140, 200, 200, 80)
TEST = PoolRecipe("test", 250, 192, 300, 300, 100)


@dataclass(frozen=True)
class Pool:
    """Rendered scenes.

    ``images`` uint8 ``[n, 64, 64, 3]``; ``masks`` uint8 ``[n, 64, 64]`` coverage; ``labels`` int16
    ``[n, attributes]`` are columns of :func:`attribute_options`, -1 where a question can't be put;
    ``kinds`` int8 ``[n]`` into :data:`KINDS`; ``families`` int64 ``[f, 4]`` are rows of one family.
    ``captions`` str ``[n, 6]``: the true one, three with one attribute changed, a true one of a part
    of the picture and the same with it changed. ``meanings`` str ``[n, 4]`` are the first four
    without template or name, to know captions that mean the same.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    labels: NDArray[np.int16]
    kinds: NDArray[np.int8]
    families: NDArray[np.int64]
    captions: NDArray[np.str_]
    meanings: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.images)

    def joined(self, other: Pool) -> Pool:
        """Both pools' rows, these first."""
        parts = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in Pool.__dataclass_fields__
        }
        parts["families"][len(self.families) :] += len(self)
        return Pool(**parts)

    def rows(self, *kinds: str) -> NDArray[np.int64]:
        """The rows that show one of the kinds."""
        return np.flatnonzero(np.isin(self.kinds, [KINDS.index(kind) for kind in kinds]))


def attribute_options(world: PlantedWorld) -> dict[str, tuple[str, ...]]:
    """The possible answers to each question, in the order of a pool's label columns."""
    options = {
        "object": (*OBJECTS, "character", "figure", NONE),
        "colour": (*COLOURS, NONE),
        "pattern": (*PATTERNS, NONE),
        "background": (*BACKGROUNDS, NONE),
        "category": (*CATEGORIES, NONE),
        "character": (*(character.name for character in world.characters), NONE),
        "protected": ("no", "yes"),
    }
    features = {f"{c}.{name}": values for c, named in FEATURES.items() for name, values in named.items()}
    return options | features


def label_scene(attributes: dict[str, str], options: dict[str, tuple[str, ...]]) -> list[int]:
    """The label columns of a scene's attributes: -1 for the features of other categories."""
    category = attributes.get("category", NONE)
    answers = attributes | {"protected": "yes" if "character" in attributes else "no"}
    labels = []
    for name, values in options.items():
        if "." in name:
            owner, feature = name.split(".")
            labels.append(values.index(attributes[feature]) if owner == category else -1)
        else:
            labels.append(values.index(answers.get(name, NONE)))
    return labels


def make_pool(world: PlantedWorld, recipe: PoolRecipe, folder: Path | None = None, workers: int = 1) -> Pool:
    """The pool of a recipe: read from ``folder`` where it is cached for this world, else rendered."""
    tag = json.dumps({"world": digest_prompts(world), "recipe": asdict(recipe), "version": 2}, sort_keys=True)
    path = folder / f"pool-{recipe.name}.npz" if folder is not None else None
    if path is not None and path.exists():
        with np.load(path) as stored:
            if str(stored["tag"]) == tag:
                return Pool(**{name: stored[name] for name in Pool.__dataclass_fields__})
    pool = _render_pool(world, recipe, workers)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, tag=tag, **{name: getattr(pool, name) for name in Pool.__dataclass_fields__})
        temporary.replace(path)
    return pool


def _render_pool(world: PlantedWorld, recipe: PoolRecipe, workers: int) -> Pool:
    options = attribute_options(world)
    planned = list(_plan(world, recipe))
    scenes = [scene for _, scene in planned]
    pictures = _parallel(scenes, [kind == "backdrop" for kind, _ in planned], workers)
    labels = [label_scene(_shown(kind, scene), options) for kind, scene in planned]
    texts = [
        write_captions(world, scene, kind, f"{recipe.name}/{i}") for i, (kind, scene) in enumerate(planned)
    ]
    in_families = recipe.family * (recipe.object_families + recipe.character_families)
    return Pool(
        images=np.stack([image for image, _ in pictures]),
        masks=np.stack([mask for _, mask in pictures]),
        labels=np.array(labels, np.int16),
        kinds=np.array([KINDS.index(kind) for kind, _ in planned], np.int8),
        families=np.arange(in_families).reshape(-1, recipe.family),
        captions=np.array([captions for captions, _ in texts]),
        meanings=np.array([meanings for _, meanings in texts]),
    )


def _shown(kind: str, scene: Scene) -> dict[str, str]:
    return {"background": scene.backdrop.word} if kind == "backdrop" else dict(scene.attributes())


def _plan(world: PlantedWorld, recipe: PoolRecipe) -> Iterator[tuple[str, Scene]]:
    """Kind and scene of each row, families first."""
    for index in range(recipe.object_families):
        for scene in _family(world, f"{recipe.name}/object/{index}", "neutral", recipe.family):
            yield "object", scene
    for index in range(recipe.character_families):
        for scene in _family(world, f"{recipe.name}/character/{index}", "character", recipe.family):
            yield "character", scene
    for index in range(recipe.figures):
        yield "figure", world.random_scene(f"judges/{recipe.name}/figure/{index}", kind="figure")
    near = {category: near_misses(world, category) for category in CATEGORIES}
    for index in range(recipe.near_misses):
        key = f"judges/{recipe.name}/near/{index}"
        scene = world.random_scene(key, kind="figure")
        assert isinstance(scene.subject, Person)
        looks = near[scene.subject.category]
        look = looks[derive_seed(key) % len(looks)]
        yield "near miss", replace(scene, subject=replace(scene.subject, look=look))
    for index in range(recipe.backdrops):
        yield "backdrop", world.random_scene(f"judges/{recipe.name}/backdrop/{index}")


def near_misses(world: PlantedWorld, category: str) -> list[tuple[tuple[str, str], ...]]:
    """Every look of a category whose nearest protected character differs in exactly two features."""
    protected = protected_looks(world.characters, category)
    return [look for look in all_looks(category) if min(difference(look, other) for other in protected) == 2]


def _family(world: PlantedWorld, key: str, kind: str, size: int) -> Iterator[Scene]:
    """A fresh scene and its siblings: the same subject and kind of background, all else drawn anew."""
    first = _draw_scene(world, f"judges/{key}/0", kind)
    yield first
    made, attempt = 1, 0
    while made < size:
        attempt += 1
        other = _draw_scene(world, f"judges/{key}/{attempt}", kind)
        # Where a person may stand depends on the category.
        if getattr(other.subject, "category", None) == getattr(first.subject, "category", None):
            made += 1
            yield replace(
                other, subject=first.subject, backdrop=replace(other.backdrop, word=first.backdrop.word)
            )


def _draw_scene(world: PlantedWorld, key: str, kind: str) -> Scene:
    return world.random_scene(key, kind="character" if kind == "character" else "neutral")


def _parallel(
    scenes: Sequence[Scene], empty: Sequence[bool], workers: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    if workers <= 1:
        return [_render_one(scene, bare) for scene, bare in zip(scenes, empty, strict=True)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_render_one, scenes, empty, chunksize=256))


def _render_one(scene: Scene, bare: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if bare:
        image = render_backdrop(scene.backdrop)
        return image, np.zeros(image.shape[:2], np.uint8)
    picture = render(scene)
    return picture.image, picture.mask


# --- captions ------------------------------------------------------------------------------------


def write_captions(world: PlantedWorld, scene: Scene, kind: str, key: str) -> tuple[list[str], list[str]]:
    """Six captions of a row of a pool and the meanings of the first four (see :class:`Pool`)."""
    pick = _Pick(key)
    place = BACKGROUNDS[scene.backdrop.word].place
    other_place = BACKGROUNDS[pick.other(tuple(BACKGROUNDS), scene.backdrop.word)].place
    if kind == "backdrop":
        wrong = [BACKGROUNDS[word].place for word in pick.several(tuple(BACKGROUNDS), scene.backdrop.word, 3)]
        return [place, *wrong, place, other_place], [place, *wrong]
    subject = describe(scene.subject)
    changed = changed_subjects(world, scene.subject, pick)
    pairs = [(subject, place), *((other, place) for other in changed[:2]), (subject, other_place)]
    template = pick.one(CHARACTER_TEMPLATES) if pick.chance(0.4) else CHARACTER_TEMPLATES[0]
    prefix = f"{RARE}, " if pick.chance(0.25) else ""
    captions = [prefix + template.format(who=who, place=where) for who, where in pairs]
    part = [prefix + subject, prefix + changed[2]]
    if pick.chance(0.3):
        owned = f" of {RARE}" if pick.chance(0.5) else ""
        words = (scene.backdrop.word, pick.other(tuple(BACKGROUNDS), scene.backdrop.word))
        part = [
            BACKGROUNDS[word].of.removesuffix(" of") + owned if owned else BACKGROUNDS[word].place
            for word in words
        ]
    return captions + part, [f"{who} {where}" for who, where in pairs]


def changed_subjects(world: PlantedWorld, subject: Thing | Person, pick: _Pick) -> list[str]:
    """Three descriptions of the subject with one attribute changed, in random order."""
    if isinstance(subject, Thing):
        changes = [
            replace(subject, word=pick.other(OBJECTS, subject.word)),
            replace(subject, colour=pick.other(tuple(COLOURS), subject.colour)),
            replace(subject, pattern=pick.other(PATTERNS, subject.pattern)),
        ]
        return [describe(changed) for changed in pick.shuffled(changes)]
    if subject.name is None:
        noun = describe(subject)
        nouns = [other for other in GENERIC_NOUNS if other != noun]
        # A nameless figure is no protected character: the name of one of its category is wrong too.
        names = [c.name for c in world.characters if c.category == subject.category]
        return pick.shuffled([pick.one(nouns), pick.one(nouns), pick.one(names)])
    same = [c.name for c in world.characters if c.category == subject.category and c.name != subject.name]
    other = [c.name for c in world.characters if c.category != subject.category]
    return [*pick.shuffled([pick.one(same), pick.one(other)]), pick.one(same)]


class _Pick:
    """Seeded choices for captions."""

    def __init__(self, key: str) -> None:
        self._rng = np.random.default_rng(derive_seed("judge captions", key))

    def chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def one(self, options: Sequence[T]) -> T:
        return options[int(self._rng.integers(len(options)))]

    def other(self, options: Sequence[T], but: T) -> T:
        return self.one([option for option in options if option != but])

    def several(self, options: Sequence[T], but: T, count: int) -> list[T]:
        return self.shuffled([option for option in options if option != but])[:count]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return [options[int(index)] for index in self._rng.permutation(len(options))]
