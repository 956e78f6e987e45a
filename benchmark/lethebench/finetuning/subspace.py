"""What must not be learnt, as subspaces of the inputs of linear layers.

A layer that is fed by the text encoders gets the subspace of the sensitive prompts' token embeddings
(:func:`subspace`); a layer that is fed by hidden states gets that of its own inputs on those prompts, as
Gradient Projection Memory does layer by layer (Saha, Garg and Roy, ICLR 2021; sahagobinda/GPM).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.finetuning.hooks import Captioned
from lethebench.finetuning.settings import ENERGY, LAYERS, TOKENS, require_choice, require_subspace
from lethebench.finetuning.trainer import check_images, image_latents
from lethebench.unlearning import draw_latents, encode, fitting_settings, noised, prediction
from lethebench.unlearning.diffusion import FLOW
from lethebench.unlearning.edits import component
from lethebench.unlearning.tokens import EncodedText, Span, encode_texts

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


@dataclass(frozen=True)
class SensitivePrompt:
    """A prompt that asks for what must not be learnt, and the words of it that name it."""

    text: str
    concept: str


def subspace(rows: Tensor, dimension: int | None = None, energy: float = ENERGY) -> Tensor:
    """An orthonormal basis ``[width, k]``, float64, of the main directions of rows ``[n, width]``.

    The right singular vectors of the uncentred rows: the first ``dimension``, or else the fewest that hold
    the share ``energy`` of the squared singular values (GPM; its released code takes one fewer). Never more
    than the numerical rank; energy 1 takes the rank.
    """
    require_subspace(dimension, energy)
    _, sigma, vh = torch.linalg.svd(rows.detach().cpu().double(), full_matrices=False)
    smallest = sigma[:1].sum() * max(rows.shape) * torch.finfo(torch.float64).eps
    rank = int((sigma > smallest).sum())
    if dimension is None and energy < 1:
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        dimension = int((shares < energy).sum()) + 1
    basis: Tensor = vh[: min(rank, dimension or rank)].T.contiguous()
    return basis


def layer_kind(family: str, name: str) -> str:
    """What is fed to a layer (``denoiser.<module>``): ``embeddings``, ``text``, ``joint`` or ``image``.

    ``embeddings``: the encoders' outputs themselves (``attn2.to_k`` and ``to_v`` of UNets,
    ``context_embedder`` of SD3 and FLUX). ``text``: hidden states of the text tokens. ``joint``: text tokens,
    then image tokens (FLUX's single blocks).
    """
    if family in ("sd", "sdxl"):
        return "embeddings" if re.search(r"\.attn2\.to_[kv]\Z", name) else "image"
    if name == "denoiser.context_embedder":
        return "embeddings"
    if ".single_transformer_blocks." in name:
        return "joint"
    return "text" if re.search(r"\.(add_[qkv]_proj|to_add_out)\Z|\.ff_context\.", name) else "image"


def concept_subspaces(
    model: Model,
    names: Sequence[str],
    prompts: Sequence[SensitivePrompt],
    sampler: SamplerSettings,
    draws: torch.Generator,
    *,
    tokens: str = "concept",
    layers: str = "text",
    dimension: int | None = None,
    energy: float = ENERGY,
    examples: Sequence[Captioned] = (),
    levels: int = 4,
) -> dict[str, Tensor]:
    """For each chosen layer of ``names`` (``<component>.<module>``) a basis ``[in, k]`` of what not to learn.

    Layers of kind ``embeddings`` share the basis of the prompts' chosen ``tokens``. Others get their own
    inputs' while the model (without LoRA) predicts, with each prompt, at ``levels`` timesteps evenly over the
    range, on the image latents of ``examples`` by turns, or on latents that the model draws for the prompts
    where there are none. Raises UserError for unknown words, a prompt without its concept, or where no layer
    is chosen.
    """
    _check(names, prompts, tokens, layers, levels)
    require_subspace(dimension, energy)
    check_images(model, examples, sampler)
    kinds = {name: layer_kind(model.family, name) for name in names}
    wanted = {"embeddings": ("embeddings",), "text": ("embeddings", "text", "joint")}.get(layers)
    chosen = {n: kind for n, kind in kinds.items() if wanted is None or kind in wanted}
    if not chosen:
        raise UserError(f"no adapted layer of {model.name} ({model.family}) is of layers='{layers}'")
    encoded = encode_texts(model, [t for p in prompts for t in (p.text, p.concept)] + [""], sampler)
    rows = [token_rows(encoded[p.text], encoded[p.concept], encoded[""], tokens, p) for p in prompts]
    found: dict[str, Tensor] = {}
    if "embeddings" in chosen.values():
        seen = torch.cat([encoded[p.text].embeds[r] for p, r in zip(prompts, rows, strict=True)])
        shared = subspace(seen.to(model.dtype), dimension, energy)
        found = {name: shared for name, kind in chosen.items() if kind == "embeddings"}
    hidden = {name: kind for name, kind in chosen.items() if kind != "embeddings"}
    if hidden:
        inputs = _inputs(model, hidden, prompts, rows, sampler, draws, examples, levels, layers == "all")
        found |= {name: subspace(seen, dimension, energy) for name, seen in inputs.items()}
    return {name: found[name] for name in chosen if name in found}


def token_rows(
    text: EncodedText, concept: EncodedText, empty: EncodedText, tokens: str, prompt: SensitivePrompt
) -> list[int]:
    """The chosen rows of a prompt's embedding. Raises UserError where the concept's tokens are not in it."""
    if tokens == "all":
        return list(range(len(text.embeds)))
    found: list[int] = []
    for span, own, none in zip(text.spans, concept.spans, empty.spans, strict=True):
        starts, length = _places(span, own, len(none.ids) - 1)
        if not starts:
            raise UserError(f"the prompt '{prompt.text}' doesn't hold the words '{prompt.concept}'")
        if tokens == "onwards":
            found += range(span.start + starts[0], span.stop)
        else:
            found += [span.start + start + i for start in starts for i in range(length)]
    return found


def _places(span: Span, concept: Span, begin: int) -> tuple[list[int], int]:
    """Where the concept's tokens start among a prompt's, and how many they are; ``begin``: begin tokens."""
    content = concept.ids[begin:-1]
    length = len(content)
    last = len(span.ids) - length
    return [i for i in range(last) if length and span.ids[i : i + length] == content], length


class _Rows:
    """Rows ``[n, width]`` as few as needed: a QR decomposition keeps their singular values and vectors."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().cpu().double()
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])
        if len(self.rows) > 4 * self.rows.shape[1]:
            self.rows = torch.linalg.qr(self.rows, mode="r").R


