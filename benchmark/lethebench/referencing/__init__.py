"""References of a prompt set: images in a folder, or indexes that hold their descriptors only.

A prompt set that reads its references from disk keeps what :func:`open_references` gives and passes on::

    found = find_references("my-set")          # <data folder>/my-set/references, or None
    found = open_references("my/references")   # a folder of images or of indexes, or one index file
    reference_id in found                      # which references there are: a prompt names only these
    found.reference(reference_id)              # the image; UserError of an index
    found.described(reference_id)              # None of an image; else the vectors that are kept of it
    found.manifest()                           # for the set's manifest, under the key "references"

The set's own methods ``reference`` and ``described`` do the same. Metrics that compare descriptors ask
``described`` first; all others need the image, and don't apply where there is none
(:func:`unusable_references`). ``manifest`` holds the SHA-256 of what is there, so that scores depend on the
index file's hash alone: no link is ever followed.

The id of an image in a folder is its path below the folder without suffix (:func:`reference_id`).
"""

from __future__ import annotations

from ._folder import ImageFolder, find_references, open_references, reference_id
from ._index import Indexes, ReferenceIndex, load_index, save_index
from ._read import UnreadableImage, read_image
from ._use import Described, Descriptor, References, described, unusable_references

__all__ = [
    "Described",
    "Descriptor",
    "ImageFolder",
    "Indexes",
    "ReferenceIndex",
    "References",
    "UnreadableImage",
    "described",
    "find_references",
    "load_index",
    "open_references",
    "read_image",
    "reference_id",
    "save_index",
    "unusable_references",
]
