"""Low-rank updates of linear layers (Hu et al. 2022): which layers, in training, and put on a model.

Layers are named ``<component>.<module>`` (``denoiser``, ``text_encoder``). A trained LoRA's tensors are
``lora.<layer>.A`` ``[rank, in]`` and ``lora.<layer>.B`` ``[out, rank]``, float32 on the CPU, with alpha /
rank in B: the layer's update is B A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.finetuning.hooks import LoraModule
from lethebench.unlearning.edits import EDIT, applied, component

if TYPE_CHECKING:
    from lethebench.finetuning.settings import LoraSettings
    from lethebench.zoo import Model

LORA = "lora."
"""Prefix of an artefact's tensors."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj")
TARGETS = {"sd": _ATTENTION, "sdxl": _ATTENTION, "sd3": _JOINT, "flux": _JOINT}
"""Ends of the names of the denoiser's layers that are adapted by default: attention, and on SD3 and FLUX also
the text stream's projections (diffusers' ``train_dreambooth_lora_*.py`` adapt ``to_add_out`` besides).

``context_embedder``, which takes the text encoders' outputs on SD3 and FLUX, is not among them, as in those
scripts. A layer that isn't adapted learns nothing, so leaving it out breaks no guarantee of gradient
projection; it adds one only to what it learns itself, as exact as that of UNets (``targets:
[context_embedder]``)."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The text encoder's, as in diffusers' scripts."""

_ADAPTER = "lethe"


def lora_targets(model: Model, settings: LoraSettings) -> list[str]:
    """Names of the layers that the settings adapt. Raises UserError where a name fits no linear layer."""
    found = _matching(model, "denoiser", settings.targets or TARGETS[model.family])
    if settings.text_encoder:
        if model.family != "sd":
            raise UserError(f"text_encoder is for Stable Diffusion 1.x and 2.x, not for {model.family}")
        found += _matching(model, "text_encoder", TEXT_TARGETS)
    return found


def _matching(model: Model, part: str, ends: tuple[str, ...]) -> list[str]:
    linear = [n for n, m in component(model, part).named_modules() if isinstance(m, nn.Linear)]
    found = {end: [n for n in linear if f".{n}".endswith(f".{end}")] for end in ends}
    for end, names in found.items():
        if not names:
            raise UserError(f"{model.name} ({model.family}) has no linear layer '{end}' in its {part}")
    wanted = {name for names in found.values() for name in names}
    return [f"{part}.{name}" for name in linear if name in wanted]


@contextmanager
def injected(
    model: Model, settings: LoraSettings, draws: Callable[[str], torch.Generator]
) -> Iterator[dict[str, LoraModule]]:
    """The target layers with a new LoRA each (peft's), for training; then the model as it was, bit for bit.

    A is normal with standard deviation 1 / rank, from ``draws(layer)``; B is 0. Only A and B require
    gradients inside. The global random state is left alone.
    """
    names = lora_targets(model, settings)
    parts = {part: component(model, part) for part in dict.fromkeys(n.partition(".")[0] for n in names)}
    layers = {name: _layer(model, name) for name in names}
    wanted = [(p, p.requires_grad) for module in parts.values() for p in module.parameters()]
    try:
        for part, module in parts.items():
            own = [n.partition(".")[2] for n in names if n.startswith(f"{part}.")]
            _inject(module, own, settings)
        with torch.no_grad():
            found = {name: _started(_layer(model, name), settings, draws(name)) for name in names}
        yield found
    finally:
        for name, layer in layers.items():
            part, _, rest = name.partition(".")
            parts[part].set_submodule(rest, layer)
        for module in parts.values():
            if hasattr(module, "peft_config"):
                del module.peft_config
        for parameter, gradients in wanted:
            parameter.requires_grad_(gradients)
            parameter.grad = None


def _inject(module: nn.Module, names: list[str], settings: LoraSettings) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a number will do
        target_modules="|".join(map(re.escape, names)),
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module, _ADAPTER)


def _started(layer: Any, settings: LoraSettings, draws: torch.Generator) -> LoraModule:
    base = layer.base_layer
    device = base.weight.device
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    down.data = (torch.randn(down.shape, generator=draws) / settings.rank).to(device)
    up.data = torch.zeros(up.shape, device=device)
    return LoraModule(base, down, up, settings.scale)


def _layer(model: Model, name: str) -> nn.Linear:
    part, _, rest = name.partition(".")
    try:
        return component(model, part).get_submodule(rest)  # type: ignore[return-value]
    except AttributeError as error:
        raise UserError(f"{model.name} has no layer '{name}': the LoRA is another model's") from error


def lora_tensors(lora: Mapping[str, LoraModule]) -> dict[str, Tensor]:
    """The LoRA as an artefact's tensors."""
    found = {}
    for name, module in lora.items():
        found[f"{LORA}{name}.A"] = module.A.detach().float().cpu().clone()
        found[f"{LORA}{name}.B"] = (module.B.detach() * module.scale).float().cpu()
    return found


def lora_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer, of an artefact's tensors; others are left out."""
    names = [
        n.removeprefix(LORA).removesuffix(".A") for n in tensors if n.startswith(LORA) and n.endswith(".A")
    ]
    return {name: (tensors[f"{LORA}{name}.A"], tensors[f"{LORA}{name}.B"]) for name in names}


@contextmanager
def applied_lora(model: Model, tensors: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
    """Add ``scale * B(A(x))`` to each layer's output while the context is open (forward hooks, no peft).

    Computed in float32 whatever the model's type, so that what A maps to zero stays so. The weights are not
    touched: methods that read or edit weights need :func:`merged_lora`. Raises UserError for another model's
    LoRA.
    """
    with ExitStack() as stack:
        for name, (down, up) in lora_pairs(tensors).items():
            layer = _layer(model, name)
            _check_shape(model, name, layer, down, up)
            device = layer.weight.device
            hook = _adding(down.to(device), up.to(device) * scale)
            stack.callback(layer.register_forward_hook(hook).remove)
        yield


def _adding(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            update = inputs[0].float() @ down.T @ up.T
        return (output.float() + update).to(output.dtype)

    return hook


def merged_lora(model: Model, tensors: Mapping[str, Tensor], scale: float = 1.0) -> Any:
    """A context in which ``scale * B A`` is added to the layers' weights, then taken off, bit for bit.

    What methods see that come after the fine-tuning in a composition and read or edit weights.
    """
    changes = lora_deltas(tensors)
    for name, (down, up) in lora_pairs(tensors).items():
        _check_shape(model, name, _layer(model, name), down, up)
    return applied(model, changes, scale)


def lora_deltas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The updates B A as changes of weights (``edit.<layer>.weight``), float32."""
    return {f"{EDIT}{name}.weight": up @ down for name, (down, up) in lora_pairs(tensors).items()}


def _check_shape(model: Model, name: str, layer: nn.Linear, down: Tensor, up: Tensor) -> None:
    if layer.weight.shape != (len(up), down.shape[1]):
        wanted, found = tuple(layer.weight.shape), (len(up), down.shape[1])
        raise UserError(f"the LoRA of '{name}' is for weights {found}; {model.name}'s are {wanted}")
