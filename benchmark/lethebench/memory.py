"""How much memory a model needs, told before any of its weights is read.

Counted are the weights by component, and what the model's own code allocates: the sampler's prediction,
the VAE's decoding, a step of UniForget's fit and one of LoRA fine-tuning are run once for one image on
tensors that have shapes and no data (PyTorch's fake tensors), and the most bytes that were alive at a time
are noted. So attention kernels, masks, recomputed activations and gradients are in it as the code has them,
for every family and size, without formulas to keep up to date. An image's are multiplied by the batch.

Not counted: what a CUDA process takes for itself (:data:`CONTEXT` stands for it), the workspaces of
libraries, fragmentation, and the text encoders' own activations. Bytes everywhere; GB is 10^9.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lethebench.errors import UserError
from lethebench.hooks import Conditioning
from lethebench.specs import SamplerSettings
from lethebench.zoo import LoadSettings, Model, ModelEntry, model_folder
from lethebench.zoo._files import components, quantised, read_json, weights_files

if TYPE_CHECKING:
    from pathlib import Path

    from lethebench.finetuning.settings import LoraSettings
    from lethebench.methods.uniforget import UniForget

GB = 10**9
CONTEXT = GB
"""What a CUDA process takes before the first tensor, about (ours)."""
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a packed weight; nf4 has a float32 scale for each 64 (bitsandbytes' default)."""
CLIP_TOKENS = 77
T5_EMBEDDING = 32_128 * 4_096
"""Parameters of T5-XXL's embedding, which quantising leaves as it is."""

