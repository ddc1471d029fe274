"""What the parts that round have in common: bits, the keys of a grid, and dynamic ranges inside of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from cushion.checks import require, without_effect
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.parts.base import NOTHING, Part, Quantizer


def width(config: Any) -> str:
    """The bits as they stand in the name of a scheme: 8, 16 where nothing is rounded, `8(format)` for no integers."""
    if config.bits is None:
        return "16"
    return f"{config.bits}" if config.format == "int" else f"{config.bits}({config.format})"


def grid_keys(form: str, symmetric: bool) -> frozenset[str]:
    """The common keys that a grid of this format is made of; a symmetric one has no zero point."""
    return frozenset(FORMATS[form].reads) - ({"zero_point"} if symmetric else NOTHING)


def check_clip_ratio(section: str, own: Any) -> None:
    """Raise `ConfigError` for a share of the range that cannot be kept, or, with bits, of a range that has none.

    Args:
        section: `quantizer.<part>`.
        own: its configuration, with `clip_ratio`, `bits`, `format` and `range`.

    """
    key, ratio = f"{section}.clip_ratio", own.clip_ratio
    require(0 < ratio <= 1, key, ratio, "a share above 0, at most 1")
    if own.bits is not None and ratio != 1:
        reason = f"1, because {section}.format={own.format} says what scale a block has"
        require(FORMATS[own.format].block is None, key, ratio, reason)
        reason = f"1, because {section}.range=static has ranges from calibration text: set dynamic"
        require(own.range == "dynamic", key, ratio, reason)


class DynamicGrid(Part):
    """A part that is one grid of something inside of attention: `own` is its configuration."""

    own: ClassVar[type[Any]]

    keys: ClassVar[tuple[str, ...]] = ("granularity", "symmetric", "format")
    """What has no effect without bits."""

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
        grid = self.grid(quantizer)
        return grid_keys(grid.format, grid.symmetric) if self.is_on(quantizer) else NOTHING

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """The grid."""
        grid = self.grid(quantizer)
        return {self.fields[0]: {**vars(grid), "format": FORMATS[grid.format].identity()}}

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One dynamic range per tensor, or a dynamic scale for the tensor that blocks are a part of."""
        grid = self.grid(quantizer)
        return self.is_on(quantizer) and (grid.granularity == "per_tensor" or FORMATS[grid.format].tensor_scale)

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The grid without bits."""
        if self.is_on(quantizer):
            return []
        key = f"quantizer.{self.fields[0]}"
        return without_effect(key, self.grid(quantizer), self.keys, f"with {key}.bits=null")
