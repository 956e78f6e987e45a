"""A real T5 tokenizer of the planted world's words, for the second text encoder of mini-flux.

A unigram model after SentencePiece's conventions: ``▁`` begins a word, ``</s>`` ends a text, ``<pad>``
pads it. Every word of the captions is one piece; other text is spelled in single printable ASCII letters,
what is not ASCII is ``<unk>``. As in T5, capitals are other letters than small ones, and the captions
have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lethebench.training.tokenizer import MAX_LENGTH, words_of

if TYPE_CHECKING:
    from transformers import T5TokenizerFast

_SPACE = "▁"
_SPECIAL = ("<pad>", "</s>", "<unk>")
_LETTER = 10.0
"""How much less likely a single letter is than the rarest word, in natural logarithms."""


def build_t5_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """A T5 tokenizer in which every word of ``captions`` is one token.

    A piece's score is its log-frequency. Any other way to cut a known word has a letter in it, which costs
    more than the rarest word. Prompts are cut to as many tokens as those of the CLIP tokenizer.
    """
    from transformers import T5TokenizerFast

    words = words_of(captions)
    total = sum(words.values())
    scores = {_SPACE + word: math.log(count / total) for word, count in sorted(words.items())}
    least = min(scores.values(), default=0.0) - _LETTER
    letters = [_SPACE, *map(chr, range(33, 127))]
    vocabulary = [(piece, 0.0) for piece in _SPECIAL]
    vocabulary += [*scores.items(), *((letter, least) for letter in letters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=MAX_LENGTH)
