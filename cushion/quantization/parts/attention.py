"""Quantized inputs of the two matrix products of attention."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import one_of
from cushion.quantization.parts.base import GRANULARITIES, Quantizer
from cushion.quantization.parts.grids import DynamicGrid, check_bits
from cushion.quantization.parts.registry import register


@dataclass
class AttentionConfig:
    """`quantizer.attention`: the grid of both inputs of both products of attention, dynamic. `bits: null`: none."""

    bits: int | None = None
    granularity: str = "per_tensor"
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bits("quantizer.attention.bits", self.bits)
        one_of("quantizer.attention.granularity", self.granularity, GRANULARITIES)


class Attention(DynamicGrid):
    """Queries, keys, probabilities and values; ranges are dynamic."""

    name = "attention"
    order = 40
    effect = "cushion.quantization.attention:ATTENTION"
    fields = ("attention",)
    own = AttentionConfig

    def label(self, quantizer: Quantizer) -> str:
        """` attention 8`."""
        return f" attention {quantizer.attention.bits}" if self.is_on(quantizer) else ""


register(Attention())
