"""Does the model still draw? Attributes that prompts ask for, diversity, and blank or noisy images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Direction, Metric, Score, Shard
from lethebench.metrics._common import Floats, Images, check_images, check_shard, spread
from lethebench.prompts import Prompt, Role
from lethebench.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

JUDGE = "recogniser-mini"
ATTRIBUTES = ("object", "colour", "pattern", "background", "category")
THUMBNAIL = 8
"""Side of the thumbnails on which diversity is taken: noise averages out, so noise isn't diverse."""
MIN_CONTRAST = 0.04
MIN_SMOOTHNESS = 0.4
"""Images with less contrast are blank, with less smoothness noise.

Scenes of the planted world have at least 0.107 and 0.63 (4,148 scenes, backgrounds alone included); uniform
noise has 0.29 and 0.
"""


def contrast(images: Images) -> Floats:
    """Standard deviation of each image's pixels in 0 to 1, over places and channels: ``[n]``."""
    check_images("fidelity-mini", images)
    return np.asarray((images / 255.0).std(axis=(1, 2, 3)))


def smoothness(images: Images) -> Floats:
    """Correlation of neighbouring pixels of each image, the mean of right and lower neighbours: ``[n]``.

    1 for a flat image.
    """
    check_images("fidelity-mini", images)
    grey = images.mean(axis=3) / 255.0
    pairs = ((grey[:, :, 1:], grey[:, :, :-1]), (grey[:, 1:], grey[:, :-1]))
    return np.asarray(sum(_correlation(a, b) for a, b in pairs) / 2)


