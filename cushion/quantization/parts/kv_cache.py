"""The quantized key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cushion.checks import at_least, one_of, require, without_effect
from cushion.errors import ConfigError
from cushion.quantization.formats.registry import FORMATS, check_format
from cushion.quantization.parts.base import NOTHING, Needed, Quantizer
from cushion.quantization.parts.grids import DynamicGrid, check_clip_ratio, width
from cushion.quantization.parts.head_rotation import rotates_keys, rotates_values
from cushion.quantization.parts.registry import PARTS, register

GRANULARITIES = {"dynamic": ("per_token", "per_tensor", "per_block"), "static": ("per_tensor", "per_head")}
"""Of the scales of keys and values, by where their ranges come from."""

LAYOUTS = ("token", "kivi")
"""What shares a scale: what `granularity` says, of every position alike, or KIVI's groups."""

CACHE_RANGES = Needed("cushion.quantization.cache_ranges:CacheRanges")
"""What static ranges follow from."""


def cache_ranges(quantizer: Quantizer) -> Needed:
    """What static ranges follow from: keys may be rotated before they are rounded, and positions protected."""
    options: list[tuple[str, Any]] = []
    if rotates_keys(quantizer):
        options.append(("rotated_keys", True))
    if quantizer.kv_cache.protect:
        options.append(("protect", quantizer.kv_cache.protect))
    return CACHE_RANGES._replace(options=tuple(options))


@dataclass
class KvCacheConfig:
    """`quantizer.kv_cache`: the grid of the cached keys and values. `bits: null` leaves them as they are.

    `range` is `dynamic`, or `static`: the extremes of each layer's keys, and of its values, over calibration text.
    `layout: kivi` is that of KIVI (arXiv 2402.02750): keys per channel, in groups of `group_size` neighbouring tokens,
    values per token, in groups of as many channels, and about `residual` of the newest tokens in full precision
    (`cushion.quantization.kivi`). `protect` is how many tokens at the start of every text stay in full precision,
    `clip_ratio` the share of a dynamic range that is kept.
    """

    bits: int | None = None
    """Bits of the cached keys and values of ordinary tokens; the prefix's stay in full precision

    Allowed: 2 to 8, null
    Paper: not in the paper
    """
    granularity: str = "per_token"
    """Dynamic: one scale per tensor, or per head and token, or `per_block` with a format of blocks; static: per tensor
    or per head

    Allowed: `per_tensor`, `per_token`, `per_block`, `per_head`
    Paper: not in the paper
    """
    symmetric: bool = False
    """Offset 0, or as `zero_point` says

    Allowed: true, false
    Paper: not in the paper; keys and values of a token are rarely centred
    """
    range: str = "dynamic"
    """Scales from the cached values, or those of each layer's keys and of its values fixed by calibration

    Allowed: `dynamic`, `static`
    Paper: not in the paper; servers load static scales
    """
    format: str = "int"
    """Number format

    Allowed: as `weights.format`
    """
    layout: str = "token"
    """What shares a scale: `token`, what `granularity` says; `kivi`, KIVI's groups (arXiv
    [2402.02750](https://arxiv.org/abs/2402.02750)), keys per channel and values per token, with the newest tokens
    in full precision ([method](method.md#kivis-layout))

    Allowed: `token`, `kivi`
    Paper: not in the paper
    """
    group_size: int = 32
    """With `kivi`: neighbouring tokens of a key channel, and channels of a token's value, that share a scale

    Allowed: 1 and more
    """
    residual: int = 128
    """With `kivi`: length of the window of newest tokens in full precision

    Allowed: multiples of `kv_cache.group_size`
    """
    protect: int = 0
    """How many tokens at the start of every text stay in full precision in the cache, and out of its scales (KVSink's
    Preserve-First-N; 1 where texts begin with BOS protects BOS)

    Allowed: 0 and more
    Paper: not in the paper
    """
    clip_ratio: float = 1.0
    """As `activations.clip_ratio`; 0.95 in QuaRot

    Allowed: above 0, at most 1
    Paper: not in the paper
    """

    def __post_init__(self) -> None:
        section = "quantizer.kv_cache"
        one_of(f"{section}.range", self.range, tuple(GRANULARITIES))
        every = tuple(dict.fromkeys(name for names in GRANULARITIES.values() for name in names))
        one_of(f"{section}.granularity", self.granularity, every)
        one_of(f"{section}.layout", self.layout, LAYOUTS)
        if self.layout == "kivi" and self.bits is not None:
            without = [name for name in FORMATS if FORMATS[name].block is None]
            reason = f"with {section}.layout=kivi, which has groups of its own, one of {', '.join(without)}"
            require(self.format not in FORMATS or self.format in without, f"{section}.format", self.format, reason)
        check_format(section, self.format, self.bits, self.symmetric, self.granularity)
        at_least(f"{section}.group_size", self.group_size, 1)
        at_least(f"{section}.protect", self.protect, 0)
        check_clip_ratio(section, self)
        if self.bits is None:
            return
        fitting = GRANULARITIES[self.range]
        reason = f"with {section}.range={self.range} choose one of {', '.join(fitting)}"
        require(self.granularity in fitting, f"{section}.granularity", self.granularity, reason)
        if self.layout == "kivi":
            self._check_kivi(section)

    def _check_kivi(self, section: str) -> None:
        reason = f"with {section}.layout=kivi ranges are those of every group: set dynamic"
        require(self.range == "dynamic", f"{section}.range", self.range, reason)
        reason = f"{section}.layout=kivi has scales of its own: set per_token, or layout=token"
        require(self.granularity == "per_token", f"{section}.granularity", self.granularity, reason)
        whole = self.residual >= self.group_size and self.residual % self.group_size == 0
        reason = (
            f"a multiple of {section}.group_size={self.group_size}, at least once: keys are rounded in whole groups"
        )
        require(whole, f"{section}.residual", self.residual, reason)


