"""Gradient projection: learning from images without learning one thing in them.

Our reading of the abstract of Kothandaraman and Pytlarz 2025 (arXiv:2512.11194), which "project[s] each
gradient update onto the orthogonal complement of the sensitive feature's embedding space"; no formula,
setting or code of theirs is known to us. :class:`EmbeddingProjection` is variant A (the space of a layer's
inputs), :class:`GradientProjection` variant B (the space of gradients).

What variant A guarantees with ``strength`` 1. A projected layer's update maps every direction of its subspace
to zero (float32: to about 1e-7 of the update's norm, whatever precision the training's arithmetic had, as the
LoRA's weights are float32), so its output on any input in the subspace is the base model's.

- Layers that the text encoders feed (``attn2.to_k``, ``attn2.to_v`` of UNets; ``context_embedder`` of SD3 and
  FLUX): the sensitive tokens' embeddings, as they stand in the sensitive prompts, are such inputs, at every
  timestep and for every image. The same words in another prompt have other embeddings, near the subspace and
  not in it.
- Layers that hidden states feed (SD3's and FLUX's ``add_*_proj``, FLUX's single blocks, image-fed layers):
  the inputs collected from the base model at some timesteps and images are such inputs, up to the energy left
  out. Before the first block text states depend on prompt and timestep alone; later ones on the image too,
  and on what earlier layers learnt.
- Layers that are not projected: nothing.

In bfloat16 an input is rounded (by up to 2^-9 of each entry), hence no longer quite in the subspace, and
autocast rounds A too: outputs then differ by that share of the update, not of the model.

Adam scales a gradient's entries one by one, which takes a projected gradient out of the complement again: the
weights must be projected, too, and the start of A must lie in the complement. The share of the update inside
the subspace, in the toy of ``tests/finetuning/test_projection.py`` (AdamW, inputs whose scales span a factor
of 100): .20 without projection, .48 with projected gradients, .43 with a projected start besides, 6e-9 with
projected steps. ``gradients_only`` is the naive form, as a control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.finetuning.hooks import Captioned, LoraModule, TrainingHooks
from lethebench.finetuning.lora import lora_pairs
from lethebench.finetuning.settings import ENERGY, require_strength, require_subspace
from lethebench.finetuning.subspace import subspace
from lethebench.finetuning.trainer import check_images

if TYPE_CHECKING:
    from lethebench.finetuning.trainer import Training


def project(rows: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """``rows P`` with P = I - strength U U^T, of rows ``[n, width]`` and a basis U ``[width, k]``.

    Computed in the basis' type, returned in the rows'.
    """
    exact = rows.to(basis.dtype)
    return (exact - strength * (exact @ basis) @ basis.T).to(rows.dtype)


class EmbeddingProjection(TrainingHooks):
    """Variant A: each projected layer's A moves in the orthogonal complement of the layer's subspace.

    ``subspaces`` holds a basis ``[in, k]`` by layer (``concept_subspaces``). The start of A, its gradients
    and each step's change of it (weight decay included) are multiplied by P = I - ``strength`` U U^T; with
    strength 1 the update B A maps the subspace to zero. With ``gradients_only`` only the gradients are.
    """

    def __init__(
        self, subspaces: Mapping[str, Tensor], strength: float = 1.0, *, gradients_only: bool = False
    ) -> None:
        require_strength(strength)
        self.subspaces, self.strength, self.gradients_only = dict(subspaces), strength, gradients_only
        self._bases: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def started(self, training: Training) -> None:
        """Project the start of A. Raises UserError where one fits no layer, or an encoder is trained."""
        lora = training.lora
        if any(not name.startswith("denoiser.") for name in lora):
            raise UserError("gradient projection needs frozen text encoders: switch text_encoder off")
        moved: dict[int, Tensor] = {}  # many layers share one basis
        for name, basis in self.subspaces.items():
            if name not in lora or lora[name].A.shape[1] != len(basis):
                raise UserError(f"the subspace of '{name}' fits no adapted layer of that name and width")
            weight = lora[name].A
            if id(basis) not in moved:
                moved[id(basis)] = basis.to(weight.device, torch.float64)
            self._bases[name] = moved[id(basis)]
            if not self.gradients_only:
                weight.data = project(weight.data, self._bases[name], self.strength)

    def gradients(self, lora: Mapping[str, LoraModule], step: int) -> None:
        """Project A's gradients; remember where A stood inside the subspace."""
        for name, basis in self._bases.items():
            weight = lora[name].A
            if weight.grad is not None:
                weight.grad.copy_(project(weight.grad, basis, self.strength))
            if not self.gradients_only:
                # at strength 1 A has no part inside but rounding, which must not add up over the steps
                share = 0.0 if self.strength == 1 else 1.0
                self._before[name] = share * (weight.double() @ basis)

    def stepped(self, lora: Mapping[str, LoraModule], step: int) -> None:
        """Take ``strength`` of what the step changed inside the subspace back."""
        for name, before in self._before.items():
            weight, basis = lora[name].A, self._bases[name]
            exact = weight.double()
            weight.copy_(exact - self.strength * (exact @ basis - before) @ basis.T)

    def finished(self, lora: Mapping[str, LoraModule]) -> dict[str, Any]:
        """``projection``: how many layers, the smallest and largest k and input width, the largest leak."""
        sizes = [tuple(basis.shape) for basis in self.subspaces.values()]
        pairs = {name: (lora[name].A.detach(), lora[name].B.detach()) for name in self.subspaces}
        return {
            "projection": {
                "layers": len(sizes),
                "dimension": [min(k for _, k in sizes), max(k for _, k in sizes)] if sizes else [],
                "width": [min(w for w, _ in sizes), max(w for w, _ in sizes)] if sizes else [],
                "leak": max((_leak(*pairs[n], basis) for n, basis in self.subspaces.items()), default=0.0),
            }
        }


