"""A permanent edit as a model of its own: a folder that Lethe and diffusers load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.composition import Recipe
from lethebench.errors import UserError
from lethebench.method import Artefact, Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lethebench.plan import Runtime
    from lethebench.zoo import Model


def export(model: Model, recipe: Recipe, artefacts: Sequence[Artefact], folder: Path | str) -> Path:
    """Save the model with the recipe applied; the model in memory stays as it is.

    What masks turned off is physically removed, unless a later part of the recipe gave it weights again: such
    a folder is loaded by ``lethe bench --model FOLDER`` and :func:`lethebench.pruning.load_pruned`; any other
    by diffusers as well. Raises UserError where a part acts on more than the weights, and where ``folder``
    isn't an empty or new one.
    """
    from lethebench.hooks import SamplerHooks
    from lethebench.pruning import save_pruned, shrink, unpack

    folder = Path(folder)
    require_exportable(recipe, folder)
    masks: dict[str, Tensor] = {}
    for artefact in artefacts:
        for name, kept in unpack(artefact.tensors).items():
            masks[name] = masks[name] & kept if name in masks else kept
    before = _hooks(model)
    with recipe.apply(model, artefacts) as hooks:
        if any(type(hook) is not SamplerHooks for hook in hooks) or _hooks(model) != before:
            raise UserError(
                f"{recipe.name}/{recipe.setting} acts while sampling: there are no weights to export"
            )
        record = {"model": model.name, "method": recipe.name, "setting": recipe.setting}
        if masks and _is_removed(model.denoiser, masks):
            save_pruned(shrink(model.pipe, masks), folder, record)
        else:
            model.pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "lethe.json").write_text(json.dumps(model.entry.sampler.model_dump(), indent=1))
    (folder / "mitigation.json").write_text(json.dumps({**record, "config": recipe.config()}, indent=1))
    return folder


def require_exportable(recipe: Recipe, folder: Path) -> None:
    """Raise UserError now for what :func:`export` would refuse after a long fit."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give a new one")
    for part in recipe.parts:
        if part.family == "sampling" or type(part).substitute is not Method.substitute:
            raise UserError(f"{part.name} doesn't change the weights: there is no model to export")


def export_fitted(
    method: str,
    folder: Path,
    *,
    suite: str,
    model: str | None,
    strength: str,
    overrides: Mapping[str, Any],
    runs: Path,
    runtime: Runtime,
    instance: str | None = None,
) -> Path:
    """Fit one setting of a method on a suite, unless the store holds the fit, and export it.

    Where the suite's prompt set has instances, each of which is fitted by itself, ``instance`` names one.
    """
    from lethebench.bench import one_row
    from lethebench.store import Store
    from lethebench.work import fit_all, loaded_model, set_threads

    plan = one_row(method, suite, model, strength, overrides, runtime)
    require_exportable(plan.recipe, folder)
    if (instance or "") not in plan.instances:
        if plan.instances == ("",):
            raise UserError(f"suite {plan.suite.key} has no instances: leave --instance out")
        raise UserError(
            f"suite {plan.suite.key} fine-tunes a model for each instance: name one by --instance "
            f"({', '.join(plan.instances)})"
        )
    set_threads(runtime.threads)
    store = Store(runs / "store")
    store.prepare()
    artefacts = fit_all(plan, store, instance or "")
    loaded = loaded_model(plan.model, plan.runtime)
    return export(loaded, plan.recipe, artefacts, folder)


def _hooks(model: Model) -> int:
    """How many module hooks are on the model."""
    modules = [m for part in (model.denoiser, model.vae, *model.text_encoders) for m in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def _is_removed(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether every weight that the masks take away is zero."""
    from lethebench.pruning.sites import find_sites
    from lethebench.pruning.zero import kept_entries

    for name, dims in kept_entries(denoiser, find_sites(denoiser), masks).items():
        parameter = denoiser.get_parameter(name)
        for dim, kept in dims.items():
            if bool(parameter.index_select(dim, (~kept).nonzero()[:, 0].to(parameter.device)).any()):
                return False
    return True
