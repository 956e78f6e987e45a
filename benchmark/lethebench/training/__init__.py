"""Training of the built-in models: ``make models`` is :func:`train_all`.

Every part resumes from its checkpoints after a kill, and finds itself done when it is.
Nothing heavy is imported until a part runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.errors import UserError
from lethebench.judges import JUDGES

if TYPE_CHECKING:
    import torch

    from lethebench.datasets.planted import PlantedWorld
    from lethebench.training.autoencoder import AutoencoderRecipe
    from lethebench.training.diffusion import DiffusionRecipe
    from lethebench.training.flux import FluxRecipe

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
"""Where the weights lie that the package ships."""


@dataclass(frozen=True)
class Job:
    """What the parts of a training share.

    ``folder`` holds checkpoints and caches, ``output`` gets the finished weights, ``sheets`` the
    contact sheets; ``scale`` multiplies every number of steps; ``judges`` are the judges to train
    (empty: all); a recipe that is None is the shipped model's.
    """

    folder: Path
    output: Path
    device: str = "cpu"
    scale: float = 1.0
    sheets: Path = Path("sheets")
    judges: tuple[str, ...] = ()
    world: PlantedWorld | None = field(default=None, compare=False)
    autoencoder: AutoencoderRecipe | None = None
    diffusion: DiffusionRecipe | None = None
    flux: FluxRecipe | None = None

    @property
    def cache(self) -> Path:
        """Rendered pictures."""
        return self.folder / "cache"

    @property
    def model_folder(self) -> Path:
        """Checkpoints, records and float32 weights of mini-sd, and the autoencoder of both models."""
        return self.folder / "mini-sd"

    @property
    def flux_folder(self) -> Path:
        """Checkpoints, records and float32 weights of mini-flux."""
        return self.folder / "mini-flux"

    @property
    def vae(self) -> Path:
        """The autoencoder trained in this folder; the shipped one where there is none."""
        own = self.model_folder / "vae"
        return own if own.exists() else SHIPPED / "mini-sd" / "vae"

    def planted(self) -> PlantedWorld:
        """The world that is trained on."""
        from lethebench.datasets.planted import PlantedWorld

        return self.world or PlantedWorld()

    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        import torch

        return torch.device(self.device)


def _autoencoder(job: Job) -> None:
    from lethebench.training.autoencoder import AutoencoderRecipe, train_autoencoder

    recipe = (job.autoencoder or AutoencoderRecipe()).scaled(job.scale)
    train_autoencoder(job.planted(), recipe, job.model_folder, job.cache, job.torch_device())


def _diffusion(job: Job) -> None:
    from lethebench.training.diffusion import DiffusionRecipe, train_diffusion
    from lethebench.training.export import export

    recipe = (job.diffusion or DiffusionRecipe()).scaled(job.scale)
    train_diffusion(job.planted(), recipe, job.model_folder, job.cache, job.torch_device())
    export(job.model_folder / "pipeline", job.output / "mini-sd", recipe)


def _flux(job: Job) -> None:
    from lethebench.training.export import export
    from lethebench.training.flux import FluxRecipe, train_flux

    recipe = (job.flux or FluxRecipe()).scaled(job.scale)
    train_flux(job.planted(), recipe, job.flux_folder, job.vae, job.cache, job.torch_device())
    export(job.flux_folder / "pipeline", job.output / "mini-flux", recipe)


def _judges(job: Job) -> None:
    from lethebench.training.judges import train_judges

    train_judges(
        job.judges or JUDGES,
        folder=job.folder / "judges",
        device=job.device,
        scale=job.scale,
        output=job.output,
        world=job.planted(),
    )


def _card(job: Job) -> None:
    from lethebench.training.card import write_card

    write_card(job, "mini-sd")


def _flux_card(job: Job) -> None:
    from lethebench.training.card import write_card

    write_card(job, "mini-flux")


PARTS: dict[str, Callable[[Job], None]] = {
    "autoencoder": _autoencoder,
    "diffusion": _diffusion,
    "flux": _flux,
    "judges": _judges,
    "card": _card,
    "flux-card": _flux_card,
}
"""The parts of a training, in the order in which they need each other."""


def train_all(
    names: Sequence[str] | None = None,
    folder: str | Path = "training",
    device: str = "cpu",
    scale: float = 1.0,
    threads: int = 0,
    *,
    out: str | Path | None = None,
    sheets: str | Path | None = None,
    **recipes: Any,
) -> None:
    """Train the named parts, resuming what ``folder`` holds.

    Names are those of :data:`PARTS`, "mini-sd" (autoencoder and diffusion), "mini-flux" (flux, on the
    folder's autoencoder of mini-sd, or on the shipped one), or a judge's; all by default. ``threads`` 0
    leaves torch's choice. ``out`` gets the weights, by default the package's own folder for a full training
    and ``folder / "weights"`` for a shortened one; ``sheets`` the contact sheets, by default
    ``folder / "sheets"``. ``recipes`` are the further fields of :class:`Job`.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    folder = Path(folder)
    output = Path(out) if out is not None else SHIPPED if scale == 1.0 else folder / "weights"
    single = tuple(name for name in names or () if name in JUDGES)
    job = Job(folder, output, device, scale, Path(sheets or folder / "sheets"), judges=single, **recipes)
    for name in parts(names):
        PARTS[name](job)


def parts(names: Sequence[str] | None) -> list[str]:
    """The parts of those names, in training order; UserError for an unknown one."""
    models = {"mini-sd": ("autoencoder", "diffusion"), "mini-flux": ("flux",)}
    aliases = models | dict.fromkeys(JUDGES, ("judges",))
    chosen = {part for name in names or PARTS for part in aliases.get(name, (name,))}
    for name in sorted(chosen - PARTS.keys()):
        known = [*aliases, *PARTS]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"unknown part of the training {name!r}; {hint}")
    return [name for name in PARTS if name in chosen]


__all__ = ["PARTS", "SHIPPED", "Job", "parts", "train_all"]
