"""Structured pruning: where a denoiser can be masked, and how masked parts are zeroed or removed.

- :func:`find_sites`: the maskable vectors of a denoiser (feed-forward neurons, normalisation
  outputs, hidden channels of residual blocks, attention heads);
- :func:`gated`: multiply them by gates while a context is open (soft or hard masks);
- :func:`zeroed`, :func:`zero_`: set the weights of the masked parts to zero; same output as hard masks;
- :func:`shrink`, :func:`save_pruned`, :func:`load_pruned`: a physically smaller pipeline; same output;
- :func:`pack`, :func:`unpack`, :func:`installed`, :func:`mask_facts`: masks as a method's artefact.

A mask maps the name of a site to a boolean vector: True keeps the element.
"""

from lethebench.pruning.artefact import KEEP, installed, mask_facts, pack, unpack
from lethebench.pruning.gates import gated
from lethebench.pruning.shrink import load_pruned, save_pruned, shrink
from lethebench.pruning.sites import KINDS, Masks, Site, check_masks, find_sites
from lethebench.pruning.zero import Counts, count, zero_, zeroed

__all__ = [
    "KEEP",
    "KINDS",
    "Counts",
    "Masks",
    "Site",
    "check_masks",
    "count",
    "find_sites",
    "gated",
    "installed",
    "load_pruned",
    "mask_facts",
    "pack",
    "save_pruned",
    "shrink",
    "unpack",
    "zero_",
    "zeroed",
]
