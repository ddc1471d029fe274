"""What the parts that round have in common: bits, the keys of a grid, and dynamic ranges inside of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from cushion.checks import require, without_effect
from cushion.quantization.parts.base import NOTHING, Part, Quantizer


def check_bits(key: str, bits: int | None) -> None:
    """Raise `ConfigError` unless `bits` is None or 2 to 8."""
    require(bits is None or 2 <= bits <= 8, key, bits, "2 to 8, or null for full precision")


def width(config: Any) -> str:
    """The bits as they stand in the name of a scheme: 8, 16 where nothing is rounded, `8(format)` for no integers."""
    if config.bits is None:
        return "16"
    return f"{config.bits}" if config.format == "int" else f"{config.bits}({config.format})"


def grid_keys(symmetric: bool) -> frozenset[str]:
    """The common keys that a grid is made of; a symmetric one has no zero point."""
    return frozenset({"levels"} if symmetric else {"levels", "zero_point"})


class DynamicGrid(Part):
    """A part that is one grid with dynamic ranges, of something inside of attention: `own` is its configuration."""

    own: ClassVar[type[Any]]

    def grid(self, quantizer: Quantizer) -> Any:
        """The part's own configuration."""
        return getattr(quantizer, self.fields[0])

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are bits."""
        return self.grid(quantizer).bits is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """In full precision."""
        return replace(quantizer, **{self.fields[0]: self.own(bits=None)})

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The keys of the grid."""
        return grid_keys(self.grid(quantizer).symmetric) if self.is_on(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One range per tensor."""
        return self.is_on(quantizer) and self.grid(quantizer).granularity == "per_tensor"

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The grid without bits."""
        if self.is_on(quantizer):
            return []
        key = f"quantizer.{self.fields[0]}"
        return without_effect(key, self.grid(quantizer), ("granularity", "symmetric"), f"with {key}.bits=null")
