"""A physically smaller pipeline, and its folder on disk.

The folder has diffusers' layout, with safetensors and one file more, ``pruning.json``, which gives the kept
sizes of every changed module. ``DiffusionPipeline.from_pretrained`` alone refuses it (the shapes differ from
the configuration): load it with :func:`load_pruned`. No pickle, unlike EcoDiff's release.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.pruning.layers import Form, rebuild
from lethebench.pruning.sites import Masks, Site, check_masks, find_sites
from lethebench.pruning.zero import kept_entries, zero_entries_

RECORD = "pruning.json"


def denoiser_name(pipe: Any) -> str:
    """The component that denoises: ``unet`` or ``transformer``."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer to prune")


def shrink(pipe: Any, masks: Masks) -> Any:
    """A pipeline whose denoiser lacks the masked parts; it shares all else with ``pipe``.

    Its output equals that of the masked (or zeroed) model up to rounding. A layer whose elements are all off
    keeps one, with zero weights: it then gives its bias, as the zero mask does (EcoDiff puts the identity in
    its place, which is another model). ``pipe`` stays as it is.
    """
    name = denoiser_name(pipe)
    smaller = copy.copy(pipe)
    smaller.register_modules(**{name: shrink_denoiser(getattr(pipe, name), masks)})
    return smaller


def shrink_denoiser(denoiser: nn.Module, masks: Masks) -> nn.Module:
    """A smaller copy of the denoiser (see :func:`shrink`)."""
    if getattr(denoiser, "pruned_forms", None):
        raise UserError("the model is pruned already: prune the base model instead")
    sites = find_sites(denoiser)
    check_masks(sites, masks)
    masks = {name: mask.cpu() for name, mask in masks.items()}
    smaller = copy.deepcopy(denoiser)
    zero_entries_(smaller, kept_entries(denoiser, sites, masks))
    sites = [s for s in sites if s.name in masks]
    at_least_one = {name: _at_least_one(mask) for name, mask in masks.items()}
    kept = {n: dims for n, dims in kept_entries(denoiser, sites, at_least_one).items() if dims}
    state = {name: _slice(value, kept.get(name, {})) for name, value in smaller.state_dict().items()}
    forms = _forms(smaller, sites, at_least_one, kept)
    state.update(_indices(smaller, forms, kept))
    return _install(smaller, forms, state)


def _at_least_one(mask: Tensor) -> Tensor:
    if bool(mask.any()):
        return mask
    mask = mask.clone()
    mask[0] = True
    return mask


def _slice(value: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, entries in dims.items():
        value = value.index_select(dim, entries.nonzero()[:, 0].to(value.device))
    return value


def _forms(
    denoiser: nn.Module, sites: Sequence[Site], masks: Masks, kept: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, Form]:
    """The form of every module that changes, by name."""
    special = {module: (form, site) for site in sites for module, form in site.forms}
    forms: dict[str, Form] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in kept):
        module = denoiser.get_submodule(owner)
        weight = denoiser.get_parameter(f"{owner}.weight")
        dims = kept.get(f"{owner}.weight", {})
        sizes = [int(dims[d].sum()) if d in dims else int(n) for d, n in enumerate(weight.shape)]
        kind = special[owner][0] if owner in special else _plain(module)
        form: Form = {"type": kind, "out": sizes[0]}
        if len(sizes) > 1:
            form["in"] = sizes[1]
        if kind in ("scattered-linear", "selected-norm"):
            form["full"] = int(weight.shape[0])
        if isinstance(module, nn.GroupNorm):
            form["groups"] = module.num_groups * sizes[0] // module.num_channels
        forms[owner] = form
    for name, (kind, site) in special.items():
        heads = int(masks[site.name].sum())
        if kind == "attention" and heads < site.size:
            forms[name] = {"type": kind, "heads": heads}
    return forms


def _plain(module: nn.Module) -> str:
    for cls, kind in ((nn.Linear, "linear"), (nn.Conv2d, "conv"), (nn.GroupNorm, "group-norm")):
        if isinstance(module, cls):
            return kind
    raise TypeError(f"no way to make a {type(module).__name__} smaller")


def _indices(
    denoiser: nn.Module, forms: Mapping[str, Form], kept: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, Tensor]:
    """The ``index`` buffers of the layers that pick or place channels."""
    found = {}
    for name, form in forms.items():
        device = next(denoiser.get_submodule(name).parameters()).device
        entries: Tensor | None = None
        if form["type"] in ("scattered-linear", "selected-norm"):
            entries = kept[f"{name}.weight"][0]
        elif form["type"] == "selected-conv":
            # conv2 takes what norm2 leaves: places are counted among the channels of its live groups.
            entries = kept[f"{name}.weight"].get(1, torch.ones(form["in"], dtype=torch.bool))
            norm = kept.get(f"{name.rpartition('.')[0]}.norm2.weight", {})
            entries = entries[norm[0]] if 0 in norm else entries
        if entries is not None:
            found[f"{name}.index"] = entries.nonzero()[:, 0].to(device)
    return found


def _install(denoiser: nn.Module, forms: Mapping[str, Form], state: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild the modules of ``forms`` in the denoiser and give it the sliced weights."""
    flags = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    for name, form in forms.items():
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, rebuild(denoiser.get_submodule(name), form))
    denoiser.load_state_dict(state, strict=True, assign=True)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    denoiser.pruned_forms = dict(forms)  # type: ignore[assignment]
    return denoiser


def save_pruned(pipe: Any, folder: Path | str, record: Mapping[str, Any] | None = None) -> Path:
    """Save a pipeline that :func:`shrink` made; ``record`` (how it was made) goes into ``pruning.json``."""
    component = denoiser_name(pipe)
    forms = getattr(getattr(pipe, component), "pruned_forms", None)
    if forms is None:
        raise UserError("the pipeline isn't pruned: make it smaller with lethebench.pruning.shrink first")
    folder = Path(folder)
    pipe.save_pretrained(folder, safe_serialization=True)
    content = {"format": 1, "component": component, "modules": forms, "record": dict(record or {})}
    (folder / RECORD).write_text(json.dumps(content, indent=1, sort_keys=True))
    return folder


def load_pruned(folder: Path | str, torch_dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Load a pipeline that :func:`save_pruned` wrote. Raises UserError where the folder isn't one.

    ``options`` go to the pipeline's ``from_pretrained``; ``dtype`` may be one type, or types by component.
    """
    import diffusers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    folder = Path(folder)
    try:
        content = json.loads((folder / RECORD).read_text())
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no pruned model: {error}") from error
    component = content["component"]
    denoiser_class = getattr(diffusers, index[component][1])
    with init_empty_weights(include_buffers=False):
        denoiser = denoiser_class.from_config(denoiser_class.load_config(folder / component))
    _install(denoiser, content["modules"], _read_state(folder / component))
    dtype = options.pop("dtype", torch_dtype)
    own = dtype.get(component, dtype.get("default")) if isinstance(dtype, dict) else dtype
    if own is not None:
        nn.Module.to(denoiser, dtype=own)
    pipeline_class = getattr(diffusers, index["_class_name"])
    return pipeline_class.from_pretrained(folder, dtype=dtype, **{component: denoiser.eval(), **options})


def _read_state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state