@torch.no_grad()
def _inputs(
    model: Model,
    kinds: Mapping[str, str],
    prompts: Sequence[SensitivePrompt],
    rows: Sequence[list[int]],
    sampler: SamplerSettings,
    draws: torch.Generator,
    examples: Sequence[Captioned],
    levels: int,
    images: bool,
) -> dict[str, Tensor]:
    """The chosen tokens' inputs of each layer on the sensitive prompts, or rows that span the same."""
    texts = [p.text for p in prompts]
    if examples:
        latents = image_latents(model, examples, sampler)
    else:
        steps = fitting_settings(sampler, model.family, sampler.num_inference_steps, None)
        latents = draw_latents(model, texts, steps, draws)
    found = {name: _Rows() for name in kinds}
    for i, text in enumerate(texts):
        start = latents[i % len(latents)].expand(levels, *latents.shape[1:])
        times = _timesteps(model, levels)
        noise = torch.randn(start.shape, generator=draws).to(start)
        conditioning = encode(model, [text] * levels, sampler)
        count = conditioning.embeds.shape[1]

        def see(name: str, inputs: Tensor, own: list[int] = rows[i], count: int = count) -> None:
            kind = kinds[name]
            if inputs.dim() == 3 and kind in ("text", "joint"):
                more = range(count, inputs.shape[1]) if kind == "joint" and images else ()
                inputs = inputs[:, [*own, *more]]
            found[name].add(inputs.reshape(-1, inputs.shape[-1]))

        with _watched(model, kinds, see):
            prediction(model, noised(model, start, noise, times), times, conditioning, sampler)
    return {name: seen.rows for name, seen in found.items() if seen.rows is not None}


@contextmanager
def _watched(model: Model, names: Mapping[str, str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, inputs)`` whenever one of the layers is called."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    with ExitStack() as stack:
        for name in names:
            part, _, rest = name.partition(".")
            layer = component(model, part).get_submodule(rest)
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield


def _timesteps(model: Model, levels: int) -> Tensor:
    """``[levels]`` timesteps: the middles of equal parts of the training range."""
    middles = (torch.arange(levels) + 0.5) / levels
    if model.family in FLOW:
        return (1000 * middles).to(model.device)
    return (int(model.pipe.scheduler.config.num_train_timesteps) * middles).long().to(model.device)


def _check(
    names: Sequence[str], prompts: Sequence[SensitivePrompt], tokens: str, layers: str, levels: int
) -> None:
    if not prompts:
        raise UserError("gradient projection needs sensitive prompts: there is none")
    require_choice("tokens", tokens, TOKENS)
    require_choice("layers", layers, LAYERS)
    if levels < 1:
        raise UserError(f"levels must be at least 1, not {levels}")
    if any(not name.startswith("denoiser.") for name in names):
        raise UserError("gradient projection needs frozen text encoders: switch text_encoder off")
