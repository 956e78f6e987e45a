"""A permanent edit as a model of its own: a folder that Lethe and diffusers load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lethebench.composition import Recipe
from lethebench.errors import UserError
from lethebench.method import Artefact

if TYPE_CHECKING:
    from torch import Tensor

    from lethebench.zoo import Model


def export(model: Model, recipe: Recipe, artefacts: Sequence[Artefact], folder: Path | str) -> Path:
    """Save the model with the recipe applied; the model in memory stays as it is.

    What masks turned off is physically removed: such a folder is loaded by ``lethe bench --model FOLDER`` and
    :func:`lethebench.pruning.load_pruned`; any other by diffusers as well. Raises UserError where a part acts
    while sampling, and where ``folder`` isn't empty.
    """
    from lethebench.hooks import SamplerHooks
    from lethebench.pruning import save_pruned, shrink, unpack

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder")
    masks: dict[str, Tensor] = {}
    for artefact in artefacts:
        for name, kept in unpack(artefact.tensors).items():
            masks[name] = masks[name] & kept if name in masks else kept
    with recipe.apply(model, artefacts) as hooks:
        if any(type(hook) is not SamplerHooks for hook in hooks):
            raise UserError(
                f"{recipe.name}/{recipe.setting} acts while sampling: there are no weights to export"
            )
        record = {"model": model.name, "method": recipe.name, "setting": recipe.setting}
        if masks:
            save_pruned(shrink(model.pipe, masks), folder, record)
        else:
            model.pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "lethe.json").write_text(json.dumps(model.entry.sampler.model_dump(), indent=1))
    (folder / "mitigation.json").write_text(json.dumps({**record, "config": recipe.config()}, indent=1))
    return folder


def export_fitted(
    method: str, folder: Path, *, suite: str, model: str | None, strength: str, runs: Path
) -> Path:
    """Fit one setting of a method on a suite, unless the store holds the fit, and export it."""
    from lethebench.bench import one_row
    from lethebench.store import Store
    from lethebench.work import fit_part, loaded_model, read_artefact

    plan = one_row(method, suite, model, strength)
    store = Store(runs / "store")
    store.prepare()
    artefacts = [read_artefact(fit_part(plan, part, store)) for part in range(len(plan.recipe.parts))]
    loaded = loaded_model(plan.model, plan.runtime.device, plan.runtime.dtype)
    return export(loaded, plan.recipe, artefacts, folder)
