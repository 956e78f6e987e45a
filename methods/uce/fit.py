"""Fitting UCE: which texts are mapped where, their rows, and the layers that solve for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.method import Artefact
from lethebench.methods.uce import ANCHOR
from lethebench.unlearning import Target, editable, find_targets, parameter_group, require_anchors
from lethebench.unlearning.closed_form import ClosedForm, stays
from lethebench.unlearning.tokens import EncodedText, aligned_tails, encode_texts

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.uce import UCE

TEMPLATES = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
"""What ``expand_prompts`` adds for objects (``trainscripts/uce_sd_erase.py``)."""
POOLED = "text_embedder.linear_1.weight"
"""The one kind of edited layer that takes the pooled embedding."""


@dataclass(frozen=True)
class Rows:
    """What a layer takes: of each erased text a block of ``[n, d]`` with its guide's, and preserved rows."""

    erased: list[Tensor]
    guides: list[Tensor]
    preserved: Tensor


def fit(method: UCE, task: Task) -> Artefact:
    """The artefact: the changes of the edited layers, and facts.

    ``left`` is what is left of the erased rows' distance to where they should go: a share, mean over
    layers (0 where there was none).
    """
    targets = find_targets(task, method.targets, method.count)
    if method.guide == ANCHOR:
        require_anchors(targets)
        nameless = [t.concept for t in targets if t.concept is not None and not t.anchor_concept]
        if nameless:
            raise UserError(
                f"the prompt set has no anchor concept for '{nameless[0]}': give a text as `guide`"
            )
    pairs = erased_texts(targets, method.guide, method.templates)
    kept = preserved_texts(method, task)
    found = encode_texts(task.model, [*(t for pair in pairs for t in pair), *kept], task.sampler)
    scale = preserve_scale(method, len(kept))
    solved: dict[bool, tuple[Rows, ClosedForm]] = {}
    left: list[float] = []
    with editable(task.model, parameter_group(task.model, "text-projections")) as edit, torch.no_grad():
        for name, parameter in edit.parameters.items():
            pooled = name.endswith(POOLED)
            if pooled not in solved:
                rows = rows_of(method.rule, found, pairs, kept, pooled=pooled)
                solved[pooled] = rows, solve(rows, method.lamb, method.erase_scale, scale)
            rows, form = solved[pooled]
            base = parameter.detach().cpu().double()
            values = wanted(base, rows, method.technique)
            parameter.copy_(form.weight(base, values))
            edited, asked = parameter.detach().cpu().double(), (form.keys @ base.T - values).norm()
            if asked > 0:
                left.append(float((form.keys @ edited.T - values).norm() / asked))
        changes, facts = edit.changes(), edit.facts()
    facts |= {"targets": len(targets), "clusters": len({t.cluster for t in targets})}
    facts |= {"erased_texts": len(pairs), "preserved_texts": len(kept), "left": sum(left) / max(1, len(left))}
    return Artefact(changes, facts)


def erased_texts(targets: Sequence[Target], guide: str, templates: bool) -> list[tuple[str, str]]:
    """Distinct (erased text, guide) of the targets, in their order.

    A concept's name once for all its prompts, with ``templates`` also in :data:`TEMPLATES`; a trigger's
    caption as it is.
    """
    found: dict[str, str] = {}
    for target in targets:
        if target.concept is None:
            found.setdefault(target.text, target.anchors[0] if guide == ANCHOR else guide)
            continue
        own = target.anchor_concept if guide == ANCHOR else guide
        found.setdefault(target.concept, own)
        for template in TEMPLATES if templates else ():
            found.setdefault(template.format(target.concept), template.format(own))
    return list(found.items())


def preserved_texts(method: UCE, task: Task) -> list[str]:
    """Neutral prompts, drawn so that more hold fewer; with the original rule '' before them."""
    always = [""] if method.rule == "original" else []
    if not method.preserve:
        return always
    texts = task.neutral_prompts()
    if not texts:
        raise UserError("the prompt set has no neutral prompts to preserve: set preserve to 0")
    order = torch.randperm(len(texts), generator=task.generator("preserved")).tolist()
    return always + [texts[i] for i in order[: method.preserve]]


def preserve_scale(method: UCE, kept: int) -> float:
    """The weight of preserved embeddings: as set, else the rule's own."""
    if method.preserve_scale is not None:
        return method.preserve_scale
    return 1.0 if method.rule == "current" else max(0.1, 1 / kept)


def rows_of(
    rule: str,
    found: Mapping[str, EncodedText],
    pairs: Sequence[tuple[str, str]],
    kept: Sequence[str],
    *,
    pooled: bool,
) -> Rows:
    """The embeddings that ``rule`` takes; pooled ones where the layer takes them (one a text, any rule)."""
    if pooled:
        erased, guides = ([_pooled(found[pair[i]]) for pair in pairs] for i in (0, 1))
        preserved = [_pooled(found[text]) for text in kept]
    elif rule == "current":
        erased, guides = ([found[pair[i]].last() for pair in pairs] for i in (0, 1))
        preserved = [found[text].last() for text in kept]
    else:
        both = [aligned_tails(found[text], found[guide]) for text, guide in pairs]
        erased, guides = [a for a, _ in both], [b for _, b in both]
        preserved = [found[text].embeds for text in kept]
    return Rows(erased, guides, torch.cat([erased[0][:0], *preserved]))


def solve(rows: Rows, lamb: float, erase_scale: float, scale: float) -> ClosedForm:
    """The closed form of the rows, whatever the layer."""
    keys = torch.cat(rows.erased)
    return ClosedForm(keys, keys.new_full((len(keys),), erase_scale), stays(rows.preserved, scale, lamb))


def wanted(weight: Tensor, rows: Rows, technique: str) -> Tensor:
    """The outputs ``[n, out]`` that the erased rows should have.

    The guides'; with ``tensor`` without their component along the erased block's own outputs, both taken
    as one vector over the block's tokens.
    """
    values = []
    for erased, guide in zip(rows.erased, rows.guides, strict=True):
        value, own = guide @ weight.T, erased @ weight.T
        if technique == "tensor":
            value = value - (value * own).sum() / (own * own).sum() * own
        values.append(value)
    return torch.cat(values)


def _pooled(text: EncodedText) -> Tensor:
    assert text.pooled is not None
    return text.pooled[None]
