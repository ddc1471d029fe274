"""What a number format is: a light declaration, named by the `format` of a part of a quantizer, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cushion.registry import located

if TYPE_CHECKING:
    from cushion.quantization.numerics import Grid

SHARED_EXPONENTS = ("floor", "even", "ceil", "rceil")
"""The rules by which the shared exponent of an MX block follows from its largest magnitude."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """The declaration of a format.

    Args:
        name: the value of `format`.
        title: how it is called in texts.
        grid: `module:Class` of a `cushion.quantization.numerics.Grid`, or of a class derived from it: what scale and
            offset a range has, and which codes there are. Of a format of blocks it is a
            `cushion.quantization.formats.blocks.BlockGrid`.
        bits: the widths that it has.
        symmetric_only: whether it has no offset.
        equal_steps: whether neighbouring codes are equally far apart.
        reads: which of the keys that formats have in common it reads: `levels`, `zero_point`, `shared_exponent`.
        block: how many neighbouring values share a scale, where the format fixes it; None where scales are free.
        tensor_scale: whether a format of blocks has a scale for the whole tensor too, which can be calibrated.
        shared_exponent: the rule of MX scales by default; None for other formats.

    """

    name: str
    title: str
    grid: str
    bits: Sequence[int]
    symmetric_only: bool = False
    equal_steps: bool = True
    reads: tuple[str, ...] = ("levels", "zero_point")
    block: int | None = None
    tensor_scale: bool = False
    shared_exponent: str | None = None

    def make(
        self,
        bits: int,
        symmetric: bool,
        levels: str = "full",
        zero_point: str = "real",
        shared_exponent: str | None = None,
    ) -> Grid:
        """The grid of a quantizer's part; what the format does not read has no effect.

        Args:
            bits: one of its widths.
            symmetric: whether the offset is 0.
            levels, zero_point: as in `Grid`.
            shared_exponent: the rule of MX scales; None for the format's own.

        """
        levels = levels if "levels" in self.reads else "full"
        zero_point = zero_point if "zero_point" in self.reads else "real"
        own = {} if self.shared_exponent is None else {"shared_exponent": shared_exponent or self.shared_exponent}
        return cast("Grid", located(self.grid)(bits, symmetric, levels, zero_point, **own))

    def identity(self) -> list[str]:
        """Name, place, code, and MX's rule of scales, for the keys of cached steps."""
        from cushion.code import version_at  # not needed for --help or a refused configuration

        own = [] if self.shared_exponent is None else [self.shared_exponent]
        return [self.name, self.grid, version_at(self.grid), *own]
