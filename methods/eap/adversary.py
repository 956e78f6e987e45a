"""The adversarial concept: candidates by distance and K-means, and the search by Gumbel-softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.unlearning import encode

if TYPE_CHECKING:
    from lethebench.hooks import Conditioning
    from lethebench.method import Task
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

LLOYD_STEPS = 20
"""Iterations of K-means (ours)."""


def vocabulary(task: Task, kind: str) -> list[str]:
    """The texts among which the adversarial concept is searched. Raises UserError where there is none.

    ``tokenizer`` gives the first tokenizer's tokens that are whole words of the letters a to z.
    """
    if kind == "prompts":
        found = list(dict.fromkeys(task.neutral_prompts()))
    elif kind == "words":
        words = [w.strip(".,;:!?\"'").lower() for prompt in task.neutral_prompts() for w in prompt.split()]
        found = sorted({w for w in words if w})
    else:
        tokens = [t.removesuffix("</w>") for t in task.model.tokenizers[0].get_vocab() if t.endswith("</w>")]
        found = sorted({t for t in tokens if t.isascii() and t.isalpha()})
    if not found:
        raise UserError(f"the vocabulary '{kind}' is empty: choose another one")
    return found


class Vocabulary:
    """Texts with their embeddings, ``[V, tokens, width]`` and pooled ``[V, width]`` or None.

    All are kept in memory: of a large tokenizer that is gigabytes (SD 1.x: 0.24 MB a text).
    """

    def __init__(self, model: Model, texts: Sequence[str], settings: SamplerSettings, size: int = 64) -> None:
        self.texts = list(texts)
        parts = [_encoded(model, self.texts[i : i + size], settings) for i in range(0, len(texts), size)]
        self.embeds = torch.cat([part.embeds for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        self.pooled = torch.cat(pooled) if pooled else None

    def candidates(self, embeds: Tensor, text: str, closest: int, centers: int) -> Tensor:
        """Numbers of the texts near ``text``, whose embeddings ``[tokens, width]`` are ``embeds``.

        The ``closest`` by Euclidean distance over all tokens, without ``text`` itself, nearest first; with
        ``centers`` > 0 of them those nearest the centres of K-means, in that order.
        """
        flat = self.embeds.flatten(1).float()
        far = (flat - embeds.flatten().float()).norm(dim=1)
        near = [i for i in far.argsort(stable=True).tolist() if self.texts[i] != text][:closest]
        if not near:
            raise UserError(f"the vocabulary holds nothing but '{text}': choose another one")
        if not centers or centers >= len(near):
            return torch.tensor(near)
        chosen = nearest_to_centers(flat[near], centers)
        return torch.tensor([near[i] for i in chosen])


def nearest_to_centers(points: Tensor, count: int) -> list[int]:
    """The numbers of the points ``[N, D]`` nearest to ``count`` centres of K-means, each once, rising.

    Lloyd's iterations from points that are far from one another, the first of them number 0: no randomness.
    """
    chosen = [0]
    far = (points - points[0]).norm(dim=1)
    for _ in range(count - 1):
        chosen.append(int(far.argmax()))
        far = torch.minimum(far, (points - points[chosen[-1]]).norm(dim=1))
    centres = points[chosen]
    for _ in range(LLOYD_STEPS):
        owner = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        sizes = torch.bincount(owner, minlength=count).unsqueeze(1)
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return sorted(set(torch.cdist(centres, points).argmin(dim=1).tolist()))


class Adversary:
    """Logits over each erased text's candidates, searched so that the model's change is largest."""

    def __init__(
        self,
        words: Vocabulary,
        candidates: Sequence[Tensor],
        *,
        lr: float,
        temperature: float,
        hard: bool,
        draws: torch.Generator,
    ) -> None:
        self.words, self.candidates = words, list(candidates)
        self.temperature, self.hard, self._draws = temperature, hard, draws
        device = words.embeds.device
        self.logits = [nn.Parameter(torch.full((len(c),), 1 / len(c), device=device)) for c in candidates]
        self._adam = torch.optim.Adam(self.logits, lr=lr)

    def draw(self, number: int) -> Tensor:
        """Weights ``[K]`` of the candidates of an erased text: a Gumbel-softmax sample, one-hot if hard."""
        logits = self.logits[number]
        uniform = torch.rand(logits.shape, generator=self._draws).clamp(1e-10, 1 - 1e-7).to(logits.device)
        soft = torch.softmax((logits - (-uniform.log()).log()) / self.temperature, dim=0)
        if not self.hard:
            return soft
        hard = torch.zeros_like(soft)
        hard[soft.argmax()] = 1.0
        return (hard - soft).detach() + soft

    def mixed(self, asked: Conditioning, numbers: Sequence[int], weights: Sequence[Tensor]) -> Conditioning:
        """``asked`` with the weighted candidates' embeddings in the place of its own, row by row."""

        def mix(table: Tensor) -> Tensor:
            rows = [
                torch.tensordot(w.to(table), table[self.candidates[n]], dims=1)
                for n, w in zip(numbers, weights, strict=True)
            ]
            return torch.stack(rows)

        pooled = None if self.words.pooled is None else mix(self.words.pooled)
        return replace(asked, embeds=mix(self.words.embeds), pooled=pooled)

    def ascend(self, change: Callable[[list[Tensor]], Tensor], numbers: Sequence[int]) -> None:
        """One step of the logits towards a larger ``change(weights)``, a scalar."""
        with torch.enable_grad():
            weights = [self.draw(n) for n in numbers]
            used = list({id(self.logits[n]): self.logits[n] for n in numbers}.values())
            gradients = torch.autograd.grad(-change(weights), used)
        self._adam.zero_grad()
        for logits, gradient in zip(used, gradients, strict=True):
            logits.grad = gradient
        self._adam.step()

    def found(self, number: int) -> str:
        """The candidate that the search has come to for an erased text."""
        return self.words.texts[int(self.candidates[number][self.logits[number].argmax()])]


@torch.no_grad()
def _encoded(model: Model, texts: list[str], settings: SamplerSettings) -> Conditioning:
    return encode(model, texts, settings)
