"""What executions on 8-bit codes share, whatever number format these are in: refusals, linears, and their making."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from cushion.errors import ConfigError, NotFiniteError
from cushion.execution.base import Execution
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, QuantizedWeight
from cushion.quantization.parts.activations import ActivationConfig
from cushion.quantization.parts.grids import DynamicGrid
from cushion.quantization.parts.registry import PARTS, parts
from cushion.quantization.parts.weights import WeightConfig
from cushion.quantization.quantizer import QuantizerConfig

BITS = 8
SIMULATED_INSTEAD = "or use execution=simulated"


def not_multiplied_in(quantizer: QuantizerConfig, form: str, codes: str) -> str | None:
    """Why the products of a quantizer are none of two matrices of 8-bit codes in a format; None where they are.

    Args:
        form: the number format of both sides, a key of `FORMATS`.
        codes: what they are, in words.

    """
    if quantizer.is_full_precision:
        return f"quantizer={quantizer.name} quantizes nothing: choose one that does, {SIMULATED_INSTEAD}"
    reason = _other_codes("quantizer.weights", quantizer.weights, form, codes)
    reason = reason or _other_codes("quantizer.activations", quantizer.activations, form, codes)
    if reason is not None:
        return f"{reason}, {SIMULATED_INSTEAD}"
    if PARTS["compensation"].is_on(quantizer):
        return (
            f"quantizer.compensation.method={quantizer.compensation.method} has a branch in floating point beside the "
            f"codes: set it to none, {SIMULATED_INSTEAD}"
        )
    if quantizer.weights.granularity == "per_group":
        return (
            "quantizer.weights.granularity=per_group has several scales within one sum: set it to per_channel or "
            f"per_tensor, {SIMULATED_INSTEAD}"
        )
    if quantizer.activations.by_channel:
        return (
            f"quantizer.activations.granularity={quantizer.activations.granularity} has several scales within one sum: "
            f"set it to per_tensor, {SIMULATED_INSTEAD}"
        )
    return None


def _other_codes(section: str, own: WeightConfig | ActivationConfig, form: str, codes: str) -> str | None:
    """Why one side of a product is not made of 8-bit codes of a format, with the way out; None where it is."""
    if own.bits is not None and own.format != form:
        finer = f" and {section}.granularity=per_tensor" if own.granularity == "per_block" else ""
        return (
            f"{section}.format={own.format}, and both sides of a product are {codes}: set it to {form}, with "
            f"{section}.bits=8{finer}"
        )
    if own.bits != BITS:
        bits = "null" if own.bits is None else own.bits
        return f"{section}.bits={bits}, and both sides of a product are {codes}: set it to 8"
    return None


def simulation_warnings(quantizer: QuantizerConfig, execution: str, codes: str) -> list[str]:
    """A warning of what is rounded in a simulation all the same, where there is such a thing."""
    found = [part.name for part in parts() if isinstance(part, DynamicGrid) and part.is_on(quantizer)]
    if not found:
        return []
    keys = " and ".join(f"quantizer.{name}" for name in found)
    return [f"execution={execution} runs linears on {codes}; {keys} stays simulated"]


class LinearOnCodes(nn.Module):
    """A linear layer whose product is one of codes.

    Args:
        weight: with one scale, or one for each output.
        bias: (out_features,) or None, in full precision.
        activation: quantizer of the input.

    Raises:
        NotFiniteError: a weight is not finite, for which there is no code.

    """

    execution: ClassVar[str]
    word: ClassVar[str] = "code"
    """What one of the codes is called."""
    scale: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activation: ActivationQuantizer) -> None:
        super().__init__()
        if not bool(weight.codes.isfinite().all()):
            raise NotFiniteError(
                f"a weight is not finite, and execution={self.execution} has no {self.word} for it: mend the model"
            )
        self.out_features, self.in_features = weight.shape
        self.on_gpu = weight.codes.device.type == "cuda"
        self.activation = activation
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", weight.scale.float().reshape(-1))  # (1,) or (out_features,)

    def scaled(self, product: Tensor, scale: Tensor, values: Tensor) -> Tensor:
        """The output, (..., out_features), in the dtype of `values`.

        Args:
            product: of the codes, float32, (tokens, out_features); it is changed.
            scale: of the input, (tokens, 1) or (1, 1).
            values: the input, (..., in_features).

        """
        result = product.mul_(scale).mul_(self.scale)
        if self.bias is not None:
            result = result.add_(self.bias.float())
        return result.to(values.dtype).reshape(*values.shape[:-1], self.out_features)


class OnCodes(Execution):
    """An execution on codes; linears whose inputs QFeM keeps in full precision have their dequantized weights."""

    module: ClassVar[type[LinearOnCodes]]
    grid: ClassVar[type[Grid]]
    """Of the inputs."""

    def linear(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, activation: ActivationQuantizer | None
    ) -> nn.Module:
        """A linear on codes, or in floating point where the input stays so; arguments as in `Execution`.

        Raises:
            ConfigError: a part of the quantizer left a weight in full precision, or gave the input a quantizer of its
                own kind.

        """
        if activation is None:
            return QuantizedLinear(weight.dequantize() if isinstance(weight, QuantizedWeight) else weight, bias, None)
        name = self.module.execution
        if not isinstance(weight, QuantizedWeight) or weight.codes.dim() != 2 or weight.offset is not None:
            raise ConfigError(
                f"execution={name} needs symmetric codes of every weight, with one scale or one for each output, and "
                "a part of the quantizer has changed them: turn it off in quantizer.plugins, or use execution=simulated"
            )
        if not (type(activation) is ActivationQuantizer and type(activation.grid) is self.grid):
            raise ConfigError(
                f"execution={name} needs 8-bit codes of every input, and a part of the quantizer has another kind of "
                "quantizer for it: turn it off in quantizer.plugins, or use execution=simulated"
            )
        return self.module(weight, bias, activation)
