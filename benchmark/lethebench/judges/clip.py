"""clip-mini: a dual text-image encoder by the recipe of CLIP (Radford et al. 2021), on the planted world."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lethebench.judges.base import Floats, Images, Judge
from lethebench.judges.nets import ClipNet, ImageTower, TextTower

PADDING, UNKNOWN = "<pad>", "<unk>"
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class Words:
    """A tokenizer of whole words: lower case, punctuation dropped, unseen words become one token.

    >>> words = Words.of(["a red star"], length=6)
    >>> words.encode(["A RED qzx star!"])
    array([[2, 3, 1, 4, 0, 0]])
    """

    vocabulary: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, captions: Iterable[str], length: int) -> Words:
        """The words of the captions, in order of first use."""
        seen = dict.fromkeys(word for caption in captions for word in split_words(caption))
        return cls((PADDING, UNKNOWN, *seen), length)

    def encode(self, texts: Sequence[str]) -> NDArrayInt:
        """Token ids, int64 ``[n, length]``: longer texts are cut, shorter ones padded by 0."""
        ids = {word: index for index, word in enumerate(self.vocabulary)}
        tokens = np.zeros((len(texts), self.length), np.int64)
        for row, text in enumerate(texts):
            known = [ids.get(word, 1) for word in split_words(text)][: self.length] or [1]
            tokens[row, : len(known)] = known
        return tokens


NDArrayInt = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def split_words(text: str) -> list[str]:
    """The words of a text.

    >>> split_words("A bull's-eye, red")
    ['a', "bull's", 'eye', 'red']
    """
    return _WORD.findall(text.lower())


class TextImageEncoder(Judge):
    """Unit embeddings of pictures and of texts: their cosine says how well a text fits a picture."""

    name: ClassVar[str] = "clip-mini"
    net: ClipNet

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> nn.Module:
        """A :class:`ClipNet` of the configured widths and vocabulary."""
        image = ImageTower(config["widths"], config["features"], config["size"])
        text = TextTower(
            len(config["vocabulary"]),
            config["text_width"],
            config["text_layers"],
            config["text_heads"],
            config["text_length"],
            config["size"],
        )
        return ClipNet(image, text)

    @property
    def words(self) -> Words:
        """The tokenizer."""
        return Words(tuple(self.config["vocabulary"]), int(self.config["text_length"]))

    def images(self, images: Images, batch_size: int = 64) -> Floats:
        """Unit embeddings of pictures, float32 ``[n, 64]``."""
        return self._over(images, batch_size, (int(self.config["size"]),), self.net.image)

    def features(self, images: Images, batch_size: int = 64) -> Floats:
        """Penultimate features of pictures, float32 ``[n, 64]``, for the Frechet distance ``fd_mini``."""
        return self._over(images, batch_size, (int(self.config["features"]),), self.net.image.features)

    def texts(self, texts: Sequence[str], batch_size: int = 256) -> Floats:
        """Unit embeddings of texts, float32 ``[n, 64]``."""
        if isinstance(texts, str):
            raise ValueError(f"{self.name}: texts must be a sequence of strings; got one string")
        tokens = torch.from_numpy(self.words.encode(texts))
        parts = [np.zeros((0, int(self.config["size"])), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                embedded: Tensor = self.net.text(tokens[start : start + batch_size].to(self.device))
                parts.append(embedded.cpu().numpy())
        return np.concatenate(parts)

    def score(self, images: Images, texts: Sequence[str], batch_size: int = 64) -> Floats:
        """The cosine of each picture and its text, float32 ``[n]`` in [-1, 1]."""
        if len(images) != len(texts):
            raise ValueError(
                f"{self.name}: {len(images)} images against {len(texts)} texts: pairs are needed"
            )
        return np.asarray((self.images(images, batch_size) * self.texts(texts)).sum(1), dtype=np.float32)
