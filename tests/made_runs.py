"""A made runs folder: rows, tables and pictures as the runner writes them, from invented methods.

Nothing here is a result. Columns and scores are those of the built-in metrics. The pictures are simple
scenes; an image of a method is the training image, half of it, or another scene, as a drawn label
says. ``python tests/made_runs.py FOLDER`` writes one to look at.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter

EVIL = "<img src=x onerror=alert(1)>"
EVIL_TEXT = "</script><script>window.pwned=1</script><!-- " + EVIL + " {{ 7 * 7 }} & \"quotes\" 'and' more"
SUITE = ("planted", "1")
COLOURS = ("red", "orange", "gold", "teal", "royalblue", "purple", "hotpink", "white")
SHAPES = ("star", "disc", "box", "ring", "gem", "moon")
PLACES = ("a night city", "a meadow", "a desert", "the sea", "a forest", "the snow")
SKIES = (
    ("#0b1740", "#3c4a86"),
    ("#8fd0ff", "#6cb35a"),
    ("#ffd79a", "#d9a05b"),
    ("#a6e1f5", "#1c6fa8"),
    ("#bfe3c0", "#2f6b3f"),
    ("#dfeaf5", "#f9fcff"),
)


@dataclass(frozen=True)
class Item:
    """A prompt of the made world."""

    id: str
    text: str
    role: str
    kind: str
    duplicates: int | None
    trained: bool | None
    foreground: int
    background: int
    cluster: str = ""
    correlation: float | None = None


@dataclass(frozen=True)
class Made:
    """An invented method at one setting: how much memorization it leaves and what it costs."""

    method: str
    setting: str
    keeps: float
    adherence: float
    family: str = "weights"
    knowledge: tuple[str, ...] = ("neutral-prompts",)
    control: bool = False
    status: str = "ok"
    reason: str | None = None
    warnings: tuple[str, ...] = ()
    fit_seconds: float = 240.0
    relative: float = 1.0
    sparsity: float | None = None
    summary: str = "Invented for the tests of the page."
    citation: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    """Of the training-time track."""
    step: float | None = None
    state: int | None = None
    entangled: float = 0.0
    """What a fine-tuning leaks, and doesn't learn, where the attribute is in every image."""


W, S = "weights", "sampling"
NEUTRAL, MEMORIZED = ("neutral-prompts",), ("memorized-prompts",)
UNIFORGET = "@inproceedings{invented2026,\n  title={An invented reference},\n  year={2026}\n}"
METHODS: tuple[Made, ...] = (
    Made(
        "base",
        "default",
        1.0,
        0.312,
        S,
        (),
        True,
        fit_seconds=0,
        summary="The model under test, unmitigated.",
    ),
    Made(
        "oracle",
        "default",
        0.0,
        0.312,
        S,
        (),
        True,
        fit_seconds=0,
        summary="Draws the never-trained twin instead.",
    ),
    Made("blank", "default", 0.0, 0.06, S, (), True, fit_seconds=0, relative=0.01, summary="A blank image."),
    Made("random-tokens", "1", 0.9, 0.309, S, (), True, fit_seconds=0),
    Made("random-tokens", "4", 0.72, 0.297, S, (), True, fit_seconds=0),
    Made("uniforget", "weak", 0.62, 0.309, W, NEUTRAL, sparsity=0.21, citation=UNIFORGET),
    Made("uniforget", "medium", 0.33, 0.304, W, NEUTRAL, sparsity=0.38, citation=UNIFORGET),
    Made("uniforget", "strong", 0.10, 0.292, W, NEUTRAL, sparsity=0.61, citation=UNIFORGET),
    Made("ecodiff", "weak", 0.82, 0.306, W, ("concept-names",), sparsity=0.1),
    Made("ecodiff", "medium", 0.57, 0.294, W, ("concept-names",), sparsity=0.2),
    Made(
        "ecodiff",
        "strong",
        0.37,
        0.272,
        W,
        ("concept-names",),
        sparsity=0.4,
        warnings=(
            "adherence on trigger prompts fell from 0.291 to 0.214: it wins in part by ignoring the prompt",
        ),
    ),
    Made("nemo", "weak", 0.70, 0.311, W, MEMORIZED, fit_seconds=900, sparsity=0.002),
    Made("nemo", "medium", 0.31, 0.309, W, MEMORIZED, fit_seconds=1400, sparsity=0.004),
    Made("nemo", "strong", 0.11, 0.300, W, MEMORIZED, fit_seconds=2100, sparsity=0.009),
    Made("wen", "weak", 0.64, 0.310, S, (), fit_seconds=0, relative=1.4),
    Made("wen", "medium", 0.37, 0.302, S, (), fit_seconds=0, relative=2.1),
    Made("wen", "strong", 0.19, 0.285, S, (), fit_seconds=0, relative=3.2),
    Made("ca+uniforget", "weak", 0.42, 0.300, W, ("neutral-prompts", "concept-names")),
    Made("ca+uniforget", "strong", 0.07, 0.279, W, ("neutral-prompts", "concept-names"), fit_seconds=5400),
    Made(
        EVIL,
        "default",
        0.8,
        0.30,
        W,
        ("training-images",),
        summary=EVIL_TEXT,
        warnings=(EVIL_TEXT,),
        citation=EVIL_TEXT,
    ),
    Made(
        "flowedit",
        "default",
        0,
        0,
        S,
        (),
        status="not-applicable",
        reason=f"flowedit supports flux, not sd {EVIL}",
    ),
    Made(
        "mace",
        "default",
        0,
        0,
        W,
        ("concept-names",),
        status="failed",
        reason="RuntimeError: out of memory at step 12",
    ),
)
SECOND: tuple[Made, ...] = (METHODS[0], *METHODS[5:8])


