"""Foreground segmenters for FB-Mem, behind one interface, chosen by name in the metric's settings.

=================  ================================================  =================================
``segmenter``      ``segmenter_weights``                             foreground
=================  ================================================  =================================
segmenter-mini     none: the package ships it                        built-in, 64 x 64 pictures only
birefnet           BiRefNet exported to ONNX (the files of rembg's   BiRefNet (Zheng et al. 2024), what
                   releases, ``BiRefNet-general-epoch_244.onnx``)    the released code uses
sam                a checkpoint of ``segment-anything``              Kirillov et al. 2023, with a rule
                   (``sam_vit_h_4b8939.pth``, ``_l_``, ``_b_``)      of ours (:func:`foreground_of_masks`)
given              masks by image, as :func:`write_masks` writes     whatever you gave
                   them; references' own masks come first
=================  ================================================  =================================

Nothing is downloaded. BiRefNet runs from its ONNX file by onnxruntime: its remote code on the hub doesn't
load under transformers 5, which asks every model for ``all_tied_weights_keys``, set by a ``post_init`` that
the remote code never calls. ``rembg`` reads the same file, but stretches each mask to the full range (an
empty scene gets a full-range mask), divides the picture by its own brightest pixel, and its alpha matting
fails at the released code's settings and falls back: so the file is run here directly.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import UserError

Images = NDArray[np.uint8]
"""uint8 ``[n, height, width, 3]``, RGB."""
Masks = NDArray[np.float32]
"""float32 ``[n, height, width]`` in 0 to 1: the probability that a pixel is foreground."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BIREFNET_SIDE = 1024
"""The side that BiRefNet reads, where its file doesn't fix another."""