_DENOISERS = {
    "sd": "UNet2DConditionModel",
    "sdxl": "UNet2DConditionModel",
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""The autoencoder of all published models here; those of SD3 and FLUX have 16 channels."""


@dataclass(frozen=True)
class Outline:
    """A model as far as configurations and file headers tell.

    ``parameters`` by component, ``denoiser`` and ``vae`` configurations, ``clip`` and ``t5`` tokens that a
    prompt is padded to (None: as many as the sampler asks), ``embedding`` parameters of the T5 encoder's
    embedding.
    """

    entry: ModelEntry
    parameters: Mapping[str, int]
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip: int = CLIP_TOKENS
    t5: int | None = None
    embedding: int = T5_EMBEDDING


@dataclass(frozen=True)
class Estimate:
    """What a use of a model takes on its device, in bytes.

    ``weights`` by component, ``state`` whatever the batch, ``image`` for each image of a batch, ``once`` what
    another phase takes in place of the batch (the VAE's decoding).
    """

    what: str
    batch: int
    weights: Mapping[str, int]
    state: int
    image: int
    once: int = 0

    @property
    def total(self) -> int:
        """Bytes at the batch size."""
        return self.at(self.batch)

    def at(self, batch: int) -> int:
        """Bytes at another batch size."""
        return sum(self.weights.values()) + self.state + max(batch * self.image, self.once)

    def largest_batch(self, room: int) -> int:
        """Images that a batch may have in ``room`` bytes; 0 where not even one fits."""
        if self.at(1) > room:
            return 0
        return (room - sum(self.weights.values()) - self.state) // max(1, self.image)


def outline(entry: ModelEntry) -> Outline:
    """From the model's folder if it is there, else from the entry. Raises UserError where neither tells."""
    try:
        folder = model_folder(entry)
    except UserError:
        if not entry.parameters:
            raise
        channels = {"latent_channels": 4}
        if entry.family in ("sd3", "flux"):
            channels = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
        return Outline(entry, entry.parameters, entry.denoiser, {**_VAE, **channels}, t5=entry.max_tokens)
    return _of_folder(entry, folder)


def _of_folder(entry: ModelEntry, folder: Path) -> Outline:
    parts = components(folder)
    weighted = {name: weights_files(folder / name) for name in parts}
    counts = {
        name: sum(stored_parameters(folder / name / file) for file in files)
        for name, files in weighted.items()
        if files
    }
    denoiser = "unet" if "unet" in parts else "transformer"
    text = read_json(folder / "text_encoder" / "config.json")
    last = max(name for name in parts if name.startswith("tokenizer"))
    limit = _optional(folder / last / "tokenizer_config.json").get("model_max_length")
    limits = [n for n in (limit, entry.max_tokens) if n is not None]
    largest = _optional(folder / last.replace("tokenizer", "text_encoder") / "config.json")
    return Outline(
        entry,
        counts,
        read_json(folder / denoiser / "config.json"),
        read_json(folder / "vae" / "config.json"),
        clip=int(text.get("max_position_embeddings", CLIP_TOKENS)),
        t5=min(limits) if limits else None,
        embedding=int(largest.get("vocab_size", 0)) * int(largest.get("d_model", 0)),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def stored_parameters(file: Path) -> int:
    """The number of elements in a safetensors file, by its header alone."""
    import math

    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118


def weights(found: Outline, dtype: str, loading: LoadSettings | None = None) -> dict[str, int]:
    """Bytes of each component's weights: the VAE's in float32, the others' in ``dtype``, or packed."""
    loading = loading or LoadSettings()
    packed = quantised([*found.parameters, *_tokenizers(found)]) if loading.quantise != "none" else []
    taken = {}
    for name, count in found.parameters.items():
        item = ITEM["float32"] if name == "vae" else ITEM[dtype]
        linear = _linear(found, name) if name in packed else 0
        taken[name] = (count - linear) * item + int(linear * PACKED.get(loading.quantise, 0))
    return taken


def _tokenizers(found: Outline) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in found.parameters if "encoder" in name]


def _linear(found: Outline, component: str) -> int:
    """Weights of a component's linear layers, which are what is packed."""
    if component.startswith("text_encoder"):
        return found.parameters[component] - found.embedding
    layers = (m for m in _empty(found).modules() if isinstance(m, nn.Linear))
    return sum(layer.weight.numel() for layer in layers)


def resident(taken: Mapping[str, int], found: Outline, dtype: str, loading: LoadSettings) -> dict[str, int]:
    """What of the weights is on the device at a time: all, or under offload the largest part and the VAE."""
    if loading.offload == "none":
        return dict(taken)
    if loading.offload == "model":
        largest = max((name for name in taken if name != "vae"), key=lambda name: taken[name])
        return {largest: taken[largest], "vae": taken["vae"]}
    largest_layer = max(p.numel() for p in _empty(found).parameters())
    return {"largest layer": ITEM[dtype] * max(largest_layer, found.embedding)}


# --- uses -----------------------------------------------------------------------------------------


def sampling(dry: DryRun, loading: LoadSettings | None = None, *, batch: int = 1) -> Estimate:
    """Drawing a batch of images: a prediction (both halves of guidance), or the decoding of the latents."""
    loading = loading or LoadSettings()
    taken = resident(weights(dry.found, dry.dtype, loading), dry.found, dry.dtype, loading)
    return Estimate("sampling", batch, taken, 0, dry.prediction, dry.decoding(batch))


def largest_batch(dry: DryRun, room: int, loading: LoadSettings | None = None) -> int:
    """Images that can be drawn at once in ``room`` bytes; 0 where not even one fits.

    Decoding takes more for each image until the sampler decodes in pieces.
    """
    whole = sampling(dry, loading, batch=dry.piece)
    if whole.total <= room:
        return whole.largest_batch(room)
    return bisect_right(range(1, dry.piece), room, key=lambda n: sampling(dry, loading, batch=n).total)


def uniforget(
    dry: Callable[[str], DryRun],
    dtype: str,
    loading: LoadSettings | None = None,
    *,
    method: UniForget | None = None,
) -> Estimate:
    """Fitting UniForget: one step of the chain with its graph, as in ``methods.uniforget.backprop``.

    ``dry`` gives the dry run in a type: the fit's own (``UniForget.dtype``) needn't be the model's.

    ``state``: masks with their gradients and Adam's two moments, the conditioning and latents of the prompts,
    and a copy of the denoiser where the fit's type isn't the model's. For each image the step's activations,
    and the latents that the steps of the chain start from.
    """
    from lethebench.methods.uniforget import UniForget

    loading, method = loading or LoadSettings(), method or UniForget()
    fitted = dtype if method.dtype == "model" else method.dtype
    run = dry(fitted)
    taken = weights(run.found, dtype, loading)
    if fitted != dtype:
        taken["copy of the denoiser"] = run.found.parameters[run.name] * ITEM[fitted]
    image, masks = run.fitting(method, checkpointing=loading.checkpointing)
    state = 4 * masks * ITEM["float32"] + method.prompts * (run.prompt + 2 * run.latents)
    return Estimate(
        "UniForget's fit", method.batch_size, taken, state, image + method.chain_steps * run.latents
    )


def lora(
    found: Outline, sampler: SamplerSettings, dtype: str, settings: LoraSettings | None = None
) -> Estimate:
    """Fine-tuning a LoRA: a micro-batch with its graph; ``state``: A and B, gradients and Adam's moments."""
    from lethebench.finetuning.settings import LoraSettings

    settings = settings or LoraSettings()
    dry = DryRun(found, sampler.model_copy(update={"guidance_scale": 1.0}), dtype)
    image, trained = dry.training(settings)
    state = 4 * trained * ITEM["float32"]
    return Estimate("LoRA fine-tuning", settings.batch_size, weights(found, dtype), state, image)


# --- dry runs -------------------------------------------------------------------------------------


@dataclass
class DryRun:
    """A model's denoiser and VAE with shapes and no data, and what their code allocates for an image.

    ``dtype`` is the denoiser's. Building and each run take seconds for the largest models, so keep it.
    """

    found: Outline
    sampler: SamplerSettings
    dtype: str
    _mode: Any = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True), repr=False)
    _decoded: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The component that denoises."""
        return "unet" if "unet" in self.found.parameters else "transformer"

    @cached_property
    def model(self) -> Model:
        """The model, of which only the denoiser is there."""
        denoiser = self._hollow(_empty(self.found), getattr(torch, self.dtype))
        scale = 2 ** (len(self.found.vae["block_out_channels"]) - 1)
        pipe = SimpleNamespace(**{self.name: denoiser}, vae_scale_factor=scale, default_sample_size=128)
        return Model(self.found.entry, pipe, torch.device("cpu"), getattr(torch, self.dtype))

    @cached_property
    def adapter(self) -> Any:
        """The sampler's adapter of the model's family. Raises UserError for a size that doesn't fit."""
        from lethebench.sampler._families import adapter_for

        return adapter_for(self.model, self.sampler)

    @property
    def latents(self) -> int:
        """Bytes of an image's latents."""
        channels, height, width = self.adapter.latent_shape
        return int(channels * height * width) * ITEM["float32"]

    @property
    def prompt(self) -> int:
        """Bytes of a prompt's conditioning, and of the empty one's under guidance."""
        with self._mode:
            given = self._conditioning()
        parts = [c for c in (given, given.negative) if c is not None]
        return sum(t.nbytes for c in parts for t in (c.embeds, c.pooled) if t is not None)

    @cached_property
    def prediction(self) -> int:
        """A prediction without gradients."""
        with self._mode, torch.no_grad():
            latents, given = self._latents(), self._conditioning()
            with self._counted([latents, *_tensors(given)]) as live:
                self._predict(latents, given)
        return int(live.peak)

    @property
    def piece(self) -> int:
        """Images that the sampler decodes at once, at most."""
        from lethebench.sampler._pixels import _DECODED_PIXELS

        height, width = self.adapter.size
        return max(1, int(_DECODED_PIXELS // (height * width)))

    def decoding(self, batch: int) -> int:
        """The VAE's decoding, in float32, of what the sampler decodes at once of a batch."""
        from diffusers import AutoencoderKL

        images = min(batch, self.piece)
        if images in self._decoded:
            return self._decoded[images]
        with torch.device("meta"), _quiet():
            vae: Any = AutoencoderKL.from_config(dict(self.found.vae))
        vae = self._hollow(vae, torch.float32)
        with self._mode, torch.no_grad():
            latents = torch.empty(images, *self.adapter.latent_shape)
            with Live([*vae.parameters(), latents]) as live:
                vae.decode(latents)
        self._decoded[images] = live.peak
        return int(live.peak)

    def fitting(self, method: UniForget, *, checkpointing: bool) -> tuple[int, int]:
        """A step of UniForget's fit with gradients, and the number of mask elements."""
        from lethebench.methods.uniforget.fit import gate_of
        from lethebench.methods.uniforget.masks import MaskParameters, NoisyGates
        from lethebench.pruning import find_sites

        denoiser: Any = self.model.denoiser
        sites = find_sites(denoiser, method.kinds)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        with self._mode, torch.enable_grad():
            masks = MaskParameters(sites, method.init, self.model.device)
            images = 1 if method.noise_per_image else None
            gates = NoisyGates(denoiser, masks, gate_of(method), 0, images)
            latents, given = self._latents().requires_grad_(), self._conditioning()
            with self._counted([latents, *_tensors(given), *masks.by_kind.values()]) as live, gates(0):
                self._predict(latents, given).square().mean().backward()  # type: ignore[no-untyped-call]
        if checkpointing:
            denoiser.disable_gradient_checkpointing()
        return live.peak, sum(mask.numel() for mask in masks.by_kind.values())

    def training(self, settings: LoraSettings) -> tuple[int, int]:
        """A step of LoRA fine-tuning with gradients, and the number of trained parameters.

        The low-rank updates are put in by hooks that compute what peft's layers do.
        """
        from lethebench.finetuning.lora import lora_targets

        denoiser: Any = self.model.denoiser
        if settings.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        trained: list[Tensor] = []
        with self._mode, torch.enable_grad(), ExitStack() as hooks:
            for name in lora_targets(self.model, replace(settings, text_encoder=False)):
                layer: Any = denoiser.get_submodule(name.partition(".")[2])
                down = torch.empty(settings.rank, layer.in_features, requires_grad=True)
                up = torch.empty(layer.out_features, settings.rank, requires_grad=True)
                hooks.callback(layer.register_forward_hook(_low_rank(down, up)).remove)
                trained += [down, up]
            latents, given = self._latents(), self._conditioning()
            with self._counted([latents, *_tensors(given), *trained]) as live:
                self._predict(latents, given).square().mean().backward()  # type: ignore[no-untyped-call]
        if settings.gradient_checkpointing:
            denoiser.disable_gradient_checkpointing()
        return live.peak, sum(t.numel() for t in trained)

    def _predict(self, latents: Tensor, given: Conditioning) -> Tensor:
        from lethebench.sampler._loop import guided_prediction

        return guided_prediction(self.adapter, latents, torch.tensor(500.0), given).combined

    def _counted(self, given: Iterable[Tensor]) -> Live:
        denoiser = self.model.denoiser
        return Live([*denoiser.parameters(), *denoiser.buffers(), *given])

    def _latents(self) -> Tensor:
        found: Tensor = self.adapter.pack(torch.empty(1, *self.adapter.latent_shape))
        return found

    def _conditioning(self) -> Conditioning:
        config, kind, found = self.adapter.config, self.found.entry.family, self.found
        dtype = getattr(torch, self.dtype)
        pooled = None
        if kind in ("sd", "sdxl"):
            shape = (1, found.clip, config.cross_attention_dim)
            if kind == "sdxl":
                times = 6 * config.addition_time_embed_dim
                pooled = torch.empty(1, config.projection_class_embeddings_input_dim - times, dtype=dtype)
        else:
            tokens = min(self.adapter.max_tokens, found.t5 or self.adapter.max_tokens)
            shape = (1, tokens + (found.clip if kind == "sd3" else 0), config.joint_attention_dim)
            pooled = torch.empty(1, config.pooled_projection_dim, dtype=dtype)
        given = Conditioning(torch.empty(shape, dtype=dtype), pooled)
        given = replace(given, extra=self.adapter._extra(given))
        return replace(given, negative=given) if self.adapter.guided else given

    def _hollow(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The module with fake tensors in place of its own."""
        with self._mode:
            for part in module.modules():
                for name, value in part._parameters.items():
                    if value is not None:
                        part._parameters[name] = nn.Parameter(_like(value, dtype), requires_grad=False)
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        part._buffers[name] = _like(buffer, dtype)
        return module.eval()


def _low_rank(down: Tensor, up: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output + inputs[0].to(down.dtype) @ down.T @ up.T).to(output.dtype)

    return hook


def _like(value: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)


def _tensors(given: Conditioning) -> Iterator[Tensor]:
    yield from (t for t in tree_leaves([given.embeds, given.pooled, dict(given.extra)]) if torch.is_tensor(t))


def _empty(found: Outline) -> nn.Module:
    """The denoiser by its configuration, on the meta device."""
    import diffusers

    cls = getattr(diffusers, _DENOISERS[found.entry.family])
    with torch.device("meta"), _quiet():
        module: nn.Module = cls.from_config(dict(found.denoiser))
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' notes on keys of a configuration that it doesn't know."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and ``peak``, the most at a time.

    Those of ``known`` tensors (weights, inputs) don't count, nor do views of them.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
