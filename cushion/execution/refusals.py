"""What stands in the way of one product of codes, whatever number format they are in, with the way out."""

from __future__ import annotations

from torch import Tensor

from cushion.errors import ConfigError
from cushion.quantization.linear import ActivationQuantizer
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


def plain_weight(
    weight: QuantizedWeight | Tensor, activation: ActivationQuantizer, grid: type[Grid], execution: str
) -> QuantizedWeight:
    """The weight, where it and the quantizer of the input are those that the configuration names.

    Raises:
        ConfigError: a part of the quantizer left the weight in full precision, or gave either one of its own kind.

    """
    if not isinstance(weight, QuantizedWeight) or weight.codes.dim() != 2 or weight.offset is not None:
        raise ConfigError(
            f"execution={execution} needs symmetric codes of every weight, with one scale or one for each output, and "
            "a part of the quantizer has changed them: turn it off in quantizer.plugins, or use execution=simulated"
        )
    if not (type(activation) is ActivationQuantizer and type(activation.grid) is grid):
        raise ConfigError(
            f"execution={execution} needs 8-bit codes of every input, and a part of the quantizer has another kind of "
            "quantizer for it: turn it off in quantizer.plugins, or use execution=simulated"
        )
    return weight