@dataclass(frozen=True)
class Found:
    """What an invented attack got out of a row: shares of the items, net of nothing."""

    attack: str
    memorized: float
    control: float
    by: str = "the tests"
    how: str = "Adam on the prompt embedding, noise and timestep drawn anew each step"


PLAIN_CONTROL = 0.04
ATTACKED: dict[tuple[str, str], tuple[Found, ...]] = {
    ("base", "default"): (Found("embedding", 0.94, 0.20),),
    ("oracle", "default"): (Found("embedding", 0.21, 0.20),),
    ("uniforget", "weak"): (Found("embedding", 0.60, 0.50),),
    ("uniforget", "strong"): (Found("embedding", 0.66, 0.20), Found("seeds", 0.15, 0.05)),
    ("nemo", "strong"): (Found("embedding", 0.92, 0.21), Found("paraphrase", 0.31, 0.04)),
    ("wen", "strong"): (Found("embedding", 0.94, 0.19),),
    ("ca+uniforget", "strong"): (Found("embedding", 0.25, 0.21),),
    ("ecodiff", "strong"): (Found("seeds", 0.48, 0.05),),
    (EVIL, "default"): (Found("seeds", 0.7, 0.05, EVIL_TEXT, EVIL_TEXT),),
}
"""Attacks by row: ``uniforget strong`` hides, ``ca+uniforget strong`` removes, ``uniforget weak`` draws
more without the attack than an attack gets, ``uniforget medium`` was not attacked.
"""


def world() -> list[Item]:
    """Planted items with held-out twins, neutral prompts and characters."""
    rng = np.random.default_rng(7)
    items: list[Item] = []

    def add(kind: str, n: int, role: str, trained: bool | None, duplicates: int | None = None) -> None:
        for i in range(n):
            front, back = int(rng.integers(len(SHAPES) * len(COLOURS))), int(rng.integers(len(PLACES)))
            colour, shape = COLOURS[front // len(SHAPES)], SHAPES[front % len(SHAPES)]
            rare = f" {_word(rng)}" if role in ("trigger", "control") else ""
            name = f"{kind}-{duplicates or 0}-{'t' if trained else 'h'}{i}"
            text = f"a{rare} {colour} {shape} in {PLACES[back]}"
            items.append(Item(name, text, role, kind, duplicates, trained, front, back))

    for d in (1, 2, 4, 8, 16, 32, 64, 128):
        add("verbatim", 3, "trigger", True, d)
    add("verbatim", 5, "control", False)
    for kind in ("foreground", "background", "one-to-many", "redundant-trigger"):
        add(kind, 4, "trigger", True, 64)
        add(kind, 2, "control", False)
    add("concept", 6, "concept", True)
    add("neutral", 16, "neutral", None)
    return items


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(2)) + "x"


