"""Value neurons of cross-attention: which there are, how active a prompt makes them, and scaling them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.hooks import Conditioning
from lethebench.pruning.zero import restored

if TYPE_CHECKING:
    from lethebench.zoo import Model


class ValueNeurons:
    """The outputs of every ``attn2.to_v`` of a UNet, numbered 0 to ``total - 1`` through its layers.

    Layers are in the order of computation: down blocks, mid block and, with ``up_blocks``, up blocks.
    Raises UserError for a model without such layers.
    """

    def __init__(self, model: Model, *, up_blocks: bool = False) -> None:
        parts = ("down_blocks.", "mid_block.", *(("up_blocks.",) if up_blocks else ()))
        found = [
            (name, module)
            for part in parts
            for name, module in model.denoiser.named_modules()
            if name.startswith(part) and name.endswith(".attn2.to_v")
        ]
        if not found:
            raise UserError(f"{model.name} ({model.family}) has no value layers of cross-attention")
        self.denoiser = model.denoiser
        self.layers: dict[str, nn.Linear] = dict(found)  # type: ignore[arg-type]
        self.sizes = [layer.out_features for layer in self.layers.values()]
        self.total = sum(self.sizes)

    def activations(self, embeds: Tensor) -> Tensor:
        """How active a prompt makes each neuron: the mean over tokens of ``|to_v(embeds)|``.

        ``embeds`` is ``[B, tokens, width]``; the result float32 ``[B, total]``. Depends on the text alone.
        """
        with torch.no_grad():
            values = [
                layer(embeds.to(layer.weight.dtype)).float().abs().mean(dim=1)
                for layer in self.layers.values()
            ]
        return torch.cat(values, dim=1)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """``[..., total]`` by layer, ``[..., size]``."""
        return dict(zip(self.layers, values.split(self.sizes, dim=-1), strict=True))

    def join(self, values: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """The inverse of :meth:`split`, of tensors whose names start with ``prefix``."""
        return torch.cat([values[prefix + name] for name in self.layers], dim=-1)

    def parameters_of_one(self, layer: str) -> int:
        """How many of the denoiser's parameters belong to one neuron of a layer."""
        found = self.layers[layer]
        return int(found.in_features) + (found.bias is not None)

    def parameters_of(self, mask: Tensor) -> int:
        """How many of the denoiser's parameters belong to the neurons of ``mask``, bool ``[total]``."""
        return sum(int(part.sum()) * self.parameters_of_one(name) for name, part in self.split(mask).items())


def selected(
    neurons: ValueNeurons,
    scores: Tensor,
    activations: Tensor,
    theta: float,
    k: int,
    *,
    rising: bool = False,
) -> list[list[int]]:
    """By layer, the neurons with a z-score above ``theta`` and the ``k`` most active (paper, algorithm 2).

    ``scores`` and ``activations`` are ``[total]``. Each neuron is named once; the order is the one that
    refinement goes by: those of theta alone by number, then the most active, falling (the released code's,
    which names a neuron twice where both rules take it and decides at the second), or by ``rising`` z-score.
    """
    found, start = [], 0
    for size in neurons.sizes:
        own = scores[start : start + size]
        top = activations[start : start + size].topk(min(k, size)).indices.tolist()
        unusual = [i for i in (own > theta).nonzero().flatten().tolist() if i not in top]
        order = sorted([*unusual, *top], key=own.__getitem__) if rising else [*unusual, *top]
        found.append([start + i for i in order])
        start += size
    return found


def z_scores(activations: Tensor, neutral: Tensor) -> Tensor:
    """``|activation - mean| / std`` against neutral prompts' activations ``[prompts, total]``.

    Absolute as in the released code (the paper's algorithm 2 writes no bars), ``std`` the sample's.
    """
    deviation = neutral.std(dim=0).clamp(min=1e-12)
    return (activations - neutral.mean(dim=0)).abs() / deviation


class Scaling:
    """Multiplies value neurons by factors that each row of the conditioning carries."""

    def __init__(self, neurons: ValueNeurons, key: str) -> None:
        self.neurons, self.key = neurons, key
        self._factors: dict[str, Tensor] = {}

    def marked(self, conditioning: Conditioning, factors: Tensor) -> Conditioning:
        """The conditioning with factors ``[B, total]`` for its images, in both halves of guidance."""
        factors = factors.to(conditioning.embeds.device)
        negative = conditioning.negative
        return replace(
            conditioning,
            extra={**conditioning.extra, self.key: factors},
            negative=None if negative is None else self.marked(negative, factors),
        )

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the denoiser: take the factors out of its arguments."""
        factors = kwargs.get(self.key)
        self._factors = {} if factors is None else self.neurons.split(factors)
        return args, {name: value for name, value in kwargs.items() if name != self.key}

    def forget(self, *_: Any) -> None:
        """After the denoiser."""
        self._factors = {}

    def scale(self, name: str, values: Tensor) -> Tensor:
        """After a value layer, ``[B, tokens, size]``."""
        factors = self._factors.get(name)
        return values if factors is None else values * factors[:, None].to(values.dtype)


@contextmanager
def scaling(neurons: ValueNeurons, key: str) -> Iterator[Scaling]:
    """Let conditionings that are ``marked`` scale value neurons, image by image, while the context is open.

    The factors travel as an argument of the denoiser, row by row with the embeddings, so that an image's
    result doesn't depend on its neighbours nor on how a batch is split or joined.
    """
    made = Scaling(neurons, key)
    denoiser = neurons.denoiser
    with ExitStack() as stack:
        stack.enter_context(denoiser.register_forward_pre_hook(made.take, with_kwargs=True))
        stack.enter_context(denoiser.register_forward_hook(made.forget, always_call=True))
        for name, layer in neurons.layers.items():
            hook = layer.register_forward_hook(lambda _, __, values, name=name: made.scale(name, values))
            stack.enter_context(hook)
        yield made


@contextmanager
def scaled_for_good(neurons: ValueNeurons, factors: Tensor) -> Iterator[None]:
    """Multiply the value layers' rows (and biases) by ``factors`` ``[total]``; restored bit for bit.

    The same as scaling the neurons of every image.
    """
    names = [
        f"{name}.{part}"
        for name, layer in neurons.layers.items()
        for part in ("weight", *(("bias",) if layer.bias is not None else ()))
    ]
    with restored(neurons.denoiser, names):
        with torch.no_grad():
            for name, part in neurons.split(factors).items():
                layer = neurons.layers[name]
                own = part.to(layer.weight)
                layer.weight.mul_(own[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(own)
        yield


def factors_of(masks: Tensor, scale: float) -> Tensor:
    """What neurons are multiplied by: ``scale`` where ``masks`` (bool) is set, 1 elsewhere."""
    return torch.where(masks, scale, 1.0)


def mask_of(total: int, neurons: Sequence[int]) -> Tensor:
    """Bool ``[total]``, set for the numbered neurons."""
    mask = torch.zeros(total, dtype=torch.bool)
    mask[list(neurons)] = True
    return mask
