"""The autoencoder of mini-sd: a diffusers AutoencoderKL that takes 64-pixel pictures to 16x16 latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethebench.datasets.planted import PlantedWorld
from lethebench.training.data import fresh_scenes, rendered, to_model, training_set
from lethebench.training.export import finished, write_record
from lethebench.training.loop import fit, recipe_key

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The autoencoder's shape and training. All numbers are ours, from the trials in testbed.md."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Three levels, so a latent pixel is 4x4 pixels. Downsampling 8 was three times less exact."""
    latent_channels: int = 8
    """Unseen RMS after 200 s of training each: .062 with 4 channels, .051 with 6, .044 with 8."""
    layers: int = 1
    """Residual blocks a level."""
    groups: int = 8
    """Of the group norms; divides every width."""
    steps: int = 8000
    """About 15 minutes on three cores."""
    batch: int = 32
    """Unseen RMS after the same 200 s: .044 with batches of 64, .037 with 32."""
    crop: int = 32
    """Side of the random crops in pixels: convolutions learn as much from them at a quarter of the cost."""
    peak_lr: float = 2e-3
    gradient_weight: float = 1.0
    """Of the L1 error of horizontal and vertical differences, which sharpens outlines and patterns."""
    kl_weight: float = 1e-6
    """Keeps the latents bounded, no more."""
    fresh: int = 4000
    """Random scenes outside the training set learnt from too, so that it is not fitted to the set."""
    unseen: int = 256
    """Random scenes for the error that the card states."""
    seed: int = 0

    def scaled(self, scale: float) -> AutoencoderRecipe:
        """The recipe with ``scale`` times the steps and fresh scenes."""
        if scale == 1.0:
            return self
        return replace(self, steps=max(2, round(self.steps * scale)), fresh=max(8, round(self.fresh * scale)))


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderKL:
    """The untrained network; no attention in the middle, which convolutions over crops don't need."""
    from diffusers import AutoencoderKL

    levels = len(recipe.widths)
    torch.manual_seed(recipe.seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.widths,
        layers_per_block=recipe.layers,
        latent_channels=recipe.latent_channels,
        norm_num_groups=recipe.groups,
        sample_size=64,
        mid_block_add_attention=False,
    )


def reconstruction_loss(output: Tensor, target: Tensor, gradient_weight: float) -> Tensor:
    """L1 plus weighted L1 of the differences of neighbours; both [n, 3, height, width] in -1 to 1."""
    error = output - target
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + gradient_weight * (across + down)


def train_autoencoder(
    world: PlantedWorld,
    recipe: AutoencoderRecipe,
    folder: Path,
    cache: Path,
    device: torch.device,
    **fit_options: Any,
) -> dict[str, Any]:
    """Train (or resume, or find trained) and write it in diffusers' layout to ``folder / "vae"``.

    Returns the record for the model card: recipe, seconds, parameters, held-out error, latent moments.
    """
    key = recipe_key(recipe, world.config)
    done = finished(folder, "autoencoder", key)
    if done is not None and (folder / "vae").exists():
        return done
    seen = training_set(world, cache).images
    fresh = rendered(fresh_scenes(world, recipe.fresh, "autoencoder"), cache)
    pictures = torch.cat([torch.from_numpy(seen.copy()), torch.from_numpy(fresh.copy())])
    vae = build_autoencoder(recipe).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        target = random_crops(pictures, recipe.batch, recipe.crop, generator).to(device)
        noise = torch.randn(
            recipe.batch, recipe.latent_channels, recipe.crop // 4, recipe.crop // 4, generator=generator
        )
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample
        kl = posterior.kl().float().mean()
        error = reconstruction_loss(output.float(), target, recipe.gradient_weight)
        total: Tensor = error + recipe.kl_weight * kl
        return total

    run = fit(
        "mini-sd autoencoder",
        {"vae": vae},
        loss,
        steps=recipe.steps,
        peak_lr=recipe.peak_lr,
        folder=folder / "vae-run",
        warmup=min(200, recipe.steps // 10),
        seed=recipe.seed,
        key=key,
        **fit_options,
    )
    mean, std = latent_moments(vae, to_model(seen[:: max(1, len(seen) // 1024)]), device)
    standardise(vae, mean, std)
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(folder / "vae")
    unseen = to_model(rendered(fresh_scenes(world, recipe.unseen, "autoencoder-test"), cache))
    errors = reconstruction_rms(vae, unseen, device)
    record = {
        "key": key,
        "recipe": asdict(recipe),
        **run,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent_mean_before": [round(float(m), 3) for m in mean],
        "latent_std_before": [round(float(s), 3) for s in std],
        "unseen_rms": float(errors.mean()),
        "unseen_rms_p95": float(errors.quantile(0.95)),
        "unseen_scenes": len(errors),
    }
    write_record(folder, "autoencoder", record)
    return record


def random_crops(pictures: Tensor, batch: int, crop: int, generator: torch.Generator) -> Tensor:
    """Crops of random pictures at one place, a multiple of 4 pixels: [batch, 3, crop, crop], -1 to 1."""
    index = torch.randint(0, len(pictures), (batch,), generator=generator)
    room = (pictures.shape[1] - crop) // 4 + 1
    top, left = (4 * torch.randint(0, room, (2,), generator=generator)).tolist()
    cut = pictures[index, top : top + crop, left : left + crop]
    return cut.permute(0, 3, 1, 2).float() / 127.5 - 1


def latent_moments(vae: AutoencoderKL, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, [channels] each, on the CPU."""
    latents = torch.cat(list(encoded(vae, images, device)))
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions around them.

    Afterwards every latent channel has mean 0 and deviation 1, which the diffusion noise assumes,
    and the reconstructions are the same. One ``scaling_factor`` for all channels could not do it.
    """
    channels = len(mean)
    mean, std = mean.to(vae.device), std.to(vae.device)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]


@torch.inference_mode()
def encoded(vae: AutoencoderKL, images: Tensor, device: torch.device, batch: int = 64) -> Iterator[Tensor]:
    """The unscaled posterior means, float32 on the CPU, a batch at a time."""
    for part in images.split(batch):
        yield vae.encode(part.to(device)).latent_dist.mean.float().cpu()


@torch.inference_mode()
def reconstruction_rms(vae: nn.Module, images: Tensor, device: torch.device, batch: int = 64) -> Tensor:
    """Each image's root mean square error after encoding and decoding, of the 0-1 range; float32 weights."""
    errors = []
    for part in images.split(batch):
        latents = vae.encode(part.to(device)).latent_dist.mean  # type: ignore[operator]
        output = vae.decode(latents).sample.clamp(-1, 1).cpu()  # type: ignore[operator]
        errors.append(((output - part) / 2).square().mean((1, 2, 3)).sqrt())
    return torch.cat(errors)
