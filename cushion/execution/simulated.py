"""Simulated execution: everything is quantized and dequantized, and multiplied in the model's own precision."""

from __future__ import annotations

from torch import Tensor

from cushion.execution.base import Execution
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import QuantizedWeight


class Simulated(Execution):
    """Linears with dequantized weights. Everything can be simulated."""

    def linear(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, activation: ActivationQuantizer | None
    ) -> QuantizedLinear:
        """A `QuantizedLinear`; arguments as in `Execution`."""
        values = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        return QuantizedLinear(values, bias, activation)
