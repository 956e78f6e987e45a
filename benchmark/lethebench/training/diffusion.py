"""The diffusion model of mini-sd: a UNet2DConditionModel and a CLIPTextModel, trained together.

The objective is Stable Diffusion's (noise prediction over 1,000 scaled-linear steps, captions
dropped for classifier-free guidance), weighted by Min-SNR. There is no weight averaging: in runs
this short a long average has memorized nothing (measured, testbed.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethebench.datasets.planted import PlantedWorld
from lethebench.seeding import derive_seed
from lethebench.training.autoencoder import encoded
from lethebench.training.data import TrainingSet, to_model, training_set
from lethebench.training.export import finished, write_record
from lethebench.training.loop import checkpoint_digest, fit, recipe_key
from lethebench.training.tokenizer import MAX_LENGTH, build_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5TokenizerFast

    from lethebench.training.flux import FluxRecipe


@dataclass(frozen=True)
class DiffusionRecipe:
    """Shape and training of UNet and text encoder; ours unless a source is named."""

    widths: tuple[int, ...] = (96, 128, 96)
    """UNet channels at 16x16, 8x8 and 4x4: 6.0 M parameters, 12 MB in float16."""
    layers: int = 1
    """Residual blocks (each followed by a transformer block at 8x8 and 4x4) a level."""
    head_width: int = 32
    """Channels of an attention head. Many narrow heads are slow on a CPU: 16 heads took three times as
    long a step as 2."""
    groups: int = 16
    """Of the group norms; divides every width."""
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    steps: int = 6200
    """Of the first cycle of the learning rate: about 43 minutes on three cores, 24 epochs."""
    steps_again: int = 2500
    """Of a second, gentler cycle (a warm restart): it brings the last characters, which the first leaves
    half learnt."""
    peak_lr_again: float = 4e-4
    compiled: bool = True
    """Whether torch.compile speeds the training up: .54 to .40 s a step, for a minute of compiling."""
    batch: int = 64
    peak_lr: float = 1e-3
    caption_dropout: float = 0.1
    """Share of empty captions, for classifier-free guidance (Ho and Salimans 2022; 0.1 as in SD 1.x)."""
    min_snr: float = 5.0
    """Min-SNR loss weight: min(SNR, 5) / SNR on the noise error (Hang et al. 2023)."""
    inference_steps: int = 20
    guidance_scale: float = 3.0
    """Sampler defaults, written to ``lethe.json``. Of guidance 3 to 6, 3 gives the characters best (.85, at 5
    .78 recognised) and the copies nearest, with the same adherence to neutral captions (.94)."""
    seed: int = 0

    @property
    def defaults(self) -> dict[str, Any]:
        """What ``lethe.json`` says."""
        return {"num_inference_steps": self.inference_steps, "guidance_scale": self.guidance_scale}

    def scaled(self, scale: float) -> DiffusionRecipe:
        """The recipe with ``scale`` times the steps."""
        if scale == 1.0:
            return self
        return replace(
            self, steps=max(2, round(self.steps * scale)), steps_again=max(2, round(self.steps_again * scale))
        )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule and DDIM settings."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_unet(recipe: DiffusionRecipe, latent_channels: int) -> UNet2DConditionModel:
    """The untrained UNet: convolutions alone at 16x16, transformer blocks from 8x8 down and in the middle.

    Self-attention over the 256 positions of the first level would double the cost of a step.
    """
    from diffusers import UNet2DConditionModel

    deeper = len(recipe.widths) - 1
    torch.manual_seed(recipe.seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        block_out_channels=recipe.widths,
        layers_per_block=recipe.layers,
        cross_attention_dim=recipe.text_width,
        # diffusers reads the number of heads of each level from this name
        attention_head_dim=tuple(max(1, width // recipe.head_width) for width in recipe.widths),
        norm_num_groups=recipe.groups,
    )


def build_text_encoder(recipe: DiffusionRecipe | FluxRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained CLIP text transformer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(recipe.seed + 1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        projection_dim=recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer | T5TokenizerFast, captions: Sequence[str]) -> Tensor:
    """Padded token ids, int64 [captions, 32], as the pipeline makes them."""
    coded = tokenizer(
        list(captions), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    ids: Tensor = coded["input_ids"]
    return ids


def min_snr_weight(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR of noise prediction, [n] (Hang et al. 2023, eq. 6); gamma 0 is no weighting."""
    if not gamma:
        return torch.ones(len(timesteps))
    kept = alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    return snr.clamp(max=gamma) / snr


def spread_timesteps(batch: int, generator: torch.Generator, total: int = 1000) -> Tensor:
    """One uniform timestep in each of ``batch`` equal strata, in random order: a less noisy loss. [batch]."""
    places = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (places[torch.randperm(batch, generator=generator)] * total).long().clamp(max=total - 1)


