"""Masks as gates on activations, by forward hooks that live as long as a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lethebench.pruning.sites import Port, Site


@contextmanager
def gated(denoiser: nn.Module, sites: Sequence[Site], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the activations of every site by its gates while the context is open.

    Gates are ``[size]``, or ``[images, size]`` for gates of each image's own; a batch that holds the
    images several times over (classifier-free guidance) takes them in turn.
    ``gates`` is read by the site's name at every call of its module, so its values may be replaced
    between two denoising steps. (EcoDiff finds a mask by counting calls, which goes wrong when a module runs
    more or less often than expected.)
    """
    modules = dict(denoiser.named_modules())
    with ExitStack() as stack:
        for site in sites:
            for port in site.ports:
                stack.callback(_attach(modules[port.module], port, site.name, gates))
        yield


def _attach(module: nn.Module, port: Port, site: str, gates: Mapping[str, Tensor]) -> Callable[[], None]:
    if port.side == "output":
        return module.register_forward_hook(lambda _m, _args, out: _apply(out, gates[site], port)).remove

    def on_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_apply(args[0], gates[site], port), *args[1:])

    return module.register_forward_pre_hook(on_input).remove


def _apply(activation: Tensor, gates: Tensor, port: Port) -> Tensor:
    full = port.layout.spread(gates, port.size).to(activation.dtype)
    if full.dim() == 1:
        return activation * (full.view(1, -1, 1, 1) if port.channels_first else full)
    full = full.repeat(activation.shape[0] // full.shape[0], 1)
    places = [1] * (activation.dim() - 2)
    shape = (*full.shape, *places) if port.channels_first else (full.shape[0], *places, full.shape[1])
    return activation * full.view(shape)
