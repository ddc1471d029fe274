"""The quantized key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import one_of
from cushion.quantization.parts.base import GRANULARITIES, Quantizer
from cushion.quantization.parts.grids import DynamicGrid, check_bits
from cushion.quantization.parts.registry import register


@dataclass
class KvCacheConfig:
    """`quantizer.kv_cache`: the grid of the cached keys and values, dynamic. `bits: null` leaves them as they are."""

    bits: int | None = None
    granularity: str = "per_token"
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits("quantizer.kv_cache.bits", self.bits)
        one_of("quantizer.kv_cache.granularity", self.granularity, GRANULARITIES)


class KvCache(DynamicGrid):
    """The cached keys and values but for those of a prefix; ranges are dynamic."""

    name = "kv_cache"
    order = 30
    effect = "cushion.quantization.attention:ATTENTION"
    fields = ("kv_cache",)
    own = KvCacheConfig

    def label(self, quantizer: Quantizer) -> str:
        """`KV8`."""
        return f"KV{quantizer.kv_cache.bits}" if self.is_on(quantizer) else ""


register(KvCache())
