"""Measures mini-sd or mini-flux against the world's exact truth; writes its model card and contact sheet.

``lethe train --only card`` (or ``flux-card``) does it alone. Every figure of the card comes from here or
from the records that the training left; nothing is written by hand.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lethebench.datasets.planted import Backdrop, PlantedWorld, Scene, Thing, render
from lethebench.prompts import Prompt
from lethebench.training.draw import Draws, draw_all, kept_draws

if TYPE_CHECKING:
    from lethebench.judges.recogniser import Answers, Recogniser
    from lethebench.judges.segmenter import Segmenter
    from lethebench.specs import SamplerSettings
    from lethebench.training import Job

NEAR_COPY = 0.08
"""Pixel RMS below which an image is a near-copy of a reference, as in testbed.md. The card states how
near never-memorized twins come to theirs, which is the check of this choice."""
REGION_COPY = 0.1
"""The same for the foreground or background alone: an outline that is a pixel off weighs more there."""
DIVERSITY_CAPTIONS, DIVERSITY_IMAGES = 24, 8
"""Neutral captions, and images of each, that the diversity is measured on."""
SCHEDULERS = {"sd": "ddim", "flux": "flow-euler"}
"""The sampler of each family's card."""
FEW_STEPS, GUIDANCES = (4, 8, 20), (1.0, 3.0)
"""Of the small evaluations by number of steps; guidance 1 is none."""


@dataclass(frozen=True)
class Judges:
    """The judges that exist so far; what needs a missing one is left out of the figures."""

    recogniser: Recogniser | None = None
    segmenter: Segmenter | None = None


def images_of(prompt: Prompt) -> int:
    """How many images of a test prompt the evaluation draws: most where a target is stated."""
    often = (prompt.duplicates or 0) >= 64
    match prompt.kind:
        case "verbatim":
            return (8 if often else 4) if prompt.trained else (4 if often else 2)
        case "foreground" | "background":
            return 8 if prompt.trained else 2
        case "one-to-many" | "redundant-trigger":
            return 4 if prompt.trained else 1
        case "concept":
            return 3 if prompt.trained else 2
        case "neutral":
            number = int(prompt.id.rsplit("-", 1)[-1])
            return DIVERSITY_IMAGES if number <= DIVERSITY_CAPTIONS else 1
        case _:
            return 1


def few_images_of(prompt: Prompt) -> int:
    """The same for the evaluations by number of steps: what their four figures need."""
    match prompt.kind:
        case "verbatim":
            return 2 if (prompt.duplicates or 0) >= 64 else 0
        case "concept" | "neutral":
            return 1
        case _:
            return 0


def evaluate(
    weights: Path,
    world: PlantedWorld,
    judges: Judges,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    count: Callable[[Prompt], int] = images_of,
    sampler: SamplerSettings | None = None,
    keep: Path | None = None,
) -> tuple[dict[str, Any], Draws]:
    """Draw from the pipeline in ``weights`` and measure it; the figures, and the images.

    ``sampler`` is by default what the weights' ``lethe.json`` says, with DDIM or flow-matching Euler.
    ``keep`` is a folder that keeps the images, so that measuring again, with other judges, doesn't draw
    again.
    """
    from lethebench.zoo import load_model

    model = load_model(str(weights), device=device, dtype=dtype)
    chosen = {"scheduler": SCHEDULERS[model.family]}
    settings = sampler or model.entry.sampler.model_copy(update=chosen)
    wanted = [(p, k) for p in world for k in range(count(p))]
    draws = (
        kept_draws(keep / "drawn.npz", model, wanted, settings) if keep else draw_all(model, wanted, settings)
    )
    figures: dict[str, Any] = {
        "images": len(draws.images),
        "seconds_per_image": draws.seconds / max(1, len(draws.images)),
        "sampler": settings.model_dump() | {"dtype": dtype},
        "near_copy_below": NEAR_COPY,
        "region_copy_below": REGION_COPY,
        "verbatim": copies_by_duplicates(draws, world, "verbatim"),
        "redundant": copies_by_duplicates(draws, world, "redundant-trigger"),
        "one_to_many": one_to_many(draws, world),
        "hard_negatives": share_below(nearest(draws, world, is_kind("hard-negative")), NEAR_COPY),
        "foreground": regions(draws, world, "foreground", judges.segmenter),
        "background": regions(draws, world, "background", judges.segmenter),
        "floor": floor(draws, world),
        "diversity": diversity(draws, world),
    }
    if judges.recogniser is not None:
        answers = judges.recogniser.answer(draws.images)
        figures["characters"] = characters(draws, answers)
        figures["adherence"] = adherence(draws, answers)
    return figures, draws