class Segmenter(ABC):
    """Finds foregrounds. ``path`` is the file that ``segmenter_weights`` names, None for the built-in one."""

    name: ClassVar[str]
    wants: ClassVar[str] = ""
    """What ``segmenter_weights`` must name; empty: nothing."""
    package: ClassVar[str] = ""
    extra: ClassVar[str] = ""

    def __init__(self, path: Path | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device

    @abstractmethod
    def masks(self, images: Images) -> Masks:
        """The foreground of each image, independent of the others in the batch."""


class SegmenterMini(Segmenter):
    """The built-in judge, trained on the planted world's true coverage."""

    name: ClassVar[str] = "segmenter-mini"

    def masks(self, images: Images) -> Masks:
        """Raises UserError unless the images have 64 x 64 pixels."""
        from lethebench import judges
        from lethebench.judges.nets import SIDE

        if images.shape[1:3] != (SIDE, SIDE):
            raise UserError(
                f"segmenter-mini reads {SIDE} x {SIDE} images; got {images.shape[1]} x {images.shape[2]}:"
                f" set fbmem's segmenter to {', '.join(n for n in SEGMENTERS if n != self.name)},"
                f" or its resolution to {SIDE}"
            )
        return judges.load("segmenter-mini").masks(images)


class BiRefNet(Segmenter):
    """BiRefNet from an ONNX file.

    As in the authors' inference: the picture resized to 1024 x 1024 (bilinear), ImageNet's mean and standard
    deviation, the sigmoid of the last output, resized back. Back with bilinear weights too (ours; theirs is
    bicubic, which leaves 0 to 1). No minimum and maximum, no matting.
    """

    name: ClassVar[str] = "birefnet"
    wants: ClassVar[str] = "BiRefNet's ONNX file"
    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "birefnet"

    def __init__(self, path: Path | None = None, device: str = "cpu") -> None:
        super().__init__(path, device)
        import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]

        wanted = ["CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"]
        if wanted[0] not in onnxruntime.get_available_providers():
            raise UserError(f"birefnet: this onnxruntime can't run on {device}: install onnxruntime-gpu")
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=wanted)
        except Exception as error:  # onnxruntime's own errors have no common class
            raise UserError(f"birefnet: {path} is not a readable ONNX file: restore it") from error
        used = self.session.get_providers()[0]
        if used != wanted[0]:
            raise UserError(
                f"birefnet: onnxruntime offers {wanted[0]} but runs on {used}: mend its CUDA libraries, or"
                " install onnxruntime in place of onnxruntime-gpu"
            )
        inputs = self.session.get_inputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or len(shape) != 4:
            raise UserError(f"birefnet: {path} must have one input [1, 3, height, width]; got {shape}")
        self.input = inputs[0].name
        self.size = tuple(side if isinstance(side, int) else BIREFNET_SIDE for side in shape[2:])

    def masks(self, images: Images) -> Masks:
        """One picture at a time: the published file's batch is 1."""
        return _stack([self._mask(image) for image in images], images)

    def _mask(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        from PIL import Image
        from scipy.special import expit

        height, width = self.size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels = (np.asarray(resized) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        given = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)
        logits = np.asarray(self.session.run(None, {self.input: given})[-1], dtype=np.float32)
        if logits.ndim != 4 or logits.shape[:2] != (1, 1):
            raise UserError(
                f"birefnet: {self.path} must give logits [1, 1, height, width]; got {list(logits.shape)}"
            )
        if not np.isfinite(logits).all():
            raise UserError(f"birefnet: {self.path} gave logits that aren't numbers: use its float32 file")
        return resize_mask(expit(logits[0, 0]), image.shape[0], image.shape[1])


class SegmentAnything(Segmenter):
    """SAM's automatic masks, and :func:`foreground_of_masks`.

    ``SamAutomaticMaskGenerator`` with its defaults (a 32 x 32 grid of points). SAM segments everything and
    knows no foreground: the rule is ours.
    """

    name: ClassVar[str] = "sam"
    wants: ClassVar[str] = "a checkpoint of segment-anything"
    package: ClassVar[str] = "segment_anything"

    def __init__(self, path: Path | None = None, device: str = "cpu") -> None:
        super().__init__(path, device)
        import torch
        from segment_anything import SamAutomaticMaskGenerator

        from ._sam import sam_of

        try:
            state = torch.load(str(path), map_location="cpu", weights_only=True)
            model = sam_of(state)
        except Exception as error:  # unpickling and rebuilding fail in many ways; each means a wrong file
            raise UserError(f"sam: {path} is not a checkpoint of segment-anything: restore it") from error
        self.generator = SamAutomaticMaskGenerator(model.to(device).eval())

    def masks(self, images: Images) -> Masks:
        """0 or 1."""
        return _stack([self._mask(image) for image in images], images)

    def _mask(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = [one["segmentation"] for one in self.generator.generate(image)]
        return foreground_of_masks(found, image.shape[0], image.shape[1])


class Given(Segmenter):
    """Masks that were made elsewhere, by the SHA-256 of the image that they belong to.

    Of a picture that the file doesn't know, :meth:`masks` raises UserError: draw the images first
    (``lethe generate``), make their masks, write them by :func:`write_masks`, then score.
    """

    name: ClassVar[str] = "given"
    wants: ClassVar[str] = "a file of masks that lethebench.metrics.fbmem.segmenters.write_masks wrote"

    def __init__(self, path: Path | None = None, device: str = "cpu") -> None:
        super().__init__(path, device)
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            self.known: dict[str, NDArray[Any]] = load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"given: {path} is not a safetensors file of masks: write it again") from error

    def masks(self, images: Images) -> Masks:
        """The masks by image, from 0 to 255 in the file."""
        return _stack([self._mask(image) for image in images], images)

    def _mask(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        key = image_key(image)
        found = self.known.get(key)
        if found is None:
            raise UserError(
                f"given: {self.path} has no mask of the image with sha256 {key[:12]}...:"
                " add it by write_masks"
            )
        if found.shape != image.shape[:2] or found.dtype != np.uint8:
            raise UserError(
                f"given: the mask {key[:12]}... in {self.path} must be uint8 {list(image.shape[:2])};"
                f" got {found.dtype} {list(found.shape)}"
            )
        return found.astype(np.float32) / np.float32(255)


SEGMENTERS: dict[str, type[Segmenter]] = {
    cls.name: cls for cls in (SegmenterMini, BiRefNet, SegmentAnything, Given)
}
"""The choices of the setting ``segmenter``."""


# --- by name --------------------------------------------------------------------------------------


def check_segmenter(name: str, weights: str, device: str = "cpu") -> None:
    """Raise UserError for an unknown segmenter, a missing package, or a missing or damaged file."""
    cls = _segmenter_class(name)
    if cls.package and find_spec(cls.package) is None:
        wanted = f"lethebench[{cls.extra}]" if cls.extra else cls.package
        raise UserError(f"segmenter {name} needs {cls.package}: pip install {wanted}")
    if bool(cls.wants) != bool(weights):
        told = f"set segmenter_weights to {cls.wants}" if cls.wants else "leave segmenter_weights empty"
        raise UserError(f"segmenter {name}: {told}; got {weights!r}")
    for path in segmenter_files(name, weights).values():
        if not path.is_file():
            told = f"set segmenter_weights to {cls.wants}" if cls.wants else "`make models` trains it"
            raise UserError(f"segmenter {name}: there is no file {path}: {told}")
    if cls.wants:
        load_segmenter(name, weights, device)


def segmenter_files(name: str, weights: str) -> dict[str, Path]:
    """The file that determines a segmenter's masks, by the segmenter's name."""
    if _segmenter_class(name).wants:
        return {name: Path(weights).expanduser()}
    import lethebench

    return {name: Path(lethebench.__file__).parent / "weights" / name / "model.safetensors"}


def load_segmenter(name: str, weights: str = "", device: str = "cpu") -> Segmenter:
    """The segmenter, read once a process for as long as its file doesn't change."""
    path = segmenter_files(name, weights)[name]
    return _load(name, path, path.stat().st_mtime if path.is_file() else 0.0, device)


@lru_cache(maxsize=2)
def _load(name: str, path: Path, changed: float, device: str) -> Segmenter:
    cls = SEGMENTERS[name]
    return cls(path if cls.wants else None, device)


def _segmenter_class(name: str) -> type[Segmenter]:
    if name not in SEGMENTERS:
        near = get_close_matches(str(name), SEGMENTERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SEGMENTERS)}"
        raise UserError(f"unknown segmenter {name!r}: {hint}")
    return SEGMENTERS[name]


# --- masks ----------------------------------------------------------------------------------------


def image_key(image: NDArray[np.uint8]) -> str:
    """The SHA-256 of an image's bytes, uint8 ``[height, width, 3]`` in C order, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def write_masks(path: str | Path, images: Images | Sequence[NDArray[np.uint8]], masks: Sequence[Any]) -> None:
    """Write masks for the segmenter ``given``: safetensors, one uint8 ``[h, w]`` an image.

    ``masks`` are bool, float in 0 to 1, or uint8 in 0 to 255, each of its image's height and width.
    Raises ValueError for others.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for image, mask in zip(images, masks, strict=True):
        values = np.asarray(mask)
        if values.shape != image.shape[:2]:
            raise ValueError(f"a mask must be {list(image.shape[:2])}; got {list(values.shape)}")
        if values.dtype != np.uint8:
            values = values.astype(np.float64)
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError("a mask must be bool, float in 0 to 1, or uint8")
            values = np.rint(values * 255).astype(np.uint8)
        tensors[image_key(image)] = np.ascontiguousarray(values)
    save_file(tensors, str(path))


def foreground_of_masks(masks: Sequence[NDArray[np.bool_]], height: int, width: int) -> NDArray[np.float32]:
    """The foreground among SAM's masks, bool ``[h, w]`` each: the union of those that hold no corner (ours).

    What lies behind a scene's objects nearly always reaches a corner of the picture. Not seen by this rule:
    an object in a corner; seen wrongly: a part of the background that ends before the corners (a window).
    No mask, no foreground: 0 everywhere.
    """
    union = np.zeros((height, width), dtype=bool)
    for mask in masks:
        if not mask[[0, 0, -1, -1], [0, -1, 0, -1]].any():
            union |= mask
    return union.astype(np.float32)


def resize_image(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """uint8 ``[h, w, 3]`` resized with PIL's LANCZOS, as the released code resizes training images."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def resize_mask(mask: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Probabilities ``[h, w]`` resized with bilinear weights (PIL's, which average when it shrinks)."""
    from PIL import Image

    values = np.ascontiguousarray(mask, dtype=np.float32)
    if values.shape == (height, width):
        return values
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, dtype=np.float32), 0, 1)


def _stack(masks: Sequence[NDArray[np.float32]], images: Images) -> Masks:
    return np.stack(masks) if len(masks) else np.zeros(images.shape[:3], np.float32)