class GradientProjection(TrainingHooks):
    """Variant B: the gradient of all layers together loses its part along sensitive gradients.

    Every ``every`` steps the loss gradients of ``count`` draws (image, prompt, noise, timestep) of the
    sensitive ``pairs``, the next ones at each refresh, flattened over all layers, give a basis Q
    ``[parameters, k]``; then g becomes (I - ``strength`` Q Q^T) g. With ``updates`` the optimiser's whole
    step is projected in the same way (ours: Adam's scaling undoes much of a projected gradient). Costs
    ``count`` backward passes a refresh and k + 1 copies of the LoRA. First-order: the sensitive loss doesn't
    fall along Q near where Q was taken, no more.
    """

    def __init__(
        self,
        pairs: Sequence[Captioned],
        strength: float = 1.0,
        *,
        count: int = 8,
        every: int = 25,
        dimension: int | None = None,
        energy: float = ENERGY,
        updates: bool = True,
    ) -> None:
        require_strength(strength)
        require_subspace(dimension, energy)
        if not pairs:
            raise UserError("gradient projection B needs sensitive images with captions: there is none")
        if count < 1 or every < 1:
            raise UserError(f"count and every must be at least 1, not {count} and {every}")
        self.pairs, self.strength, self.count, self.every = list(pairs), strength, count, every
        self.dimension, self.energy, self.updates = dimension, energy, updates
        self._basis: Tensor | None = None
        self._refreshed = -1
        self._before: Tensor | None = None

    def started(self, training: Training) -> None:
        """Encode the sensitive pairs."""
        check_images(training.model, self.pairs, training.sampler)
        self._training, self._latents = training, training.latents(self.pairs)
        training.remember([pair.caption for pair in self.pairs])

    def gradients(self, lora: Mapping[str, LoraModule], step: int) -> None:
        """Refresh the basis where it is time, and project the gradients."""
        basis, parameters = self._fresh(lora, step), _parameters(lora)
        flat = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        _put(project(flat[None], basis, self.strength)[0], [p.grad for p in parameters], parameters)
        if self.updates:
            self._before = _flat([p.detach() for p in parameters])

    def stepped(self, lora: Mapping[str, LoraModule], step: int) -> None:
        """Project what the step changed."""
        if self._before is None or self._basis is None:
            return
        parameters = _parameters(lora)
        change = _flat([p.detach() for p in parameters]) - self._before
        found = self._before + project(change[None], self._basis, self.strength)[0]
        _put(found, [p.data for p in parameters], parameters)

    def _fresh(self, lora: Mapping[str, LoraModule], step: int) -> Tensor:
        """The basis ``[parameters, k]`` of the step's period, from the period's first step that counts."""
        if self._basis is None or step // self.every != self._refreshed:
            self._refreshed = step // self.every
            rows = torch.stack([self._sensitive(lora, step, number) for number in range(self.count)])
            self._basis = subspace(rows, self.dimension, self.energy).to(rows)
        return self._basis

    def place(self, step: int, number: int) -> int:
        """Which of the pairs a draw of the step's refresh takes: all of them by turns."""
        return (step // self.every * self.count + number) % len(self.pairs)

    @torch.enable_grad()
    def _sensitive(self, lora: Mapping[str, LoraModule], step: int, number: int) -> Tensor:
        """The gradient of one draw's loss, ``[parameters]``."""
        training, place = self._training, self.place(step, number)
        draws = training.draws("sensitive", step, number)
        latents, times, target = training.noisy(self._latents[place : place + 1], [draws])
        conditioning = training.conditioning([self.pairs[place].caption])
        predicted = training.predict(latents, times, conditioning)
        loss = training.losses(predicted, target, times).sum()
        return _flat(torch.autograd.grad(loss, _parameters(lora), materialize_grads=True))

    def finished(self, lora: Mapping[str, LoraModule]) -> dict[str, Any]:
        """``projection``: the last basis' dimension, and the length of a gradient."""
        size = (0, 0) if self._basis is None else tuple(self._basis.shape)
        return {"projection": {"dimension": size[1], "width": size[0]}}

    def state(self) -> dict[str, Tensor]:
        """The basis, and when it was taken."""
        if self._basis is None:
            return {}
        return {"basis": self._basis, "refreshed": torch.tensor(self._refreshed)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the basis back."""
        if "basis" in state:
            self._basis = state["basis"].to(self._training.model.device)
            self._refreshed = int(state["refreshed"])


def leakage(tensors: Mapping[str, Tensor], subspaces: Mapping[str, Tensor]) -> dict[str, float]:
    """By layer, the share of a trained update inside a subspace: |B A U| / |B A| (Frobenius), 0 to 1.

    ``tensors`` are a trained LoRA's. 0 for an update of zero.
    """
    pairs = lora_pairs(tensors)
    return {name: _leak(*pairs[name], basis) for name, basis in subspaces.items()}


def _leak(down: Tensor, up: Tensor, basis: Tensor) -> float:
    down, up = down.double(), up.double()
    whole = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()
    return float((up @ (down @ basis.to(down))).norm() / whole) if whole > 0 else 0.0


def _parameters(lora: Mapping[str, LoraModule]) -> list[Tensor]:
    return [parameter for module in lora.values() for parameter in (module.A, module.B)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _put(flat: Tensor, places: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
    """Write the parts of a flat tensor, sized as ``like``, to places (None: that part is left out)."""
    for part, place in zip(flat.split([t.numel() for t in like]), places, strict=True):
        if place is not None:
            place.copy_(part.view_as(place))
