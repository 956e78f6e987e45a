"""The one sampler: a single denoising loop for Stable Diffusion 1.x/2.x, XL, 3 and FLUX.

- :func:`sample` draws images and calls the hooks of ``lethebench.hooks``;
- :class:`Chain` gives the same chain as pure, differentiable steps, for methods that learn through it;
- :func:`prepare` gives a batch before its first step, to ask the denoiser about it;
- :func:`unconditional` is the empty prompt for a hook that needs it where the model samples without;
- :func:`initial_latents` and :func:`encode_prompts` are the two inputs of either.

Under classifier-free guidance the denoiser sees one batch of 2B, the unconditional half first: what a
module hook or an attention processor must know.

With the same initial latents the loop equals the diffusers pipeline's own output
(``output_type="latent"``): see ``tests/sampler``.
"""

from __future__ import annotations

from lethebench.sampler._chain import Chain
from lethebench.sampler._families import (
    encode_prompts,
    image_size,
    pack_latents,
    rows_of,
    unpack_latents,
)
from lethebench.sampler._loop import (
    Samples,
    initial_latents,
    prepare,
    sample,
    unconditional,
)
from lethebench.sampler._pixels import decode, to_latents, to_pixels

__all__ = [
    "Chain",
    "Samples",
    "decode",
    "encode_prompts",
    "image_size",
    "initial_latents",
    "pack_latents",
    "prepare",
    "rows_of",
    "sample",
    "to_latents",
    "to_pixels",
    "unconditional",
    "unpack_latents",
]
