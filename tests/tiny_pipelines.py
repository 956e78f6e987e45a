"""Tiny diffusers pipelines with seeded random weights, made without any download.

The classes are the real ones (`StableDiffusionPipeline`, `StableDiffusionXLPipeline`,
`StableDiffusion3Pipeline`, `FluxPipeline`, with their tokenizers, text encoders, denoisers, VAE and
schedulers); only the sizes are small. Images are 16x16 pixels (for FLUX: where the settings say so),
latents 8x8. Each builder leaves the global random state as it found it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a", "in", "red", "blue", "star", "circle", "striped", "night", "city", "forest", "robot", "captain")
CLIP_LENGTH, T5_LENGTH = 16, 20
"""Tokens a prompt is padded or cut to, by the CLIP and the T5 tokenizer."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights drawn inside depend on ``seed`` alone; the global state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer that knows ``WORDS`` as whole tokens, and single letters besides."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = [*letters, *(f"{c}</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            if pair[0] + pair[1] not in vocab:
                vocab.append(pair[0] + pair[1])
            pieces = [pair[0] + pair[1], *pieces[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer that knows ``WORDS`` as whole tokens, and single letters besides."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocab += [(chr(c), -4.0) for c in range(33, 127)]
    vocab += [(f"▁{word}", -1.0) for word in WORDS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def clip_text(width: int = 16, *, projection: bool = False) -> Any:
    """A two-layer CLIP text encoder; with ``projection`` the class that SDXL and SD3 use."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text(width: int = 32) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    size = len(t5_tokenizer())
    return T5EncoderModel(
        T5Config(vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def vae(**overrides: Any) -> AutoencoderKL:
    """An autoencoder that halves height and width, with 4 latent channels."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.7,
    }
    return AutoencoderKL(**{**config, **overrides})


def unet(width: int = 16, **overrides: Any) -> UNet2DConditionModel:
    """A UNet with cross-attention at both levels of 8x8 latents."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **overrides})


def schedule(cls: type[Any], **overrides: Any) -> Any:
    """A scheduler with the settings of Stable Diffusion 1.x."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        **overrides,
    }
    if cls is DDIMScheduler:
        config.update(clip_sample=False, set_alpha_to_one=False)
    if cls is PNDMScheduler:
        config.update(skip_prk_steps=True, set_alpha_to_one=False)
    return cls(**config)


def tiny_sd(scheduler: type[Any] = DDIMScheduler, *, seed: int = 0, **schedule_overrides: Any) -> Any:
    """Stable Diffusion 1.x; pass e.g. ``prediction_type="v_prediction"`` for the scheduler."""
    with seeded(seed):
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(),
            unet=unet(),
            scheduler=schedule(scheduler, **schedule_overrides),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(scheduler: type[Any] = EulerDiscreteScheduler, *, seed: int = 0) -> Any:
    """Stable Diffusion XL: two text encoders, pooled embedding and size conditioning."""
    with seeded(seed):
        denoiser = unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=(1, 2),
        )
        return StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=clip_text(),
            text_encoder_2=clip_text(projection=True),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=denoiser,
            scheduler=schedule(scheduler),
            add_watermarker=False,
        )


def tiny_sd3(*, dynamic_shift: bool = False, seed: int = 0) -> Any:
    """Stable Diffusion 3: MMDiT, two CLIP encoders and T5, flow matching."""
    with seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text(projection=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text(projection=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_text(),
            tokenizer_3=t5_tokenizer(),
        )


def tiny_flux(*, guidance_embeds: bool = False, seed: int = 0) -> Any:
    """FLUX: like schnell, or with ``guidance_embeds`` like dev (and its resolution-dependent shift)."""
    with seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
            ),
            vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_text(),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
        )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sd-pndm": lambda: tiny_sd(PNDMScheduler),
    "sd-euler": lambda: tiny_sd(EulerDiscreteScheduler),
    "sd-dpm": lambda: tiny_sd(DPMSolverMultistepScheduler),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3-dynamic": lambda: tiny_sd3(dynamic_shift=True),
    "flux-schnell": tiny_flux,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
}
"""Every family, prediction type and kind of scheduler that the sampler is tested on."""
