"""Wanda's scores and masks, the inputs they are measured on, and the zeroed weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lethebench.errors import UserError
from lethebench.method import Artefact
from lethebench.progress import progress
from lethebench.pruning import find_sites
from lethebench.pruning.zero import restored
from lethebench.unlearning import NeutralBatches, chosen_prompts, find_targets, fitting_settings

if TYPE_CHECKING:
    from lethebench.method import Task
    from lethebench.methods.wanda import Wanda

ZERO = "zero."
"""Prefix of the artefact's tensors: by a parameter's name, the packed mask of its zeroed entries."""


@dataclass(frozen=True)
class Layer:
    """A second feed-forward layer: a linear module, whose columns from ``first`` on take the neurons."""

    module: str
    first: int
    neurons: int

    @property
    def parameter(self) -> str:
        """The name of its weight, ``[out, columns]``."""
        return f"{self.module}.weight"

    def columns(self, values: Tensor) -> Tensor:
        """What belongs to the neurons of ``[..., columns]``, ``[..., neurons]`` (a view)."""
        return values[..., self.first : self.first + self.neurons]


def fit(method: Wanda, task: Task) -> Artefact:
    """Masks of the zeroed weights, and facts."""
    denoiser = task.model.denoiser
    layers = find_layers(denoiser)
    steps = method.chain_steps or task.sampler.num_inference_steps
    _check(method, layers, steps)
    targets = find_targets(task, method.targets, method.count)
    began = time.perf_counter()
    settings = fitting_settings(task.sampler, task.model.family, steps, method.guidance)
    texts = {"target": [t.text for t in targets], "base": base_prompts(method, task, len(targets))}
    norms = {}
    for part, asked in texts.items():
        # The same generator for both parts: a target and its base prompt start from the same noise.
        batches = NeutralBatches(task.model, asked, settings, method.batch_size, task.generator("noise"))
        norms[part] = input_norms(batches, layers, method.tau, f"wanda: {part} prompts")
    masks = chosen_weights(denoiser, layers, norms["target"], norms["base"], method.ratio, method.union)
    shares = {x.module: float(x.columns(masks[x.parameter]).float().mean()) for x in layers}
    weights = sum(x.columns(masks[x.parameter]).numel() for x in layers)
    gone = sum(int(mask.sum()) for mask in masks.values())
    facts: dict[str, Any] = {
        "parameters_changed": gone / sum(p.numel() for p in denoiser.parameters()),
        "sparsity": gone / weights,
        "targets": len(targets),
        "clusters": len({t.cluster for t in targets}),
        "zeroed_weights": gone,
        "zeroed_by_layer": shares,
        "timing": {"seconds": round(time.perf_counter() - began, 1)},
    }
    return Artefact({ZERO + name: packed(mask) for name, mask in masks.items()}, facts)


def chosen_weights(
    denoiser: nn.Module,
    layers: Sequence[Layer],
    target: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    ratio: float,
    union: float,
) -> dict[str, Tensor]:
    """The weights to zero, bool by parameter in its shape; ``target`` and ``base`` by :func:`input_norms`."""
    masks: dict[str, Tensor] = {}
    for layer in layers:
        weight = denoiser.get_parameter(layer.parameter).detach().float().cpu()
        mask = torch.zeros_like(weight, dtype=torch.bool)
        norms = target[layer.module], base[layer.module]
        layer.columns(mask).copy_(joined(layer.columns(weight).abs(), *norms, ratio, union))
        masks[layer.parameter] = mask
    return masks


def packed(mask: Tensor) -> Tensor:
    """A mask's entries in order, 8 to a byte: uint8 ``[ceil(entries / 8)]``."""
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`packed`, bool of the given shape."""
    entries = np.unpackbits(bits.numpy(), count=shape.numel())
    return torch.from_numpy(entries).bool().view(shape)


def find_layers(denoiser: nn.Module) -> list[Layer]:
    """The denoiser's second feed-forward layers, in the order of its modules.

    ``ff.net.2`` of every transformer block (``ff_context.net.2`` too), ``proj_out`` of FLUX's single blocks.
    """
    return [
        Layer(cut.parameter.removesuffix(".weight"), cut.layout.offset, site.size)
        for site in find_sites(denoiser, ("ffn",))
        for cut in site.cuts
        if cut.dim == 1
    ]


def base_prompts(method: Wanda, task: Task, count: int) -> list[str]:
    """One prompt to compare with for each of ``count`` targets; neutral ones come again if they run out."""
    if method.base == "empty":
        return [""] * count
    texts = chosen_prompts(task.neutral_prompts(), count, task.generator("base"))
    return [texts[i % len(texts)] for i in range(count)]


def input_norms(
    batches: NeutralBatches, layers: Sequence[Layer], steps: int, title: str = "wanda"
) -> dict[str, Tensor]:
    """The norm of each input of each layer over the first steps, by module, float64 ``[steps, neurons]``.

    Over all tokens of all prompts, and under classifier-free guidance of both halves.
    """
    squares = {x.module: torch.zeros(steps, x.neurons, dtype=torch.float64) for x in layers}
    with torch.no_grad(), progress(title, total=len(batches)) as bar:
        for number in range(len(batches)):
            batch = batches.chain(number)
            latents = batch.start
            for step in range(steps):
                with _watched(batches.model.denoiser, layers, {m: s[step] for m, s in squares.items()}):
                    latents = batch.chain.step(step, latents)
            bar.advance()
    return {module: total.sqrt() for module, total in squares.items()}


def token_squares(inputs: Tensor) -> Tensor:
    """Squares of each token's inputs, scaled to unit norm, summed over tokens: ``[..., n]`` to ``[n]``."""
    return F.normalize(inputs.detach().float().flatten(0, -2), dim=1).square().sum(0)


