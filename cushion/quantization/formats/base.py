"""What a number format is: a light declaration, named by the `format` of weights or activations, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cushion.registry import located

if TYPE_CHECKING:
    from cushion.quantization.numerics import Grid


@dataclass(frozen=True, kw_only=True)
class Format:
    """The declaration of a format.

    Args:
        name: the value of `format`.
        title: how it is called in texts.
        grid: `module:Class` of a `cushion.quantization.numerics.Grid`, or of a class derived from it: what scale and
            offset a range has, and which codes there are.
        bits: the widths that it has.
        symmetric_only: whether it has no offset.

    """

    name: str
    title: str
    grid: str
    bits: Sequence[int]
    symmetric_only: bool = False

    def make(self, bits: int, symmetric: bool, levels: str = "full", zero_point: str = "real") -> Grid:
        """The grid of a quantizer's part."""
        return cast("Grid", located(self.grid)(bits, symmetric, levels, zero_point))

    def identity(self) -> list[str]:
        """Name, place and code, for the keys of cached steps."""
        from cushion.code import version_at  # not needed for --help or a refused configuration

        return [self.name, self.grid, version_at(self.grid)]
