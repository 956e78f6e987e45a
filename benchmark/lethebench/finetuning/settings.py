"""How a LoRA is trained, and how the subspace is chosen that it must not learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lethebench.errors import UserError
from lethebench.method import check_type, setting

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")

TOKENS = ("concept", "onwards", "all")
"""Which rows of a prompt's embedding: the concept's own tokens; those and all after them in their encoder,
end token and padding included (of CLIP, whose attention is causal, all that know of the concept); or every
row."""

LAYERS = ("embeddings", "text", "all")
"""Which adapted layers: those that the encoders' outputs are fed to; those and all that see text tokens; or
all, image-fed ones by all their tokens."""

ENERGY = 0.97
"""GPM's threshold (its code: 0.97 + 0.003 a task)."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a LoRA fine-tuning. Raises UserError where one makes no sense.

    The defaults are those of diffusers' ``train_text_to_image_lora.py`` (AdamW, constant learning rate, norm
    of the gradient cut to 1, A drawn with standard deviation 1 / rank), with the caption dropout of
    classifier-free guidance (Ho and Salimans 2022: 0.1 to 0.2). Ours: steps, batch size, rank.
    """

    steps: int = setting(400, "optimiser steps")
    batch_size: int = setting(8, "images of a micro-batch")
    accumulate: int = setting(1, "micro-batches whose gradients are averaged before an optimiser step")
    lr: float = setting(1e-4, "peak learning rate")
    schedule: str = setting("constant", "learning rate after warm-up: constant, or to 0 linear or cosine")
    warmup: int = setting(0, "steps of linear warm-up")
    rank: int = setting(8, "rank of each layer's update")
    alpha: float | None = setting(None, "the update is alpha / rank times B A; none: alpha = rank")
    beta1: float = setting(0.9, "AdamW's decay of the first moment")
    beta2: float = setting(0.999, "AdamW's decay of the second moment")
    eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(1e-2, "AdamW's weight decay")
    clip: float = setting(1.0, "norm that the gradient of all layers together is cut to; 0 doesn't cut")
    caption_dropout: float = setting(0.1, "share of captions left out, for guidance")
    min_snr: float | None = setting(None, "gamma of the min-SNR weighting of the loss; none: no weighting")
    precision: str = setting("no", "autocast of accelerate: no, bf16 or fp16 (the LoRA stays float32)")
    targets: tuple[str, ...] = setting((), "ends of the adapted layers' names; none: the family's own")
    text_encoder: bool = setting(False, "adapt the text encoder's attention too (Stable Diffusion 1.x, 2.x)")
    gradient_checkpointing: bool = setting(False, "compute activations twice to save memory")
    checkpoint_every: int = setting(100, "steps between checkpoints")

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        for field in fields(self):
            check_type("LoRA fine-tuning", LoraSettings, field.name, getattr(self, field.name))
        for name in ("steps", "batch_size", "accumulate", "rank", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "eps"):
            _require(0 < getattr(self, name) < math.inf, f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip"):
            _require(getattr(self, name) >= 0, f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("alpha", "min_snr"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be above 0, or none, not {value}")
        for name in ("beta1", "beta2", "caption_dropout"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        _require(
            self.schedule in SCHEDULES, f"schedule is one of {', '.join(SCHEDULES)}, not '{self.schedule}'"
        )
        _require(
            self.precision in PRECISIONS,
            f"precision is one of {', '.join(PRECISIONS)}, not '{self.precision}'",
        )
        listed = isinstance(self.targets, (list, tuple)) and all(isinstance(t, str) for t in self.targets)
        _require(listed, f"targets is a list of names, not {self.targets!r}")

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def images_a_step(self) -> int:
        """Images that an optimiser step learns from."""
        return self.batch_size * self.accumulate

    def rate(self, step: int) -> float:
        """The learning rate of a step, numbered from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.lr * left[self.schedule]


def require_subspace(dimension: int | None, energy: float) -> None:
    """Raise UserError where a subspace's size makes no sense."""
    if dimension is not None and dimension < 1:
        raise UserError(f"the subspace's dimension must be at least 1, not {dimension}")
    if not 0 < energy <= 1:
        raise UserError(f"the subspace's energy must be above 0 and at most 1, not {energy}")


def require_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UserError unless ``value`` is one of the known ones."""
    if value not in known:
        raise UserError(f"{name} is one of {', '.join(known)}, not '{value}'")


def require_strength(strength: float) -> None:
    """Raise UserError for a strength (lambda) outside [0, 1]."""
    if not 0 <= strength <= 1:
        raise UserError(f"the projection's strength must be in [0, 1], not {strength}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"LoRA fine-tuning: {message}")