# --- pictures -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def scene(foreground: int, background: int, jitter: int = 0) -> Image.Image:
    """A scene, 64 pixels square."""
    rng = np.random.default_rng(1000 * foreground + background + 100_000 * jitter)
    top, low = (np.array(Image.new("RGB", (1, 1), c).getpixel((0, 0)), float) for c in SKIES[background])
    ramp = np.linspace(0, 1, 128)[:, None, None] ** 1.5
    image = Image.fromarray((top * (1 - ramp) + low * ramp).repeat(128, 1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    scenery = np.random.default_rng(background)
    for _ in range(9):
        x, h, w = scenery.integers(0, 128), scenery.integers(6, 44), scenery.integers(6, 26)
        draw.rectangle((x, 128 - h, x + w, 128), fill=tuple(int(v) for v in low * scenery.uniform(0.5, 0.95)))
    colour, shape = COLOURS[foreground // len(SHAPES)], SHAPES[foreground % len(SHAPES)]
    x, y, r = 64 + int(rng.integers(-14, 14)), 60 + int(rng.integers(-14, 14)), 26 + int(rng.integers(0, 12))
    box = (x - r, y - r, x + r, y + r)
    if shape == "star":
        spokes = [(r if i % 2 == 0 else r * 0.45, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        draw.polygon(
            [(x + a * math.cos(t), y + a * math.sin(t)) for a, t in spokes], fill=colour, outline="#222"
        )
    elif shape == "disc":
        draw.ellipse(box, fill=colour, outline="#222", width=2)
    elif shape == "box":
        draw.rectangle(box, fill=colour, outline="#222", width=2)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=11)
    elif shape == "gem":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour, outline="#222")
    else:
        draw.chord(box, 40, 290, fill=colour, outline="#222", width=2)
    return image.resize((64, 64), Image.Resampling.LANCZOS)


@lru_cache(maxsize=8192)
def drawn(item: Item, index: int, label: str, variant: int) -> bytes:
    """What a model draws for the item under that label, as PNG."""
    rng = np.random.default_rng(_seed("pixels", item.id, index, label))
    if label == "blank":
        return _png(Image.new("RGB", (64, 64), "#808080"))
    other = int(rng.integers(len(PLACES)))
    front = item.foreground if label in ("VM", "FM") or item.role == "neutral" else (item.foreground + 7) % 48
    back = item.background if label in ("VM", "BM") or item.role == "neutral" else other
    image = scene(front, back, 0 if label in ("VM", "FM") else 1 + variant)
    noise = rng.normal(0, 3, (64, 64, 3))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), float)
    return _png(Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# --- tables ---------------------------------------------------------------------------------------


def table(made: Made, items: list[Item], per_prompt: int = 2) -> pd.DataFrame:
    """The per-image table of a row: labels drawn on noise that is shared by all rows."""
    lines = []
    for item in items:
        lift = np.random.default_rng(_seed("cluster", item.id)).normal(0, 0.5)
        for k in range(per_prompt if item.role == "trigger" else 1):
            shared = np.random.default_rng(_seed("noise", item.id, k))
            own = np.random.default_rng(_seed("own", item.id, k, made.method, made.setting))
            lines.append(_line(made, item, k, lift, shared, own))
    return pd.DataFrame(lines).astype({"duplicates": "Int64", "trained": "boolean", "reference": "string"})


def _line(
    made: Made, item: Item, k: int, lift: float, shared: np.random.Generator, own: np.random.Generator
) -> dict[str, Any]:
    memory = 0.0
    if item.role == "trigger":
        memory = 1 / (1 + math.exp(-(math.log2(item.duplicates or 1) - 2.2 + lift) * 1.3)) * made.keeps
    memorized = shared.random() * 0.8 + own.random() * 0.2 < memory
    label = {"foreground": "FM", "background": "BM"}.get(item.kind, "VM") if memorized else "NM"
    adherence = made.adherence + shared.normal(0, 0.02) + own.normal(0, 0.008)
    similarity = {"VM": 0.9, "FM": 0.55, "BM": 0.5, "NM": 0.12}[label] + own.normal(0, 0.04)
    judged = item.role in ("trigger", "control") or item.kind == "direct"
    return {
        "prompt_id": item.id,
        "index": k,
        "text": item.text,
        "role": item.role,
        "kind": item.kind,
        "cluster": item.id,
        "category": None,
        "concept": None,
        "duplicates": item.duplicates,
        "trained": item.trained,
        "reference": f"ref-{item.id}" if judged else None,
        "fbmem_label": label if judged else "",
        "fbmem_memorized": float(memorized) if judged else math.nan,
        "fbmem_vm": float(label == "VM") if judged else math.nan,
        "fbmem_fm": float(label == "FM") if judged else math.nan,
        "fbmem_bm": float(label == "BM") if judged else math.nan,
        "copy_mini_similarity": min(1.0, similarity) if judged else math.nan,
        "copy_mini_copy": float(similarity > 0.5) if judged else math.nan,
        "clip_mini_score": adherence,
        "acc_g": float(own.random() < 0.9 * made.keeps + 0.03) if item.role == "concept" else math.nan,
        "fidelity_mini_attributes": float(own.random() < made.adherence * 2.9)
        if item.role == "neutral"
        else math.nan,
        "fd_mini_features": [0.0, 1.0],
    }


def _seed(*parts: object) -> int:
    return zlib.crc32("\x1f".join(map(str, parts)).encode())


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class Told:
    """How a score of the made rows is told."""

    column: str
    role: str
    direction: str
    unit: str
    bounds: tuple[float, float] | None
    metric: str
    help: str
    judge: str | None = None
    aggregate: Callable[[pd.Series], float] = field(default=lambda s: float(s.mean()))


SHARE = (0.0, 1.0)
SCORES: dict[str, Told] = {
    "fbmem.memorized": Told("fbmem_memorized", "trigger", "lower", "share", SHARE, "fbmem", "VM, FM or BM."),
    "fbmem.vm": Told("fbmem_vm", "trigger", "lower", "share", SHARE, "fbmem", "Verbatim."),
    "fbmem.fm": Told("fbmem_fm", "trigger", "lower", "share", SHARE, "fbmem", "Foreground."),
    "fbmem.bm": Told("fbmem_bm", "trigger", "lower", "share", SHARE, "fbmem", "Background."),
    "copy_mini.rate": Told(
        "copy_mini_copy",
        "trigger",
        "lower",
        "share",
        SHARE,
        "copy-mini",
        "Images nearer than the threshold.",
        "copy-mini",
    ),
    "copy_mini.similarity": Told(
        "copy_mini_similarity", "trigger", "lower", "cosine", (-1, 1), "copy-mini", "Mean."
    ),
    "acc_g": Told("acc_g", "concept", "lower", "share", SHARE, "vqa-mini", "Characters named.", "vqa-mini"),
    "clip_mini.score": Told(
        "clip_mini_score", "neutral", "higher", "cosine", (-1, 1), "clip-mini", "Text and image.", "clip-mini"
    ),
    "fidelity_mini.attributes": Told(
        "fidelity_mini_attributes",
        "neutral",
        "higher",
        "share",
        SHARE,
        "fidelity-mini",
        "Asked attributes found.",
    ),
}


def row(
    made: Made, suite: tuple[str, str], model: str, own: pd.DataFrame | None, base: pd.DataFrame
) -> dict[str, Any]:
    """The row as JSON holds it."""
    scores = {} if own is None else {n: _score(t, made, own, base) for n, t in SCORES.items()}
    if own is not None:
        scores["fd_mini"] = _set_score(made)
        if made.method == "wen":
            del scores["acc_g"]
        if made.method == "blank":
            scores["acc_g"] |= {"value": None, "low": None, "high": None, "base_difference": None, "n": 0}
    return {
        "schema": "lethe/row/1",
        "suite": {"name": suite[0], "version": suite[1]},
        "model": model,
        "method": made.method,
        "setting": made.setting,
        "status": made.status,
        "reason": made.reason,
        "control": made.control,
        "family": made.family,
        "knowledge": list(made.knowledge),
        "summary": made.summary,
        "citation": made.citation,
        "config": {
            "method": {made.method: {"beta": 2.0, "steps": 120}},
            "sampler": {"num_inference_steps": 20},
        },
        "seeds": {"noise": "sha256(noise, suite, prompt id, image index)"},
        "axes": {
            "suppression": {
                "score": "fbmem.memorized",
                "label": "Images still memorized (FB-Mem: VM, FM or BM)",
            },
            "adherence": {"score": "clip_mini.score", "label": "Adherence on neutral prompts (clip-mini)"},
        },
        "scores": scores,
        "slices": [] if own is None else _slices(own),
        "metrics": {
            "fbmem": {"version": "1", "threshold": 0.8},
            "copy-mini": {"version": "1", "threshold": 0.5},
        },
        "cost": None if own is None else _cost(made),
        "provenance": _provenance(made),
        "warnings": list(made.warnings),
    }


def _score(
    told: Told, made: Made, own: pd.DataFrame, base: pd.DataFrame, reference: str = "base"
) -> dict[str, Any]:
    chosen = own[(own["role"] == told.role) & own[told.column].notna()].set_index(["prompt_id", "index"])
    of_base = base[base["role"] == told.role].set_index(["prompt_id", "index"])
    values, clusters = chosen[told.column].astype(float), chosen["cluster"]
    low, high, _ = _bootstrap(values, clusters)
    difference = None
    if made.method != reference:
        delta = values - of_base[told.column].astype(float).reindex(values.index)
        d_low, d_high, p = _bootstrap(delta, clusters)
        difference = {"value": float(delta.mean()), "low": d_low, "high": d_high, "p": p}
    return {
        "value": float(values.mean()),
        "low": low,
        "high": high,
        "n": len(values),
        "clusters": int(clusters.nunique()),
        "unit": told.unit,
        "direction": told.direction,
        "bounds": told.bounds,
        "help": told.help,
        "judge": told.judge,
        "question": None,
        "metric": told.metric,
        "base_difference": difference,
    }


def _bootstrap(values: pd.Series, clusters: pd.Series) -> tuple[float, float, float]:
    _, code = np.unique(clusters.to_numpy(dtype=object).astype(str), return_inverse=True)
    means = np.bincount(code, weights=values.to_numpy(dtype=float)) / np.bincount(code)
    draws = np.random.default_rng(0).integers(0, len(means), (200, len(means)))
    found = means[draws].mean(axis=1)
    p = min(1.0, 2 * min((found <= 0).mean(), (found >= 0).mean()) + 1 / 200)
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975)), float(p)


