"""What FlowEdit and RF-Inversion share: an image is drawn for its prompt, then edited to a neutral one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import Batch, Conditioning, ImageKey, SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lethebench.zoo import Model

TRAINING_TIMES = 1000
"""The timestep that means pure noise (level 1) in flow matching, for SD3 and FLUX alike."""


@dataclass(frozen=True)
class Drawn:
    """B images of target prompts as they were drawn, and what editing them takes.

    ``latents`` ``[B, ...]`` are the final ones, as the denoiser takes them. ``times`` ``[steps + 1]`` is the
    editing schedule in the scheduler's timesteps, falling and ending at 0. ``source``, ``neutral`` and
    ``empty`` are the conditionings of the prompts that drew the images, of the neutral ones and of "".
    """

    batch: Batch
    keys: tuple[ImageKey, ...]
    latents: Tensor
    times: Tensor
    source: Conditioning
    neutral: Conditioning
    empty: Conditioning

    @property
    def steps(self) -> int:
        """The steps of the editing schedule."""
        return len(self.times) - 1

    @property
    def levels(self) -> list[float]:
        """The noise level s of x_t = (1 - s) x_0 + s e at each of ``times``."""
        return [float(time) / TRAINING_TIMES for time in self.times]

    def velocity(self, latents: Tensor, index: int, conditioning: Conditioning, guidance: float) -> Tensor:
        """dx/ds that the denoiser predicts at ``times[index]``, ``[B, ...]``.

        ``guidance`` is the scale of classifier-free guidance where the conditioning has a negative (SD3), and
        the model's own input where it was distilled into one (FLUX.1-dev); FLUX.1-schnell has neither.
        """
        import torch

        if "guidance" in conditioning.extra:
            scale = torch.full_like(conditioning.extra["guidance"], guidance)
            conditioning = replace(conditioning, extra={**conditioning.extra, "guidance": scale})
        _, without, asked = self.batch.predict(latents, self.times[index], conditioning)
        return asked if without is None else without + guidance * (asked - without)

    def noise(self, generators: list[torch.Generator]) -> Tensor:
        """Unit normal noise like ``latents``: each image's next draw of its own generator."""
        import torch

        shape = self.latents.shape[1:]
        drawn = torch.stack([torch.randn(shape, generator=own) for own in generators])
        return drawn.to(self.latents.device)


def counted(share: float, steps: int) -> int:
    """The steps that a share of them stands for: the nearest whole number, a half upwards.

    >>> counted(24 / 28, 28), counted(24 / 28, 4), counted(0.5, 5)
    (24, 3, 3)
    """
    return int(share * steps + 0.5)


@dataclass(frozen=True)
class EditHooks(SamplerHooks):
    """Edits the finished latents of target prompts; an image of any other prompt keeps its own, bit for bit.

    ``neutral`` is the neutral text by the target's; the text asked for decides, not what hooks made of it.
    """

    neutral: Mapping[str, str]
    steps: int | None
    edit: Callable[[Drawn], Tensor]

    def finish(self, latents: Tensor, batch: Batch) -> Tensor:
        """The latents with the targets' edited."""
        rows = [row for row, key in enumerate(batch.keys) if key.prompt.text in self.neutral]
        if not rows:
            return latents
        edited = latents.clone()
        edited[rows] = self.edit(self._drawn(latents, batch, rows))
        return edited

    def _drawn(self, latents: Tensor, batch: Batch, rows: list[int]) -> Drawn:
        from lethebench.sampler import encode_prompts

        model, keys = batch.model, tuple(batch.keys[row] for row in rows)
        neutral = encode_prompts(model, [self.neutral[k.prompt.text] for k in keys], batch.settings)
        empty = replace(encode_prompts(model, [""] * len(keys), batch.settings), negative=None)
        neutral = replace(neutral, negative=empty if model.family == "sd3" else None)
        pooled = batch.conditioning.pooled
        source = replace(
            neutral,
            embeds=batch.conditioning.embeds[rows],
            pooled=None if pooled is None else pooled[rows],
        )
        return Drawn(batch, keys, latents[rows], _times(batch, self.steps), source, neutral, empty)


def _times(batch: Batch, steps: int | None) -> Tensor:
    """The model's own schedule of so many steps (None: the sampler's), with the end, 0, appended."""
    import torch

    from lethebench.sampler import Chain

    times = batch.timesteps
    if steps is not None:
        settings = batch.settings.model_copy(update={"num_inference_steps": steps})
        times = Chain(batch.model, batch.conditioning, settings).timesteps
    return torch.cat([times, times.new_zeros(1)])


@dataclass(frozen=True)
class Editing(Method):
    """Base of the methods that edit: which prompts are edited, and towards what."""

    targets: str = setting("all", "what is edited: triggers (memorized prompts), concepts or all (ours)")
    count: int = setting(0, "clusters of targets (items, concepts) that are edited, 0 for all (ours)")
    prompt: str = setting(
        "",
        "a neutral prompt for every target (ours); empty: each target's own, a memorized caption's first "
        "paraphrase or the text with the anchor concept in the name's place",
    )
    steps: int | None = setting(
        None,
        "steps of the editing schedule; none: as many as the image was drawn with (ours; papers: 28 on FLUX, "
        "50 on SD3), since a model's own number is what it was made for: 4 on FLUX.1-schnell",
        applied=True,
    )

    family = Family.SAMPLING
    knowledge = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES})
    model_families: ClassVar = frozenset({"sd3", "flux"})
    unsupported_reason = "it edits with the velocity of a flow-matching model, and this model predicts noise"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        from lethebench.unlearning.targets import require_targets

        require_targets(self.targets, self.count)
        if self.prompt and not self.prompt.strip():
            raise ValueError(
                "prompt is blank: give a neutral prompt, or leave it empty for each target's own"
            )
        if self.steps is not None and not 1 <= self.steps <= TRAINING_TIMES:
            raise ValueError(f"steps is between 1 and {TRAINING_TIMES}, not {self.steps}")

    @property
    def sees(self) -> frozenset[Knowledge]:
        """The prompts of what is edited."""
        seen = {"triggers": {Knowledge.MEMORIZED_PROMPTS}, "concepts": {Knowledge.CONCEPT_NAMES}}
        return frozenset(seen.get(self.targets, self.knowledge))

    def fit(self, task: Task) -> Artefact:
        """Look up each target's neutral prompt. Raises UserError where one has none."""
        from lethebench.unlearning import find_targets, require_anchors

        targets = find_targets(task, self.targets, self.count)
        if not self.prompt:
            require_anchors(targets)
        return Artefact(
            facts={
                "targets": len(targets),
                "clusters": len({t.cluster for t in targets}),
                "neutral": {t.text: self.prompt or t.anchors[0] for t in targets},
            }
        )

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Edit the images of the targets; the model is left alone."""
        yield EditHooks(artefact.facts["neutral"], self.steps, self.edit)

    @abstractmethod
    def edit(self, drawn: Drawn) -> Tensor:
        """The edited latents of the drawn images, ``[B, ...]``."""
