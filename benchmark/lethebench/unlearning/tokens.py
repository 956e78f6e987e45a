"""Prompts' token embeddings: which row is which token, and how two prompts' tokens stand to each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.unlearning.diffusion import encode

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Span:
    """The rows ``start`` to ``stop`` of an embedding that one tokenizer's tokens fill.

    ``ids`` are the prompt's tokens with begin and end token, without padding.
    """

    ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def last(self) -> int:
        """The row of the last content token (the one before the end token).

        Of an empty prompt: the begin token of CLIP; for T5, which has none, the last padding token, as the
        index -1 gives it in UCE's released code.
        """
        return self.start + (len(self.ids) - 2) % (self.stop - self.start)


@dataclass(frozen=True)
class EncodedText:
    """A prompt as the denoiser takes it, in float64 on the CPU.

    ``embeds`` is ``[tokens, width]``, ``pooled`` ``[width]`` or None. Stable Diffusion 3 has two spans (the
    CLIP encoders side by side, then T5), every other family one.
    """

    embeds: Tensor
    pooled: Tensor | None
    spans: tuple[Span, ...]

    def last(self) -> Tensor:
        """The last content token of each span, ``[spans, width]``."""
        return self.embeds[[span.last for span in self.spans]]


def encode_texts(
    model: Model, texts: Iterable[str], settings: SamplerSettings, batch_size: int = 64
) -> dict[str, EncodedText]:
    """Each distinct text with its encoding, without gradients."""
    wanted = list(dict.fromkeys(texts))
    found: dict[str, EncodedText] = {}
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        with torch.no_grad():
            conditioning = encode(model, part, settings)
        embeds = conditioning.embeds.detach().cpu().double()
        pooled = None if conditioning.pooled is None else conditioning.pooled.detach().cpu().double()
        spans = zip(*(_spans(part, *of) for of in _tokenizers(model, embeds.shape[1])), strict=True)
        for i, (text, of) in enumerate(zip(part, spans, strict=True)):
            found[text] = EncodedText(embeds[i], None if pooled is None else pooled[i], tuple(of))
    return found


def aligned_tails(text: EncodedText, other: EncodedText) -> tuple[Tensor, Tensor]:
    """Rows ``[n, width]`` of both, from the last content token through the padding, pair by pair.

    The tail of the text whose content is longer sets how many: the other's last padding is left out
    (the original UCE's rule).
    """
    pairs = []
    for a, b in zip(text.spans, other.spans, strict=True):
        count = min(a.stop - a.last, b.stop - b.last)
        pairs.append((text.embeds[a.last : a.last + count], other.embeds[b.last : b.last + count]))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


@dataclass(frozen=True)
class Alignment:
    """How the rows of a prompt stand to those of its anchor.

    ``own`` are the rows of the content tokens that the anchor lacks. ``shared`` are pairs (row, row in the
    anchor) of all others that both have: begin token, common words, end token and padding.
    """

    own: tuple[int, ...]
    shared: tuple[tuple[int, int], ...]


def align(span: Span, other: Span) -> Alignment:
    """Align a prompt's tokens with its anchor's by their longest common runs (difflib)."""
    blocks = SequenceMatcher(None, span.ids, other.ids, autojunk=False).get_matching_blocks()
    pairs = [(b.a + i, b.b + i) for b in blocks for i in range(b.size)]
    matched = {i for i, _ in pairs}
    own = [i for i in range(len(span.ids)) if i not in matched]
    padding = min(span.stop - span.start - len(span.ids), other.stop - other.start - len(other.ids))
    pairs += [(len(span.ids) + i, len(other.ids) + i) for i in range(padding)]
    return Alignment(
        tuple(span.start + i for i in own), tuple((span.start + i, other.start + j) for i, j in pairs)
    )


def _tokenizers(model: Model, tokens: int) -> list[tuple[Any, int, int]]:
    """(tokenizer, start, stop) of each part of an embedding of ``tokens`` rows."""
    pipe = model.pipe
    if model.family == "flux":
        return [(pipe.tokenizer_2, 0, tokens)]
    if model.family != "sd3":
        return [(pipe.tokenizer, 0, tokens)]
    clip = int(pipe.tokenizer_max_length)
    parts = [(pipe.tokenizer, 0, clip)]
    if getattr(pipe, "tokenizer_3", None) is not None:
        parts.append((pipe.tokenizer_3, clip, tokens))
    return parts


def _spans(texts: list[str], tokenizer: Any, start: int, stop: int) -> list[Span]:
    ids = tokenizer(texts, truncation=True, max_length=stop - start)["input_ids"]
    return [Span(tuple(row), start, stop) for row in ids]