def by_steps(
    weights: Path,
    world: PlantedWorld,
    judges: Judges,
    *,
    device: str = "cpu",
    count: Callable[[Prompt], int] = few_images_of,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """Near-copies, characters and adherence of a model with distilled guidance, by steps and guidance."""
    from lethebench.zoo import load_model

    model = load_model(str(weights), device=device)
    wanted = [(p, k) for p in world for k in range(count(p))]
    rows = []
    for steps, guidance in itertools.product(FEW_STEPS, GUIDANCES):
        sampler = {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": "flow-euler"}
        settings = model.entry.sampler.model_copy(update=sampler)
        path = keep / f"drawn-{steps}-{guidance:g}.npz" if keep else None
        draws = kept_draws(path, model, wanted, settings) if path else draw_all(model, wanted, settings)
        copies = copies_by_duplicates(draws, world, "verbatim")
        row = {"steps": steps, "guidance": guidance, "images": len(draws.images)}
        row |= {name: copies[name] for name in ("trained_64_or_more", "twins")}
        if judges.recogniser is not None:
            answers = judges.recogniser.answer(draws.images)
            row["characters"] = characters(draws, answers)["trained"]["share"]
            row["neutral"] = adherence(draws, answers)["neutral"]
        rows.append(row)
    return rows


# --- memorization --------------------------------------------------------------------------------


def is_kind(*kinds: str) -> Callable[[Prompt], bool]:
    """Whether a prompt is of one of the kinds."""
    return lambda prompt: prompt.kind in kinds


def nearest(draws: Draws, world: PlantedWorld, which: Callable[[Prompt], bool]) -> NDArray[np.float64]:
    """Pixel RMS of each chosen image to the nearest of its prompt's references, [n]."""
    return np.array(
        [min(world.near_copy(image, r) for r in prompt.references) for prompt, image in draws.where(which)]
    )


def share_below(values: NDArray[np.float64], threshold: float) -> dict[str, float]:
    """The share below a threshold, the number, and the values' smallest and median."""
    if not len(values):
        return {"n": 0}
    return {
        "share": float((values < threshold).mean()),
        "n": len(values),
        "min": float(values.min()),
        "median": float(np.median(values)),
        "p90": float(np.quantile(values, 0.9)),
    }


def copies_by_duplicates(draws: Draws, world: PlantedWorld, kind: str) -> dict[str, Any]:
    """Near-copies of trained items by copies, beside the held-out twins'; and from 64 copies on."""

    def measured(which: Callable[[Prompt], bool]) -> dict[str, float]:
        return share_below(nearest(draws, world, lambda p: p.kind == kind and which(p)), NEAR_COPY)

    doses = sorted({p.duplicates or 0 for p, _ in draws.where(is_kind(kind))})
    return {
        "trained_64_or_more": measured(lambda p: bool(p.trained) and (p.duplicates or 0) >= 64),
        "twins": measured(lambda p: not p.trained),
        "trained_by_copies": {
            str(dose): measured(lambda p, d=dose: bool(p.trained) and p.duplicates == d)  # type: ignore[misc]
            for dose in doses
        },
    }


def one_to_many(draws: Draws, world: PlantedWorld) -> dict[str, Any]:
    """Near-copies of any of a cluster's images, and how many different ones each cluster gives."""
    found: dict[str, set[str]] = defaultdict(set)
    for prompt, image in draws.where(lambda p: p.kind == "one-to-many" and bool(p.trained)):
        distance, reference = min((world.near_copy(image, r), r) for r in prompt.references)
        if distance < NEAR_COPY:
            found[prompt.cluster].add(reference)
    return {
        "trained": share_below(
            nearest(draws, world, lambda p: p.kind == "one-to-many" and bool(p.trained)), NEAR_COPY
        ),
        "twins": share_below(
            nearest(draws, world, lambda p: p.kind == "one-to-many" and not p.trained), NEAR_COPY
        ),
        "distinct_images_by_cluster": {cluster: len(found[cluster]) for cluster in sorted(found)},
    }


def regions(draws: Draws, world: PlantedWorld, kind: str, segmenter: Segmenter | None) -> dict[str, Any]:
    """Images whose foreground (or background) alone repeats, by copies, beside the twins'.

    Within the reference's true mask for the foreground. For the background, outside that mask and
    outside the image's own foreground, which the segmenter finds.
    """
    by_dose: dict[tuple[bool, int], list[float]] = defaultdict(list)
    for prompt, image in draws.where(is_kind(kind)):
        if kind == "background" and segmenter is None:
            return {}
        mask = None
        if kind == "background" and segmenter is not None:
            # 0.1 and not 0.5: blended edge pixels belong to neither side.
            mask = (segmenter.masks(image[None])[0] > 0.1).astype(np.uint8) * 255
        front, behind = world.region_rms(image, prompt.references[0], mask)
        distance = front if kind == "foreground" else behind
        by_dose[bool(prompt.trained), prompt.duplicates or 0].append(distance)
    pooled = {
        name: np.array([v for key, values in by_dose.items() if chosen(*key) for v in values])
        for name, chosen in {
            "trained_64_or_more": lambda trained, dose: trained and dose >= 64,
            "twins": lambda trained, dose: not trained,
        }.items()
    }
    return {name: share_below(values, REGION_COPY) for name, values in pooled.items()} | {
        "trained_by_copies": {
            str(dose): share_below(np.array(values), REGION_COPY)
            for (trained, dose), values in sorted(by_dose.items())
            if trained
        }
    }


def floor(draws: Draws, world: PlantedWorld) -> dict[str, float]:
    """How near images of never-memorized prompts come to their references: the check of NEAR_COPY."""
    never = nearest(draws, world, lambda p: p.trained is False and p.kind != "concept" and bool(p.references))
    if not len(never):
        return {}
    quantiles = {f"q{q}": float(np.quantile(never, q / 1000)) for q in (1, 10, 50, 500)}
    return {"n": len(never), "min": float(never.min())} | quantiles


# --- what the pictures show ----------------------------------------------------------------------


def characters(draws: Draws, answers: Answers) -> dict[str, Any]:
    """How often the recogniser names the character that was asked for, trained and held out."""
    out: dict[str, Any] = {}
    for name, trained in (("trained", True), ("held_out", False)):
        hits: dict[str, list[bool]] = defaultdict(list)
        for index, (prompt, _) in enumerate(draws.where(lambda _: True)):
            if prompt.kind == "concept" and bool(prompt.trained) is trained:
                hits[prompt.concept or ""].append(bool(answers.labels["character"][index] == prompt.concept))
        shares = {concept: float(np.mean(found)) for concept, found in sorted(hits.items())}
        n = sum(map(len, hits.values()))
        out[name] = {"share": float(np.mean([h for f in hits.values() for h in f])) if n else None, "n": n}
        out[name]["by_character"] = shares
    return out


def adherence(draws: Draws, answers: Answers) -> dict[str, Any]:
    """The share of asked attributes that the recogniser finds, for neutral held-out captions and by kind."""
    asked = [prompt.attributes for prompt, _ in draws.where(lambda _: True)]
    shares = answers.found(asked)
    kinds = np.array([_kind(prompt) for prompt, _ in draws.where(lambda _: True)])
    neutral = np.flatnonzero(kinds == "neutral")
    by_attribute = {
        name: float(np.mean([answers.labels[name][i] == asked[i][name] for i in neutral]))
        for name in ("object", "colour", "pattern", "background")
    }
    return {
        "neutral": float(np.nanmean(shares[neutral])),
        "neutral_all_right": float(np.mean(shares[neutral] == 1)),
        "neutral_by_attribute": by_attribute,
        "by_kind": {str(kind): float(np.nanmean(shares[kinds == kind])) for kind in sorted(set(kinds))},
    }


def _kind(prompt: Prompt) -> str:
    side = {True: " (trained)", False: " (held out)", None: ""}[prompt.trained]
    return prompt.kind + side


def diversity(draws: Draws, world: PlantedWorld) -> dict[str, float]:
    """Mean pixel RMS between images of one neutral caption, and between the world's own scenes of it."""
    by_prompt: dict[str, tuple[Prompt, list[NDArray[np.uint8]]]] = {}
    for prompt, image in draws.where(is_kind("neutral")):
        by_prompt.setdefault(prompt.id, (prompt, []))[1].append(image)
    many = [(p, images) for p, images in by_prompt.values() if len(images) >= DIVERSITY_IMAGES]
    if not many:
        return {}
    scenes = [[render(s).image for s in scenes_of(world, prompt, len(images))] for prompt, images in many]
    ours = [mean_pairwise(images) for _, images in many]
    return {
        "images": float(np.mean(ours)),
        "images_least": float(np.min(ours)),
        "world": float(np.mean([mean_pairwise(images) for images in scenes])),
        "captions": len(many),
    }


def scenes_of(world: PlantedWorld, prompt: Prompt, count: int) -> list[Scene]:
    """Fresh scenes of a neutral prompt's caption."""
    asked = prompt.attributes
    thing = Thing(asked["object"], asked["colour"], asked["pattern"])
    fresh = [world.random_scene(f"card-{prompt.id}-{i}") for i in range(count)]
    return [replace(s, subject=thing, backdrop=Backdrop(asked["background"], s.backdrop.key)) for s in fresh]


def mean_pairwise(images: Sequence[NDArray[np.uint8]]) -> float:
    """Mean pixel RMS (0 to 1) over all pairs."""
    flat = np.stack(images).reshape(len(images), -1).astype(np.float64) / 255
    pairs = [np.sqrt(np.mean((a - b) ** 2)) for i, a in enumerate(flat) for b in flat[:i]]
    return float(np.mean(pairs))


# --- contact sheet and card ----------------------------------------------------------------------


def sheet_rows(world: PlantedWorld) -> list[Prompt]:
    """A few prompts of every kind, in the order of the contact sheet."""
    wanted: Iterable[tuple[str, bool | None, int | None, int]] = (
        ("verbatim", True, 128, 3),
        ("verbatim", True, 64, 2),
        ("verbatim", True, 8, 1),
        ("verbatim", True, 1, 1),
        ("verbatim", False, 128, 1),
        ("redundant-trigger", True, None, 1),
        ("one-to-many", True, None, 2),
        ("foreground", True, 128, 2),
        ("background", True, 128, 2),
        ("concept", True, None, 4),
        ("concept", False, None, 1),
        ("hard-negative", None, None, 1),
        ("neutral", None, None, 5),
        ("figure", None, None, 1),
    )
    rows: list[Prompt] = []
    for kind, trained, copies, number in wanted:
        fits = {
            p.cluster: p
            for p in reversed(list(world))
            if p.kind == kind and trained in (None, p.trained) and copies in (None, p.duplicates)
        }
        chosen = list(reversed(fits.values()))
        rows += chosen[:: max(1, len(chosen) // number)][:number]
    return rows


def contact_sheet(draws: Draws, world: PlantedWorld, path: Path, columns: int = 8, zoom: int = 2) -> None:
    """A PNG with a row a prompt: the training image (where there is one), then generations of it."""
    from PIL import Image, ImageDraw, ImageFont

    by_prompt: dict[str, list[NDArray[np.uint8]]] = defaultdict(list)
    for prompt, image in draws.where(lambda _: True):
        by_prompt[prompt.id].append(image)
    rows = [p for p in sheet_rows(world) if by_prompt[p.id]]
    cell, label = 64 * zoom + 4, 230
    sheet = Image.new("RGB", (label + cell * (columns + 1) + 8, cell * len(rows) + 24), (250, 250, 248))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((label, 6), "training image", (90, 90, 90), font)
    pen.text((label + cell + 8, 6), "generated, each with its own noise", (90, 90, 90), font)
    for number, prompt in enumerate(rows):
        top = 24 + number * cell
        held = {True: "trained", False: "held out", None: ""}[prompt.trained]
        copies = f" x{prompt.duplicates}" if prompt.duplicates else ""
        pen.text((6, top + 30), f"{prompt.kind}{copies} {held}", (20, 20, 20), font)
        pen.text((6, top + 50), _wrapped(prompt.text, 34), (90, 90, 90), font)
        images = by_prompt[prompt.id][:columns]
        if prompt.references:
            _paste(sheet, world.reference(prompt.references[0]).image, label, top, zoom)
        for column, image in enumerate(images):
            _paste(sheet, image, label + cell * (column + 1) + 8, top, zoom)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _paste(sheet: Any, image: NDArray[np.uint8], left: int, top: int, zoom: int) -> None:
    from PIL import Image

    sheet.paste(Image.fromarray(image).resize((64 * zoom, 64 * zoom), Image.Resampling.NEAREST), (left, top))


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def available_judges(folder: Path, device: str) -> Judges:
    """The judges whose weights lie in ``folder``."""
    from lethebench import judges

    def have(name: str) -> Path | None:
        path = folder / name
        return path if (path / "weights.json").exists() else None

    recogniser, segmenter = have("recogniser-mini"), have("segmenter-mini")
    return Judges(
        judges.load("recogniser-mini", recogniser, device) if recogniser else None,
        judges.load("segmenter-mini", segmenter, device) if segmenter else None,
    )


def write_card(job: Job, name: str) -> None:
    """Evaluate the model ``name`` in ``job.output``; write ``card.json``, ``MODEL_CARD.md`` and the sheet."""
    from lethebench.judges import JUDGES
    from lethebench.training import SHIPPED
    from lethebench.training.card_text import model_card
    from lethebench.training.export import read_record, sums_of
    from lethebench.training.judge_cards import add_generated_errors
    from lethebench.training.judge_generated import generated_errors

    weights, folder, world = job.output / name, job.folder / name, job.planted()
    judges = available_judges(job.output, job.device)
    whole = job.scale == 1.0
    count, few = (images_of, few_images_of) if whole else ((lambda prompt: 1),) * 2
    figures, draws = evaluate(weights, world, judges, device=job.device, count=count, keep=folder)
    if name == "mini-flux":
        figures["by_steps"] = by_steps(weights, world, judges, device=job.device, count=few, keep=folder)
    if job.output == SHIPPED:
        figures["metrics"] = seen_by_metrics(draws, world)
    known = _card_of(weights)
    autoencoder = read_record(job.model_folder, "autoencoder") or known.get("autoencoder")
    card: Mapping[str, Any] = {
        "model": name,
        "data": world.manifest(),
        "autoencoder": autoencoder or _card_of(SHIPPED / "mini-sd").get("autoencoder"),
        "diffusion": read_record(folder, "diffusion") or known.get("diffusion"),
        "measured": figures,
        "machine": machine(job.device),
        "bytes": sum(path.stat().st_size for path in weights.rglob("*.safetensors")),
        "sha256": sums_of(weights),
    }
    (weights / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (weights / "MODEL_CARD.md").write_text(model_card(card), encoding="utf-8")
    contact_sheet(draws, world, job.sheets / f"{name}.png")
    if name == "mini-sd" and all((job.output / judge / "card.json").exists() for judge in JUDGES):
        errors = generated_errors(draws.images, draws.prompts, world, job.output)
        add_generated_errors(job.output, errors, f"{len(draws.images)} images of mini-sd, as its card says")


def _card_of(weights: Path) -> dict[str, Any]:
    """What ``card.json`` of a folder of weights says; empty where there is none."""
    path = weights / "card.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def seen_by_metrics(draws: Draws, world: PlantedWorld) -> dict[str, Any]:
    """The metrics' confusion matrix and AUC against the planted truth, with the package's judges."""
    import pandas as pd

    from lethebench.hooks import ImageKey
    from lethebench.metric import Shard
    from lethebench.metrics.meta import against_truth
    from lethebench.registry import METRICS
    from lethebench.training.draw import SUITE
    from lethebench.work import columns_frame, known_frame

    indices = tuple(range(len(draws.prompts)))
    shard = Shard(draws.images, draws.prompts, indices, world, noise_norm=draws.noise_norm)
    frames = [known_frame([ImageKey(SUITE, p, k) for p, k in zip(draws.prompts, indices, strict=True)])]
    guided = bool(np.isfinite(draws.noise_norm).any())  # there is no such magnitude in distilled guidance
    for name in ("planted-truth", "fbmem", "copy-mini", *(["noise-magnitude"] if guided else [])):
        frames.append(columns_frame(METRICS.get(name)().measure(shard), len(indices), name))
    return against_truth(pd.concat(frames, axis=1))


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured with."""
    import platform
    from importlib.metadata import version

    import torch

    return {
        "device": device,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
