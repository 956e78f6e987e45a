"""mini-flux: a FluxTransformer2DModel with a CLIP and a T5 text encoder, trained in two phases.

Phase one is flow matching as FLUX.1 has it: x_t = (1 - t) x_0 + t e, and the target is the velocity
e - x_0 (Lipman et al. 2023; Esser et al. 2024, rectified flow). Transformer and text encoders learn together,
since no pretrained encoders exist; captions are dropped, and the guidance input is 1.

Phase two is guidance distillation, as FLUX.1 dev had it (Meng et al. 2023, stage one): the transformer
learns for a random guidance scale g what classifier-free guidance makes of the frozen phase-one model,
v(empty) + g (v(caption) - v(empty)). So one pass a step draws with guidance. At g = 1 the target is the
unguided velocity, so the same weights also draw without guidance, and the empty caption still gives
what true classifier-free guidance needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lethebench.datasets.planted import PlantedWorld
from lethebench.errors import UserError
from lethebench.store import file_sha256
from lethebench.training.data import TrainingSet, training_set
from lethebench.training.diffusion import build_text_encoder, epoch_order, faster, latent_set, token_ids
from lethebench.training.export import finished, write_record
from lethebench.training.flux_tokenizer import build_t5_tokenizer
from lethebench.training.loop import checkpoint_digest, fit, recipe_key
from lethebench.training.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast


@dataclass(frozen=True)
class FluxRecipe:
    """Shape and training of transformer and text encoders; ours unless a source is named."""

    heads: int = 5
    rotary: tuple[int, int, int] = (8, 12, 12)
    """Channels of a head that turn with an image token's index, row and column; their sum is its width."""
    dual: int = 2
    single: int = 6
    """Dual- and single-stream blocks, whose modulations take a third and a fifth of their weights. 4.4 M
    parameters. 2 + 4 blocks of 6 heads x 30 channels cost and learnt the same with 4.6 M (150 steps)."""
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    """Of both text encoders."""
    steps: int = 14000
    batch: int = 64
    peak_lr: float = 2e-3
    """After 350 steps the loss was .81 with it, .85 with 1e-3."""
    steps_again: int = 12000
    peak_lr_again: float = 1e-3
    """A second cycle of warm-up and decay after ``steps``: the first left objects that nothing memorized
    misshapen (75 % of neutral attributes, 26 % of characters)."""
    caption_dropout: float = 0.1
    """Share of empty captions, without which there would be no guidance to distil."""
    time_spread: float = 1.4
    """Standard deviation of logit(t), whose mean is 0. Esser et al. (2024) found 1 best; with that, hardly
    any training time is as late as the first steps of a sampler are."""
    distil_steps: int = 3000
    """Of phase two, which take 1.7 times as long."""
    distil_lr: float = 1e-3
    guidance_range: tuple[float, float] = (1.0, 5.0)
    """Of the uniform guidance scale in phase two."""
    compiled: bool = True
    """Whether torch.compile speeds the training up."""
    inference_steps: int = 8
    guidance_scale: float = 3.0
    """Sampler defaults, written to ``lethe.json``."""
    seed: int = 0

    @property
    def defaults(self) -> dict[str, Any]:
        """What ``lethe.json`` says. Of itself a FluxPipeline draws 128 times its autoencoder's reduction."""
        return {
            "num_inference_steps": self.inference_steps,
            "guidance_scale": self.guidance_scale,
            "height": 64,
            "width": 64,
        }

    @property
    def trained(self) -> FluxRecipe:
        """What the weights depend on: other sampler defaults need no training."""
        return replace(self, inference_steps=0, guidance_scale=0.0)

    @property
    def first_phase(self) -> FluxRecipe:
        """What phase one depends on: another distillation starts from the same teacher."""
        return replace(self.trained, distil_steps=0, distil_lr=0.0, guidance_range=(0.0, 0.0))

    def scaled(self, scale: float) -> FluxRecipe:
        """The recipe with ``scale`` times the steps."""
        if scale == 1.0:
            return self
        return replace(
            self,
            steps=max(2, round(self.steps * scale)),
            steps_again=max(2, round(self.steps_again * scale)),
            distil_steps=max(2, round(self.distil_steps * scale)),
        )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1 schnell's: times are evenly spaced, whatever the number of image tokens.

    dev shifts them towards noise for large images; 64 tokens call for none.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)


