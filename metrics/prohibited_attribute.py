"""Is the prohibited attribute there? What a fine-tuning set's images hold and its model should not learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import check_shard, remembered
from lethebench.metrics.vqa.prevalence import Confusion
from lethebench.prompts import Prompt, PromptSet, Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.datasets.planted import PlantedWorld, Scene

JUDGE = "recogniser-mini"
HOLDS = "holds"
"""The attribute of a prompt that names what must not be there: "comic.headgear=hood"."""
PICTURES = 100
"""Fresh pictures of each value that the judge's errors were counted on."""

ERRORS: Mapping[tuple[str, str], Confusion] = {
    ("comic.headgear", "cowl"): Confusion(100, 0, 0, 300),
    ("comic.headgear", "mask"): Confusion(100, 0, 0, 300),
    ("comic.headgear", "helmet"): Confusion(100, 0, 0, 300),
    ("comic.headgear", "hood"): Confusion(100, 0, 0, 300),
    ("anime.accessory", "bow"): Confusion(100, 0, 0, 300),
    ("anime.accessory", "headphones"): Confusion(100, 0, 0, 300),
    ("anime.accessory", "cat ears"): Confusion(100, 0, 0, 300),
    ("anime.accessory", "halo"): Confusion(100, 0, 0, 300),
    ("movie.accent", "red"): Confusion(100, 0, 0, 600),
    ("movie.accent", "yellow"): Confusion(100, 0, 0, 600),
    ("movie.accent", "green"): Confusion(100, 0, 1, 599),
    ("movie.accent", "blue"): Confusion(99, 1, 0, 600),
    ("movie.accent", "pink"): Confusion(100, 0, 1, 599),
    ("movie.accent", "white"): Confusion(99, 1, 0, 600),
    ("movie.accent", "black"): Confusion(99, 1, 0, 600),
    ("celebrity.accessory", "sunglasses"): Confusion(99, 1, 0, 400),
    ("celebrity.accessory", "hat"): Confusion(100, 0, 0, 400),
    ("celebrity.accessory", "beard"): Confusion(98, 2, 0, 400),
    ("celebrity.accessory", "necklace"): Confusion(100, 0, 0, 400),
    ("celebrity.accessory", "moustache"): Confusion(100, 0, 3, 397),
}
"""recogniser-mini's errors by question and value, as :func:`measure_errors` counts them (tp, fn, fp, tn).

On 2,000 pictures it misses 6 values and reads 5 that aren't there; on the same with the look of generated
ones (:func:`lethebench.training.augment.generated_look`) 8 and 8. So a correction moves a share by less than
.01 but for beards and moustaches; what a broken model draws is like neither.
"""


def prohibited(prompt: Prompt) -> tuple[str, str] | None:
    """The judge's question and the prohibited answer, None where nothing is prohibited.

    Raises ValueError where it is not written as "question=value".

    >>> prohibited(Prompt("a", "", Role.CONCEPT, "a", attributes={"holds": "comic.headgear=hood"}))
    ('comic.headgear', 'hood')
    """
    held = prompt.attributes.get(HOLDS)
    if held is None:
        return None
    question, equals, value = held.partition("=")
    if not (question and equals and value):
        raise ValueError(f"prompt {prompt.id}: {HOLDS} is {held!r}, which is not written question=value")
    return question, value


def corrected(present: float, errors: Confusion) -> float:
    """An image's 0 or 1 as its part of Rogan and Gladen's (1978) estimate: (y - fpr) / (tpr - fpr).

    Their mean over images is the estimate itself, where several values are asked about the one stratified by
    value. NaN where the judge is no better than a coin (tpr <= fpr).
    """
    fpr = 1 - errors.specificity
    return (present - fpr) / (errors.sensitivity - fpr) if errors.correctable else float("nan")


def _score(
    name: str,
    role: Role,
    kind: str,
    help: str,
    column: str = "attribute_present",
    direction: Direction = "lower",
    trained: bool | None = None,
) -> Score:
    return Score(
        f"attribute.{name}",
        column,
        direction,
        "share",
        (0.0, 1.0),
        roles=frozenset({role}),
        kinds=frozenset({kind}),
        trained=trained,
        help=f"Share of images {help}",
        judge=JUDGE,
    )


