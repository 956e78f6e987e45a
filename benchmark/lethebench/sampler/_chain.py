"""The denoising chain as pure, differentiable steps, for methods that learn through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lethebench.hooks import Conditioning, ImageKey, Prediction
from lethebench.sampler._families import adapter_for
from lethebench.sampler._loop import _noise, _scaled, guided_prediction
from lethebench.sampler._schedulers import at_step, prepared_scheduler, require_one_step

if TYPE_CHECKING:
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


class Chain:
    """The chain from initial to final latents of B images, one call a step.

    ``step(index, latents)`` depends on nothing but its arguments, the conditioning and the denoiser,
    so it can be recomputed in any order (backpropagation in constant memory). Gradients flow to the
    latents, the conditioning, and whatever in the denoiser has them switched on (parameters, masks
    put in by module hooks); the caller decides with ``torch.no_grad`` whether they are recorded.

    The sampler's own hooks play no part here. Latents are float32 ``[B, ...]`` as the denoiser takes
    them (packed for FLUX), on the model's device. Schedulers: DDIM (eta 0), Euler, flow-matching
    Euler; UserError for any that remembers earlier steps.
    """

    def __init__(
        self,
        model: Model,
        conditioning: Conditioning,
        settings: SamplerSettings,
        keys: Sequence[ImageKey] = (),
    ) -> None:
        self.model, self.conditioning, self.settings, self.keys = model, conditioning, settings, tuple(keys)
        self._adapter = adapter_for(model, settings)
        self._scheduler = prepared_scheduler(self._adapter)
        require_one_step(self._scheduler)
        self._timesteps: Tensor = self._scheduler.timesteps.to(model.device)

    @property
    def steps(self) -> int:
        """The number of denoising steps."""
        return len(self._timesteps)

    @property
    def timesteps(self) -> Tensor:
        """The timestep of each step, ``[steps]``, falling."""
        return self._timesteps

    def initial(self, noise: Tensor | None = None) -> Tensor:
        """The input of step 0: unit normal ``noise`` (by default the keys') as the scheduler scales it."""
        if noise is None:
            noise = _noise(self._adapter, self.keys)
        return noise.to(self.model.device) * getattr(self._scheduler, "init_noise_sigma", 1.0)

    def predict(self, index: int, latents: Tensor) -> Prediction:
        """(combined, unconditional or None, conditional) prediction at a step, each like ``latents``."""
        scheduler = at_step(self._scheduler, self._checked(index))
        scaled = _scaled(scheduler, latents, scheduler.timesteps[index])
        return guided_prediction(self._adapter, scaled, self._timesteps[index], self.conditioning)

    def advance(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """The latents after step ``index``, given the (guided) prediction at ``latents``."""
        scheduler = at_step(self._scheduler, self._checked(index))
        time = scheduler.timesteps[index]
        _scaled(scheduler, latents, time)  # Euler warns unless its input was scaled first
        found: Tensor = scheduler.step(prediction, time, latents, return_dict=False)[0]
        return found

    def step(self, index: int, latents: Tensor) -> Tensor:
        """The latents after step ``index`` (0 is the noisiest) from those before it."""
        return self.advance(index, latents, self.predict(index, latents).combined)

    def run(self, latents: Tensor) -> Tensor:
        """The final latents from the input of step 0."""
        for index in range(self.steps):
            latents = self.step(index, latents)
        return latents

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.steps:
            raise IndexError(f"step {index} of a chain of {self.steps}")
        return index