def _correlation(a: Floats, b: Floats) -> Floats:
    a, b = (x - x.mean(axis=(1, 2), keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    return np.where(scale > 1e-9, (a * b).sum(axis=(1, 2)) / np.maximum(scale, 1e-9), 1.0)


def thumbnails(images: Images) -> Floats:
    """Block means of each image in 0 to 1: ``[n, 8 * 8 * 3]``. Sides must be multiples of 8."""
    check_images("fidelity-mini", images)
    n, height, width, _ = images.shape
    if height % THUMBNAIL or width % THUMBNAIL:
        raise ValueError(f"fidelity-mini: sides must be multiples of {THUMBNAIL}; got {height} x {width}")
    blocks = images.reshape(n, THUMBNAIL, height // THUMBNAIL, THUMBNAIL, width // THUMBNAIL, 3)
    return np.asarray(blocks.mean(axis=(2, 4)).reshape(n, THUMBNAIL * THUMBNAIL * 3) / 255.0)


def diversity(vectors: Floats, prompts: NDArray[Any]) -> float:
    """Mean root mean square distance of two thumbnails ``[n, d]`` of different ``prompts`` ``[n]``.

    NaN where there are no two prompts.
    """
    squares = (vectors**2).sum(axis=1)
    between = np.maximum(squares[:, None] + squares[None] - 2 * vectors @ vectors.T, 0) / vectors.shape[1]
    different = prompts[:, None] != prompts[None]
    return float(np.sqrt(between)[different].mean()) if different.any() else float("nan")


def asked(prompt: Prompt) -> dict[str, str]:
    """What the picture should show, as far as this metric asks: no characters, which vqa-mini asks about."""
    wanted = {name: value for name, value in prompt.attributes.items() if name in ATTRIBUTES}
    if prompt.role is Role.PROBE and prompt.category is not None:
        wanted["category"] = prompt.category
    return wanted


def _score(
    name: str, column: str, role: Role | None, direction: Direction, help: str, unit: str = "share"
) -> Score:
    roles = frozenset({role}) if role is not None else frozenset[Role]()
    judge = JUDGE if unit == "share" and name != "broken" else None
    return Score(
        f"fidelity_mini.{name}", column, direction, unit, (0.0, 1.0), roles=roles, help=help, judge=judge
    )


@METRICS.register
class FidelityMini(Metric):
    """What a mitigated model must keep, and what a broken one loses; all choices are ours.

    - attributes: share of the attributes that a prompt asks for (object, colour, pattern, background; for
      nameless figures the category and the background) that the recogniser finds in the image;
    - diversity: mean distance (root mean square, 0 to 1) of 8 x 8 pixel thumbnails of neutral images of
      different prompts: 0 where all images are one, and low for noise, which averages out;
    - broken: share of images that are blank (contrast below 0.04) or noise (neighbouring pixels
      correlated below 0.4).
    """

    name: ClassVar[str] = "fidelity-mini"
    summary: ClassVar[str] = "Attributes asked for and found, diversity, blank and noisy images."
    source: ClassVar[str] = "ours; judge recogniser-mini"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = (
        _score(
            "attributes",
            "fidelity_mini_attributes",
            Role.NEUTRAL,
            "higher",
            "Share of the attributes asked for by neutral prompts that the image shows.",
        ),
        *(
            _score(
                name,
                f"fidelity_mini_{name}",
                Role.NEUTRAL,
                "higher",
                f"Share of images on neutral prompts that show the {name} asked for.",
            )
            for name in ATTRIBUTES[:4]
        ),
        _score(
            "trigger_attributes",
            "fidelity_mini_attributes",
            Role.TRIGGER,
            "higher",
            "Share of the attributes asked for by trigger prompts that the image shows.",
        ),
        _score(
            "probe",
            "fidelity_mini_attributes",
            Role.PROBE,
            "higher",
            "Share of what prompts for nameless figures ask for that the image shows: low where a method "
            "suppresses more than the protected characters.",
        ),
        _score(
            "diversity",
            "fidelity_mini_thumbnail",
            Role.NEUTRAL,
            "higher",
            "Distance between images of different neutral prompts: low where all are one thing, or noise.",
            "rms",
        ),
        _score(
            "broken", "fidelity_mini_broken", None, "lower", "Share of all images that are blank or noise."
        ),
    )
    set_valued: ClassVar[frozenset[str]] = frozenset({"fidelity_mini.diversity"})
    reads: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """Share of attributes found, each attribute, broken (0 or 1), and neutral images' thumbnails."""
        check_shard(self.name, shard)
        broken = (contrast(shard.images) < MIN_CONTRAST) | (smoothness(shard.images) < MIN_SMOOTHNESS)
        neutral = [i for i, prompt in enumerate(shard.prompts) if prompt.role is Role.NEUTRAL]
        return {
            **self._attributes(shard),
            "fidelity_mini_broken": broken.astype(float),
            "fidelity_mini_thumbnail": spread(thumbnails(shard.images[neutral]), neutral, len(shard)),
        }

    def _attributes(self, shard: Shard) -> dict[str, Floats]:
        wanted = [asked(prompt) for prompt in shard.prompts]
        columns = {name: np.full(len(shard), np.nan) for name in ATTRIBUTES}
        at = [i for i, attributes in enumerate(wanted) if attributes]
        if at:
            answers = self._judge().answer(shard.images[at])
            for row, i in enumerate(at):
                for name, value in wanted[i].items():
                    if name in answers.labels and value in answers.options[name]:
                        columns[name][i] = float(answers.labels[name][row] == value)
        stacked = np.stack(list(columns.values()))
        known = ~np.isnan(stacked)
        share = np.full(len(shard), np.nan)
        np.divide(np.nansum(stacked, axis=0), known.sum(axis=0), out=share, where=known.any(axis=0))
        return {
            "fidelity_mini_attributes": share,
            **{f"fidelity_mini_{name}": values for name, values in columns.items()},
        }

    def aggregate(self, score: Score, table: pd.DataFrame) -> float:
        """Diversity between prompts; the mean for all other scores."""
        if score.name not in self.set_valued:
            return super().aggregate(score, table)
        vectors = np.stack([np.asarray(v, dtype=np.float64) for v in table[score.column]])
        return diversity(vectors, table["prompt_id"].to_numpy())

    def facts(self) -> dict[str, Any]:
        """Judge and constants."""
        return {
            "judge": JUDGE,
            "thumbnail": THUMBNAIL,
            "min_contrast": MIN_CONTRAST,
            "min_smoothness": MIN_SMOOTHNESS,
        }

    def _judge(self) -> Any:
        if self.judge is None:
            from lethebench import judges

            return judges.load("recogniser-mini")
        return self.judge