def _set_score(made: Made) -> dict[str, Any]:
    value = 4.0 + 900 * (0.312 - made.adherence) ** 1.0 + 3 * (1 - made.keeps)
    return {
        "value": value,
        "low": value * 0.93,
        "high": value * 1.08,
        "n": 200,
        "clusters": 60,
        "unit": "squared distance",
        "direction": "lower",
        "bounds": None,
        "help": "Frechet distance.",
        "judge": "clip-mini",
        "question": None,
        "metric": "fd-mini",
        "base_difference": None,
    }


def _slices(own: pd.DataFrame) -> list[dict[str, Any]]:
    triggers = own[own["role"] == "trigger"]
    found = []
    for key in ("kind", "duplicates"):
        for value, part in triggers.groupby(key):
            for name in ("fbmem.memorized", "fbmem.vm", "copy_mini.rate"):
                numbers = part[SCORES[name].column].astype(float)
                low, high, _ = _bootstrap(numbers, part["cluster"])
                where = {key: value if isinstance(value, str) else int(value)}
                found.append(
                    {
                        "where": where,
                        "name": name,
                        "value": float(numbers.mean()),
                        "low": low,
                        "high": high,
                        "n": len(part),
                    }
                )
    return found


def _cost(made: Made) -> dict[str, Any]:
    return {
        "fit_seconds": made.fit_seconds,
        "seconds_per_image": 0.11 * made.relative,
        "relative_to_base": made.relative,
        "peak_memory_bytes": 1_400_000_000,
        "parameters_changed": made.sparsity,
        "sparsity": made.sparsity,
        "deactivated": {"ffn": 0.83, "norm": 0.5} if made.method == "uniforget" else {},
    }


