"""AWQ's scales (arXiv 2306.00978, section 3.2, equations 4 and 5): columns of large inputs are rounded more finely.

`s_j = (mean|X_j|)^alpha`, divided by `sqrt(max s * min s)` as in the authors' code. The weight's columns are multiplied
with s before they are rounded, and the input is divided by it. alpha = 0 is rounding to nearest as it was.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST = 1e-4
"""Lower bound of a scale before it is normalised: that of the authors' code."""


def awq_scales(input_mean: Tensor, alpha: float) -> Tensor:
    """The scale of every input channel.

    Args:
        input_mean: mean|X_j| over the calibration tokens, shape (channels,).
        alpha: 0 (all scales are 1) to 1.

    Returns:
        float32, shape (channels,), all positive; the geometric mean of the largest and the smallest is 1.

    """
    scales = input_mean.float().pow(alpha).clamp(min=SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()
