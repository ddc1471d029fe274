"""Quantized inputs of the linears in the decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cushion.checks import one_of, require
from cushion.quantization.parts.base import GRANULARITIES, NOTHING, RANGES, Part, Quantizer
from cushion.quantization.parts.grids import check_bits, grid_keys
from cushion.quantization.parts.registry import register

KINDS_OF_RANGE = ("static", "dynamic")


@dataclass
class ActivationConfig:
    """`quantizer.activations`: the grid of every linear's input. `bits: null` leaves them in full precision."""

    bits: int | None = 8
    granularity: str = "per_tensor"
    range: str = "static"
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bits("quantizer.activations.bits", self.bits)
        one_of("quantizer.activations.granularity", self.granularity, GRANULARITIES)
        one_of("quantizer.activations.range", self.range, KINDS_OF_RANGE)
        if self.granularity == "per_token":
            reason = "per-token scales are computed on the fly: set quantizer.activations.range=dynamic"
            require(self.range == "dynamic", "quantizer.activations.range", self.range, reason)


class Activations(Part):
    """The inputs of the targeted linears."""

    name = "activations"
    order = 20
    effect = "cushion.quantization.inputs:INPUTS"
    fields = ("activations",)

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are bits."""
        return quantizer.activations.bits is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Inputs in full precision."""
        return replace(quantizer, activations=ActivationConfig(bits=None))

    def statistics(self, quantizer: Quantizer) -> frozenset[str]:
        """Static ranges are taken from the ranges of channels."""
        is_static = self.is_on(quantizer) and quantizer.activations.range == "static"
        return frozenset({RANGES}) if is_static else NOTHING

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The targets, and the keys of the grid."""
        return grid_keys(quantizer.activations.symmetric) | {"targets"} if self.is_on(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One dynamic range per tensor."""
        activations = quantizer.activations
        return self.is_on(quantizer) and activations.range == "dynamic" and activations.granularity == "per_tensor"

    def label(self, quantizer: Quantizer) -> str:
        """`A8`."""
        return f"A{quantizer.activations.bits or 16}"


register(Activations())
