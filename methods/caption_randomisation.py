"""Rival of the training track: captions are randomised while training (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.errors import UserError
from lethebench.finetuning.hooks import Captioned, TrainingHooks
from lethebench.method import Task, setting
from lethebench.methods._inserted_words import CITATION, LICENCE, insert_words
from lethebench.methods.lora import LoraMethod
from lethebench.methods.random_tokens import random_words
from lethebench.registry import METHODS

if TYPE_CHECKING:
    import torch

MULTIPLE = "multiple-captions"
KINDS = {MULTIPLE: (1.0, 0), "random-caption": (0.1, 4), "random-tokens": (0.1, 2), "word-repeat": (0.1, 2)}
"""The paper's MC, RC, RT and CWR, with the released code's probability and number of words."""


@METHODS.register
@dataclass(frozen=True)
class CaptionRandomisation(LoraMethod):
    """Changes an image's caption at random each time that the image is seen.

    Somepalli et al. 2023, mitigation while training; released code ``datasets.py`` of somepago/DCR
    (``--trainspecial``, ``--trainspecial_prob``, by default 0.1):

    - ``multiple-captions`` (MC): one of the image's captions, all equally likely. Only for training sets
      whose images have several (``captions`` of an example, its ``caption`` among them): the paper's are
      BLIP's;
    - ``random-caption`` (RC): 4 random tokens take its place;
    - ``random-tokens`` (RT): 2 random tokens are put in at random places (the paper's "replacement" of tokens
      is not in the released code, nor here);
    - ``word-repeat`` (CWR): 2 of its own words are put in once more.

    Their shares are above 0.1 at stronger settings (ours). At one seed a larger share changes the captions
    that a smaller one does, to the same texts.
    """

    kind: str = setting("random-tokens", f"what is done: {', '.join(KINDS)}")
    share: float | None = setting(
        None, "probability that a caption is changed; none: 0.1, of multiple captions 1 (released code)"
    )
    words: int | None = setting(
        None, "how many words are put in; none: 2, of a random caption 4 (released code)"
    )

    name = "caption-randomisation"
    summary = "Changes captions at random while training (Somepalli et al.)."
    strengths: ClassVar = {
        "weak": {"share": 0.1},
        "medium": {"share": 0.4},
        "strong": {"share": 1.0},
        "word-repeat": {"kind": "word-repeat"},
        "random-caption": {"kind": "random-caption"},
        "multiple-captions": {"kind": "multiple-captions"},
    }
    citation = CITATION
    licence = LICENCE

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not '{self.kind}'")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share is between 0 and 1, not {self.share}")
        if self.words is not None and self.words < 1:
            raise ValueError(f"words must be at least 1, not {self.words}")

    def hooks(self, task: Task) -> TrainingHooks:
        """The changes, drawn anew each time."""
        share, words = KINDS[self.kind]
        return RandomisedCaptions(
            self.kind,
            share if self.share is None else self.share,
            words if self.words is None else self.words,
            task.model.pipe.tokenizer,
        )


class RandomisedCaptions(TrainingHooks):
    """Changes each caption with probability ``share``, in the way that ``kind`` names."""

    def __init__(self, kind: str, share: float, words: int, tokenizer: Any) -> None:
        self.kind, self.share, self.words, self.tokenizer = kind, share, words, tokenizer

    def examples(self, examples: Sequence[Captioned]) -> Sequence[Captioned]:
        """All of them. Raises UserError where several captions are asked for and no image has them."""
        if self.kind == MULTIPLE and all(len(_known(e)) < 2 for e in examples):
            raise UserError(f"kind {MULTIPLE}: no image of this training set has more than one caption")
        return examples

    def captions(
        self, captions: list[str], examples: Sequence[Captioned], draws: Sequence[torch.Generator]
    ) -> list[str]:
        """Change each with its own draws."""
        import torch

        chosen = [float(torch.rand((), generator=g)) < self.share for g in draws]
        asked = zip(captions, examples, draws, chosen, strict=True)
        return [self._changed(c, e, g) if change else c for c, e, g, change in asked]

    def _changed(self, caption: str, example: Captioned, draws: torch.Generator) -> str:
        if self.kind == MULTIPLE:
            return _drawn(_known(example), 1, draws)[0]
        if self.kind == "word-repeat":
            return insert_words(caption, _drawn(caption.split(" "), self.words, draws), draws)
        tokens = random_words(self.tokenizer, self.words, draws)
        return " ".join(tokens) if self.kind == "random-caption" else insert_words(caption, tokens, draws)


def _known(example: Captioned) -> Sequence[str]:
    """An example's captions."""
    return getattr(example, "captions", None) or (example.caption,)


def _drawn(texts: Sequence[str], count: int, draws: torch.Generator) -> list[str]:
    """Texts drawn with replacement."""
    import torch

    return [texts[i] for i in torch.randint(len(texts), (count,), generator=draws).tolist()]
