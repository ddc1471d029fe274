"""MX: blocks of 32 numbers with one scale `2^k` (OCP Microscaling Formats Specification 1.0).

The specification leaves open how k follows from the largest magnitude of a block, `f * 2^E` with `1 <= f < 2`, beyond
the conversion that it recommends (section 6.3): `k = E - emax`. The rules in use add 1 to it where f is large:

- `floor`: never; numbers above T become T.
- `even`: from `2 - 2^(-m-1)` on, which rounds to the next power of two with m bits of mantissa.
- `ceil`: above 1.
- `rceil`: where otherwise the largest would be above T; `k = ceil(log2(max / T))`.

k lies between -127 and 127, as E8M0 has it; a block of zeros has the smallest scale. A block in which something is not
a number keeps its other values, where the specification has no value for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cushion.quantization.formats.blocks import BlockGrid
from cushion.quantization.formats.floats import E2M1, E2M3, E4M3, Element

_ONE = 1 << 23
"""The exponent of a float32, as its bits have it, is counted in these; below them is `f - 1`."""
_SMALLEST = 1 << 22
"""The bits of 2^-127."""


def power_of_two_scale(largest: Tensor, element: Element, rule: str) -> Tensor:
    """The scale `2^k` of each block.

    Args:
        largest: the largest magnitude of each block, float32, not negative.
        element: the numbers of the block.
        rule: `floor`, `even`, `ceil` or `rceil`, as explained at the head of this file.

    """
    # the bits of f - 1 from which on 1 is added to the exponent
    top = element.largest / 2**element.largest_exponent
    threshold = {
        "floor": _ONE,
        "even": _ONE - (_ONE >> (element.mantissa + 1)),
        "ceil": 1,
        "rceil": int((top - 1) * _ONE) + 1,
    }[rule]
    bits = largest.view(torch.int32) + (_ONE - threshold)
    bits.bitwise_and_(0x7F800000).sub_(element.largest_exponent * _ONE).clamp_(min=_SMALLEST)
    return bits.view(torch.float32)


@dataclass(frozen=True)
class MxGrid(BlockGrid):
    """The grid of a block of 32.

    Args:
        shared_exponent: the rule by which k follows.

    """

    shared_exponent: str = "rceil"

    block: ClassVar[int] = 32

    def scales(self, largest: Tensor, whole: Tensor) -> Tensor:
        """Powers of two; there is no scale of the tensor."""
        return power_of_two_scale(largest, self.element, self.shared_exponent)


class Mxfp8(MxGrid):
    """Of E4M3."""

    element = E4M3


class Mxfp6(MxGrid):
    """Of E2M3."""

    element = E2M3


class Mxfp4(MxGrid):
    """Of E2M1."""

    element = E2M1
