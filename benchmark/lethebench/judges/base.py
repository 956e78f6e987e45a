"""What the built-in judges share: their files, the check of images, and batched inference."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lethebench.errors import UserError
from lethebench.judges.nets import SIDE
from lethebench.store import file_sha256

Images = NDArray[np.uint8]
"""uint8 ``[n, 64, 64, 3]``."""
Floats = NDArray[np.float32]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SUMS = "weights.json"


class Judge(ABC):
    """A judge: a network, its configuration, and the device that it runs on.

    A folder holds ``config.json``, ``model.safetensors`` (float16) and ``weights.json`` (the sha256
    of each). It runs in float32, in evaluation mode, without gradients.
    """

    name: ClassVar[str]
    """The name in scores and of the folder: never that of the published model it stands in for."""

    def __init__(self, net: nn.Module, config: Mapping[str, Any], device: str = "cpu") -> None:
        self.net = net
        self.config = config
        self.device = device

    @classmethod
    @abstractmethod
    def build(cls, config: Mapping[str, Any]) -> nn.Module:
        """The network of a configuration, with random weights."""

    @classmethod
    def load(cls, folder: str | Path | None = None, device: str = "cpu") -> Self:
        """The judge in ``folder``, by default the one that the package ships.

        Raises :class:`UserError` naming the file where one is missing or damaged.
        """
        config, tensors = read_folder(
            cls.name, Path(folder) if folder is not None else shipped_folder(cls.name)
        )
        net = cls.build(config).float()
        net.load_state_dict({name: value.float() for name, value in tensors.items()})
        return cls(net.to(device).eval().requires_grad_(False), config, device)

    def _over(
        self, images: Images, batch_size: int, empty: tuple[int, ...], run: Callable[[Tensor], Tensor]
    ) -> Floats:
        """``run`` over batches of the images, stacked; ``empty`` is the shape of one value."""
        check_images(self.name, images)
        parts = [np.zeros((0, *empty), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = to_input(images[start : start + batch_size], self.device)
                parts.append(run(batch).float().cpu().numpy())
        return np.concatenate(parts)


def shipped_folder(name: str) -> Path:
    """The folder of a judge that the package ships."""
    return Path(__file__).resolve().parent.parent / "weights" / name


def check_images(judge: str, images: Any) -> None:
    """Raise one clear ValueError unless ``images`` is uint8 ``[n, 64, 64, 3]``."""
    shape = tuple(getattr(images, "shape", ()))
    dtype = getattr(images, "dtype", type(images).__name__)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or shape[1:] != (SIDE, SIDE, 3):
        wanted = f"uint8 [n, {SIDE}, {SIDE}, 3]"
        raise ValueError(f"{judge}: images must be a numpy array, {wanted}; got {dtype} {list(shape)}")


def to_input(images: Images, device: str = "cpu") -> Tensor:
    """uint8 ``[n, h, w, 3]`` to float32 ``[n, 3, h, w]`` in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def write_folder(folder: Path, net: nn.Module, config: Mapping[str, Any]) -> None:
    """Write a judge: weights in float16, configuration, and the sums of both."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().cpu().half().contiguous() for name, value in net.state_dict().items()}
    save_file(halves, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    sums = {name: file_sha256(folder / name) for name in (WEIGHTS, CONFIG)}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def read_folder(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a judge, after checking the sums of its files."""
    sums_path = folder / SUMS
    if not sums_path.is_file():
        raise UserError(f"{name}: no such judge: {sums_path} is missing; `make models` trains it")
    try:
        sums = json.loads(sums_path.read_text(encoding="utf-8"))
        expected = {file: str(sums[file]) for file in (CONFIG, WEIGHTS)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name}: {sums_path} is damaged; restore it, or train again by `make models`"
        ) from error
    for file, wanted in expected.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{name}: {path} is missing; restore it, or train again by `make models`")
        if file_sha256(path) != wanted:
            raise UserError(f"{name}: {path} is damaged (its sha256 is not the one in {SUMS}); restore it")
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config, load_file(folder / WEIGHTS)
