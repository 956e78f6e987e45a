"""The training-time track: LoRA fine-tuning that training-time methods take part in.

- ``settings``: :class:`LoraSettings`, how is trained; ``hooks``: :class:`TrainingHooks`, what a method may do
  meanwhile;
- ``trainer``: :func:`finetune_lora`; ``lora``: which layers are adapted, and a trained LoRA put on a model
  (:func:`applied_lora`, :func:`merged_lora`);
- ``subspace``: what must not be learnt, as subspaces of layers' inputs (:func:`concept_subspaces`);
  ``projection``: gradient projection (:class:`EmbeddingProjection`, :class:`GradientProjection`);
- ``overhead``: what a method costs a step, beside plain LoRA;
- ``data``: the fine-tuning sets.

The names above are imported when first asked for: this package, ``settings``, ``hooks`` and ``data`` import
no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lethebench.finetuning.hooks import LoraModule, LossBatch, TrainingHooks
    from lethebench.finetuning.lora import applied_lora, lora_targets, merged_lora
    from lethebench.finetuning.projection import EmbeddingProjection, GradientProjection, leakage
    from lethebench.finetuning.settings import LoraSettings
    from lethebench.finetuning.subspace import SensitivePrompt, concept_subspaces
    from lethebench.finetuning.trainer import LoraResult, Training, finetune_lora

_PLACES = {
    "hooks": ("LoraModule", "LossBatch", "TrainingHooks"),
    "lora": ("applied_lora", "lora_targets", "merged_lora"),
    "projection": ("EmbeddingProjection", "GradientProjection", "leakage"),
    "settings": ("LoraSettings",),
    "subspace": ("SensitivePrompt", "concept_subspaces"),
    "trainer": ("LoraResult", "Training", "finetune_lora"),
}

__all__ = [
    "EmbeddingProjection",
    "GradientProjection",
    "LoraModule",
    "LoraResult",
    "LoraSettings",
    "LossBatch",
    "SensitivePrompt",
    "Training",
    "TrainingHooks",
    "applied_lora",
    "concept_subspaces",
    "finetune_lora",
    "leakage",
    "lora_targets",
    "merged_lora",
]


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
