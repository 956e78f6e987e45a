"""LoRA fine-tuning of Stable Diffusion 1.x/2.x, XL, 3 and FLUX, with hooks, through peft and accelerate.

Everything random (order, noise, timesteps, caption dropout, the start of A, what hooks draw) is a function of
the seed and of an example's or layer's place alone, so a killed and resumed run ends with the weights that an
uninterrupted one ends with: on a CPU bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lethebench.errors import RunError, UserError
from lethebench.finetuning import checkpoint as checkpoints
from lethebench.finetuning.hooks import Captioned, LoraModule, LossBatch, TrainingHooks
from lethebench.finetuning.lora import injected, lora_targets, lora_tensors
from lethebench.hooks import Conditioning
from lethebench.progress import progress
from lethebench.sampler import image_size, pack_latents, rows_of, to_latents
from lethebench.sampler._families import adapter_for, join
from lethebench.seeding import derive_seed, generator
from lethebench.unlearning import encode, noised, prediction, random_timesteps, training_target
from lethebench.unlearning.diffusion import FLOW

if TYPE_CHECKING:
    from lethebench.finetuning.settings import LoraSettings
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model

CURVE_POINTS = 20
"""Points of the loss curve that the facts keep, at most."""

_CHUNK = 16
"""Images or captions encoded at once."""


@dataclass
class LoraResult:
    """A trained LoRA: tensors (see ``lethebench.finetuning.lora``) and facts that JSON can hold.

    Facts: ``examples`` (distinct ones after the hook), ``images_seen``, ``kept`` (share of the images seen
    that counted), ``skipped_steps``, ``layers``, ``lora_parameters``, ``parameters_changed`` (entries of the
    adapted weights as a share of the denoiser's parameters), ``curve`` (mean loss over the steps since the
    point before, of the images that counted), ``timing`` (``seconds`` of all sessions together,
    ``seconds_per_step``), and what the hooks add.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def finetune_lora(
    model: Model,
    examples: Sequence[Captioned],
    settings: LoraSettings,
    *,
    sampler: SamplerSettings,
    seed: int | str,
    hooks: TrainingHooks | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    title: str = "fine-tuning",
) -> LoraResult:
    """Fine-tune a LoRA on captioned images; the model is left as it was, bit for bit.

    The loss is the mean squared error of the denoiser's prediction at a uniform timestep (epsilon, v, or the
    velocity of flow matching: no shift of its timesteps), by example, over those that the hooks keep; a
    step's gradient is the mean over its kept examples, however they are split into micro-batches. Each pass
    over the examples is in a new order. Images must be ``[height, width, 3]`` of the size that ``sampler``
    says. For a dropped caption stands what ``sampler`` guides against (the empty prompt; zeros for SDXL).

    With a ``checkpoint`` folder the run goes on from the checkpoint there, if it is of the same model,
    weights included, settings, seed, examples and ``key`` (which must name what the hooks do). Raises
    UserError for examples, settings and models that don't fit, before anything is computed; RunError where
    the loss is not finite.
    """
    hooks = hooks or TrainingHooks()
    chosen = repeated(hooks.examples(list(examples)))
    _check(model, chosen, settings, sampler)
    identity = _identity(model, chosen, settings, sampler, seed, key)
    with prepared(model, settings, sampler, seed) as training:
        run = Run(training, chosen, hooks, checkpoint, identity)
        with progress(title, total=settings.steps, done=run.state.step) as bar:
            while run.state.step < settings.steps:
                run.step()
                bar.advance(note=f"loss {run.last:.4f}")
        facts = run.facts() | dict(hooks.finished(training.lora))
        return LoraResult(lora_tensors(training.lora), facts)


@contextmanager
def prepared(
    model: Model, settings: LoraSettings, sampler: SamplerSettings, seed: int | str
) -> Iterator[Training]:
    """A training with a new LoRA in place; then the model as it was, bit for bit."""
    with (
        torch.enable_grad(),
        _accelerator(model, settings) as accelerator,
        injected(model, settings, lambda layer: generator("finetune", seed, "start", layer)) as lora,
        _checkpointing(model, settings),
    ):
        yield Training(model, settings, sampler, seed, lora, accelerator)


