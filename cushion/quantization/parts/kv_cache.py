"""The quantized key-value cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cushion.checks import one_of, without_effect
from cushion.quantization.parts.base import GRANULARITIES, NOTHING, Part, Quantizer
from cushion.quantization.parts.grids import check_bits, grid_keys


@dataclass
class KvCacheConfig:
    """`quantizer.kv_cache`: the grid of the cached keys and values, dynamic. `bits: null` leaves them as they are."""

    bits: int | None = None
    granularity: str = "per_token"
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits("quantizer.kv_cache.bits", self.bits)
        one_of("quantizer.kv_cache.granularity", self.granularity, GRANULARITIES)


class KvCache(Part):
    """The cached keys and values but for those of a prefix; ranges are dynamic."""

    fields = ("kv_cache",)

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are bits."""
        return quantizer.kv_cache.bits is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Keys and values as they are."""
        return replace(quantizer, kv_cache=KvCacheConfig(bits=None))

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The keys of the grid."""
        return grid_keys(quantizer.kv_cache.symmetric) if self.is_on(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One range per tensor."""
        return self.is_on(quantizer) and quantizer.kv_cache.granularity == "per_tensor"

    def label(self, quantizer: Quantizer) -> str:
        """`KV8`."""
        return f"KV{quantizer.kv_cache.bits}" if self.is_on(quantizer) else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The grid without bits."""
        if self.is_on(quantizer):
            return []
        keys = ("granularity", "symmetric")
        return without_effect("quantizer.kv_cache", quantizer.kv_cache, keys, "with quantizer.kv_cache.bits=null")
