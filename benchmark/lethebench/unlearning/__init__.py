"""What methods that change the weights share.

- :class:`Target`, :func:`find_targets`: what is to be unlearnt, with anchors to put in its place;
- :func:`editable`, :func:`applied`: parameters that may be changed inside a context, the change as an
  artefact's tensors, and the change put on a model;
- :func:`parameter_group`: names of the parameters that the papers train;
- :func:`encode`, :func:`draw_latents`, :func:`noised`, :func:`prediction`, :func:`training_target`: the
  pieces of a denoising loss, for every family of models;
- ``tokens`` and ``closed_form``: prompts' token embeddings, and the ridge problem of UCE and MACE;
  ``finetune``: the gradient loop of CA, ESD and EAP;
- :class:`NeutralBatches`, :func:`working_model`, :func:`fitting_settings`, :func:`autocast`: fitting on
  neutral prompts.
"""

from lethebench.unlearning.diffusion import (
    draw_latents,
    encode,
    noised,
    prediction,
    random_timesteps,
    training_target,
)
from lethebench.unlearning.edits import EDIT, Editable, applied, editable
from lethebench.unlearning.groups import GROUPS, parameter_group
from lethebench.unlearning.neutral import (
    NeutralBatches,
    autocast,
    chosen_prompts,
    fitting_settings,
    working_model,
)
from lethebench.unlearning.targets import TARGETS, Target, find_targets, require_anchors

__all__ = [
    "EDIT",
    "GROUPS",
    "TARGETS",
    "Editable",
    "NeutralBatches",
    "Target",
    "applied",
    "autocast",
    "chosen_prompts",
    "draw_latents",
    "editable",
    "encode",
    "find_targets",
    "fitting_settings",
    "noised",
    "parameter_group",
    "prediction",
    "random_timesteps",
    "require_anchors",
    "training_target",
    "working_model",
]
