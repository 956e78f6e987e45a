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
from lethebench.zoo._files import INDEX, check_model, components, model_folder, quantised, read_json
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
    ``lethebench.pruning``. ``loading`` saves memory or time (:class:`LoadSettings`). Raises UserError for an
    unknown name, device or type, for missing or damaged files, for settings of loading that the device, the
    type or the installed packages don't allow, and for a model that is not in the local cache: nothing is
    downloaded.
    """
    loading = loading or LoadSettings()
    entry = require_loadable(name, device=device, dtype=dtype, revision=revision, loading=loading)
    folder = model_folder(entry)
    chosen, where = _torch_dtype(dtype), _torch_device(device)
    entry = replace(entry, sampler=_defaults(folder, entry.sampler))
    try:
        pipe = _load_pipe(folder, chosen, loading.quantise)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"model {name} in {folder} can't be loaded: {type(error).__name__}: {first}"
        ) from error
    if entry.max_tokens is not None:
        last = _tokenizers(pipe)[-1]
        last.model_max_length = min(last.model_max_length, entry.max_tokens)
    return wrap(pipe, entry=entry, device=where, folder=folder, loading=loading)


def require_loadable(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    loading: LoadSettings | None = None,
) -> ModelEntry:
    """Raise UserError now for what :func:`load_model` would refuse before reading weights."""
    entry = check_model(name, revision=revision)
    _torch_dtype(dtype)
    where = _torch_device(device)
    check_loading(loading or LoadSettings(), where, dtype, entry.family)
    return entry


def check_loading(loading: LoadSettings, device: torch.device, dtype: str, family: str) -> None:
    """Raise UserError, before anything is read, for settings that can't be had here."""
    if dtype == "float16" and device.type == "cpu":
        raise UserError("float16 is slow and incomplete on a CPU: use float32 or bfloat16")
    if loading.offload != "none" and device.type != "cuda":
        raise UserError(
            f"offload={loading.offload} moves weights between a GPU and main memory, and the device is "
            f"{device}: give --device cuda, or leave it out of --load"
        )
    if loading.attention_slicing and family in ("sd3", "flux"):
        raise UserError(
            f"attention_slicing is for UNets: diffusers has none for {family}, whose attention takes little "
            "memory as it is; leave it out of --load"
        )
    if loading.quantise == "none":
        return
    if dtype != "bfloat16":
        raise UserError(f"quantise={loading.quantise} computes in bfloat16: give --dtype bfloat16")
    if loading.quantise == "nf4" and device.type != "cuda":
        raise UserError(f"quantise=nf4 needs a CUDA device, not {device}: use quantise=int8, or none")
    missing = lacking_package(loading)
    if missing:
        raise UserError(
            f"quantise={loading.quantise} needs the package {missing}: `pip install {missing}`, "
            "or leave it out of --load"
        )


def lacking_package(loading: LoadSettings) -> str | None:
    """The package that the settings need and that isn't installed."""
    from importlib.util import find_spec

    wanted = {"int8": "torchao", "nf4": "bitsandbytes"}.get(loading.quantise)
    return wanted if wanted is not None and find_spec(wanted) is None else None


def wrap(
    pipe: Any,
    *,
    entry: ModelEntry | None = None,
    device: str | torch.device = "cpu",
    folder: Path | None = None,
    loading: LoadSettings | None = None,
) -> Model:
    """A diffusers pipeline as a :class:`Model`: moved to ``device``, evaluated, frozen, silent.

    Methods that train parameters switch their gradients on, and off again. The pipeline's own
    modules are used, not copies; its VAE becomes float32. Of ``loading`` all is done here but quantising,
    which is done while weights are read.
    """
    import torch

    loading = loading or LoadSettings()
    kind = type(pipe).__name__
    if entry is None:
        if kind not in FAMILIES:
            raise UserError(f"a {kind} can't be used: Lethe runs {', '.join(FAMILIES)}")
        entry = ModelEntry(kind.lower(), FAMILIES[kind], source="memory")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            if loading.offload == "none":
                module.to(device=device)
            module.eval().requires_grad_(False)
    if hasattr(pipe, "unet") and loading.quantise == "none":
        # a fifth faster on a CPU, the same on a GPU in half precision or faster
        pipe.unet.to(memory_format=torch.channels_last)
    if pipe.vae.dtype != torch.float32:
        pipe.vae.to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = Model(entry, pipe, torch.device(device), torch.float32, folder, loading)
    model.dtype = next(p.dtype for p in model.denoiser.parameters() if p.is_floating_point())
    _settle(model, loading)
    return model


def _settle(model: Model, loading: LoadSettings) -> None:
    """What the settings ask of a loaded pipeline, by diffusers' own means."""
    denoiser: Any = model.denoiser
    if loading.attention_slicing:
        model.pipe.enable_attention_slicing()
    if loading.checkpointing:
        denoiser.enable_gradient_checkpointing()
    if loading.compile:
        from torch._dynamo import config

        # By default code compiled before a hook was put in doesn't see it: a method would do nothing.
        config.skip_nnmodule_hook_guards = False
        denoiser.compile()  # in place: the class, the names and the parameters stay
    # The sampler calls the components one by one, as the pipelines do; the VAE's decode has a hook as well.
    if loading.offload == "model":
        model.pipe.enable_model_cpu_offload(device=model.device)
    elif loading.offload == "sequential":
        model.pipe.enable_sequential_cpu_offload(device=model.device)


def _load_pipe(folder: Path, dtype: torch.dtype, quantise: str = "none") -> Any:
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
    pruned = (folder / "pruning.json").is_file()
    if quantise != "none":
        if pruned:
            raise UserError(f"{folder} is a pruned model, which can't be quantised: leave it out of --load")
        kwargs["quantization_config"] = _quantisation(quantise, folder, dtype)
    with _quiet():
        if pruned:
            from lethebench.pruning import load_pruned

            return load_pruned(folder, **kwargs)
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder, **kwargs)


def _quantisation(how: str, folder: Path, dtype: torch.dtype) -> Any:
    """The configuration for diffusers: torchao's int8 weights, or bitsandbytes' 4-bit NormalFloat (QLoRA)."""
    import diffusers
    import transformers

    mapping = {}
    for name in quantised(components(folder)):
        library: Any = diffusers if name in ("unet", "transformer") else transformers
        if how == "int8":
            from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

            mapping[name] = library.TorchAoConfig(Int8WeightOnlyConfig())
        else:
            mapping[name] = library.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def _tokenizers(pipe: Any) -> list[Any]:
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return [found for n in names if (found := getattr(pipe, n, None)) is not None]


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
