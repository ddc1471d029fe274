"""The quantized key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import one_of, require
from cushion.quantization.formats.registry import check_format
from cushion.quantization.parts.base import NOTHING, Needed, Quantizer
from cushion.quantization.parts.grids import DynamicGrid, width
from cushion.quantization.parts.head_rotation import rotates_keys
from cushion.quantization.parts.registry import register

GRANULARITIES = {"dynamic": ("per_token", "per_tensor", "per_block"), "static": ("per_tensor", "per_head")}
"""Of the scales of keys and values, by where their ranges come from."""

CACHE_RANGES = Needed("cushion.quantization.cache_ranges:CacheRanges")
"""What static ranges follow from."""


def cache_ranges(quantizer: Quantizer) -> Needed:
    """What static ranges follow from where keys are rotated before they are rounded, or are not."""
    return CACHE_RANGES._replace(options=(("rotated_keys", True),)) if rotates_keys(quantizer) else CACHE_RANGES


@dataclass
class KvCacheConfig:
    """`quantizer.kv_cache`: the grid of the cached keys and values. `bits: null` leaves them as they are.

    `range` is `dynamic`, or `static`: the extremes of each layer's keys, and of its values, over calibration text.
    """

    bits: int | None = None
    granularity: str = "per_token"
    symmetric: bool = False
    range: str = "dynamic"
    format: str = "int"

    def __post_init__(self) -> None:
        section = "quantizer.kv_cache"
        one_of(f"{section}.range", self.range, tuple(GRANULARITIES))
        every = tuple(dict.fromkeys(name for names in GRANULARITIES.values() for name in names))
        one_of(f"{section}.granularity", self.granularity, every)
        check_format(section, self.format, self.bits, self.symmetric, self.granularity)
        fitting = GRANULARITIES[self.range]
        reason = f"with {section}.range={self.range} choose one of {', '.join(fitting)}"
        if self.bits is not None:
            require(self.granularity in fitting, f"{section}.granularity", self.granularity, reason)


class KvCache(DynamicGrid):
    """The cached keys and values but for those of a prefix."""

    name = "kv_cache"
    order = 30
    effect = "cushion.quantization.attention:ATTENTION"
    fields = ("kv_cache",)
    own = KvCacheConfig
    keys = ("granularity", "symmetric", "range", "format")

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The ranges of keys and values, where they are static."""
        return frozenset({cache_ranges(quantizer)}) if self._is_static(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One dynamic range per tensor, or a dynamic scale for the tensor that blocks are a part of."""
        return super().spans_batch(quantizer) and not self._is_static(quantizer)

    def label(self, quantizer: Quantizer) -> str:
        """`KV8`, and whether it is static."""
        if not self.is_on(quantizer):
            return ""
        return f"KV{width(quantizer.kv_cache)}" + (" static KV" if self._is_static(quantizer) else "")

    def _is_static(self, quantizer: Quantizer) -> bool:
        return self.is_on(quantizer) and bool(quantizer.kv_cache.range == "static")


register(KvCache())