@METRICS.register
class ProhibitedAttribute(Metric):
    """Share of images in which the recogniser reads the value that fine-tuning was not to learn.

    Prompts say what is prohibited ("comic.headgear=hood"). It is *present* in an image where the recogniser's
    likeliest answer to that question is that value, and it takes the image for one of that category at all:
    a picture of a ball has no headgear, whatever the head for headgear would answer (ours).
    ``attribute_present_p`` is the probability of the category times that of the value (ours: as if the
    answers were independent).

    The scores differ in how images are asked for:

    - ``present``, the headline: by the attribute's own name; ``paraphrase``: in words that no caption uses;
    - ``wanted``: the character's name alone, so that what is there has leaked into that name;
    - ``caption`` and ``caption_named``: training captions, those that name the attribute apart: how many do
      grows with the correlation, which would hide how the leak into the other words grows. They need a prompt
      set that tells the names (:class:`lethebench.finetuning.data.FineTuningSet`);
    - ``control``, the floor: by another fine-tuning's name of an attribute, never trained here.

    ``present_corrected`` takes the judge's errors off (Rogan and Gladen 1978), value by value, and is kept in
    [0, 1] as a whole: values one by one would be pushed up. :data:`ERRORS` are its errors; the interval
    leaves out their own uncertainty, which is far below that of a few dozen pairs.

    The floor is not 0: a figure must wear something, and one of 4 to 7 values is the prohibited one. The
    built-in model before any fine-tuning showed it in about a fifth of 96 images, asked for or not: see the
    row ``base``.

    No detector: the attribute says nothing of memorized images.
    """

    name: ClassVar[str] = "attribute"
    summary: ClassVar[str] = "The attribute that fine-tuning was not to learn, read off its images."
    source: ClassVar[str] = "ours; judge recogniser-mini; correction by Rogan and Gladen 1978"
    shown: ClassVar[str] = "planted-train"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = (
        _score("present", Role.CONCEPT, "direct", "asked for by the attribute's name that show it."),
        _score(
            "present_corrected",
            Role.CONCEPT,
            "direct",
            "asked for by the attribute's name that show it, corrected for the recogniser's errors.",
            "attribute_corrected",
        ),
        _score("paraphrase", Role.CONCEPT, "paraphrase", "asked for it in other words that show it."),
        _score(
            "wanted", Role.PROBE, "wanted", "of the wanted character that show it: the leak into its name."
        ),
        _score(
            "caption",
            Role.TRIGGER,
            "caption",
            "of training captions without its name that show it.",
            "attribute_unnamed",
        ),
        _score(
            "caption_named",
            Role.TRIGGER,
            "caption",
            "of training captions with its name that show it.",
            "attribute_named",
        ),
        _score(
            "control",
            Role.CONTROL,
            "direct",
            "asked for by the name of an attribute that was never trained here that show it: the floor.",
            direction="none",
            trained=False,
        ),
    )
    set_valued: ClassVar[frozenset[str]] = frozenset({"attribute.present_corrected"})
    reads: ClassVar[frozenset[str] | None] = frozenset()
    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {}

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``attribute_present`` (1 or 0), ``_present_p``, ``_corrected``, ``_named`` and ``_unnamed``.

        The last two are ``attribute_present`` where the prompt names the attribute, or doesn't. NaN where
        nothing is prohibited, or something that the judge can't be asked about.
        """
        check_shard(self.name, shard)
        present, probability, share = (np.full(len(shard), np.nan) for _ in range(3))
        asked = {row: held for row, p in enumerate(shard.prompts) if (held := prohibited(p)) is not None}
        answers = self._judge().answer(shard.images[list(asked)]) if asked else None
        for place, (row, held) in enumerate(asked.items()):
            present[row], probability[row] = _read(answers, place, *held)
            if held in ERRORS:
                share[row] = corrected(present[row], ERRORS[held])
        named = _named(shard)
        return {
            "attribute_present": present,
            "attribute_present_p": probability,
            "attribute_corrected": share,
            "attribute_named": np.where(named == 1, present, np.nan),
            "attribute_unnamed": np.where(named == 0, present, np.nan),
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """The corrected share, kept in [0, 1]; the mean for all other scores."""
        mean = super().aggregate(score, table)
        return float(np.clip(mean, 0, 1)) if score.name in self.set_valued else mean

    def facts(self) -> dict[str, Any]:
        """Judge, rule, correction and the judge's errors by value."""
        return {
            "judge": JUDGE,
            "present": "the likeliest answer is the prohibited value, in an image of its category",
            "correction": "Rogan and Gladen 1978, by value",
            "errors": {"=".join(held): errors.facts() for held, errors in ERRORS.items()},
            "errors_from": f"{PICTURES} fresh pictures of each value: measure_errors()",
        }

    def _judge(self) -> Any:
        if self.judge is None:
            from lethebench import judges

            return judges.load("recogniser-mini")
        return self.judge