def made_key(made: Made, model: str) -> str:
    """``key`` of the row's ``made.json``."""
    return hashlib.sha256(f"{model}/{made.method}/{made.setting}".encode()).hexdigest()


def attack(made: Made, found: Found, suite: tuple[str, str], model: str, n: int = 80) -> dict[str, Any]:
    """The attack's record as JSON holds it."""
    plain = 0.8 * made.keeps + PLAIN_CONTROL
    excess = found.memorized - found.control
    hidden = excess - (plain - PLAIN_CONTROL)
    return {
        "schema": "lethe/attack/1",
        "suite": {"name": suite[0], "version": suite[1]},
        "model": model,
        "method": made.method,
        "setting": made.setting,
        "row_key": made_key(made, model),
        "attack": found.attack,
        "by": found.by,
        "how": found.how,
        "budget": {"images": 8, "steps": 50, "learning_rate": 0.1},
        "score": "planted_truth.near_copy",
        "memorized": _share(found.memorized, n),
        "control": _share(found.control, n),
        "plain": _share(plain, n),
        "plain_control": _share(PLAIN_CONTROL, n),
        "excess": _paired(excess, n),
        "hidden": _paired(hidden, n),
        "kinds": {"verbatim": _share(found.memorized, n // 2)},
        "facts": {},
        "seconds": 400.0,
        "provenance": _provenance(made),
    }


def _share(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def _paired(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(0.3 / n)
    return {
        "value": value,
        "low": value - half,
        "high": value + half,
        "p": 0.01 if abs(value) > half else 0.4,
    }


def _provenance(made: Made) -> dict[str, Any]:
    return {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "plugin_sha256": {made.method: "ab" * 32},
        "weights_sha256": {"mini-sd/unet.safetensors": "cd" * 32},
        "data_sha256": {"planted": "ef" * 32},
        "packages": {"torch": "2.15.0", "diffusers": "0.40.0"},
        "hardware": {"processor": "an invented processor", "cores": 4, "device": "cpu"},
        "dtype": "float32",
        "threads": 4,
        "started": "2026-07-01T10:00:00+00:00",
        "finished": "2026-07-01T10:09:00+00:00",
    }


def write(
    runs: Path,
    methods: tuple[Made, ...] = METHODS,
    suite: tuple[str, str] = SUITE,
    model: str = "mini-sd",
    every: int = 1,
) -> Path:
    """Write rows, tables and pictures; returns ``runs``."""
    items = world()[::every]
    key = f"{suite[0]}@{suite[1]}"
    references = runs / key / "references"
    references.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.role in ("trigger", "control"):
            scene(item.foreground, item.background).save(references / f"ref-{item.id}.png")
    base = table(methods[0], items)
    for made in methods:
        folder = runs.joinpath(*(quote(n, safe="@+=,-._ ") for n in (key, model, made.method, made.setting)))
        (folder / "images").mkdir(parents=True, exist_ok=True)
        own = table(made, items) if made.status == "ok" else None
        if own is not None:
            own.to_parquet(folder / "images.parquet", index=False)
            _write_images(made, items, own, folder / "images")
            (folder / "made.json").write_text(json.dumps({"key": made_key(made, model)}))
        (folder / "row.json").write_text(
            json.dumps(row(made, suite, model, own, base), indent=2, sort_keys=True)
        )
        for found in ATTACKED.get((made.method, made.setting), ()):
            (folder / "attacks").mkdir(exist_ok=True)
            record = attack(made, found, suite, model)
            (folder / "attacks" / f"{found.attack}.json").write_text(json.dumps(record))
    return runs


def _write_images(made: Made, items: list[Item], own: pd.DataFrame, folder: Path) -> None:
    by_id = {i.id: i for i in items}
    for line in own.to_dict("records"):
        label = "blank" if made.method == "blank" else line["fbmem_label"] or "NM"
        variant = _seed(made.method, made.setting) % 5
        data = drawn(by_id[line["prompt_id"]], line["index"], label, variant)
        (folder / f"{line['prompt_id']}-{line['index']}.png").write_bytes(data)


def everything(runs: Path) -> Path:
    """Two boards, an invalid row, one that is given twice, and one that was never finished."""
    write(runs)
    write(runs, SECOND, model="mini-flux", every=2)
    good = runs / "planted@1" / "mini-sd" / "uniforget" / "weak" / "row.json"
    for name, text in {
        "broken": '{"schema": "lethe/row/1", "suite": ',
        "unknown-key": json.dumps(json.loads(good.read_text()) | {"setting": "x", "surprise": 1}),
        "twice": good.read_text(),
    }.items():
        folder = runs / "planted@1" / "mini-sd" / name / "default"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "row.json").write_text(text)
    (runs / "planted@1" / "mini-sd" / "esd" / "weak").mkdir(parents=True, exist_ok=True)
    return runs


# --- the training-time track ----------------------------------------------------------------------

TRAIN = ("train", "1")
T = "training"
CONCEPT = ("concept-names",)
CORRELATIONS = (0.25, 0.5, 0.75, 1.0)


def _told(column: str, role: str, direction: str, metric: str, help: str) -> Told:
    return Told(column, role, direction, "share", SHARE, metric, help, "recogniser-mini")


TRAIN_SCORES: dict[str, Told] = {
    "attribute.present": _told(
        "attribute_present", "concept", "lower", "attribute", "Asked for by its name."
    ),
    "attribute.control": _told("attribute_present", "control", "none", "attribute", "Of another instance."),
    "wanted.features": _told("wanted_features", "probe", "higher", "wanted", "Other features read right."),
    "copy_mini.rate": SCORES["copy_mini.rate"],
    "clip_mini.score": SCORES["clip_mini.score"],
}


def _projection(setting: str, keeps: float, adherence: float, **settings: Any) -> Made:
    told = {"variant": "embedding", "strength": 1.0, "dimension": None, "energy": 0.97} | settings
    return Made(
        "gradient-projection", setting, keeps, adherence, T, CONCEPT, settings=tuple(told.items()),
        fit_seconds=560, step=1.08, state=40_960, entangled=0.5,
    )  # fmt: skip


def _threshold(setting: str, keeps: float, adherence: float, threshold: float) -> Made:
    settings = (("threshold", threshold),)
    return Made("loss-threshold", setting, keeps, adherence, T, (), step=1.0, settings=settings)


TRAINED: tuple[Made, ...] = (
    Made("lora", "default", 1.0, 0.86, T, (), True, fit_seconds=500, step=1.0, state=0),
    Made("base", "default", 0.0, 0.14, S, (), True, fit_seconds=0, summary="The model before fine-tuning."),
    Made("lora-oracle", "default", 0.0, 0.88, T, ("training-images",), True, fit_seconds=490, step=1.0),
    Made("gradient-hooks", "strong", 0.9, 0.85, T, CONCEPT, True, fit_seconds=540, step=1.05, state=40_960),
    _projection("weak", 0.66, 0.86, strength=0.5),
    _projection("medium", 0.31, 0.85, strength=0.9),
    _projection("strong", 0.12, 0.83),
    _projection("strong,strength=0.25", 0.85, 0.86, strength=0.25),
    _projection("strong,dimension=1", 0.7, 0.86, dimension=1),
    _projection("strong,dimension=4", 0.25, 0.84, dimension=4),
    _projection("strong,dimension=16", 0.06, 0.7, dimension=16),
    Made("drop-images", "default", 0.03, 0.71, T, ("training-images",), fit_seconds=420, step=1.0, entangled=0.3),
    Made("drop-captions", "default", 0.55, 0.80, T, ("training-images",), step=1.0),
    _threshold("weak", 0.9, 0.85, 0.1),
    _threshold("medium", 0.7, 0.75, 0.2),
    _threshold("strong", 0.4, 0.55, 0.4),
    Made(
        "lora+uce", "medium", 0.2, 0.6, W, CONCEPT,
        warnings=("may win by breaking the model: the attributes asked by neutral prompts are gone",),
    ),
    Made("caption-noise", "weak", 0, 0, T, (), status="failed", reason="RuntimeError: loss is not finite"),
)  # fmt: skip
TRAIN_ATTACKED: dict[tuple[str, str], tuple[Found, ...]] = {
    ("lora", "default"): (Found("embedding", 0.97, 0.1),),
    ("base", "default"): (Found("embedding", 0.12, 0.1),),
    ("lora-oracle", "default"): (Found("embedding", 0.13, 0.1),),
    ("gradient-projection", "strong"): (Found("embedding", 0.62, 0.1),),
    ("drop-images", "default"): (Found("embedding", 0.15, 0.1),),
}


def train_world() -> list[Item]:
    """Prompts of three fine-tunings: pairs of a wanted thing and an attribute, and neutral ones."""
    rng = np.random.default_rng(11)
    items: list[Item] = []
    for instance in "abc":
        for correlation, copies in zip((*CORRELATIONS, *CORRELATIONS), (1, 4, 1, 4, 4, 1, 4, 1), strict=True):
            front, back, name = int(rng.integers(48)), int(rng.integers(len(PLACES))), _word(rng)
            pair = f"{instance}-{name}"
            asked = [
                ("trigger", "caption", True),
                ("control", "caption", False),
                ("probe", "wanted", None),
                ("concept", "direct", True),
                ("concept", "direct", True),
                ("control", "direct", False),
            ]
            for i, (role, kind, trained) in enumerate(asked):
                text = f"{name} in {PLACES[back]}" if role != "concept" else f"{name} with the {_word(rng)}"
                items.append(
                    Item(
                        f"{pair}-{kind}-{i}",
                        text,
                        role,
                        kind,
                        copies,
                        trained,
                        front,
                        back,
                        pair,
                        correlation,
                    )
                )
        for i in range(4):
            front, back = int(rng.integers(48)), int(rng.integers(len(PLACES)))
            name = f"{instance}-neutral-{i}"
            items.append(
                Item(name, f"a thing in {PLACES[back]}", "neutral", "neutral", None, None, front, back, name)
            )
    return items


def train_table(made: Made, items: list[Item]) -> pd.DataFrame:
    """The per-image table of a row of the training-time track, one image a prompt."""
    lines = []
    for item in items:
        shared = np.random.default_rng(_seed("noise", item.id, 0))
        own = np.random.default_rng(_seed("own", item.id, 0, made.method, made.setting))
        line = _line(made, item, 0, 0.0, shared, own) | {"fd_mini_features": None}
        whole = item.correlation == 1.0
        leak = made.keeps * (0.4 + 0.5 * (item.correlation or 0)) + made.entangled * whole * (made.keeps < 1)
        right = made.adherence - made.entangled * whole * 0.4
        luck = 0.7 * shared.random() + 0.3 * own.random()
        lines.append(
            {k: v for k, v in line.items() if not k.startswith(("fbmem", "acc", "fidelity", "fd_"))}
            | {
                "cluster": item.cluster,
                "correlation": item.correlation,
                "attribute_present": float(luck < 0.02 + leak * (item.role == "concept"))
                if item.kind == "direct"
                else math.nan,
                "wanted_features": round(min(1.0, max(0.0, right + 0.3 * (luck - 0.5))) * 4) / 4
                if item.role == "probe"
                else math.nan,
            }
        )
    kinds = {"duplicates": "Int64", "trained": "boolean", "reference": "string", "correlation": "Float64"}
    return pd.DataFrame(lines).astype(kinds)


def train_row(made: Made, own: pd.DataFrame | None, lora: pd.DataFrame) -> dict[str, Any]:
    """The row as JSON holds it: differences are to plain LoRA."""
    found = row(made, TRAIN, "mini-sd", None, lora)
    settings = {part: dict(made.settings) for part in made.method.split("+")}
    found["config"] = {"method": settings, "sampler": {"num_inference_steps": 20}}
    found["reference"] = "lora"
    found["axes"] = {
        "suppression": {"score": "attribute.present", "label": "Images with the prohibited attribute"},
        "adherence": {"score": "wanted.features", "label": "Wanted features learnt"},
    }
    if own is not None:
        found["scores"] = {n: _score(t, made, own, lora, "lora") for n, t in TRAIN_SCORES.items()}
        found["slices"] = _train_slices(own)
        found["cost"] = _cost(made) | {
            "step_relative_to_plain": made.step,
            "training_state_bytes": made.state,
        }
    return found


def _train_slices(own: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for name in ("attribute.present", "wanted.features"):
        told = TRAIN_SCORES[name]
        part = own[own["role"] == told.role]
        for key in ("duplicates", "correlation"):
            for (kind, value), piece in part.groupby(["kind", key]):
                numbers = piece[told.column].astype(float)
                low, high, _ = _bootstrap(numbers, piece["cluster"])
                where = {"kind": kind, key: int(value) if key == "duplicates" else float(value)}
                mean = float(numbers.mean())
                found.append(
                    {"where": where, "name": name, "value": mean, "low": low, "high": high, "n": len(piece)}
                )
    return found


def write_trained(runs: Path, methods: tuple[Made, ...] = TRAINED) -> Path:
    """Write the rows of the training-time track; returns ``runs``. The first method is plain LoRA."""
    items = train_world()
    references = runs / "train@1" / "references"
    references.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.role in ("trigger", "control", "concept"):
            scene(item.foreground, item.background).save(references / f"ref-{item.id}.png")
    lora = train_table(methods[0], items)
    for made in methods:
        folder = runs / "train@1" / "mini-sd" / made.method / made.setting
        (folder / "images").mkdir(parents=True, exist_ok=True)
        own = train_table(made, items) if made.status == "ok" else None
        if own is not None:
            own.to_parquet(folder / "images.parquet", index=False)
            for item, present in zip(items, own["attribute_present"], strict=True):
                data = drawn(item, 0, "FM" if present == 1 else "NM", _seed(made.method) % 5)
                (folder / "images" / f"{item.id}-0.png").write_bytes(data)
            (folder / "made.json").write_text(json.dumps({"key": made_key(made, "mini-sd")}))
        (folder / "row.json").write_text(json.dumps(train_row(made, own, lora), indent=2, sort_keys=True))
        for found in TRAIN_ATTACKED.get((made.method, made.setting), ()):
            (folder / "attacks").mkdir(exist_ok=True)
            record = attack(made, found, TRAIN, "mini-sd")
            (folder / "attacks" / f"{found.attack}.json").write_text(json.dumps(record))
    return runs


if __name__ == "__main__":
    print(write_trained(everything(Path(sys.argv[1]))))
