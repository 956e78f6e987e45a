"""Sets the thresholds of FB-Mem and copy-mini on the planted world, and writes them with their recipe.

Run ``python -m lethebench.metrics._calibration`` again whenever the world, the segmenter, the descriptor or
the similarity changes; it takes a few minutes and writes ``fbmem/calibration.json`` and
``copy_mini/calibration.json``. A test refuses a calibration that was made with other judges' weights.

**Negatives** are never-memorized pictures at their hardest: for the caption of each planted item, twin and
hard negative, fresh renderings of what the caption asks for (the same object, colour, pattern and kind of
background, in another place, size and instance). Half of them are softened like the positives. Each is
scored as a generated image is: against all candidates, by the best match. **Positives** are the planted
pictures themselves, softened: what a model that reproduces them through its autoencoder draws.

**Rule.** Each of FB-Mem's two thresholds is the smallest multiple of 0.005 that at most a quarter of a
percent of the negatives reach, copy-mini's the smallest that at most half a percent reach: at most 0.5 %
false positives by either.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lethebench.metrics._common import CALIBRATION, HARD_NEGATIVE, PLANTED_KINDS, Images, trigger_references
from lethebench.metrics._world import fresh_picture
from lethebench.prompts import Prompt
from lethebench.seeding import derive_seed

if TYPE_CHECKING:
    from lethebench.datasets.planted import PlantedWorld

ROOM = Path(__file__).parent
FALSE_POSITIVES = 0.005
STEP = 0.005
SOFTENING = {
    "blur_sigma": (0.3, 0.9),
    "smooth_noise_rms": (0.0, 0.03),
    "smooth_noise_sigma": 3.0,
    "pixel_noise_rms": (0.0, 0.02),
}
"""What a picture loses by way of an autoencoder and a sampler; uniform in each range."""


@dataclass(frozen=True)
class Example:
    """A picture as a model might draw it for ``prompt``; ``part`` is what it copies of its reference."""

    prompt: Prompt
    image: NDArray[np.uint8]
    part: str


def soften(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture slightly blurred, with smooth and with pixel noise (:data:`SOFTENING`)."""
    from scipy.ndimage import gaussian_filter

    sigma = rng.uniform(*_range("blur_sigma"))
    x = gaussian_filter(image / 255.0, (sigma, sigma, 0))
    wide = float(np.asarray(SOFTENING["smooth_noise_sigma"]))
    smooth = gaussian_filter(rng.standard_normal(x.shape), (wide, wide, 0))
    x = x + smooth / smooth.std() * rng.uniform(*_range("smooth_noise_rms"))
    x = x + rng.standard_normal(x.shape) * rng.uniform(*_range("pixel_noise_rms"))
    found: NDArray[np.uint8] = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    return found


def _range(name: str) -> tuple[float, float]:
    low, high = np.asarray(SOFTENING[name]).tolist()
    return low, high


def negatives(world: PlantedWorld, count: int, seed: int) -> Iterator[Example]:
    """``count`` fresh pictures of what planted captions ask for, every second one softened."""
    prompts = [p for p in world if p.kind in PLANTED_KINDS | {HARD_NEGATIVE}]
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        image = fresh_picture(world, prompt, f"calibration/{seed}/{number}").image
        softened = (number + number // len(prompts)) % 2 == 1
        yield Example(prompt, soften(image, _rng(seed, number)) if softened else image, "nothing")


def positives(world: PlantedWorld, seed: int, most: int = 4) -> Iterator[Example]:
    """Softened pictures of the trained items: verbatim ones, and others with the same fore- or background."""
    from lethebench.datasets.planted import render

    for item in world.items:
        if not item.trained or item.kind not in PLANTED_KINDS:
            continue
        part = item.kind if item.kind in ("foreground", "background") else "both"
        scenes = item.scenes[1 : most + 1] if part != "both" else item.scenes[: item.references]
        prompt = world.prompt(item.prompt_id(0))
        for number, scene in enumerate(scenes):
            for again in range(1 if part != "both" else 2):
                rng = _rng(seed, "positive", item.id, number, again)
                yield Example(prompt, soften(render(scene).image, rng), part)


def _rng(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed("calibration", *parts)))


def threshold(values: Sequence[float] | NDArray[Any], share: float, step: float = STEP) -> float:
    """The smallest multiple of ``step`` that at most ``share`` of the values reach.

    >>> threshold([0.1, 0.2, 0.3, 0.4], 0.25)
    0.305
    """
    ordered = np.sort(np.asarray(values, dtype=float))[::-1]
    allowed = int(np.floor(share * len(ordered)))
    return round((float(np.floor(ordered[allowed] / step + 1e-9)) + 1) * step, 10)


