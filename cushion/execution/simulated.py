"""Simulated execution: everything is quantized and dequantized, and multiplied in the model's own precision."""

from __future__ import annotations

from torch import Tensor

from cushion.models import LanguageModel
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.quantizer import QuantizerConfig


class Simulated:
    """Linears with dequantized weights."""

    def check(self, lm: LanguageModel, quantizer: QuantizerConfig) -> None:
        """Everything can be simulated."""

    def linear(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, activation: ActivationQuantizer | None
    ) -> QuantizedLinear:
        """A `QuantizedLinear`; arguments as in `Execution`."""
        values = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        return QuantizedLinear(values, bias, activation)
