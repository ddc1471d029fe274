"""Quantized inputs of the two matrix products of attention."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import one_of
from cushion.quantization.formats.registry import FORMATS, check_format
from cushion.quantization.parts.base import GRANULARITIES, Quantizer
from cushion.quantization.parts.grids import DynamicGrid, width
from cushion.quantization.parts.registry import register


@dataclass
class AttentionConfig:
    """`quantizer.attention`: the grid of both inputs of both products of attention, dynamic. `bits: null`: none."""

    bits: int | None = None
    """Bits of the inputs of the products of attention: queries and keys, probabilities and values

    Allowed: 2 to 8, null
    Paper: **open**: the paper does not say whether they are quantized
    """
    granularity: str = "per_tensor"
    """One scale per tensor, or per head and token, or `per_block` with a format of blocks; always dynamic

    Allowed: `per_tensor`, `per_token`, `per_block`
    """
    symmetric: bool = True
    """Offset 0, or as `zero_point` says

    Allowed: true, false
    """
    format: str = "int"
    """Number format

    Allowed: as `weights.format`
    """

    def __post_init__(self) -> None:
        one_of("quantizer.attention.granularity", self.granularity, GRANULARITIES)
        check_format("quantizer.attention", self.format, self.bits, self.symmetric, self.granularity)


class Attention(DynamicGrid):
    """Queries, keys, probabilities and values; ranges are dynamic."""

    name = "attention"
    order = 40
    of_activations = True
    effect = "cushion.quantization.attention:ATTENTION"
    fields = ("attention",)
    own = AttentionConfig

    def label(self, quantizer: Quantizer) -> str:
        """` attention 8`."""
        return f" attention {width(quantizer.attention)}" if self.is_on(quantizer) else ""

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One range per tensor, or blocks along the positions, which padding may be among."""
        blocks = FORMATS[quantizer.attention.format].block is not None
        return super().spans_batch(quantizer) or (self.is_on(quantizer) and blocks)


register(Attention())
