"""The cards of the judges: ``card.json``, and ``MODEL_CARD.md`` written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ABOUT = {
    "recogniser-mini": (
        """Answers questions about a picture of the planted world: object, colour, pattern, background,
protected character, category, the character's features, and whether anything protected is shown at
all. Stands in for the vision-language judges of the literature (VQA).""",
        """A small residual convolutional network with one softmax a question, trained by cross-entropy on
fresh scenes that are softened, recoloured, compressed and noised. Among them are negatives of the
protected characters: nameless figures, figures exactly two features away from a protected one,
blends, halves, washed out and recoloured characters; and pictures of nothing. Pictures one feature
away from a protected character are neither: whether they count is undefined. A second cycle of the
learning rate warps the pictures too, since generated outlines waver. Confidences are
calibrated by one temperature a question (Guo et al. 2017) on validation scenes.""",
    ),
    "segmenter-mini": (
        """Finds the foreground of a picture of the planted world. Stands in for BiRefNet and SAM.""",
        """A small U-net trained on the true coverage by binary cross-entropy and soft Dice.""",
    ),
    "copy-mini": (
        """A copy descriptor: the inner product of two pictures' descriptors is high where one is a copy of
the other. Stands in for SSCD, and is not SSCD: its numbers are not comparable with SSCD's.""",
        """The recipe of SSCD (Pizzi et al. 2022): InfoNCE between two changed views at temperature 0.05
plus the entropy regulariser, GeM pooling, l2-normalised descriptors; batches made of families of
pictures of the same kind, so that most negatives are hard. Left out: mixed images, strong rotations,
overlays. `threshold` is the similarity that one in a thousand pairs of the same kind exceeds on
validation scenes.""",
    ),
    "clip-mini": (
        """Embeds pictures and captions of the planted world: their cosine says how well a caption fits.
Stands in for CLIP. Its penultimate image features are those of the Frechet distance `fd_mini`.""",
        """The recipe of CLIP (Radford et al. 2021): symmetric InfoNCE with a learnt scale, plus captions
with one attribute changed as negatives. Its words are those of the world's captions without the rare
names of planted items, which it reads as unknown words, so that it can't tell what was memorized.""",
    ),
}


def write_card(output: Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` and ``MODEL_CARD.md`` into a judge's folder."""
    (output / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (output / "MODEL_CARD.md").write_text(describe_card(card), encoding="utf-8")


def add_generated_errors(weights: Path, errors: Mapping[str, Any], source: str) -> None:
    """Add the figures of ``generated_errors`` to the cards of the judges in ``weights``.

    ``source`` says which pictures they were measured on (model, sampler, number).
    """
    for name, figures in errors.items():
        path = weights / name / "card.json"
        card = json.loads(path.read_text(encoding="utf-8"))
        write_card(path.parent, card | {"generated": {"source": source} | dict(figures)})


def describe_card(card: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    about, how = _ABOUT[card["judge"]]
    lines = [f"# {card['judge']}", "", about, "", "## Training", "", how, "", *_facts(card), ""]
    lines += ["## Figures on held-out scenes", "", _LOOK, "", *_table(card["held_out"]), ""]
    if "generated" in card:
        lines += ["## Figures on generated pictures", "", *_table(card["generated"]), ""]
    return "\n".join([*lines, "## Limits", "", _LIMITS, ""])


_LOOK = """"Generated look" means that the test scenes were softened, recoloured, compressed and noised
first, as a small diffusion model's pictures are."""

_LIMITS = """It knows the planted world only, at 64 pixels; on other pictures its answers mean nothing.
Licence: that of the package. All pictures, names and characters are invented."""


def _facts(card: Mapping[str, Any]) -> list[str]:
    training, data, recipe = card["training"], card["data"], card["recipe"]
    scenes = [f"{data[key]:,}" for key in ("training_scenes", "validation_scenes", "test_scenes")]
    return [
        f"- Data: {scenes[0]} fresh scenes of the planted world {data['world']} (seed {data['world_seed']}),",
        "  none of them in the diffusion models' training set;",
        f"  {scenes[1]} more for thresholds and temperatures, {scenes[2]} more for the figures below.",
        f"- Steps: {training['steps']:,} of {recipe['batch']} pictures, seed {recipe['seed']};",
        f"  {training['seconds'] / 60:.0f} minutes on {card['device']}, {card['threads']} thread(s);",
        f"  PyTorch {card['torch']}.",
        f"- Size: {card['parameters']:,} parameters, {card['bytes'] / 1e6:.2f} MB (float16).",
        "- Recipe: " + ", ".join(f"{key} {value}" for key, value in recipe.items()) + ".",
    ]


def _table(figures: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in _flat(figures)]
    return ["| figure | value |", "|---|---|", *rows]


def _flat(figures: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in figures.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}: ")
        elif isinstance(value, float):
            rows.append((name, f"{value:.4f}"))
        else:
            rows.append((name, "none measured" if value is None else str(value)))
    return rows