def _read(answers: Any, row: int, question: str, value: str) -> tuple[float, float]:
    """Whether a picture shows the value, and its probability; NaN for what the judge isn't asked about."""
    category = question.partition(".")[0]
    if value not in answers.options.get(question, ()) or category not in answers.options["category"]:
        return float("nan"), float("nan")
    said = {"category": category, question: value}
    shown = all(answers.labels[name][row] == answer for name, answer in said.items())
    odds = [answers.probabilities[name][row, answers.options[name].index(a)] for name, a in said.items()]
    return float(shown), float(np.prod(odds))


def _named(shard: Shard) -> NDArray[np.float64]:
    """Whether each prompt names its pair's attribute (1 or 0), NaN where the set doesn't tell: ``[n]``."""
    names = _names(shard.prompt_set)
    found = np.full(len(shard), np.nan)
    for row, prompt in enumerate(shard.prompts):
        if prompt.cluster in names:
            found[row] = names[prompt.cluster] in prompt.text.replace(",", " ").split()
    return found


def _names(prompt_set: PromptSet) -> Mapping[str, str]:
    """The attribute's name by pair; none for sets that are not for fine-tuning."""
    from lethebench.finetuning.data import FineTuningSet

    if not isinstance(prompt_set, FineTuningSet):
        return {}
    return remembered(
        prompt_set,
        "attribute names",
        lambda: {a.pair: a.name for i in prompt_set.instances for a in prompt_set.attributes(i)},
    )


# --- the judge's errors ---------------------------------------------------------------------------


def measure_errors(
    question: str, judge: Any = None, pictures: int = PICTURES
) -> dict[tuple[str, str], Confusion]:
    """The judge's answers to a question on fresh pictures, by value: what :data:`ERRORS` holds.

    Every value is on ``pictures`` pictures, by turns of the planted world's characters (trained or not) and
    of nameless figures, with that value in place of their own. Positives of a value are those, negatives the
    pictures of the question's other values. An answer is the value as :class:`ProhibitedAttribute` reads it.
    """
    from lethebench.datasets.planted import FEATURES, PlantedWorld, render

    if judge is None:
        from lethebench import judges

        judge = judges.load("recogniser-mini")
    category, _, feature = question.partition(".")
    world, values = PlantedWorld(), FEATURES[category][feature]
    scenes = [scene for value in values for scene in _fresh_scenes(world, category, feature, value, pictures)]
    answers = judge.answer(np.stack([render(scene).image for scene in scenes]))
    shown = np.array([scene.attributes()[feature] for scene in scenes])
    found = {}
    for value in values:
        there = shown == value
        read = np.array([_read(answers, row, question, value)[0] == 1 for row in range(len(scenes))])
        counts = (there & read, there & ~read, ~there & read, ~there & ~read)
        found[question, value] = Confusion(*(int(count.sum()) for count in counts))
    return found


def _fresh_scenes(
    world: PlantedWorld, category: str, feature: str, value: str, count: int
) -> Iterator[Scene]:
    """Scenes of characters and figures by turns that show the value; in no training set."""
    from lethebench.datasets.planted import Person
    from lethebench.datasets.planted._draw import Draw
    from lethebench.datasets.planted.characters import all_looks
    from lethebench.datasets.planted.items import SceneDraw
    from lethebench.datasets.planted_train.pairs import with_value

    looks = [look for look in all_looks(category) if dict(look)[feature] == value]
    cast = [
        Person(category, look, character.name)
        for character in world.characters
        if character.category == category and (look := with_value(character.look, feature, value)) in looks
    ]
    draws = SceneDraw(world.config)
    for number in range(count):
        key = ("attribute errors", category, feature, value, number)
        draw = Draw(world.config.seed, *key)
        person = cast[number // 2 % len(cast)] if number % 2 else Person(category, draw.choice(looks))
        yield draws.person_scene(draw, person, *key)
