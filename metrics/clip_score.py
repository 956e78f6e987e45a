"""CLIP score: the cosine of an image and its prompt's original text in a published CLIP model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError
from lethebench.method import setting
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard
from lethebench.metrics._weights import (
    Published,
    check_device,
    check_sha256,
    is_torchscript,
    locate,
    record,
    titled,
)
from lethebench.metrics.clip_mini import cosines
from lethebench.prompts import Role
from lethebench.registry import METRICS
from lethebench.store import known_sha256

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image
    from torch import Tensor

Floats = NDArray[np.float64]
Images = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
BATCH = 32
OPEN_CLIP_CONFIG = "open_clip_config.json"
_READ = frozenset({".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".pth"})
"""Suffixes of the files of a model folder that may determine a value."""


@dataclass(frozen=True)
class Preset:
    """A paper's CLIP: open_clip's name of the architecture, and the published file."""

    model: str
    weights: Published
    source: str


def _openai(name: str, sha256: str) -> Published:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
    return Published("clip", f"{name}.pt", url, sha256, "its URL, as open_clip lists it")


def _laion(repository: str, sha256: str, pinned_by: str) -> Published:
    url = f"https://huggingface.co/laion/{repository}/resolve/main/open_clip_pytorch_model.bin"
    return Published("clip", f"{repository}.bin", url, sha256, pinned_by)


PRESETS: Mapping[str, Preset] = {
    "vit-b-32": Preset(
        "ViT-B-32-quickgelu",
        _openai("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
        "OpenAI's; NeMo's A_CLIP and FB-Mem's archive/compare_clip.py use ViT-B/32",
    ),
    "vit-l-14": Preset(
        "ViT-L-14-quickgelu",
        _openai("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
        "OpenAI's; chenchen-usyd/AMG-sd scripts/eval.py (which reports 100 times the cosine)",
    ),
    "vit-h-14": Preset(
        "ViT-H-14",
        _laion(
            "CLIP-ViT-H-14-laion2B-s32B-b79K",
            "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4",
            "public projects that use it (MLPerf's Stable Diffusion among them)",
        ),
        "laion2b_s32b_b79k; MLPerf's text-to-image benchmark",
    ),
    "vit-g-14": Preset(
        "ViT-g-14",
        _laion(
            "CLIP-ViT-g-14-laion2B-s12B-b42K",
            "6aac683f899159946bc4ca15228bb7016f3cbb1a2c51f365cba0b23923f344da",
            "the repository's page of the file",
        ),
        "laion2b_s12b_b42k; YuxinWenRick/diffusion_memorization inference_mem.py, MemBench",
    ),
}


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A CLIP model in evaluation mode.

    ``preprocess`` turns an RGB image into float32 ``[3, side, side]``, ``encode_images`` a batch of those
    into embeddings ``[n, d]``, ``encode_texts`` a list of n texts into ``[n, d]``; embeddings are not of unit
    length. Texts are cut at the model's context length (77 tokens).
    """

    preprocess: Callable[[Image.Image], Tensor]
    encode_images: Callable[[Tensor], Tensor]
    encode_texts: Callable[[list[str]], Tensor]
    device: str = "cpu"

    def images(self, images: Images) -> Floats:
        """Embeddings ``[n, d]`` of images uint8 ``[height, width, 3]``."""
        import torch
        from PIL import Image

        found = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = [self.preprocess(Image.fromarray(i)) for i in images[start : start + BATCH]]
                found.append(self.encode_images(torch.stack(batch).to(self.device)).double().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0))

    def texts(self, texts: Sequence[str]) -> Floats:
        """Embeddings ``[n, d]`` of texts; each distinct text is encoded once."""
        import torch

        distinct = sorted(set(texts))
        place = {text: number for number, text in enumerate(distinct)}
        found = []
        with torch.inference_mode():
            for start in range(0, len(distinct), BATCH):
                found.append(self.encode_texts(distinct[start : start + BATCH]).double().cpu().numpy())
        return np.concatenate(found)[[place[t] for t in texts]] if found else np.zeros((0, 0))


@lru_cache(maxsize=2)
def load(model: str, path: Path, sha256: str, device: str) -> Encoder:
    """The CLIP model of a file or folder, by one of four ways.

    A TorchScript archive is OpenAI's release, whose architecture and activation (QuickGELU) open_clip reads
    from it. Another file is an open_clip checkpoint of the architecture ``model``. A folder with
    ``open_clip_config.json`` is open_clip's, any other is a ``CLIPModel`` of transformers with its tokenizer
    and image processor. ``sha256`` makes a changed file another one. Raises UserError where it can't be read.
    """
    ways = {"torchscript": _openai_archive, "checkpoint": _checkpoint, "open_clip": _folder}
    kind = kind_of(path)
    try:
        with _own_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return ways.get(kind, _transformers)(model, path, device)
    except UserError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"an open_clip checkpoint of {model}" if kind == "checkpoint" else f"a CLIP model ({kind})"
        raise UserError(f"metric 'clip': {path} can't be read as {what}: {first}") from error