class KvCache(DynamicGrid):
    """The cached keys and values but for those of a prefix."""

    name = "kv_cache"
    order = 30
    of_activations = True
    effect = "cushion.quantization.attention:ATTENTION"
    fields = ("kv_cache",)
    own = KvCacheConfig
    keys = ("granularity", "symmetric", "range", "format", "layout", "group_size", "residual", "protect", "clip_ratio")

    def check(self, quantizer: Quantizer) -> None:
        """KIVI's layout stands alone inside of attention: which keys a query sees rounded depends on the query.

        And a choice of rotated sites does not know its groups.
        """
        if self._is_kivi(quantizer) and rotates_values(quantizer) and PARTS["rotation_sites"].is_on(quantizer):
            raise ConfigError(
                "quantizer.rotation_sites=adaptive compares errors of values with a scale per token, and "
                "quantizer.kv_cache.layout=kivi has groups of its own: use quantizer.rotation_sites=all, or "
                "quantizer.kv_cache.layout=token"
            )
        if self._is_kivi(quantizer) and quantizer.attention.bits is not None:
            raise ConfigError(
                f"quantizer.attention.bits={quantizer.attention.bits} cannot be used with quantizer.kv_cache.layout="
                "kivi, where every query reads another mixture of rounded and full-precision keys, which have no one "
                "range: set quantizer.attention.bits=null or quantizer.kv_cache.layout=token"
            )

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """The grid, without the keys that its layout does not read."""
        identity = super().identity(quantizer)
        if not self._is_kivi(quantizer):
            for key in ("group_size", "residual"):
                del identity[self.fields[0]][key]
        if quantizer.kv_cache.clip_ratio == 1:
            del identity[self.fields[0]]["clip_ratio"]
        return identity

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The ranges of keys and values, where they are static."""
        return frozenset({cache_ranges(quantizer)}) if self._is_static(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """A dynamic range per tensor, or a dynamic scale for the tensor that blocks are a part of.

        Also where positions are counted from the start of a row, which is padding in rows of shorter texts: for groups
        of tokens, and for protected ones.
        """
        counted = self.is_on(quantizer) and (self._is_kivi(quantizer) or quantizer.kv_cache.protect > 0)
        return counted or (super().spans_batch(quantizer) and not self._is_static(quantizer))

    def label(self, quantizer: Quantizer) -> str:
        """`KV8`, and whether it is static, in another layout, or protects tokens."""
        if not self.is_on(quantizer):
            return ""
        own = quantizer.kv_cache
        words = [
            *(["static KV"] if self._is_static(quantizer) else []),
            *([f"KIVI g{own.group_size} r{own.residual}"] if self._is_kivi(quantizer) else []),
            *([f"first {own.protect} protected"] if own.protect else []),
            *([f"KV clipped to {own.clip_ratio:g}"] if own.clip_ratio != 1 else []),
        ]
        return " ".join([f"KV{width(own)}", *words])

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The grid without bits, and KIVI's sizes in another layout."""
        if not self.is_on(quantizer) or self._is_kivi(quantizer):
            return super().warnings(quantizer)
        key = "quantizer.kv_cache"
        return without_effect(key, quantizer.kv_cache, ("group_size", "residual"), f"with {key}.layout=token")

    def _is_static(self, quantizer: Quantizer) -> bool:
        return self.is_on(quantizer) and bool(quantizer.kv_cache.range == "static")

    def _is_kivi(self, quantizer: Quantizer) -> bool:
        return self.is_on(quantizer) and bool(quantizer.kv_cache.layout == "kivi")


register(KvCache())
