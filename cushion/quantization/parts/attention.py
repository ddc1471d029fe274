"""Quantized inputs of the two matrix products of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cushion.checks import one_of, without_effect
from cushion.quantization.parts.base import GRANULARITIES, NOTHING, Part, Quantizer
from cushion.quantization.parts.grids import check_bits, grid_keys


@dataclass
class AttentionConfig:
    """`quantizer.attention`: the grid of both inputs of both products of attention, dynamic. `bits: null`: none."""

    bits: int | None = None
    granularity: str = "per_tensor"
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bits("quantizer.attention.bits", self.bits)
        one_of("quantizer.attention.granularity", self.granularity, GRANULARITIES)


class Attention(Part):
    """Queries, keys, probabilities and values; ranges are dynamic."""

    fields = ("attention",)

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are bits."""
        return quantizer.attention.bits is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Both products in full precision."""
        return replace(quantizer, attention=AttentionConfig(bits=None))

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The keys of the grid."""
        return grid_keys(quantizer.attention.symmetric) if self.is_on(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One range per tensor."""
        return self.is_on(quantizer) and quantizer.attention.granularity == "per_tensor"

    def label(self, quantizer: Quantizer) -> str:
        """` attention 8`."""
        return f" attention {quantizer.attention.bits}" if self.is_on(quantizer) else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The grid without bits."""
        if self.is_on(quantizer):
            return []
        keys = ("granularity", "symmetric")
        return without_effect("quantizer.attention", quantizer.attention, keys, "with quantizer.attention.bits=null")