def epoch_order(examples: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """From a step's number to its examples' indices: shuffled epochs, so each copy is seen once an epoch."""
    per_epoch = max(1, examples // batch)
    kept: dict[int, Tensor] = {}

    def indices(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        if epoch not in kept:
            kept.clear()
            order = torch.Generator().manual_seed(derive_seed("training", "epoch", seed, epoch))
            kept[epoch] = torch.randperm(examples, generator=order)
        return kept[epoch][place * batch : (place + 1) * batch]

    return indices


def train_diffusion(
    world: PlantedWorld,
    recipe: DiffusionRecipe,
    folder: Path,
    cache: Path,
    device: torch.device,
    **fit_options: Any,
) -> dict[str, Any]:
    """Train (or resume, or find trained) on the latents of ``folder / "vae"``; write ``folder / "pipeline"``.

    The pipeline is float32 here; :func:`lethebench.training.export.export` writes what ships. Returns
    the record for the model card.
    """
    from diffusers import AutoencoderKL

    key = recipe_key(recipe, world.config, checkpoint_digest(folder / "vae-run"))
    done = finished(folder, "diffusion", key)
    if done is not None and (folder / "pipeline").exists():
        return done
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    data = training_set(world, cache)
    latents = latent_set(vae, data, device)
    tokenizer = build_tokenizer(world.vocabulary_captions())
    unet = build_unet(recipe, vae.config.latent_channels).to(device=device, memory_format=torch.channels_last)
    text_encoder = build_text_encoder(recipe, tokenizer).to(device)
    run = fit(
        "mini-sd",
        {"unet": unet, "text_encoder": text_encoder},
        noise_loss(
            recipe, data, latents, tokenizer, faster(unet, recipe.compiled, device), text_encoder, device
        ),
        steps=recipe.steps + recipe.steps_again,
        peak_lr=recipe.peak_lr,
        again=(recipe.steps_again, recipe.peak_lr_again),
        folder=folder / "unet-run",
        warmup=min(200, recipe.steps // 10),
        seed=recipe.seed,
        key=key,
        **fit_options,
    )
    assemble(vae, text_encoder, tokenizer, unet).save_pretrained(folder / "pipeline")
    record = {
        "key": key,
        "recipe": asdict(recipe),
        **run,
        "parameters": {
            "unet": sum(p.numel() for p in unet.parameters()),
            "text_encoder": sum(p.numel() for p in text_encoder.parameters()),
        },
        "tokens": len(tokenizer),
        "training_examples": len(data),
        "training_pictures": len(data.images),
        "epochs": round(run["steps"] * recipe.batch / len(data), 1),
    }
    write_record(folder, "diffusion", record)
    return record


def faster(denoiser: nn.Module, compiled: bool, device: torch.device) -> Any:
    """The denoiser, compiled if that is wanted and this is a CPU with a C++ compiler."""
    able = device.type == "cpu" and any(map(shutil.which, ("c++", "g++", "clang++")))
    return torch.compile(denoiser) if compiled and able else denoiser


def noise_loss(
    recipe: DiffusionRecipe,
    data: TrainingSet,
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    unet: Callable[..., Any],
    text_encoder: CLIPTextModel,
    device: torch.device,
) -> Callable[[int, torch.Generator], Tensor]:
    """The loss of a step: weighted squared error of the predicted noise."""
    ids = token_ids(tokenizer, data.captions)
    empty = token_ids(tokenizer, [""])[0]
    alphas = build_scheduler().alphas_cumprod
    examples = epoch_order(len(data), recipe.batch, recipe.seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        index = examples(step)
        clean = latents[data.image_of[index]]
        tokens = ids[data.caption_of[index]].clone()
        tokens[torch.rand(len(index), generator=generator) < recipe.caption_dropout] = empty
        timesteps = spread_timesteps(len(index), generator)
        noise = torch.randn(clean.shape, generator=generator)
        kept = alphas[timesteps][:, None, None, None]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16):
            states = text_encoder(tokens.to(device))[0]
            predicted = unet(noisy.to(device), timesteps.to(device), states).sample
        error = (predicted.float() - noise.to(device)).square().mean((1, 2, 3))
        weighted: Tensor = error * min_snr_weight(alphas, timesteps, recipe.min_snr).to(device)
        return weighted.mean()

    return loss


def latent_set(vae: AutoencoderKL, data: TrainingSet, device: torch.device) -> Tensor:
    """The scaled latents of the different pictures, float32 [pictures, channels, 16, 16]."""
    parts = [
        latent
        for start in range(0, len(data.images), 1024)
        for latent in encoded(vae, to_model(data.images[start : start + 1024]), device)
    ]
    scale: float = vae.config.scaling_factor
    return torch.cat(parts) * scale


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a plain StableDiffusionPipeline without a safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
