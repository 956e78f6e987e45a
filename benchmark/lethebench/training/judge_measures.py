"""What the judges' cards say: figures on pools of held-out scenes, clean and with a generated look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from lethebench.judges.base import Images, Judge, to_input
from lethebench.judges.clip import TextImageEncoder
from lethebench.judges.descriptor import CopyDescriptor
from lethebench.judges.nets import SIDE
from lethebench.judges.recogniser import Recogniser
from lethebench.judges.segmenter import Segmenter
from lethebench.seeding import generator
from lethebench.training.augment import blur, chance, crop_grid, generated_look, jitter, resample
from lethebench.training.judge_data import KINDS, Pool
from lethebench.training.judge_losses import spoil

MAIN = ("object", "colour", "pattern", "background", "category", "character", "protected")
"""The attributes whose confusions a card lists: the first columns of a pool's labels, in that order."""

Change = Callable[[Tensor, Generator], Tensor]


def changed_images(images: Images, change: Change, *key: object) -> Images:
    """The pictures after a random change, as uint8 again."""
    g = generator("judge measures", *key)
    parts = [to_pixels(change(to_input(images[i : i + 64]), g)) for i in range(0, len(images), 64)]
    return np.concatenate([np.zeros((0, SIDE, SIDE, 3), np.uint8), *parts])


def to_pixels(x: Tensor) -> Images:
    """float32 ``[n, 3, h, w]`` in [-1, 1] to uint8 ``[n, h, w, 3]``."""
    pixels = (x.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def area_under_roc(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """The chance that a positive scores above a negative (ties count half).

    >>> area_under_roc(np.array([0.9, 0.8]), np.array([0.1, 0.8]))
    0.875
    """
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    upto = np.searchsorted(ordered, positive, "right")
    return float((below + upto).mean() / (2 * len(negative)))


# --- recogniser ----------------------------------------------------------------------------------


def calibrate(judge: Judge, pool: Pool) -> dict[str, float]:
    """One temperature a head, the best of a grid by log-likelihood on pictures with a generated look."""
    net, names = judge.net, list(judge.config["options"])
    images = np.concatenate([pool.images, changed_images(pool.images, generated_look, "calibrate")])
    labels = torch.from_numpy(np.concatenate([pool.labels, pool.labels]).astype(np.int64))
    logits = _all_logits(net, images, judge.device)
    temperatures = {}
    for index, name in enumerate(names):
        asked = labels[:, index] >= 0
        if asked.any():
            temperatures[name] = _best_temperature(logits[index][asked], labels[asked, index])
    return temperatures


def _all_logits(net: Any, images: Images, device: str) -> list[Tensor]:
    with torch.inference_mode():
        parts = [net(to_input(images[i : i + 64], device)) for i in range(0, len(images), 64)]
    return [torch.cat(head).cpu() for head in zip(*parts, strict=True)]


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    grid = [round(0.4 * 1.1**k, 3) for k in range(26)]
    return min(grid, key=lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels)))


def measure_recogniser(judge: Recogniser, pool: Pool) -> dict[str, Any]:
    """Accuracies, confusions, calibration, and how often characters are missed or imagined."""
    looked = changed_images(pool.images, generated_look, "recogniser")
    clean, soft = _accuracies(judge, pool.images, pool), _accuracies(judge, looked, pool)
    spoilt, unspoilt = _spoilt(pool)
    return {
        "accuracy": clean["accuracy"],
        "accuracy_generated_look": soft["accuracy"],
        "lowest_accuracy": min(clean["accuracy"].values()),
        "calibration_error_generated_look": soft["calibration_error"],
        "confusions": clean["confusions"],
        "characters": {
            "named_right": _named_right(judge, pool.images, pool),
            "named_right_generated_look": _named_right(judge, looked, pool),
            "called_protected": {kind: _called(judge, pool.images[pool.rows(kind)]) for kind in KINDS},
            "called_protected_generated_look": {
                kind: _called(judge, looked[pool.rows(kind)]) for kind in KINDS
            },
            "called_protected_spoilt": _called(judge, spoilt[unspoilt]),
            "spoilt": int(unspoilt.sum()),
        },
    }