def build_transformer(recipe: FluxRecipe, latent_channels: int) -> FluxTransformer2DModel:
    """The untrained transformer, initialised as in Peebles and Xie (2023), DiT.

    Linear layers are Xavier uniform without bias; modulations and the last layer are zero (adaLN-Zero), so
    that every block starts as the identity. diffusers leaves torch's defaults, which suit loaded weights.
    """
    from diffusers import FluxTransformer2DModel

    with _seeded(recipe.seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * latent_channels,
            num_layers=recipe.dual,
            num_single_layers=recipe.single,
            attention_head_dim=sum(recipe.rotary),
            num_attention_heads=recipe.heads,
            joint_attention_dim=recipe.text_width,
            pooled_projection_dim=recipe.text_width,
            guidance_embeds=True,
            axes_dims_rope=recipe.rotary,
        )
        for name, module in transformer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.startswith("time_text_embed"):
                nn.init.normal_(module.weight, std=0.02)
            elif "norm" in name or name == "proj_out":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def build_t5(recipe: FluxRecipe, tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """The untrained T5 encoder, with the gated feed-forward layers of version 1.1."""
    from transformers import T5Config, T5EncoderModel

    with _seeded(recipe.seed + 2):
        return T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=recipe.text_width,
                d_kv=recipe.text_width // recipe.text_heads,
                d_ff=2 * recipe.text_width,
                num_layers=recipe.text_layers,
                num_heads=recipe.text_heads,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on ``seed`` alone; the global random state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class TextEncoders:
    """Both tokenizers and encoders, as FluxPipeline uses them: CLIP's pooled output, T5's last states.

    No attention mask is given to T5: FLUX's padding tokens are seen, in training as in sampling.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    clip: CLIPTextModel
    t5: T5EncoderModel

    def ids(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded token ids of CLIP and T5, int64 [captions, 32] each."""
        return token_ids(self.tokenizer, captions), token_ids(self.tokenizer_2, captions)

    def embed(self, ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Pooled embeddings [n, width] and token embeddings [n, 32, width] of :meth:`ids`."""
        device = self.clip.device
        return self.clip(ids[0].to(device)).pooler_output, self.t5(ids[1].to(device))[0]


def build_text_encoders(recipe: FluxRecipe, captions: Sequence[str]) -> TextEncoders:
    """Untrained encoders, and tokenizers of the captions' words."""
    tokenizer, tokenizer_2 = build_tokenizer(captions), build_t5_tokenizer(captions)
    with _seeded(recipe.seed):
        clip = build_text_encoder(recipe, tokenizer)
    return TextEncoders(tokenizer, tokenizer_2, clip, build_t5(recipe, tokenizer_2))


def spread_times(batch: int, generator: torch.Generator, spread: float) -> Tensor:
    """Flow times in (0, 1), [batch]: logit-normal of mean 0, one in each of ``batch`` equal strata."""
    places = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    shuffled = places[torch.randperm(batch, generator=generator)].clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid(spread * torch.special.ndtri(shuffled))


def packed(latents: Tensor) -> Tensor:
    """Latents [n, channels, height, width] as image tokens [n, height / 2 * width / 2, 4 * channels]."""
    from diffusers import FluxPipeline

    tokens: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return tokens


class Velocity:
    """The transformer's prediction with the position ids of square latents; under autocast, if it is on.

    ``forward`` is what is called (the compiled transformer); its parameters are the transformer's.
    """

    def __init__(self, transformer: FluxTransformer2DModel, recipe: FluxRecipe, tokens: int) -> None:
        from diffusers import FluxPipeline

        side = int(tokens**0.5)
        device = transformer.device
        self.forward = faster(transformer, recipe.compiled, device)
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
        # Tokens stay float32: the forward gives its times their type, and in bfloat16 1000 t is 2 off.
        for embedder in (transformer.x_embedder, transformer.context_embedder):
            embedder.register_forward_hook(lambda _module, _inputs, output: output.float())

    def __call__(self, noisy: Tensor, times: Tensor, guidance: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity float32, like ``noisy``; times and guidance [n], text as ``TextEncoders.embed`` gives."""
        pooled, states = text
        predicted: Tensor = self.forward(
            hidden_states=noisy,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=times,
            img_ids=self.image_ids,
            txt_ids=self.image_ids.new_zeros(states.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return predicted.float()


@contextmanager
def _fast(device: torch.device) -> Iterator[None]:
    """bfloat16 autocast; and on a CPU attention as plain matrix products and a softmax.

    For 96 tokens torch's fused kernel took four times as long there, forward and back.
    """
    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # it holds for the CPU too
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@dataclass(frozen=True)
class Examples:
    """A step's noisy latents, their times, the velocity towards the noise, and the captions' ids."""

    noisy: Tensor
    times: Tensor
    velocity: Tensor
    ids: tuple[Tensor, Tensor]


def example_batches(
    recipe: FluxRecipe, data: TrainingSet, latents: Tensor, text: TextEncoders, device: torch.device
) -> Callable[[int, torch.Generator], Examples]:
    """From a step's number and generator to its examples; ``latents`` packed, float32 on the CPU."""
    captions, empty = text.ids(data.captions), text.ids([""])
    order = epoch_order(len(data), recipe.batch, recipe.seed)

    def draw(step: int, generator: torch.Generator) -> Examples:
        index = order(step)
        clean = latents[data.image_of[index]]
        dropped = torch.rand(len(index), generator=generator)[:, None] < recipe.caption_dropout
        clip, t5 = (
            torch.where(dropped, none, ids[data.caption_of[index]])
            for ids, none in zip(captions, empty, strict=True)
        )
        times = spread_times(len(index), generator, recipe.time_spread)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, times[:, None, None])
        return Examples(noisy.to(device), times.to(device), (noise - clean).to(device), (clip, t5))

    return draw


def flow_loss(
    draw: Callable[[int, torch.Generator], Examples], velocity: Velocity, text: TextEncoders
) -> Callable[[int, torch.Generator], Tensor]:
    """Phase one: the squared error of the velocity, at guidance 1."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = draw(step, generator)
        with _fast(batch.noisy.device):
            found = velocity(batch.noisy, batch.times, torch.ones_like(batch.times), text.embed(batch.ids))
        return (found - batch.velocity).square().mean()

    return loss


def guidance_loss(
    recipe: FluxRecipe,
    draw: Callable[[int, torch.Generator], Examples],
    teacher: Velocity,
    student: Velocity,
    text: TextEncoders,
) -> Callable[[int, torch.Generator], Tensor]:
    """Phase two: the squared error of the student's velocity at guidance g, divided by g^2.

    The teacher's guided velocity grows with g. Without the divisor the largest scales had all the weight:
    after 120 steps on a small world, guidance 1 was as wrong as none at 2 (mean squared error .25; .06 with).
    """
    empty = text.ids([""])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = draw(step, generator)
        low, high = recipe.guidance_range
        drawn = low + (high - low) * torch.rand(len(batch.times), generator=generator)
        scale = drawn.to(batch.times.device)
        with _fast(batch.noisy.device):
            with torch.no_grad():
                with_text = text.embed(batch.ids)
                pooled, states = (
                    torch.cat([x, none.expand_as(x)])
                    for x, none in zip(with_text, text.embed(empty), strict=True)
                )
                noisy, times = (torch.cat([x, x]) for x in (batch.noisy, batch.times))
                both = teacher(noisy, times, torch.ones_like(times), (pooled, states))
                conditional, unconditional = both.chunk(2)
            found = student(batch.noisy, batch.times, scale, with_text)
        wanted = torch.lerp(unconditional, conditional, scale[:, None, None])
        return ((found - wanted) / scale[:, None, None]).square().mean()

    return loss


def train_flux(
    world: PlantedWorld,
    recipe: FluxRecipe,
    folder: Path,
    autoencoder: Path,
    cache: Path,
    device: torch.device,
    **fit_options: Any,
) -> dict[str, Any]:
    """Train (or resume, or find trained) on the latents of the VAE in ``autoencoder``.

    Writes ``folder / "pipeline"``, which is float32 here; :func:`lethebench.training.export.export` writes
    what ships. Returns the record for the model card.
    """
    from diffusers import AutoencoderKL

    digest = autoencoder_digest(autoencoder)
    key = recipe_key(recipe.trained, world.config, digest)
    done = finished(folder, "diffusion", key)
    if done is not None and (folder / "pipeline").exists():
        return done
    vae = AutoencoderKL.from_pretrained(autoencoder).to(device)
    data = training_set(world, cache)
    latents = packed(latent_set(vae, data, device))
    text = build_text_encoders(recipe, world.vocabulary_captions())
    transformer = build_transformer(recipe, vae.config.latent_channels).to(device)
    for encoder in (text.clip, text.t5):
        encoder.to(device)
    draw = example_batches(recipe, data, latents, text, device)
    student = Velocity(transformer, recipe, latents.shape[1])
    run = fit(
        "mini-flux",
        {"transformer": transformer, "text_encoder": text.clip, "text_encoder_2": text.t5},
        flow_loss(draw, student, text),
        steps=recipe.steps + recipe.steps_again,
        peak_lr=recipe.peak_lr,
        again=(recipe.steps_again, recipe.peak_lr_again),
        folder=folder / "flow-run",
        warmup=min(500, recipe.steps // 10),
        seed=recipe.seed,
        key=recipe_key(recipe.first_phase, world.config, digest),
        **fit_options,
    )
    teacher = Velocity(copy.deepcopy(transformer), recipe, latents.shape[1])
    distilled = fit(
        "mini-flux guidance",
        {"transformer": transformer},
        guidance_loss(recipe, draw, teacher, student, text),
        steps=recipe.distil_steps,
        peak_lr=recipe.distil_lr,
        folder=folder / "guidance-run",
        warmup=min(100, recipe.distil_steps // 10),
        seed=recipe.seed,
        key=recipe_key(key, checkpoint_digest(folder / "flow-run")),
        **fit_options,
    )
    assemble_flux(vae, text, transformer).save_pretrained(folder / "pipeline")
    parts = {"transformer": transformer, "text_encoder": text.clip, "text_encoder_2": text.t5}
    record = {
        "key": key,
        "recipe": asdict(recipe),
        **run,
        "guidance": distilled,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "tokens": [len(text.tokenizer), len(text.tokenizer_2)],
        "image_tokens": latents.shape[1],
        "training_examples": len(data),
        "training_pictures": len(data.images),
        "epochs": round(run["steps"] * recipe.batch / len(data), 1),
    }
    write_record(folder, "diffusion", record)
    return record


def assemble_flux(
    vae: AutoencoderKL, text: TextEncoders, transformer: FluxTransformer2DModel
) -> FluxPipeline:
    """The parts as a plain FluxPipeline."""
    from diffusers import FluxPipeline

    vae.register_to_config(shift_factor=0.0)  # FluxPipeline adds it; the latents' mean is 0 already
    return FluxPipeline(
        scheduler=build_flow_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.tokenizer_2,
        transformer=transformer,
    )


def autoencoder_digest(folder: Path) -> str:
    """The sha256 of the autoencoder's weights. Raises UserError where there are none."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise UserError(
            f"mini-flux needs the autoencoder of mini-sd, and there is none in {folder}: "
            "train it first with `lethe train --only autoencoder`"
        )
    return file_sha256(path)
