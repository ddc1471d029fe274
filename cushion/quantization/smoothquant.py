"""SmoothQuant (arXiv 2211.10438): move the outliers of channels from the activations into the weights.

`s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (equation 4). The norm before the linears is divided by s and the linears
are multiplied with it, which leaves the function as it was. X is the linear's input, with the prefix in place and its
positions excluded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Lower bound of abs-maxima and scales, so that a channel that is always zero does not divide by zero."""


def smoothing_scales(input_abs_max: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """The scale of every input channel, equation 4 of SmoothQuant.

    Args:
        input_abs_max: max|X_j| over the calibration tokens, shape (channels,).
        weights: weights of all linears that read this input, each (out_features, channels); they share one scale.
        alpha: migration strength, 0 (all difficulty stays in the activations) to 1 (all moves into the weights).

    Returns:
        float32, shape (channels,), all positive.

    """
    weight_abs_max = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    activation = input_abs_max.float().clamp(min=SMALLEST).to(weight_abs_max.device)
    scales = activation**alpha / weight_abs_max.clamp(min=SMALLEST) ** (1 - alpha)
    return scales.clamp(min=SMALLEST)