def kind_of(path: Path) -> str:
    """``torchscript``, ``checkpoint``, ``open_clip`` or ``transformers``: see :func:`load`."""
    if path.is_dir():
        return "open_clip" if (path / OPEN_CLIP_CONFIG).is_file() else "transformers"
    return "torchscript" if is_torchscript(path) else "checkpoint"


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep torch's global generator as it is: a model draws initial weights before it loads its own."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield


def _openai_archive(model: str, path: Path, device: str) -> Encoder:
    import open_clip

    found = open_clip.load_openai_model(str(path), precision="fp32", device=device).eval()
    visual = found.visual
    preprocess = open_clip.image_transform(
        visual.image_size, is_train=False, mean=visual.image_mean, std=visual.image_std
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=found.context_length)
    return _open_clip_encoder(found, preprocess, tokenizer, device)


def _checkpoint(model: str, path: Path, device: str) -> Encoder:
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(
            f"metric 'clip': open_clip has no architecture '{model}'; see open_clip.list_models()"
        )
    if "hf_tokenizer_name" in config["text_cfg"]:
        raise UserError(
            f"metric 'clip': {model} needs a tokenizer beside its weights: give a folder with "
            f"{OPEN_CLIP_CONFIG}, the weights and the tokenizer's files"
        )
    found, preprocess = open_clip.create_model_from_pretrained(
        model, pretrained=str(path), precision="fp32", device=device
    )
    return _open_clip_encoder(found.eval(), preprocess, open_clip.get_tokenizer(model), device)


def check_architecture(model: str) -> None:
    """Raise UserError unless open_clip can build ``model`` and tokenize for it without a download."""
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"metric 'clip': open_clip has no architecture '{model}': see open_clip.list_models")
    if "hf_tokenizer_name" in config["text_cfg"]:
        raise UserError(
            f"metric 'clip': {model} needs a tokenizer beside its weights: give a folder with "
            f"{OPEN_CLIP_CONFIG}, the weights and the tokenizer's files"
        )


def _folder(model: str, path: Path, device: str) -> Encoder:
    import open_clip

    name = f"local-dir:{path}"
    found, preprocess = open_clip.create_model_from_pretrained(name, precision="fp32", device=device)
    return _open_clip_encoder(found.eval(), preprocess, open_clip.get_tokenizer(name), device)


def _open_clip_encoder(model: Any, preprocess: Any, tokenizer: Any, device: str) -> Encoder:
    return Encoder(
        preprocess, model.encode_image, lambda texts: model.encode_text(tokenizer(texts).to(device)), device
    )


