"""What differs between the model families, adapted once: everything else is the loop's.

An adapter encodes prompts, lays out latents, calls the denoiser, and prepares the timesteps. The
reference for each is the ``__call__`` of its diffusers pipeline (0.42).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.hooks import Conditioning

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

SHARED = frozenset({"txt_ids", "img_ids"})
"""Keys of ``Conditioning.extra`` that have no batch dimension."""


class Adapter:
    """Stable Diffusion 1.x and 2.x, and what the other families have in common with them.

    One adapter serves one model at one choice of settings. Raises UserError where the image size
    doesn't fit the model.
    """

    flow = False
    """Whether the family is trained by flow matching (its scheduler must be, too)."""
    begin_index = False
    """Whether the family's pipeline tells the scheduler that it starts at step 0."""

    def __init__(self, model: Model, settings: SamplerSettings) -> None:
        self.model, self.pipe, self.settings = model, model.pipe, settings
        self.denoiser = model.denoiser
        self.config = cast(Any, model.denoiser).config
        if self.config.get("time_cond_proj_dim"):
            raise UserError(
                f"{model.name} takes the guidance scale as an embedding (LCM): Lethe doesn't run such models"
            )
        self.scale = int(self.pipe.vae_scale_factor)
        self.size = self._size()

    # --- sizes and latents ---

    @property
    def patch(self) -> int:
        """Latent pixels a side that the denoiser takes as one token."""
        return 1

    def _default_size(self) -> tuple[int, int]:
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.scale, width * self.scale

    def _size(self) -> tuple[int, int]:
        default, own = self._default_size(), self.model.entry.sampler
        height = self.settings.height or own.height or default[0]
        width = self.settings.width or own.width or default[1]
        multiple = self.scale * self.patch
        for what, value in (("height", height), ("width", width)):
            if value % multiple:
                raise UserError(
                    f"{what} {value} doesn't fit {self.model.name}: it must be a multiple of {multiple}"
                )
        return height, width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents."""
        height, width = self.size
        return int(self.config.in_channels), height // self.scale, width // self.scale

    def pack(self, latents: Tensor) -> Tensor:
        """Spatial latents ``[B, channels, height, width]`` as the denoiser takes them."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`pack`."""
        return latents

    # --- conditioning ---

    @property
    def guided(self) -> bool:
        """Whether the settings ask for classifier-free guidance."""
        return self.settings.guidance_scale > 1.0

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of B texts; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(t) for t in texts], device=self.model.device)
        found = self._batched(self._embed(distinct), lambda x: x[rows])
        negative = self.unconditional(len(texts)) if self.guided else None
        return replace(found, extra=self._extra(found), negative=negative)

    def unconditional(self, count: int) -> Conditioning:
        """What stands for no prompt under classifier-free guidance, for ``count`` images."""
        rows = torch.zeros(count, dtype=torch.long, device=self.model.device)
        found = self._batched(self._unconditional(), lambda x: x[rows])
        return replace(found, extra=self._extra(found))

    @staticmethod
    def _batched(conditioning: Conditioning, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = conditioning.pooled
        return replace(
            conditioning,
            embeds=change(conditioning.embeds),
            pooled=None if pooled is None else change(pooled),
        )

    def _embed(self, texts: list[str]) -> Conditioning:
        embeds, _ = self.pipe.encode_prompt(texts, self.model.device, 1, False)
        return Conditioning(embeds)

    def _unconditional(self) -> Conditioning:
        return self._embed([""])

    def _extra(self, conditioning: Conditioning) -> dict[str, Any]:
        return {}

    # --- denoiser ---

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's raw prediction in float32, shaped like ``latents`` (``[B, ...]`` float32).

        ``timestep`` is a scalar tensor; ``conditioning`` is for B images, its ``negative`` unused.
        """
        arguments = self._arguments(latents.to(self.model.dtype), timestep, conditioning)
        found: Tensor = self.denoiser(**_cast(arguments, self.model.dtype), return_dict=False)[0]
        return found.float()

    def _arguments(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {
            "sample": latents,
            "timestep": timestep,
            "encoder_hidden_states": conditioning.embeds,
            **conditioning.extra,
        }

    # --- timesteps ---

    def timestep_arguments(self, scheduler: Any) -> dict[str, Any]:
        """The arguments of the scheduler's ``set_timesteps``, but for the device."""
        return {"num_inference_steps": self.settings.num_inference_steps}


class XLAdapter(Adapter):
    """Stable Diffusion XL: a pooled embedding, and the image's size as conditioning."""

    begin_index = True

    def _embed(self, texts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.model.device, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled)

    def _unconditional(self) -> Conditioning:
        found = self._embed([""])
        if self.pipe.config.force_zeros_for_empty_prompt:
            return self._batched(found, torch.zeros_like)
        return found

    def _extra(self, conditioning: Conditioning) -> dict[str, Any]:
        height, width = self.size  # original size, crop corner, target size: the pipeline's defaults
        row = torch.tensor([height, width, 0, 0, height, width], device=self.model.device)
        ids = row.to(conditioning.embeds.dtype).repeat(len(conditioning.embeds), 1)
        return {"added_cond_kwargs": {"time_ids": ids}}

    def _arguments(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        found = super()._arguments(latents, timestep, conditioning)
        added = {"text_embeds": conditioning.pooled, **found.get("added_cond_kwargs", {})}
        return {**found, "added_cond_kwargs": added}


class SD3Adapter(Adapter):
    """Stable Diffusion 3: a transformer, two CLIP encoders and T5, flow matching."""

    flow = True
    max_tokens = 256
    """The pipeline's default limit of T5 tokens."""
    max_shift = 1.16

    @property
    def patch(self) -> int:
        return int(self.config.patch_size)

    def _embed(self, texts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            texts,
            texts,
            device=self.model.device,
            do_classifier_free_guidance=False,
            max_sequence_length=token_limit(self.pipe.tokenizer_3, self.max_tokens),
        )
        return Conditioning(embeds, pooled)

    def _arguments(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": timestep.expand(len(latents)),
            "encoder_hidden_states": conditioning.embeds,
            "pooled_projections": conditioning.pooled,
            **conditioning.extra,
        }

    def timestep_arguments(self, scheduler: Any) -> dict[str, Any]:
        found = super().timestep_arguments(scheduler)
        if scheduler.config.get("use_dynamic_shifting"):
            found["mu"] = self._shift(scheduler)
        return found

    def _shift(self, scheduler: Any) -> float:
        _, height, width = self.latent_shape
        tokens = (height // self.patch) * (width // self.patch)
        return resolution_shift(tokens, scheduler.config, self.max_shift)


class FluxAdapter(SD3Adapter):
    """FLUX: latents packed two by two into tokens; guidance is distilled (dev) or absent (schnell).

    No negative prompt is encoded. A conditioning that carries one (given by a hook) is sampled with
    true classifier-free guidance at ``guidance_scale``.
    """

    begin_index = True
    max_tokens = 512
    max_shift = 1.15

    @property
    def patch(self) -> int:
        return 2

    @property
    def guided(self) -> bool:
        return False

    def _default_size(self) -> tuple[int, int]:
        size = int(self.pipe.default_sample_size) * self.scale
        return size, size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = self.size
        return int(self.config.in_channels) // 4, height // self.scale, width // self.scale

    def pack(self, latents: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        tokens = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return tokens.reshape(batch, (height // 2) * (width // 2), channels * 4)

    def unpack(self, latents: Tensor) -> Tensor:
        channels, height, width = self.latent_shape
        patches = latents.reshape(len(latents), height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), channels, height, width)

    def _embed(self, texts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.pipe.encode_prompt(
            texts,
            device=self.model.device,
            max_sequence_length=token_limit(self.pipe.tokenizer_2, self.max_tokens),
        )
        return Conditioning(embeds, pooled)

    def _extra(self, conditioning: Conditioning) -> dict[str, Any]:
        batch, tokens, _ = conditioning.embeds.shape
        device = self.model.device
        found: dict[str, Any] = {
            "txt_ids": torch.zeros(tokens, 3, device=device),
            "img_ids": self._image_ids().to(device),
        }
        if self.config.guidance_embeds:
            found["guidance"] = torch.full((batch,), self.settings.guidance_scale, device=device)
        return found

    def _image_ids(self) -> Tensor:
        """``[tokens, 3]``: 0, row and column of each image token."""
        _, height, width = self.latent_shape
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()

    def _arguments(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        found = super()._arguments(latents, timestep, conditioning)
        found["timestep"] = found["timestep"].to(latents.dtype) / 1000
        tokens = conditioning.embeds.shape[1]
        if found["txt_ids"].shape[0] != tokens:  # a hook changed the number of text tokens
            found["txt_ids"] = found["txt_ids"].new_zeros(tokens, 3)
        return found

    def timestep_arguments(self, scheduler: Any) -> dict[str, Any]:
        steps = self.settings.num_inference_steps
        mu = self._shift(scheduler)
        if scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy(), "mu": mu}


ADAPTERS: dict[str, type[Adapter]] = {
    "sd": Adapter,
    "sdxl": XLAdapter,
    "sd3": SD3Adapter,
    "flux": FluxAdapter,
}


def adapter_for(model: Model, settings: SamplerSettings) -> Adapter:
    """The adapter of the model's family. Raises UserError for a size that doesn't fit."""
    return ADAPTERS[model.family](model, settings)


def encode_prompts(model: Model, texts: Sequence[str], settings: SamplerSettings) -> Conditioning:
    """The conditioning of B prompts, with the empty prompt as ``negative`` under classifier-free guidance.

    Guidance is on for a ``guidance_scale`` above 1 (Stable Diffusion); FLUX takes the scale as an
    input (dev) or ignores it (schnell). Gradients flow to the text encoders if they are switched on.
    """
    return adapter_for(model, settings).encode(texts)


def image_size(model: Model, settings: SamplerSettings) -> tuple[int, int]:
    """(height, width) in pixels: the settings', else the model entry's, else the pipeline's own."""
    return adapter_for(model, settings).size


def pack_latents(model: Model, latents: Tensor, settings: SamplerSettings) -> Tensor:
    """Spatial latents ``[B, channels, height, width]`` as the denoiser takes them (packed for FLUX)."""
    return adapter_for(model, settings).pack(latents)


def unpack_latents(model: Model, latents: Tensor, settings: SamplerSettings) -> Tensor:
    """Latents as the denoiser takes them, as the VAE does: ``[B, channels, height, width]``."""
    return adapter_for(model, settings).unpack(latents)


def rows_of(conditioning: Conditioning, rows: Sequence[int] | Tensor) -> Conditioning:
    """The conditioning of some of its images (numbers, in that order, or a mask), with its negative."""
    index = rows if isinstance(rows, Tensor) else list(rows)

    def chosen(extra: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: chosen(value)
            if isinstance(value, Mapping)
            else (value[index] if isinstance(value, Tensor) and key not in SHARED else value)
            for key, value in extra.items()
        }

    pooled, negative = conditioning.pooled, conditioning.negative
    return Conditioning(
        conditioning.embeds[index],
        None if pooled is None else pooled[index],
        chosen(conditioning.extra),
        None if negative is None else rows_of(negative, rows),
    )


def join(negative: Conditioning, positive: Conditioning) -> Conditioning:
    """One conditioning for 2B images: first the B unconditional, then the B conditional ones."""
    pooled = None
    if negative.pooled is not None and positive.pooled is not None:
        pooled = torch.cat([negative.pooled, positive.pooled])
    embeds = torch.cat([negative.embeds, positive.embeds])
    return Conditioning(embeds, pooled, _join_extra(negative.extra, positive.extra))


def _join_extra(negative: Mapping[str, Any], positive: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in positive.items():
        if isinstance(value, Mapping):
            found[key] = _join_extra(negative.get(key, value), value)
        elif isinstance(value, Tensor) and key not in SHARED:
            found[key] = torch.cat([negative.get(key, value), value])
        else:
            found[key] = value
    return found


def _cast(arguments: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with prompt embeddings in the model's type; times, ids and scales stay as they are."""
    embeddings = ("encoder_hidden_states", "pooled_projections", "text_embeds")
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            found[key] = _cast(value, dtype)
        else:
            found[key] = value.to(dtype) if key in embeddings and isinstance(value, Tensor) else value
    return found


def token_limit(tokenizer: Any, default: int) -> int:
    """T5 tokens a prompt is padded to: the pipeline's default, or the tokenizer's limit if that is less.

    schnell's tokenizer says 256, dev's 512; a built-in model's says what its captions need.
    """
    return min(default, int(getattr(tokenizer, "model_max_length", default)))


def resolution_shift(tokens: int, config: Mapping[str, Any], max_shift: float) -> float:
    """The shift mu of flow timesteps for an image of ``tokens`` tokens (``calculate_shift`` of diffusers).

    Linear from ``base_shift`` at ``base_image_seq_len`` tokens to ``max_shift`` at
    ``max_image_seq_len``; ``max_shift`` here is the family's default where the config has none.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))
