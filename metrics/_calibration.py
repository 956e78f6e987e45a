"""Sets the thresholds of FB-Mem and copy-mini on the planted world, and writes them with their recipe.

Run ``python -m lethebench.metrics._calibration`` again whenever the world, the segmenter, the descriptor or
the similarity changes; it takes a few minutes and writes ``fbmem/calibration.json``, ``fbmem/unrelated.json``
(what both variants of FB-Mem say of unrelated pictures, by mask area) and ``copy_mini/calibration.json``. A
test refuses a calibration that was made with other judges' weights.

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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lethebench.metrics._common import CALIBRATION, HARD_NEGATIVE, PLANTED_KINDS, Images, trigger_references
from lethebench.metrics._world import fresh_picture
from lethebench.metrics.fbmem._constants import AS_RELEASED_TAU, KEEP, MASK_THRESHOLD, MIN_AREA
from lethebench.prompts import Prompt
from lethebench.seeding import derive_seed

if TYPE_CHECKING:
    from lethebench.datasets.planted import PlantedWorld
    from lethebench.metrics.fbmem._functional import Pictures, Variant

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
PAIRS = 4
"""Random unrelated references for each negative."""
AREA_EDGES = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 1.01)
"""Bins of the table of unrelated pictures."""


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
    null = _best_matches(_seen(world, list(negatives(world, count, seed)), segmenter), exact)
    examples = list(positives(world, seed))
    copies = _best_matches(_seen(world, examples, segmenter), None)
    copies["part"] = np.array([example.part for example in examples])
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


class _Seen(NamedTuple):
    """Examples and all references that they may reproduce, with the foregrounds that the metric sees."""

    made: Pictures
    references: Pictures
    own: NDArray[np.bool_]
    """Whether a reference is the example's own, ``[examples, references]``."""
    trained: NDArray[np.bool_]


def _seen(world: PlantedWorld, examples: Sequence[Example], segmenter: Any) -> _Seen:
    from lethebench.metrics.fbmem._functional import Pictures

    if segmenter is None:
        from lethebench import judges

        segmenter = judges.load("segmenter-mini")
    trained = set(trigger_references(world))
    ids = sorted(trained.union(*(example.prompt.references for example in examples)))

    def pictures(images: Images) -> Pictures:
        return Pictures.of(images, segmenter.masks(images) >= MASK_THRESHOLD)

    references = pictures(np.stack([world.reference(name).image for name in ids]))
    return _Seen(
        pictures(np.stack([example.image for example in examples])),
        references,
        np.array([[name in example.prompt.references for name in ids] for example in examples]),
        np.array([name in trained for name in ids]),
    )


def _best_matches(
    seen: _Seen, exact: int | None, variant: Variant = "masked", keep: int | None = KEEP
) -> dict[str, NDArray[Any]]:
    """For each example: the best match's F and B, whether it is an own reference, the foreground's area."""
    import torch

    from lethebench.metrics.fbmem._functional import against_all, best_match

    trained = torch.from_numpy(seen.trained)
    rows: list[tuple[float, ...]] = []
    with torch.inference_mode():
        for number in range(len(seen.made)):
            one = seen.made[slice(number, number + 1)]
            own = torch.from_numpy(seen.own[number])
            candidates = own | trained
            f, b = against_all(one, seen.references, variant, keep=keep, always=own, among=candidates)
            best = best_match(f, b)
            row: tuple[float, ...] = (float(f[best]), float(b[best]), float(own[best]))
            if exact is None or number < exact:
                f, b = against_all(one, seen.references, variant, keep=None, among=candidates)
                other = best_match(f, b)
                rows.append((*row, other == best, float(f[other]), float(b[other])))
            else:
                rows.append((*row, np.nan, np.nan, np.nan))
    names = ("foreground", "background", "own", "same_best", "exact_foreground", "exact_background")
    columns = dict(zip(names, np.array(rows, dtype=float).T, strict=True))
    return {**columns, "area": seen.made.masks.mean(dim=(1, 2, 3)).numpy()}