def _transformers(model: str, path: Path, device: str) -> Encoder:
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    found, loading = CLIPModel.from_pretrained(
        path, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    lacking = sorted(loading["missing_keys"])
    if lacking:
        raise UserError(f"metric 'clip': {path} lacks {len(lacking)} weights, the first {lacking[0]}")
    found = found.to(device).eval()
    processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    longest = found.config.text_config.max_position_embeddings

    def encode_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        embedded: Tensor = found.get_text_features(**tokens.to(device)).pooler_output
        return embedded

    return Encoder(
        lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        lambda pixels: found.get_image_features(pixel_values=pixels).pooler_output,
        encode_texts,
        device,
    )


# --- the metric -----------------------------------------------------------------------------------


def _scores(judge: str) -> tuple[Score, ...]:
    def score(name: str, role: Role, help: str) -> Score:
        return Score(
            f"clip.{name}", "clip_score", "higher", "cosine", (-1.0, 1.0), roles=frozenset({role}),
            help=help, judge=judge,
        )  # fmt: skip

    return (
        score("score", Role.NEUTRAL, "Cosine (not times 100) of image and prompt on neutral prompts."),
        score(
            "trigger_score",
            Role.TRIGGER,
            "Cosine of image and prompt on trigger prompts: falls where suppressing breaks the model.",
        ),
        score(
            "concept_score", Role.CONCEPT, "Cosine of image and prompt on prompts that ask for a character."
        ),
        score("probe_score", Role.PROBE, "Cosine of image and prompt on near neighbours of the characters."),
    )


@METRICS.register
@dataclass(frozen=True)
class ClipScore(Metric):
    """The CLIP score (Hessel et al. 2021) by open_clip: the plain cosine.

    Neither times 100 (as AMG and torchmetrics report it) nor 2.5 and clipped at 0 (CLIPScore's w). Always
    against the prompt as the suite asks it: a method that changes the prompt's words is held to the original
    ones. Backbones don't compare: every score names its own.
    """

    preset: str = setting("vit-b-32", f"a paper's model and published file: {', '.join(PRESETS)}")
    model: str = setting("", "open_clip's name of the architecture of an own file, in place of a preset")
    path: str = setting(
        "",
        "the weights file or the folder that holds it ('': the data folder's clip/); a folder with "
        "open_clip_config.json or a transformers CLIPModel is used in place of a preset",
        place=True,
    )
    sha256: str = setting("", "what the file's SHA-256 must be ('': the published one, where known)")
    device: str = setting("cpu", "where the model runs, as torch names it")

    name: ClassVar[str] = "clip"
    summary: ClassVar[str] = "How well images show what their prompts ask for, by a published CLIP model."
    source: ClassVar[str] = (
        "Hessel et al. 2021 (CLIPScore), as a plain cosine; open_clip; preset's source: facts"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = _scores("clip")

    def all_scores(self) -> tuple[Score, ...]:
        """The scores, naming the model."""
        return _scores(self._judge())

    def check(self) -> None:
        """Raise UserError for settings that don't go together, and a missing or damaged file."""
        path = self._file()
        if path.is_file() and (self.model or not is_torchscript(path)):
            check_architecture(self._architecture())
        check_device(self.name, self.device)
        if self._published() is None or self.sha256:
            self.encoder()  # what isn't a published file may be anything

    def weights(self) -> Mapping[str, Path]:
        """The weights file; of a folder every file that may determine a value."""
        path = self._file()
        if path.is_file():
            return {path.name: path}
        return {p.name: p for p in sorted(path.iterdir()) if p.is_file() and p.suffix in _READ}

    def encoder(self) -> Encoder:
        """The model, loaded once a process."""
        path = self._file()
        sums = "".join(known_sha256(p) for p in self.weights().values())
        return load(self._architecture(), path, sums, self.device)

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``clip_score``: the cosine with the prompt's own text."""
        check_shard(self.name, shard)
        if not len(shard):
            return {"clip_score": np.zeros(0)}
        encoder = self.encoder()
        return {
            "clip_score": cosines(
                encoder.images(shard.images), encoder.texts([p.text for p in shard.prompts])
            )
        }

    def compare(self, table: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
        """``clip_relative``: the score over base's on the same images (UniForget's Figure 7)."""
        from lethebench import stats

        score = self.scores[0]
        ours, theirs, _ = stats.paired(score, *(stats.select(score, t) for t in (table, base)))
        both = ~(np.isnan(ours) | np.isnan(theirs))
        if not both.any() or not theirs[both].mean():
            return {}
        ratio = float(ours[both].mean() / theirs[both].mean())
        return {"clip_relative": ratio, "n": int(both.sum())}

    def facts(self) -> dict[str, Any]:
        """Model, file with its sum, the text compared with, and the convention."""
        path, preset = self._file(), self._published()
        return {
            "model": self._judge(),
            "preset": self.preset if preset is not None else None,
            "preset_source": preset.source if preset is not None else None,
            "loaded_as": kind_of(path),
            "weights": record(path, preset.weights if preset else None, self.sha256)
            if path.is_file()
            else {p.name: known_sha256(p) for p in self.weights().values()},
            "text": "the suite's prompt, before any change by the method, cut at the context length",
            "convention": "cosine: not times 100, no factor 2.5, not clipped at 0",
            "device": self.device,
        }

    def _published(self) -> Preset | None:
        """The preset; None where an own model is used."""
        if self.model or self._own_folder() is not None:
            return None
        if self.preset not in PRESETS:
            raise UserError(f"metric 'clip' has no preset '{self.preset}': known {', '.join(PRESETS)}")
        return PRESETS[self.preset]

    def _own_folder(self) -> Path | None:
        path = Path(self.path).expanduser()
        configured = self.path and any((path / n).is_file() for n in (OPEN_CLIP_CONFIG, "config.json"))
        return path if configured else None

    def _architecture(self) -> str:
        preset = self._published()
        return preset.model if preset is not None else self.model

    def _judge(self) -> str:
        preset = self._published()
        if preset is not None:
            return titled(f"{preset.model} ({preset.weights.file})", preset.weights, self.sha256)
        return f"{self.model or 'CLIP'} ({Path(self.path).name})"

    def _file(self) -> Path:
        """The weights file or model folder, checked."""
        preset, folder = self._published(), self._own_folder()
        if preset is not None:
            return locate(self.name, preset.weights, self.path, self.sha256)
        if folder is not None:
            if self.model or self.sha256:
                raise UserError(
                    f"metric 'clip': {folder} is a model's folder, which names its architecture, and its "
                    "files' sums are recorded: leave out the settings 'model' and 'sha256'"
                )
            return folder
        path = Path(self.path).expanduser()
        if not self.path or not path.is_file():
            raise UserError(
                f"metric 'clip': model='{self.model}' needs its weights, and path='{self.path}' is no file: "
                "give an existing one as the setting 'path'"
            )
        check_sha256(self.name, path, self.sha256)
        return path
