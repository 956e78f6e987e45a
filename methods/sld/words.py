"""The texts to guide away from, found in the task's targets (ours: the paper gives one text for all)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lethebench.errors import UserError
from lethebench.method import Artefact
from lethebench.unlearning import Target, find_targets

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.sld import SLD


def choose(settings: SLD, task: Task) -> Artefact:
    """Facts ``words`` (all targets' distinguishing words), ``text`` (those that fit), and ``targets``.

    Raises UserError where the targets have no anchors, or nothing that their anchors lack.
    """
    targets = find_targets(task, settings.targets, settings.count)
    words = distinguishing_words(targets)
    if not words:
        raise UserError(
            "sld finds no words that tell the targets from their anchors (the prompt set's paraphrases): "
            "set `concept` to what is to be avoided"
        )
    order = torch.randperm(len(words), generator=task.generator("words")).tolist()
    text = fitting_text([words[i] for i in order], task.model.pipe.tokenizer)
    return Artefact(facts={"words": words, "text": text, "targets": len(targets)})


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: letters and digits, without what stands between or around them.

    >>> words_of("Dozzux, a captain's pink-red rocket")
    ['dozzux', 'a', 'captain', 's', 'pink', 'red', 'rocket']
    """
    return re.findall(r"\w+", text.lower())


def distinguishing_words(targets: Sequence[Target]) -> list[str]:
    """The words of the targets that no anchor of any target has, in their order.

    A target without anchors has none: nothing tells which of its words matter.
    """
    usual = {w for t in targets for anchor in t.anchors for w in words_of(anchor)}
    found = [w for t in targets if t.anchors for w in words_of(t.text) if w not in usual]
    return list(dict.fromkeys(found))


def fitting_text(words: Sequence[str], tokenizer: Any) -> str:
    """As many of the words, from the first, as the tokenizer takes, with commas between them."""
    text = words[0]
    for word in words[1:]:
        longer = f"{text}, {word}"
        if len(tokenizer(longer).input_ids) > tokenizer.model_max_length:
            break
        text = longer
    return text


def concept_of(prompt: str, words: Sequence[str], text: str) -> str:
    """What a prompt is guided away from: its own words among ``words``, else ``text``.

    >>> concept_of("Wolvuth in a forest", ["dozzux", "wolvuth"], "dozzux, wolvuth")
    'wolvuth'
    """
    wanted = set(words)
    return " ".join(dict.fromkeys(w for w in words_of(prompt) if w in wanted)) or text