# --- FB-Mem ---------------------------------------------------------------------------------------


def calibrate_fbmem(
    world: PlantedWorld, count: int = 4000, seed: int = 0, segmenter: Any = None, exact: int = 200
) -> dict[str, Any]:
    """FB-Mem's thresholds and what they rest on; ``exact`` negatives are compared to all references too."""
    from lethebench.metrics.fbmem._functional import KEEP, MIN_AREA
    from lethebench.metrics.fbmem.metric import MASK_THRESHOLD

    null = _best_matches(world, list(negatives(world, count, seed)), segmenter, exact)
    copies = _best_matches(world, list(positives(world, seed)), segmenter, None)
    half = FALSE_POSITIVES / 2
    tau = {name: threshold(null[name], half) for name in ("foreground", "background")}
    called = {name: null[name] >= tau[name] for name in tau}
    return {
        "tau": tau,
        "false_positives": {
            "any": _share(called["foreground"] | called["background"]),
            **{name: _share(hit) for name, hit in called.items()},
            "by_foreground_area": _by_area(null["area"], called["foreground"] | called["background"]),
        },
        "true_positives": {
            part: _hits(copies, copies["part"] == part, tau) for part in ("both", "foreground", "background")
        },
        "quantiles": {
            "levels": [0.5, 0.9, 0.99, 0.995, 0.9975, 1.0],
            **{
                name: np.quantile(null[name], [0.5, 0.9, 0.99, 0.995, 0.9975, 1.0]).round(4).tolist()
                for name in tau
            },
        },
        "prefilter": {
            "keep": KEEP,
            "recall_copies": _share(copies["same_best"]),
            "recall_negatives": _share(null["same_best"][:exact]),
            "same_label_copies": _same_label(copies, tau, len(copies["part"])),
            "same_label_negatives": _same_label(null, tau, exact),
        },
        "recipe": {
            "rule": f"smallest multiple of {STEP} that at most {half:.2%} of the negatives reach, each",
            "negatives": count,
            "positives": len(copies["part"]),
            "seed": seed,
            "softening": SOFTENING,
            "similarity": "masked ms-ssim-3",
            "masks": f"segmenter-mini >= {MASK_THRESHOLD}, images and references",
            "min_area": MIN_AREA,
        },
        "made_with": _made_with(world, "segmenter-mini"),
    }


def _best_matches(
    world: PlantedWorld, examples: Sequence[Example], segmenter: Any, exact: int | None
) -> dict[str, NDArray[Any]]:
    """For each example: the best match's F and B, whether it is an own reference, the foreground's area."""
    import torch

    from lethebench.metrics.fbmem._functional import KEEP, Pictures, against_all, best_match
    from lethebench.metrics.fbmem.metric import MASK_THRESHOLD

    if segmenter is None:
        from lethebench import judges

        segmenter = judges.load("segmenter-mini")
    trained = set(trigger_references(world))
    ids = sorted(trained.union(*(example.prompt.references for example in examples)))
    place = {name: number for number, name in enumerate(ids)}
    in_trained = torch.tensor([name in trained for name in ids])

    def pictures(images: Images) -> Pictures:
        return Pictures.of(images, segmenter.masks(images) >= MASK_THRESHOLD)

    references = pictures(np.stack([world.reference(name).image for name in ids]))
    made = pictures(np.stack([example.image for example in examples]))
    rows: list[tuple[float, ...]] = []
    with torch.inference_mode():
        for number, example in enumerate(examples):
            one = made[slice(number, number + 1)]
            own = torch.zeros(len(ids), dtype=torch.bool)
            own[[place[name] for name in example.prompt.references]] = True
            candidates = own | in_trained
            f, b = against_all(one, references, keep=KEEP, always=own, among=candidates)
            best = best_match(f, b)
            row: tuple[float, ...] = (float(f[best]), float(b[best]), ids[best] in example.prompt.references)
            if exact is None or number < exact:
                f, b = against_all(one, references, keep=None, among=candidates)
                other = best_match(f, b)
                rows.append((*row, other == best, float(f[other]), float(b[other])))
            else:
                rows.append((*row, np.nan, np.nan, np.nan))
    names = ("foreground", "background", "own", "same_best", "exact_foreground", "exact_background")
    columns = dict(zip(names, np.array(rows, dtype=float).T, strict=True))
    return {
        **columns,
        "area": made.masks.mean(dim=(1, 2, 3)).numpy(),
        "part": np.array([example.part for example in examples]),
    }


def _same_label(found: dict[str, NDArray[Any]], tau: dict[str, float], count: int) -> float | None:
    """The share of the first ``count`` pictures that get the same label without the prefilter."""
    same = [(found[n][:count] >= t) == (found[f"exact_{n}"][:count] >= t) for n, t in tau.items()]
    return _share(same[0] & same[1])