class Training:
    """The training as hooks see it: the model with its LoRA in place, and the loss.

    ``lora`` holds the trained layers by ``<component>.<module>``.
    """

    def __init__(
        self,
        model: Model,
        settings: LoraSettings,
        sampler: SamplerSettings,
        seed: int | str,
        lora: dict[str, LoraModule],
        accelerator: Any,
    ) -> None:
        self.model, self.settings, self.seed, self.lora = model, settings, seed, lora
        self.accelerator = accelerator
        # FLUX takes the scale as an input; the others would encode an empty prompt beside each caption
        guided = model.family == "flux"
        self.sampler = sampler if guided else sampler.model_copy(update={"guidance_scale": 1.0})
        self._rows: dict[str, Conditioning] = {}

    def draws(self, *purpose: object) -> torch.Generator:
        """A generator for a named purpose of this training."""
        return generator("finetune", self.seed, *purpose)

    def latents(self, examples: Sequence[Captioned]) -> Tensor:
        """The examples' latents, ``[n, ...]`` as the denoiser takes them: :func:`image_latents`."""
        return image_latents(self.model, examples, self.sampler)

    def remember(self, captions: Sequence[str]) -> None:
        """Encode captions once and for all (unless the text encoder is trained)."""
        if not self.settings.text_encoder:
            wanted = [c for c in dict.fromkeys(captions) if c not in self._rows]
            for start in range(0, len(wanted), _CHUNK):
                self._rows |= self._encoded(wanted[start : start + _CHUNK])

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of B captions; an empty one's is the unconditional that guidance takes."""
        new = [c for c in dict.fromkeys(captions) if c not in self._rows]
        rows = self._rows | self._encoded(new)
        device = self.model.device
        found = reduce(join, [rows[c] for c in captions])
        pooled = None if found.pooled is None else found.pooled.to(device)
        return Conditioning(found.embeds.to(device), pooled, found.extra)

    def _encoded(self, captions: Sequence[str]) -> dict[str, Conditioning]:
        trained = self.settings.text_encoder
        found: dict[str, Conditioning] = {}
        texts = [c for c in captions if c]
        with self.accelerator.autocast() if trained else nullcontext(), torch.set_grad_enabled(trained):
            if texts:
                together = encode(self.model, texts, self.sampler)
                found = {text: rows_of(together, [i]) for i, text in enumerate(texts)}
            if len(texts) < len(captions):
                found[""] = adapter_for(self.model, self.sampler).unconditional(1)
        return found if trained else {text: _on_cpu(row) for text, row in found.items()}

    def noisy(self, latents: Tensor, draws: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents ``[B, ...]`` at random timesteps (a generator each): noised, timesteps ``[B]``, target."""
        times = torch.cat([random_timesteps(self.model, 1, g) for g in draws])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws]).to(latents)
        target = training_target(self.model, latents, noise, times)
        return noised(self.model, latents, noise, times), times, target

    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction, float32 like the (noised) latents, in the training's precision."""
        with self.accelerator.autocast():
            return prediction(self.model, latents, times, conditioning, self.sampler)

    def losses(self, predicted: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """The loss of each example, ``[B]``: the weighted mean squared error."""
        errors: Tensor = (predicted - target).square().flatten(1).mean(dim=1)
        return self._weights(times) * errors

    def _weights(self, times: Tensor) -> Tensor:
        """Min-SNR weights ``[B]`` (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) / SNR for epsilon,
        min(SNR, gamma) / (SNR + 1) for v; 1 where the weighting is off.
        """
        gamma = self.settings.min_snr
        if gamma is None:
            return torch.ones(len(times), device=times.device)
        config = self.model.pipe.scheduler.config
        kept = self.model.pipe.scheduler.alphas_cumprod.to(times.device, torch.float32)[times.long()]
        snr = kept / (1 - kept)
        velocity = config.get("prediction_type", "epsilon") == "v_prediction"
        weights: Tensor = snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
        return weights


@dataclass
class _State:
    """What a run has behind it."""

    step: int = 0
    seconds: float = 0.0
    kept: int = 0
    skipped: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    loss: float = 0.0
    """Sum of the losses of the images that counted since the curve's last point, and their number."""
    counted: int = 0


class Run:
    """One training: its examples, optimiser and state, gone on with from a checkpoint where there is one."""

    def __init__(
        self,
        training: Training,
        examples: Sequence[Captioned],
        hooks: TrainingHooks,
        folder: Path | None = None,
        key: str = "",
    ) -> None:
        self.training, self.examples, self.hooks = training, examples, hooks
        self.settings, self.lora, self.accelerator = training.settings, training.lora, training.accelerator
        self.folder, self.key = folder, key
        self.parameters = [p for m in self.lora.values() for p in (m.A, m.B)]
        self.state, self.last = _State(), math.nan
        distinct = {id(e): e for e in examples}
        self.latents = training.latents(list(distinct.values())).cpu()
        self.places = {one: place for place, one in enumerate(distinct)}
        training.remember(["", *(e.caption for e in examples)])
        hooks.started(training)
        s = self.settings
        adam = torch.optim.AdamW(
            self.parameters,
            lr=s.lr,
            betas=(s.beta1, s.beta2),
            eps=s.eps,
            weight_decay=s.weight_decay,
        )
        self.optimiser = self.accelerator.prepare_optimizer(adam)
        self.order = lru_cache(maxsize=2)(self._order)
        self._resume()

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(
            len(self.examples), generator=self.training.draws("order", epoch)
        ).tolist()
        return order

    def _example(self, position: int) -> Captioned:
        """The example that the run sees at a position, counted in images from 0."""
        epoch, place = divmod(position, len(self.examples))
        return self.examples[self.order(epoch)[place]]

    def step(self) -> None:
        """One optimiser step."""
        began, s, number = time.perf_counter(), self.settings, self.state.step
        for group in self.optimiser.param_groups:
            group["lr"] = s.rate(number)
        kept, total = 0, 0.0
        for part in range(s.accumulate):
            first = number * s.images_a_step + part * s.batch_size
            with self.accelerator.accumulate():
                counted, loss = self._micro_batch(range(first, first + s.batch_size))
                kept, total = kept + counted, total + loss
                if kept and self.accelerator.sync_gradients:
                    self._update(kept, number)
        self.optimiser.optimizer.zero_grad()
        self.last = total / kept if kept else math.nan
        self._count(kept, total, time.perf_counter() - began)
        if self.state.step % s.checkpoint_every == 0 or self.state.step == s.steps:
            self._save()

    def _micro_batch(self, positions: range) -> tuple[int, float]:
        """Add a micro-batch's gradients; the number of examples that counted, and the sum of their losses."""
        training, examples = self.training, [self._example(p) for p in positions]
        clean = self.latents[[self.places[id(e)] for e in examples]].to(training.model.device)
        latents, times, target = training.noisy(clean, [training.draws("noise", p) for p in positions])
        captions, conditioning = self._conditioning(examples, positions)
        predicted = training.predict(latents, times, conditioning)
        losses = training.losses(predicted, target, times)
        batch = LossBatch(
            tuple(examples),
            tuple(captions),
            latents,
            times,
            predicted.detach(),
            target,
            losses.detach(),
            lambda: self._unconditional(latents, times),
        )
        mask = self.hooks.keep(batch)
        if mask is not None:
            losses = losses[mask.to(losses.device)]
        if not len(losses):
            return 0, 0.0
        total = losses.sum()
        value = float(total.detach())
        if not math.isfinite(value):
            raise RunError(f"the loss is {value} at step {self.state.step}: lower the learning rate (lr)")
        self.accelerator.backward(total / len(positions))
        return len(losses), value

    def _conditioning(
        self, examples: Sequence[Captioned], positions: range
    ) -> tuple[list[str], Conditioning]:
        draws = [self.training.draws("text", p) for p in positions]
        dropped = [float(torch.rand((), generator=g)) < self.settings.caption_dropout for g in draws]
        captions = self.hooks.captions([e.caption for e in examples], examples, draws)
        captions = ["" if out else caption for caption, out in zip(captions, dropped, strict=True)]
        return captions, self.hooks.embeddings(self.training.conditioning(captions), draws)

    @torch.no_grad()
    def _unconditional(self, latents: Tensor, times: Tensor) -> Tensor:
        return self.training.predict(latents, times, self.training.conditioning([""] * len(latents)))

    def _update(self, kept: int, number: int) -> None:
        """The optimiser's step on the accumulated gradients, between the hooks."""
        self.accelerator.unscale_gradients(self.optimiser)
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:  # the sum was divided by all images of the step
                    parameter.grad.mul_(self.settings.images_a_step / kept)
            self.hooks.gradients(self.lora, number)
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        with torch.no_grad():
            self.hooks.stepped(self.lora, number)

    def _count(self, kept: int, total: float, seconds: float) -> None:
        state, steps = self.state, self.settings.steps
        state.step += 1
        state.seconds += seconds
        state.kept += kept
        state.skipped += not kept
        state.loss += total
        state.counted += kept
        ends = state.step % max(1, math.ceil(steps / CURVE_POINTS)) == 0 or state.step == steps
        if ends and state.counted:
            state.curve.append({"step": state.step - 1, "loss": state.loss / state.counted})
            state.loss, state.counted = 0.0, 0

    def facts(self) -> dict[str, Any]:
        """What :class:`LoraResult` says."""
        state, lora = self.state, self.lora
        seen = state.step * self.settings.images_a_step
        total = sum(
            p.numel() for n, p in self.training.model.denoiser.named_parameters() if ".lora_" not in n
        )
        changed = sum(m.layer.weight.numel() for n, m in lora.items() if n.startswith("denoiser."))
        return {
            "examples": len(self.places),
            "images_seen": seen,
            "kept": state.kept / seen,
            "skipped_steps": state.skipped,
            "layers": len(lora),
            "lora_parameters": sum(p.numel() for p in self.parameters),
            "parameters_changed": changed / total,
            "curve": state.curve,
            "timing": {
                "seconds": round(state.seconds, 1),
                "resumed_at": self.resumed_at,
                "seconds_per_step": state.seconds / self.settings.steps,
            },
        }

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {
            f"lora.{place}": parameter.detach().cpu().clone()
            for place, parameter in enumerate(self.parameters)
        }
        moments = checkpoints.optimiser_tensors(self.optimiser)
        tensors |= {f"optimiser.{name}": value for name, value in moments.items()}
        tensors |= {f"hooks.{name}": value for name, value in self.hooks.state().items()}
        scaler = self.accelerator.scaler
        facts = {"state": asdict(self.state), "scaler": None if scaler is None else scaler.state_dict()}
        checkpoints.write(self.folder, self.key, tensors, facts)

    def _resume(self) -> None:
        self.resumed_at = 0
        found = None if self.folder is None else checkpoints.read(self.folder, self.key)
        if found is None:
            return
        for place, parameter in enumerate(self.parameters):
            parameter.data.copy_(found.tensors[f"lora.{place}"])
        checkpoints.restore_optimiser(self.optimiser, found.part("optimiser."))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.facts["scaler"])
        self.hooks.restore(found.part("hooks."))
        self.state = _State(**found.facts["state"])
        self.resumed_at = self.state.step


@torch.no_grad()
def image_latents(model: Model, examples: Sequence[Captioned], sampler: SamplerSettings) -> Tensor:
    """Images' latents ``[n, ...]``, float32 as the denoiser takes them: the VAE's mean."""
    found = []
    for start in range(0, len(examples), _CHUNK):
        images = np.stack([e.image for e in examples[start : start + _CHUNK]])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(model.device) / 127.5 - 1
        found.append(to_latents(model, pixels.to(next(model.vae.parameters()).dtype)).float())
    return pack_latents(model, torch.cat(found), sampler)


def check_images(model: Model, examples: Sequence[Captioned], sampler: SamplerSettings) -> None:
    """Raise UserError for an image that isn't uint8 ``[height, width, 3]`` of the size that is drawn."""
    size = image_size(model, sampler)
    for image in (e.image for e in {id(e): e for e in examples}.values()):
        if image.shape != (*size, 3) or image.dtype != np.uint8:
            raise UserError(
                f"an image is {image.dtype} {image.shape}; {model.name} is trained on uint8 {(*size, 3)}"
            )


def repeated(examples: Sequence[Captioned]) -> list[Captioned]:
    """Each example as often as its ``duplicates`` says."""
    return [e for e in examples for _ in range(int(getattr(e, "duplicates", 1)))]


def _check(
    model: Model, examples: Sequence[Captioned], settings: LoraSettings, sampler: SamplerSettings
) -> None:
    """Raise UserError where examples, settings or the model don't go together."""
    if not examples:
        raise UserError("nothing to fine-tune on: no example is left")
    check_images(model, examples, sampler)
    if settings.precision == "fp16" and model.device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: take bf16 or no")
    if settings.min_snr is not None and model.family in FLOW:
        raise UserError(f"min_snr weights models that predict epsilon or v, not {model.family}")
    lora_targets(model, settings)


def _identity(
    model: Model,
    examples: Sequence[Captioned],
    settings: LoraSettings,
    sampler: SamplerSettings,
    seed: int | str,
    key: str,
) -> str:
    """What tells two trainings apart whose checkpoints must not be mixed up."""
    digests: dict[int, str] = {}
    for e in examples:
        if id(e) not in digests:
            digests[id(e)] = hashlib.sha256(e.caption.encode() + e.image.tobytes()).hexdigest()
    data = hashlib.sha256("".join(digests[id(e)] for e in examples).encode())
    kept = {n: v for n, v in asdict(settings).items() if n != "checkpoint_every"}
    parts = (model.name, model.dtype, _weights(model), sorted(kept.items()), sampler, seed, key)
    return f"{derive_seed(*parts, data.hexdigest()):016x}"


@torch.no_grad()
def _weights(model: Model) -> list[int]:
    """A fingerprint of the weights as they are now: of each parameter the sum of its bits, as whole numbers.

    So what a composition changed in memory before the training counts, too. Exact, hence the same on every
    device, and one sum a parameter on the model's own device, where a digest would fetch and hash every byte.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = (model.denoiser, *model.text_encoders, model.vae)
    sums = [p.view(whole[p.element_size()]).sum(dtype=torch.int64) for m in parts for p in m.parameters()]
    return [int(value) for value in sums]


def _on_cpu(row: Conditioning) -> Conditioning:
    pooled = None if row.pooled is None else row.pooled.cpu()
    return Conditioning(row.embeds.cpu(), pooled, row.extra)


@contextmanager
def _accelerator(model: Model, settings: LoraSettings) -> Iterator[Any]:
    """An Accelerator on the model's device, one process; accelerate's global state is put back.

    accelerate keeps precision and device in singletons, and takes unnamed options from the environment.
    """
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.state import (  # type: ignore[import-untyped]
        AcceleratorState,
        GradientState,
        PartialState,
    )
    from accelerate.utils import (  # type: ignore[import-untyped]
        GradientAccumulationPlugin,
        patch_environment,
    )

    shared = [c._shared_state for c in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        with patch_environment(accelerate_torch_device=str(model.device)):
            found = Accelerator(
                cpu=model.device.type == "cpu",
                mixed_precision=settings.precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=settings.accumulate, adjust_scheduler=False, sync_with_dataloader=False
                ),
            )
        if found.num_processes > 1:
            raise UserError("LoRA fine-tuning runs in one process: start it without a distributed launcher")
        yield found
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


@contextmanager
def _checkpointing(model: Model, settings: LoraSettings) -> Iterator[None]:
    """Gradient checkpointing of the denoiser while the context is open, where the settings ask for it."""
    denoiser: Any = model.denoiser
    change = settings.gradient_checkpointing and not denoiser.is_gradient_checkpointing
    if change:
        denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if change:
            denoiser.disable_gradient_checkpointing()
