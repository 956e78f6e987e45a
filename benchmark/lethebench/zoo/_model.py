"""What a model is to Lethe: an entry that says where it comes from, and the loaded pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethebench.specs import SamplerSettings
from lethebench.zoo._settings import LoadSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

Family = Literal["sd", "sdxl", "sd3", "flux"]

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
"""Model families by the diffusers pipeline class that ``model_index.json`` names."""


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be named on the command line.

    ``source`` is a folder name under ``lethebench/weights`` (``builtin``), a local path, or a hub id,
    then at ``revision`` (a commit hash pins it). ``sampler`` holds the model's defaults; a ``None``
    height or width leaves the size to the pipeline.

    The rest is for published models: ``mirrors`` are other hub ids of the same weights, with their revisions;
    ``gated`` says that the hub asks for an account that accepted the licence; ``max_tokens`` cuts the T5
    encoder's prompts. What memory is needed can be told without any file from ``parameters`` (by component),
    ``stored`` (bytes of one on the hub) and ``denoiser`` (its configuration, where that isn't diffusers'
    default): ``lethebench.memory``.
    """

    name: str
    family: Family
    source: str
    summary: str = ""
    revision: str | None = None
    licence: str = ""
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    builtin: bool = False
    mirrors: Mapping[str, str] = field(default_factory=dict)
    gated: bool = False
    max_tokens: int | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    stored: int = 2
    denoiser: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Model:
    """A loaded model: a diffusers pipeline, in evaluation mode and with frozen parameters.

    ``dtype`` is the denoiser's and the text encoders'; the VAE always computes in float32, so that
    images don't depend on ``dtype`` twice. ``folder`` is where it was loaded from (None for a
    pipeline made in memory), ``loading`` how.
    """

    entry: ModelEntry
    pipe: Any = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    folder: Path | None = None
    loading: LoadSettings = field(default_factory=LoadSettings)
    _weights: dict[str, str] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The entry's name."""
        return self.entry.name

    @property
    def family(self) -> Family:
        """``sd``, ``sdxl``, ``sd3`` or ``flux``."""
        return self.entry.family

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or the transformer."""
        unet = getattr(self.pipe, "unet", None)
        found: nn.Module = unet if unet is not None else self.pipe.transformer
        return found

    @property
    def vae(self) -> nn.Module:
        """The autoencoder."""
        found: nn.Module = self.pipe.vae
        return found

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The text encoders in the pipeline's order (one for Stable Diffusion 1.x, three for SD3)."""
        return self._numbered("text_encoder")

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, in the order of the text encoders."""
        return self._numbered("tokenizer")

    def _numbered(self, stem: str) -> list[Any]:
        found = (getattr(self.pipe, f"{stem}{suffix}", None) for suffix in ("", "_2", "_3"))
        return [item for item in found if item is not None]

    def weights_sha256(self) -> dict[str, str]:
        """The SHA-256 of each safetensors file of the folder, computed once.

        For a pipeline made in memory: of each component's parameters and buffers as they are now.
        """
        if self.folder is None:
            modules = {k: v for k, v in self.pipe.components.items() if hasattr(v, "state_dict")}
            return {name: _state_sha256(module) for name, module in sorted(modules.items())}
        if self._weights is None:
            from lethebench.zoo._files import folder_sha256

            self._weights = folder_sha256(self.folder)
        return dict(self._weights)


def _state_sha256(module: nn.Module) -> str:
    """The SHA-256 of a module's state: names, shapes, types and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode() + b"\0")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