def _hits(copies: dict[str, NDArray[Any]], rows: NDArray[np.bool_], tau: dict[str, float]) -> dict[str, Any]:
    """How copies of one kind come out: labels, own reference found, similarities' low quantiles."""
    front = copies["foreground"][rows] >= tau["foreground"]
    back = copies["background"][rows] >= tau["background"]
    return {
        "n": int(rows.sum()),
        "vm": _share(front & back),
        "fm": _share(front & ~back),
        "bm": _share(back & ~front),
        "nm": _share(~front & ~back),
        "own_best": _share(copies["own"][rows]),
        "foreground_5_percent": round(float(np.quantile(copies["foreground"][rows], 0.05)), 4),
        "background_5_percent": round(float(np.quantile(copies["background"][rows], 0.05)), 4),
    }


def _by_area(area: NDArray[Any], hits: NDArray[np.bool_]) -> dict[str, Any]:
    """The share of hits by the foreground's share of the picture."""
    edges = (0.0, 0.03, 0.06, 0.1, 0.15, 1.0)
    found = {}
    for low, high in pairwise(edges):
        rows = (area >= low) & (area < high)
        found[f"{low:.2f}-{high:.2f}"] = {"n": int(rows.sum()), "share": _share(hits[rows])}
    return found


def _share(hits: NDArray[np.bool_]) -> float | None:
    return round(float(np.mean(hits)), 5) if len(hits) else None


# --- copy-mini ------------------------------------------------------------------------------------


def calibrate_copy_mini(
    world: PlantedWorld, count: int = 4000, seed: int = 0, judge: Any = None
) -> dict[str, Any]:
    """copy-mini's threshold with all that it rests on."""
    if judge is None:
        from lethebench import judges

        judge = judges.load("copy-mini")
    null = _own_similarity(world, list(negatives(world, count, seed)), judge)
    examples = [e for e in positives(world, seed) if e.part == "both"]
    copies = _own_similarity(world, examples, judge)
    cut = threshold(null, FALSE_POSITIVES)
    levels = [0.5, 0.9, 0.99, 0.995, 1.0]
    return {
        "threshold": cut,
        "false_positives": _share(null >= cut),
        "true_positives": {"n": len(copies), "share": _share(copies >= cut)},
        "quantiles": {"levels": levels, "negatives": np.quantile(null, levels).round(4).tolist()},
        "copies_5_percent": round(float(np.quantile(copies, 0.05)), 4),
        "recipe": {
            "rule": f"smallest multiple of {STEP} that at most {FALSE_POSITIVES:.2%} of the negatives reach",
            "negatives": count,
            "positives": len(copies),
            "seed": seed,
            "softening": SOFTENING,
        },
        "made_with": _made_with(world, "copy-mini"),
    }


def _own_similarity(world: PlantedWorld, examples: Sequence[Example], judge: Any) -> NDArray[np.float64]:
    """The highest cosine of each example to a reference of its prompt."""
    ids = sorted({r for example in examples for r in example.prompt.references})
    references = judge.describe(np.stack([world.reference(name).image for name in ids]))
    known = dict(zip(ids, references, strict=True))
    made = judge.describe(np.stack([example.image for example in examples]))
    return np.array(
        [
            max(float(row @ known[r]) for r in e.prompt.references)
            for row, e in zip(made, examples, strict=True)
        ]
    )


# --- files ----------------------------------------------------------------------------------------


def _made_with(world: PlantedWorld, judge: str) -> dict[str, str]:
    return {"world": str(world.manifest()["prompts_sha256"]), judge: judge_sha256(judge)}


def judge_sha256(name: str) -> str:
    """The recorded sha256 of a judge's weights; "" where the judge isn't there."""
    import lethebench

    path = Path(lethebench.__file__).parent / "weights" / name / "weights.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["model.safetensors"]) if path.is_file() else ""


def write(name: str, found: dict[str, Any]) -> Path:
    """Write one metric's calibration; returns its path."""
    path = ROOM / name / CALIBRATION
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Calibrate both metrics, or one."""
    parser = argparse.ArgumentParser(description="Calibrate thresholds on the planted world.")
    parser.add_argument("names", nargs="*", default=["fbmem", "copy_mini"], help="fbmem and copy_mini")
    parser.add_argument("--negatives", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from lethebench.datasets.planted import PlantedWorld

    world = PlantedWorld()
    for name in given.names:
        calibrate = calibrate_fbmem if name == "fbmem" else calibrate_copy_mini
        found = calibrate(world, given.negatives, given.seed)
        print(f"{write(name, found)}: {json.dumps(found, indent=1)}")


if __name__ == "__main__":
    main()