def _accuracies(judge: Recogniser, images: Images, pool: Pool) -> dict[str, Any]:
    answers = judge.answer(images)
    accuracy, confusions, errors = {}, {}, {}
    for index, (name, options) in enumerate(answers.options.items()):
        asked = pool.labels[:, index] >= 0
        if not asked.any():
            continue
        wanted = np.asarray(options, dtype=np.str_)[pool.labels[asked, index]]
        found = answers.labels[name][asked]
        accuracy[name] = float((wanted == found).mean())
        errors[name] = calibration_error(answers.confidence[name][asked], wanted == found)
        if name in MAIN:
            wrong = Counter(f"{a} -> {b}" for a, b in zip(wanted, found, strict=True) if a != b)
            confusions[name] = dict(wrong.most_common(8))
    return {"accuracy": accuracy, "confusions": confusions, "calibration_error": errors}


def calibration_error(confidence: NDArray[Any], right: NDArray[Any], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy, by confidence."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps))


def _named_right(judge: Recogniser, images: Images, pool: Pool) -> float:
    rows = pool.rows("character")
    names = judge.options["character"]
    column = list(judge.options).index("character")
    wanted = np.asarray(names, dtype=np.str_)[pool.labels[rows, column]]
    return float((judge.answer(images[rows]).labels["character"] == wanted).mean())


def _called(judge: Recogniser, images: Images) -> float:
    """The share of pictures said to contain protected content."""
    return float((judge.contains_protected(images) > 0.5).mean()) if len(images) else float("nan")


def _spoilt(pool: Pool) -> tuple[Images, NDArray[np.bool_]]:
    """Spoilt characters, as in training, and which of them are surely no character any more."""
    count = 256
    g = generator("judge measures", "spoilt")
    x, labels = torch.zeros(count, 3, SIDE, SIDE), torch.zeros(count, pool.labels.shape[1], dtype=torch.long)
    columns = {name: index for index, name in enumerate(MAIN)}
    spoil(x, labels, columns, pool, count, g)
    return to_pixels(x), (labels[:, columns["protected"]] == 0).numpy()


# --- segmenter -----------------------------------------------------------------------------------


def measure_masks(judge: Segmenter, pool: Pool) -> dict[str, Any]:
    """Mean intersection over union at 0.5, by kind, and how much is found on bare backdrops."""
    looked = changed_images(pool.images, generated_look, "segmenter")
    clean, soft = judge.masks(pool.images), judge.masks(looked)
    scores, soft_scores = iou(clean, pool.masks), iou(soft, pool.masks)
    shown = {kind: pool.rows(kind) for kind in KINDS if kind != "backdrop"}
    filled = np.concatenate(list(shown.values()))
    bare = pool.rows("backdrop")
    return {
        "iou": float(scores[filled].mean()),
        "iou_generated_look": float(soft_scores[filled].mean()),
        "iou_lowest_percent": float(np.percentile(scores[filled], 1)),
        "iou_by_kind": {kind: float(scores[rows].mean()) for kind, rows in shown.items()},
        "foreground_on_bare_backdrops": float((clean[bare] > 0.5).mean()),
        "bare_backdrops_with_any_foreground": float(((clean[bare] > 0.5).mean((1, 2)) > 0.01).mean()),
    }


def iou(found: NDArray[Any], cover: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Intersection over union at 0.5 of masks in [0, 1] and coverage 0 to 255, ``[n]``; 1 for two empty."""
    first, second = found > 0.5, cover > 127
    union = (first | second).sum((1, 2))
    overlap = (first & second).sum((1, 2))
    return np.where(union == 0, 1.0, overlap / np.maximum(union, 1))


# --- copy descriptor -----------------------------------------------------------------------------


def _crop(x: Tensor, g: Generator) -> Tensor:
    return resample(x, crop_grid(len(x), g, 0.6, 0.0))


def _colour(x: Tensor, g: Generator) -> Tensor:
    return jitter(x, g, 0.35).clamp(-1, 1)


def _blur(x: Tensor, g: Generator) -> Tensor:
    return blur(x, g, 0.5, 2.0, 1.0)


def _any(x: Tensor, g: Generator) -> Tensor:
    x = torch.lerp(x, _crop(x, g), chance(len(x), 0.5, g))
    x = torch.lerp(x, _colour(x, g), chance(len(x), 0.5, g))
    return torch.lerp(x, _blur(x, g), chance(len(x), 0.5, g))


COPIES: dict[str, Change] = {
    "crop": _crop,
    "colour": _colour,
    "blur": _blur,
    "any": _any,
    "generated look": generated_look,
}
"""How a card copies: crops of 60 to 100 % of the area, colour by up to 35 %, blur of sigma 0.5 to 2."""


def measure_copies(judge: CopyDescriptor, pool: Pool) -> dict[str, Any]:
    """ROC AUC of copies against other scenes of the same kind, which got the same change."""
    threshold = float(judge.config["threshold"])
    figures: dict[str, Any] = {"auc": {}, "recall_at_threshold": {}, "false_at_threshold": {}}
    for name, change in COPIES.items():
        same, other = copy_pairs(judge, pool, change, name)
        figures["auc"][name] = area_under_roc(same, other)
        figures["recall_at_threshold"][name] = float((same > threshold).mean())
        figures["false_at_threshold"][name] = float((other > threshold).mean())
        if name == "any":
            figures["median"] = {"copies": float(np.median(same)), "same kind": float(np.median(other))}
    random_pairs = judge.describe(pool.images[::2])
    figures["median"]["any two"] = float(np.median(random_pairs[:-7] @ random_pairs[7:].T))
    figures["threshold"] = threshold
    figures["lowest_auc"] = min(figures["auc"].values())
    return figures


def copy_pairs(
    judge: CopyDescriptor, pool: Pool, change: Change, key: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Similarities of pictures to their changed copies, and to changed pictures of the same kind."""
    rows = pool.families.reshape(-1)
    members = pool.families.shape[1]
    originals = judge.describe(pool.images[rows]).reshape(-1, members, int(judge.config["size"]))
    changed = judge.describe(changed_images(pool.images[rows], change, "copies", key)).reshape(
        originals.shape
    )
    similarity = np.einsum("fid,fjd->fij", originals, changed)
    own = np.eye(members, dtype=bool)[None].repeat(len(similarity), 0)
    return similarity[own], similarity[~own]


def same_kind_threshold(judge: Judge, pool: Pool) -> dict[str, Any]:
    """The similarity that one in a thousand pictures of the same kind exceeds: where a copy begins."""
    assert isinstance(judge, CopyDescriptor)
    _, other = copy_pairs(judge, pool, COPIES["generated look"], "threshold")
    return {"threshold": round(float(np.quantile(other, 0.999)), 3)}


# --- text-image encoder --------------------------------------------------------------------------


def measure_texts(judge: TextImageEncoder, pool: Pool) -> dict[str, Any]:
    """How often the true caption beats one with one attribute changed, and retrieval among 256."""
    looked = changed_images(pool.images, generated_look, "clip")
    figures: dict[str, Any] = {}
    for name, images in (("clean", pool.images), ("generated look", looked)):
        embedded = judge.images(images)
        right = right_caption(judge, embedded, pool)
        figures[name] = {
            "beats_changed": right,
            "lowest": min(right.values()),
            **retrieval(judge, embedded, pool),
        }
    figures["known_words"] = len(judge.words.vocabulary) - 2
    return figures


def right_caption(judge: TextImageEncoder, images: NDArray[np.float32], pool: Pool) -> dict[str, float]:
    """The share of pictures whose caption scores above the changed one, by what was changed."""
    texts = [judge.texts(list(column)) for column in pool.captions.T]
    scores = np.stack([(images * text).sum(1) for text in texts], 1)
    wins: dict[str, list[bool]] = {}
    for row, kind in enumerate(pool.kinds):
        for column in (1, 2, 3):
            changed = _what_changed(KINDS[kind], pool.meanings[row, 0], pool.meanings[row, column], column)
            wins.setdefault(changed, []).append(bool(scores[row, 0] > scores[row, column]))
        wins.setdefault("part of the picture", []).append(bool(scores[row, 4] > scores[row, 5]))
    return {name: float(np.mean(values)) for name, values in sorted(wins.items())}


def _what_changed(kind: str, right: str, wrong: str, column: int) -> str:
    if column == 3 or kind == "backdrop":
        return "background"
    if kind != "object":
        return "character" if kind == "character" else "figure"
    places = zip(right.split()[1:4], wrong.split()[1:4], ("pattern", "colour", "object"), strict=True)
    return next(name for first, second, name in places if first != second)


def retrieval(judge: TextImageEncoder, images: NDArray[np.float32], pool: Pool) -> Mapping[str, float]:
    """Recall at 1 among up to 256 pictures of different meaning, both ways."""
    _, rows = np.unique(pool.meanings[:, 0], return_index=True)
    rows = np.random.default_rng(0).permutation(rows)[:256]
    scores = images[rows] @ judge.texts([str(text) for text in pool.meanings[rows, 0]]).T
    own = np.arange(len(rows))
    return {
        "text_of_image": float((scores.argmax(1) == own).mean()),
        "image_of_text": float((scores.argmax(0) == own).mean()),
    }
