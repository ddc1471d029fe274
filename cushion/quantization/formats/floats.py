"""Small floating-point numbers: how a value is rounded to one, and the grid of FP8 scales.

E4M3 and E5M2 are those of the OCP 8-bit Floating Point Specification 1.0, E2M3 and E2M1 those of the OCP Microscaling
Formats Specification 1.0 (section 5.3). Values beyond the largest one become the largest one, infinity too: that is the
saturating conversion of both texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cushion.quantization.numerics import Grid

_MANTISSA = 23
"""Bits of the mantissa of float32."""
_EXPONENT_MASK = 0x7F800000


@dataclass(frozen=True)
class Element:
    """A floating-point number of few bits: a sign, exponent bits, mantissa bits, and subnormal numbers.

    Args:
        exponent: bits of the exponent; its bias is `2^(exponent - 1) - 1`.
        mantissa: bits of the mantissa.
        largest: the largest number T; some codes above it are infinity or not a number.

    """

    exponent: int
    mantissa: int
    largest: float

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - int(2 ** (self.exponent - 1))

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest number: `emax` in the Microscaling specification."""
        return int(torch.tensor(self.largest).frexp().exponent) - 1


E4M3 = Element(4, 3, 448.0)
E5M2 = Element(5, 2, 57344.0)
E2M3 = Element(2, 3, 7.5)
E3M2 = Element(3, 2, 28.0)
E2M1 = Element(2, 1, 6.0)


def round_to_float(values: Tensor, exponent: int, mantissa: int, largest: float) -> Tensor:
    """The nearest numbers with so many bits, ties to even, as a new float32 tensor.

    Args:
        values: float32, any shape. What is not a number stays so.
        exponent: bits of the exponent, 2 to 5.
        mantissa: bits of the mantissa, 1 to 3.
        largest: T: what lies outside of -T to T becomes the nearer of the two.

    """
    return round_in_place(values.float().clone(), Element(exponent, mantissa, largest))


def round_in_place(values: Tensor, element: Element) -> Tensor:
    """`round_to_float` of a float32 tensor, which is changed."""
    values.clamp_(-element.largest, element.largest)
    # 1.5 * 2^(E + 23 - m) with E the exponent of a value: a float32 of that size has the spacing 2^(E - m), so that
    # adding it rounds the value to m bits behind its first, ties to even, and taking it off again is exact
    anchor = values.view(torch.int32).bitwise_and(_EXPONENT_MASK)
    anchor.clamp_(min=(element.smallest_exponent + 127) << _MANTISSA)
    anchor.add_(((_MANTISSA - element.mantissa) << _MANTISSA) + (1 << (_MANTISSA - 1)))
    shift = anchor.view(torch.float32)
    return values.add_(shift).sub_(shift)


class FloatGrid(Grid):
    """The numbers of `element` times a scale that is free: `s = max |X| / T`, without offset."""

    element: ClassVar[Element]

    @property
    def steps(self) -> float:  # type: ignore[override]
        """T, the largest number: the end of the range stands for it."""
        return self.element.largest

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        """-T and T."""
        return -self.element.largest, self.element.largest

    def rounded(self, units: Tensor) -> Tensor:
        """The nearest numbers, ties to even, beyond T the largest; changes `units` in place."""
        return round_in_place(units, self.element)


class Fp8E4M3(FloatGrid):
    """FP8 with more mantissa: up to 448, no infinity."""

    element = E4M3


class Fp8E5M2(FloatGrid):
    """FP8 with more exponent: up to 57344."""

    element = E5M2
