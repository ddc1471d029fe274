"""What an execution is: from codes, scales and offsets to the module that stands for a linear."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from cushion.models import LanguageModel
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.quantizer import QuantizerConfig


class Execution(ABC):
    """One way to compute quantized linears. It is made without arguments."""

    def check(self, lm: LanguageModel, quantizer: QuantizerConfig) -> None:
        """Raise `ConfigError` where it cannot compute this quantizer on this model, before anything is computed."""
        return

    def warnings(self, lm: LanguageModel, quantizer: QuantizerConfig) -> list[str]:
        """What a reader of a result should know of this execution, after `check`."""
        return []

    @abstractmethod
    def linear(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, activation: ActivationQuantizer | None
    ) -> nn.Module:
        """The module that stands for a linear.

        Args:
            weight: quantized, or (out_features, in_features) where it stays in full precision.
            bias: (out_features,) or None, in full precision.
            activation: quantizer of the input, or None to leave it in full precision.

        """
