"""Loading a named model: verified, offline, safetensors only, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lethebench.errors import UserError
from lethebench.specs import SamplerSettings, first_error
from lethebench.zoo._files import INDEX, check_model, model_folder, read_json
from lethebench.zoo._model import FAMILIES, Model, ModelEntry
from lethebench.zoo._settings import LoadSettings

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
DEFAULTS = "lethe.json"
"""A model folder's own sampler defaults, by the names of ``SamplerSettings``."""


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    loading: LoadSettings | None = None,
) -> Model:
    """The model of a registered name, a local folder or a cached hub id.

    ``dtype`` (float32, bfloat16 or float16) is the denoiser's and the text encoders'; weights are
    converted to it from whatever is on disk, and the VAE's to float32. Files recorded in
    ``weights.json`` are verified first. A folder with ``pruning.json`` is loaded by
    ``lethebench.pruning``. Raises UserError for an unknown name, device or type, for missing or
    damaged files, and for a model that is not in the local cache: nothing is downloaded.
    """
    entry = check_model(name, revision=revision)
    folder = model_folder(entry)
    chosen, where = _torch_dtype(dtype), _torch_device(device)
    if chosen.itemsize == 2 and where.type == "cpu" and dtype == "float16":
        raise UserError("float16 is slow and incomplete on a CPU: use float32 or bfloat16")
    entry = replace(entry, sampler=_defaults(folder, entry.sampler))
    try:
        pipe = _load_pipe(folder, chosen)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"model {name} in {folder} can't be loaded: {type(error).__name__}: {first}"
        ) from error
    return wrap(pipe, entry=entry, device=where, folder=folder)


def wrap(
    pipe: Any,
    *,
    entry: ModelEntry | None = None,
    device: str | torch.device = "cpu",
    folder: Path | None = None,
) -> Model:
    """A diffusers pipeline as a :class:`Model`: moved to ``device``, evaluated, frozen, silent.

    Methods that train parameters switch their gradients on, and off again. The pipeline's own
    modules are used, not copies; its VAE becomes float32.
    """
    import torch

    kind = type(pipe).__name__
    if entry is None:
        if kind not in FAMILIES:
            raise UserError(f"a {kind} can't be used: Lethe runs {', '.join(FAMILIES)}")
        entry = ModelEntry(kind.lower(), FAMILIES[kind], source="memory")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(device=device)
            module.eval().requires_grad_(False)
    if hasattr(pipe, "unet"):  # a fifth faster on a CPU, the same on a GPU in half precision or faster
        pipe.unet.to(memory_format=torch.channels_last)
    if pipe.vae.dtype != torch.float32:
        pipe.vae.to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = Model(entry, pipe, torch.device(device), torch.float32, folder)
    model.dtype = next(p.dtype for p in model.denoiser.parameters() if p.is_floating_point())
    return model


def _load_pipe(folder: Path, dtype: torch.dtype) -> Any:
    import torch

    index = read_json(folder / INDEX)
    # Blanked images would read as perfect suppression, so no model is loaded with a safety checker.
    kwargs: dict[str, Any] = {}
    if "safety_checker" in index:
        kwargs = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kwargs |= {
        "dtype": {"vae": torch.float32, "default": dtype},
        "local_files_only": True,
        "use_safetensors": True,
    }
    with _quiet():
        if (folder / "pruning.json").is_file():
            from lethebench.pruning import load_pruned

            return load_pruned(folder, **kwargs)
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers while files load."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    were = [m for m in (of_diffusers, of_transformers) if m.is_progress_bar_enabled()]
    for module in were:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in were:
            module.enable_progress_bar()


def _defaults(folder: Path, given: SamplerSettings) -> SamplerSettings:
    """The entry's sampler defaults, overridden by those in the folder's ``lethe.json``."""
    path = folder / DEFAULTS
    if not path.is_file():
        return given
    try:
        return SamplerSettings.model_validate({**given.model_dump(), **read_json(path)})
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from error


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise UserError(f"unknown dtype '{name}': use {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def _torch_device(name: str | torch.device) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}': use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
