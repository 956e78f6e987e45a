"""Any image-text-to-text model of transformers, from a local folder: LLaVA 1.6 (LlavaNext), Qwen-VL, ..."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lethebench.errors import UserError
from lethebench.metrics._common import Images
from lethebench.metrics._weights import check_device

from .judges import Answer, Judge, positive, verdict

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt")


@dataclass(frozen=True)
class TransformersJudge(Judge):
    """Greedy decoding of the folder's own chat template: the image, then the question.

    The paper's Acc_l is ``llava-hf/llava-v1.6-vicuna-13b-hf``. ``probability`` is that of yes against yes or
    no at the first token (ours). Weights must be safetensors; no code of the folder is run.
    """

    kind: ClassVar[str] = "transformers"
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int = 8
    max_new_tokens: int = 8

    def _answer(self, images: Images, questions: list[str]) -> list[Answer]:
        loaded = _load(self.model, self.device, self.dtype)
        answers: list[Answer] = []
        for start in range(0, len(images), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            answers += loaded.answer(images[chunk], questions[chunk], self.max_new_tokens)
        return answers

    def check(self) -> None:
        """Raise UserError for a missing folder, weights, processor or device. Weights are not read."""
        super().check()
        positive(self, "batch_size", "max_new_tokens", whole=True)
        if self.dtype not in _DTYPES:
            raise UserError(
                f"vqa judge {self.spec}: dtype={self.dtype!r} must be one of {', '.join(_DTYPES)}"
            )
        check_folder(Path(self.model), self.spec)
        check_device("vqa", self.device)
        _processor(self.model)

    def facts(self) -> dict[str, Any]:
        """Kind, model and settings; of the folder only its name, since its files are recorded by sum."""
        return {**super().facts(), "model": Path(self.model).name}

    def files(self) -> dict[str, Path]:
        """The folder's configuration, tokenizer, processor and weights."""
        folder = Path(self.model)
        found = {path.name: path for pattern in _FILES for path in sorted(folder.glob(pattern))}
        return {**super().files(), **found}


def check_folder(folder: Path, spec: str) -> None:
    """Raise UserError unless the folder holds an image-text-to-text model as safetensors."""
    if not folder.is_dir():
        raise UserError(
            f"vqa judge {spec}: no folder {folder}; give another, or download the model into it: "
            f"`hf download llava-hf/llava-v1.6-vicuna-13b-hf --local-dir {folder}` gets the paper's"
        )
    try:
        model_type = str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"vqa judge {spec}: {folder} has no config.json of a transformers model") from error
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    if model_type not in NAMES:
        raise UserError(
            f"vqa judge {spec}: a '{model_type}' model answers no questions about images; "
            "give an image-text-to-text model, as LLaVA 1.6 (llava_next)"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"vqa judge {spec}: {folder} has no weights in *.safetensors")


@lru_cache(maxsize=4)
def _processor(folder: str) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the folder's files make transformers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"vqa judge transformers:{folder}: its processor can't be read: {reason}") from error
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "tokenizer"):
        raise UserError(f"vqa judge transformers:{folder}: its processor has no chat template")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


@lru_cache(maxsize=2)
def _load(folder: str, device: str, dtype: str) -> _Loaded:
    from transformers import AutoModelForImageTextToText

    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    lacking = sorted(loading["missing_keys"])
    if lacking:
        first = f"{len(lacking)} weights, the first {lacking[0]}"
        raise UserError(f"vqa judge transformers:{folder}: its files lack {first}")
    return _Loaded(_processor(folder), model.to(device).eval())


class _Loaded:
    """A model and its processor, read once a process."""

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor, self.model = processor, model
        vocabulary: dict[str, int] = processor.tokenizer.get_vocab()
        words = {token: token.strip(" \u0120\u2581").lower() for token in vocabulary}
        self.tokens = {
            word: [vocabulary[token] for token, plain in words.items() if plain == word]
            for word in ("yes", "no")
        }

    def answer(self, images: Images, questions: list[str], max_new_tokens: int) -> list[Answer]:
        """One batch, greedily."""
        import torch
        from PIL import Image

        asked = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in zip(map(Image.fromarray, images), questions, strict=True)
        ]
        inputs = self.processor.apply_chat_template(
            asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            drawn = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        length = inputs["input_ids"].shape[1]
        texts = self.processor.batch_decode(drawn.sequences[:, length:], skip_special_tokens=True)
        first = torch.softmax(drawn.logits[0].double(), dim=-1).cpu().numpy()
        return [
            Answer(verdict(text), text, self._probability(row))
            for text, row in zip(texts, first, strict=True)
        ]

    def _probability(self, first: np.ndarray[Any, Any]) -> float | None:
        yes, no = (float(first[self.tokens[word]].sum()) for word in ("yes", "no"))
        return yes / (yes + no) if yes + no > 0 else None
