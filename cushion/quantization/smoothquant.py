"""SmoothQuant (arXiv 2211.10438): move the outliers of channels from the activations into the weights.

## SmoothQuant

Equation 4 of SmoothQuant. For a norm and the linears that read its output, per input channel j:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

The norm's weight (and bias) is divided by s, the columns of the linears' weights are multiplied with it. max|W_j| is
over all linears that share the input; both maxima and s are at least 1e-5. max|X_j| is over all calibration tokens,
behind the row's prefix. Linears that no norm feeds directly (`o_proj`, `down_proj`) are quantized without smoothing.
alpha = 0.8 is CushionCache's value (section 5.1).

- A norm that multiplies with 1 + weight (Gemma) gets (1 + weight) / s - 1, in float32 also in a half-precision model.
- One norm may feed attention and MLP alike (Falcon): then all linears share one s.
- The router of a mixture of experts stays in full precision. Its columns are multiplied with s, but max|W_j| is over
  the experts' linears alone, and max|X_j| over what all experts see together.
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
