"""FB-Mem's constants, each with its source. Light to import."""

from __future__ import annotations

KERNEL, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
THREE_SCALES = (1 / 3, 1 / 3, 1 / 3)
"""NeMo's betas, rounded there to 0.33 each."""
FIVE_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""torchmetrics' default betas (Wang et al. 2003), which the released code uses."""
FIVE_SCALES_SIDE, THREE_SCALES_SIDE = 176, 44
"""The shortest sides for five and for three scales: kernel * (scales - 1)^2 pixels, as torchmetrics wants."""
AS_RELEASED_TAU = 0.8
"""The released code's threshold, for foreground and background."""
MIN_AREA = 0.03
"""A foreground of less than this share of the area, or a background, can't be compared (the adaptive rule;
the constant is inferred from the released code, which tests brightness, 0.97 and 0.03, not area)."""
MASK_THRESHOLD = 0.5
"""Masks are binary: foreground where the segmenter's probability (or the true coverage) is at least this."""
BUILT_IN_SIDE = 64
"""Pixels a side of the built-in world, its segmenter and the calibration."""
KEEP = 24
"""References that the prefilter keeps for a picture: half by foreground, half by background."""


def betas(height: int, width: int) -> tuple[float, ...]:
    """The scales' exponents for pictures of this size: five from 176 pixels a side, else three.

    Raises ValueError for a side of less than 44 pixels, which has no third scale.
    """
    if min(height, width) >= FIVE_SCALES_SIDE:
        return FIVE_SCALES
    if min(height, width) < THREE_SCALES_SIDE:
        raise ValueError(
            f"fbmem: images must have at least {THREE_SCALES_SIDE} pixels a side; got {height} x {width}"
        )
    return THREE_SCALES