def mask_of_step(weight: Tensor, target: Tensor, base: Tensor, ratio: float) -> Tensor:
    """A step's mask, bool ``[out, n]``, True where the weight is to go.

    ``weight`` ``[out, n]`` holds absolute values, ``target`` and ``base`` ``[n]`` the norms of the inputs. Of
    each row the ``int(ratio * n)`` largest target scores (of equal ones the first), where above the base's.
    """
    scores = weight * target
    largest = scores.sort(dim=1, descending=True, stable=True).indices[:, : int(ratio * weight.shape[1])]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, largest, True)
    return mask & (scores > weight * base)


def joined(weight: Tensor, target: Tensor, base: Tensor, ratio: float, union: float) -> Tensor:
    """The masks of all steps joined: bool ``[out, n]``, where more than ``union`` of them hold the weight.

    ``target`` and ``base`` are ``[steps, n]``.
    """
    held = sum(mask_of_step(weight, t, b, ratio).int() for t, b in zip(target, base, strict=True))
    assert isinstance(held, Tensor)
    return held > union * len(target)


@contextmanager
def zeroed(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero the artefact's weights while the context is open; then restore them bit for bit."""
    masks = {name.removeprefix(ZERO): bits for name, bits in tensors.items()}
    with restored(denoiser, list(masks)):
        with torch.no_grad():
            for name, bits in masks.items():
                parameter = denoiser.get_parameter(name)
                parameter.masked_fill_(unpacked(bits.cpu(), parameter.shape).to(parameter.device), 0.0)
        yield


@contextmanager
def _watched(denoiser: nn.Module, layers: Sequence[Layer], squares: Mapping[str, Tensor]) -> Iterator[None]:
    """Add the inputs' squares of every layer to ``squares`` while the context is open."""

    def watch(layer: Layer) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            squares[layer.module].add_(token_squares(layer.columns(args[0])).cpu())

        return denoiser.get_submodule(layer.module).register_forward_pre_hook(hook)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(watch(layer).remove)
        yield


def _check(method: Wanda, layers: Sequence[Layer], steps: int) -> None:
    """Refuse, before any work, what can't be done on this model."""
    if not layers:
        raise UserError("wanda: the model has no feed-forward layer that it knows")
    if method.tau > steps:
        raise UserError(f"wanda: tau is {method.tau}, but the chain has {steps} steps: lower tau")
    narrow = min(layers, key=lambda x: x.neurons)
    if int(method.ratio * narrow.neurons) < 1:
        raise UserError(
            f"wanda: ratio {method.ratio} takes none of the {narrow.neurons} weights in a row of "
            f"{narrow.module}: use at least {1 / narrow.neurons:.2g}"
        )
