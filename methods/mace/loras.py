"""The second step: a LoRA for each subject, trained to take attention off the subject's tokens.

LoRAs don't see each other: AdamW works on each entry alone and a subject's loss holds its own LoRA only, so
a batch of subjects is trained at once, each row of the batch with its own LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lethebench.errors import RunError
from lethebench.sampler.attention import probabilities
from lethebench.unlearning import encode, noised, prediction

if TYPE_CHECKING:
    from lethebench.hooks import Conditioning
    from lethebench.progress import Bar
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

Factors = dict[str, tuple[Tensor, Tensor]]
"""A LoRA: by the weight's name in the denoiser ``up`` ``[out, rank]`` and ``down`` ``[rank, in]``."""


@dataclass(frozen=True)
class Subject:
    """An item or a concept with its pictures.

    ``texts`` are its prompts and ``own`` the rows of each prompt's embedding that are the target's tokens;
    ``latents`` ``[n, 4, height, width]`` are pictures, number k of prompt ``k % len(texts)``, and ``masks``
    ``[n, 1, height, width]`` where the subject is in them (1) or not (0).
    """

    cluster: str
    texts: tuple[str, ...]
    own: tuple[tuple[int, ...], ...]
    latents: Tensor
    masks: Tensor


class Loras:
    """A low-rank change ``up @ down`` of each projection for each subject; ``up`` is 0 at first."""

    def __init__(
        self, modules: Mapping[str, Any], rank: int, draws: Sequence[torch.Generator], device: torch.device
    ) -> None:
        self.layers = {
            f"{n}.{part}": getattr(m, part) for n, m in modules.items() for part in ("to_k", "to_v")
        }
        self.down, self.up = {}, {}
        for name, layer in self.layers.items():
            outputs, inputs = layer.weight.shape
            spread = torch.stack([torch.rand(rank, inputs, generator=g) * 2 - 1 for g in draws])
            self.down[name] = (spread / inputs**0.5).to(device).requires_grad_()
            self.up[name] = torch.zeros(len(draws), outputs, rank, device=device, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [*self.down.values(), *self.up.values()]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Row i of a batch is projected with LoRA i added."""

        def hook_for(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
            def hook(_module: Any, args: Any, output: Tensor) -> Tensor:
                change: Tensor = (args[0].float() @ self.down[name].mT) @ self.up[name].mT
                return output + change.to(output.dtype)

            return hook

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(hook_for(name)).remove)
            yield

    def factors(self, index: int) -> Factors:
        """LoRA number ``index`` in float64 on the CPU: ``up @ down`` is what it adds to a weight."""

        def kept(value: Tensor) -> Tensor:
            return value[index].detach().cpu().double()

        return {f"{name}.weight": (kept(self.up[name]), kept(self.down[name])) for name in self.layers}


@contextmanager
def attention_mass(modules: Mapping[str, Any], marks: Tensor, masks: Tensor) -> Iterator[list[Tensor]]:
    """Collects, of each call of a cross-attention, ``sum |A * mask|^2`` by image, ``[B]``.

    A is the attention of heads and pixels to the tokens that ``marks`` ``[B, tokens]`` holds 1 for. ``masks``
    ``[B, 1, height, width]`` are brought to the layer's pixels by their mean. Gradients flow.
    """
    found: list[Tensor] = []
    sums: dict[int, Tensor] = {}

    def region(pixels: int) -> Tensor:
        if pixels not in sums:
            height, width = masks.shape[-2:]
            factor = round((height * width / pixels) ** 0.5)
            small = F.adaptive_avg_pool2d(masks, (-(-height // factor), -(-width // factor)))
            sums[pixels] = small.flatten(1)
        return sums[pixels]

    def hooks(name: str, module: Any) -> list[Any]:
        given: dict[str, Tensor] = {}

        def keep(what: str) -> Callable[[Any, Any, Tensor], None]:
            def hook(_module: Any, _args: Any, output: Tensor) -> None:
                given[what] = output

            return hook

        def after(_module: Any, _args: Any, _output: Any) -> None:
            if not {"query", "key"} <= set(given):
                raise RunError(f"{name} doesn't call its to_q and to_k: unfuse its projections")
            attention = probabilities(module, given["query"], given["key"])
            marked = (attention * marks[:, None, None]).square().sum(dim=(1, 3))
            found.append((marked * region(marked.shape[1]).square()).sum(dim=1))
            given.clear()

        return [
            module.to_q.register_forward_hook(keep("query")),
            module.to_k.register_forward_hook(keep("key")),
            module.register_forward_hook(after),
        ]

    with ExitStack() as stack:
        for name, module in modules.items():
            for handle in hooks(name, module):
                stack.callback(handle.remove)
        yield found


def importance(total: int) -> Tensor:
    """The density of timesteps 0 to ``total`` - 1, not normalised (concept-focal importance sampling)."""
    t = torch.arange(total, dtype=torch.float64)
    return torch.sigmoid(0.05 * (t - 200)) - torch.sigmoid(0.05 * (t - 400))


def train(
    model: Model,
    modules: Mapping[str, Any],
    subjects: Sequence[Subject],
    settings: SamplerSettings,
    *,
    steps: int,
    lr: float,
    rank: int,
    timesteps: Tensor,
    draws: Sequence[torch.Generator],
    bar: Bar,
) -> tuple[list[Factors], Tensor]:
    """Train the subjects' LoRAs side by side; returns them, and the loss ``[steps, B]``.

    ``timesteps`` is the density to draw them by, ``draws`` a generator for each subject. A subject's pictures
    take turns. The model's weights must not ask for gradients.
    """
    loras = Loras(modules, rank, draws, model.device)
    optimiser = torch.optim.AdamW(loras.parameters(), lr=lr)
    lessons = [_lesson(model, subjects, number, settings) for number in range(len(subjects[0].latents))]
    losses: list[Tensor] = []
    for step in range(steps):
        lesson = lessons[step % len(lessons)]
        noise = torch.stack([torch.randn(lesson.latents.shape[1:], generator=g) for g in draws])
        times = torch.cat([torch.multinomial(timesteps, 1, generator=g) for g in draws])
        inputs = noised(model, lesson.latents, noise.to(lesson.latents), times)
        with loras.applied(), attention_mass(modules, lesson.marks, lesson.masks) as found:
            prediction(model, inputs, times, lesson.conditioning, settings)
        loss = torch.stack(found).sum(dim=0)
        optimiser.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach().cpu())
        bar.advance(len(subjects), note=f"attention {float(loss.detach().mean()):.4f}")
    return [loras.factors(i) for i in range(len(subjects))], torch.stack(losses)


@dataclass(frozen=True)
class _Lesson:
    """Picture number k of each subject: its prompt encoded, its target's tokens ``[B, tokens]``, its mask."""

    conditioning: Conditioning
    marks: Tensor
    latents: Tensor
    masks: Tensor


def _lesson(model: Model, subjects: Sequence[Subject], number: int, settings: SamplerSettings) -> _Lesson:
    which = [number % len(s.texts) for s in subjects]
    with torch.no_grad():
        conditioning = encode(model, [s.texts[k] for s, k in zip(subjects, which, strict=True)], settings)
    marks = conditioning.embeds.new_zeros(conditioning.embeds.shape[:2], dtype=torch.float32)
    for i, (subject, k) in enumerate(zip(subjects, which, strict=True)):
        marks[i, list(subject.own[k])] = 1.0
    latents, masks = (
        torch.stack([part[number] for part in parts])
        for parts in ([s.latents for s in subjects], [s.masks for s in subjects])
    )
    return _Lesson(conditioning, marks, latents, masks)
