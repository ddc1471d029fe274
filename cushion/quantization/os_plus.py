"""Outlier Suppression+ (arXiv 2304.09145, section 4.1, equations 3 to 6): channels centred, large ones shrunk.

`X' = (X - z) / s`: z is the middle of a channel's range, and only channels beyond a threshold t are divided, so that
they just reach it. Columns of the weight that belong to other channels stay as they are.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST = 1e-5
"""Lower bound of the threshold, so that inputs that are always zero do not divide by zero."""


def channel_shift(low: Tensor, high: Tensor) -> Tensor:
    """z, the middle of every channel's range, from its ends, each (channels,)."""
    return (low.float() + high.float()) / 2


def threshold_scales(largest: Tensor, threshold: float) -> Tensor:
    """The scale of every channel: `max(1, max|X_j - z_j| / t)`.

    Args:
        largest: max|X_j - z_j| over the calibration tokens, shape (channels,).
        threshold: t; the largest of all leaves every scale at 1.

    Returns:
        float32, shape (channels,), at least 1.

    """
    return (largest.float() / max(threshold, SMALLEST)).clamp(min=1)
