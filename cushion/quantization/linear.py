"""The quantized linear: quantize-dequantize the input, multiply with the quantized-dequantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cushion.quantization.numerics import Grid, dynamic_range, fake_quantize


class _StraightThrough(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(_context: Any, values: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(values)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class ActivationQuantizer:
    """Quantize-dequantize the input of a linear.

    Args:
        grid: the integer grid.
        granularity: `per_tensor` or `per_token` (one scale for the last dimension of each token).
        static_range: minimum and maximum fixed by calibration; None computes them from every input (dynamic). A dynamic
            per-tensor range spans the whole tensor, all texts of a batch together, as in a real kernel.
        straight_through: let gradients pass as if nothing had been rounded, with scale and offset held constant.

    """

    def __init__(
        self,
        grid: Grid,
        granularity: str,
        static_range: tuple[Tensor, Tensor] | None = None,
        straight_through: bool = False,
    ) -> None:
        self.grid = grid
        self.dims = (-1,) if granularity == "per_token" else None
        self.straight_through = straight_through
        self.parameters = None if static_range is None else grid.parameters(*static_range)

    def __call__(self, values: Tensor) -> Tensor:
        """A new tensor of the shape and dtype of `values`, (..., channels)."""
        constant = values.detach()
        if self.parameters is None:
            low, high = dynamic_range(constant, self.dims)
            scale, offset = self.grid.parameters(low.float(), high.float())
        else:
            scale, offset = self.parameters
        quantized = fake_quantize(constant, scale, offset, self.grid)
        return _StraightThrough.apply(values, quantized) if self.straight_through else quantized


class QuantizedLinear(nn.Module):
    """A linear layer with its own quantized-dequantized weight.

    Args:
        weight: (out_features, in_features), already quantized and dequantized.
        bias: (out_features,) or None, in full precision.
        activation: quantizer of the input, or None to leave it in full precision.

    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: ActivationQuantizer | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activation = activation
        self.out_features, self.in_features = weight.shape

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (..., in_features) -> (..., out_features)."""
        if self.activation is not None:
            values = self.activation(values)
        return functional.linear(values, self.weight, self.bias)