def unrelated_fbmem(
    world: PlantedWorld, tau: dict[str, float], count: int = 1000, seed: int = 0, segmenter: Any = None
) -> dict[str, Any]:
    """What both variants of FB-Mem say of never-memorized pictures, by the share that foregrounds cover.

    ``images``: negatives against all candidates by the best match, as the metric scores an image, by the
    image's own foreground. ``pairs``: the same negatives, each with :data:`PAIRS` random references of other
    items, by the union of both foregrounds. ``noise``: pairs of 1/f noise of 512 pixels behind discs (five
    scales), foreground similarity only. ``memorized`` is the share that isn't NM at the variant's thresholds.
    """
    from lethebench.metrics.fbmem._noise import noise_table

    seen = _seen(world, list(negatives(world, count, seed)), segmenter)
    taus = {"masked": tau, "as-released": dict.fromkeys(tau, AS_RELEASED_TAU)}
    pairs = _random_pairs(seen, seed)
    found: dict[str, Any] = {}
    variants: tuple[Variant, ...] = ("masked", "as-released")
    for variant in variants:
        keep = KEEP if variant == "masked" else None
        images = _best_matches(seen, 0, variant, keep)
        found[variant] = {
            "images": _says(images["area"], images["foreground"], images["background"], taus[variant]),
            "pairs": _says(pairs["area"], pairs[variant][0], pairs[variant][1], taus[variant]),
            "noise": noise_table(variant),
        }
    return {
        **found,
        "recipe": {"negatives": count, "pairs": len(pairs["area"]), "seed": seed, "tau": taus},
        "made_with": _made_with(world, "segmenter-mini"),
    }


def _random_pairs(seen: _Seen, seed: int, batch: int = 64) -> dict[str, NDArray[Any]]:
    """Examples with others' images: union area ``[pairs]``, and each variant's F and B ``[2, pairs]``."""
    import torch

    from lethebench.metrics.fbmem._functional import region_similarity

    rng = _rng(seed, "unrelated")
    others = np.stack([rng.choice(np.flatnonzero(~own), PAIRS, replace=False) for own in seen.own])
    columns: dict[str, list[Any]] = {"masked": [], "as-released": [], "area": []}
    variants: tuple[Variant, ...] = ("masked", "as-released")
    with torch.inference_mode():
        for start in range(0, len(seen.made), batch):
            rows = torch.arange(start, min(start + batch, len(seen.made))).repeat_interleave(PAIRS)
            a = seen.made[rows]
            b = seen.references[torch.from_numpy(others[start : start + batch].reshape(-1))]
            for variant in variants:
                columns[variant].append(torch.stack(region_similarity(a, b, variant)).numpy())
            columns["area"].append(torch.maximum(a.masks, b.masks).mean(dim=(1, 2, 3)).numpy())
    return {name: np.concatenate(parts, axis=-1) for name, parts in columns.items()}


def _says(
    area: NDArray[Any], foreground: NDArray[Any], background: NDArray[Any], tau: dict[str, float]
) -> dict[str, Any]:
    """Mean similarities and shares that reach their thresholds, by area; empty bins are left out."""
    front, back = foreground >= tau["foreground"], background >= tau["background"]
    found = {}
    for low, high in pairwise(AREA_EDGES):
        rows = (area >= low) & (area < high)
        if rows.any():
            found[f"{low:.2f}-{high:.2f}"] = {
                "n": int(rows.sum()),
                "foreground": round(float(foreground[rows].mean()), 4),
                "background": round(float(background[rows].mean()), 4),
                "foreground_reached": _share(front[rows]),
                "background_reached": _share(back[rows]),
                "memorized": _share((front | back)[rows]),
            }
    return found


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


def write(name: str, found: dict[str, Any], file: str = CALIBRATION) -> Path:
    """Write one metric's calibration, or what rests on it; returns its path."""
    path = ROOM / name / file
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
        if name == "fbmem":
            unrelated = unrelated_fbmem(world, found["tau"], seed=given.seed)
            print(f"{write(name, unrelated, 'unrelated.json')}: {json.dumps(unrelated, indent=1)}")


if __name__ == "__main__":
    main()
