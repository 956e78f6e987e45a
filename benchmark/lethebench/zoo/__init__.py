"""The model zoo: how a model under test is named, found, checked and loaded.

A model is named by a registered name (``mini-sd``), by a local folder in diffusers' layout (one that
holds ``model_index.json``), or by the id of a repository in the local Hugging Face cache (one that a
registered model comes from means that model). Nothing is ever downloaded here. Importing this package
imports neither torch nor diffusers.
"""

from __future__ import annotations

from lethebench.zoo._files import check_model, family_of, find_model, model_folder, weights_sha256
from lethebench.zoo._load import load_model, require_loadable, wrap
from lethebench.zoo._model import FAMILIES, Model, ModelEntry
from lethebench.zoo._settings import LoadSettings

__all__ = [
    "FAMILIES",
    "LoadSettings",
    "Model",
    "ModelEntry",
    "check_model",
    "family_of",
    "find_model",
    "load_model",
    "model_folder",
    "require_loadable",
    "weights_sha256",
    "wrap",
]
