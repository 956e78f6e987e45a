"""Which files of a model on the hub are needed: the same when it is fetched and when it is looked for."""

from __future__ import annotations

_COMPONENTS = (
    "scheduler",
    "unet",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
)

NEEDED = (
    "model_index.json",
    *(f"{part}/*.{ending}" for part in _COMPONENTS for ending in ("json", "txt", "model", "safetensors")),
)
"""A pipeline's components with weights as safetensors. Left out: single-file checkpoints, the safety checker
(blanked images would read as perfect suppression), image encoders, pickles, weights for other software."""

NOT_NEEDED = ("*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*")
"""Second copies of the weights: in half precision (a run's dtype says how they are used), or not averaged."""
