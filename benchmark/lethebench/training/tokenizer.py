"""A real CLIPTokenizer of the planted world's words: byte-pair merges after CLIP's conventions.

Lower case, byte-level base letters, ``</w>`` at the end of a word, ``<|startoftext|>`` and
``<|endoftext|>`` (which also pads, as in Stable Diffusion). Merging goes on until every word of the
captions is ONE token, the invented names too, so that a rare name is one rare token as it is in
the papers. The base holds all 256 bytes: any other text is tokenized as well, into more pieces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32
"""Tokens of a prompt. The world's captions have at most 14 with start and end; the rest is room for
methods that add tokens (random tokens, word repetition)."""

_WORDS = re.compile(r"[^\W\d_]+|\d|[^\s\w]+")
Pair = tuple[str, str]


def byte_letters() -> list[str]:
    """The 256 printable letters that GPT-2's byte-level coding gives the bytes 0 to 255, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def words_of(captions: Iterable[str]) -> Counter[str]:
    """How often each lower-case word (or run of punctuation) occurs."""
    return Counter(word for caption in captions for word in _WORDS.findall(caption.lower()))


def learn_merges(words: Counter[str]) -> list[Pair]:
    """Byte-pair merges that make every word one token: most frequent pair first, ties by spelling.

    The words must be ASCII (their letters are then their bytes' letters).
    """
    spelled: dict[str, list[str]] = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges: list[Pair] = []
    while True:
        pairs: Counter[Pair] = Counter()
        for word, pieces in spelled.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, pieces in spelled.items():
            if best[0] in pieces:
                spelled[word] = _merged(pieces, best)


def _merged(pieces: list[str], pair: Pair) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of ``captions`` is one token."""
    from transformers import CLIPTokenizer

    merges = learn_merges(words_of(captions))
    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
    return tokenizer
