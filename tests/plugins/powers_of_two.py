"""A number format in one file: 0 and plus or minus powers of two (arXiv 1702.03044), which need no multiplier."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.quantization.formats.base import Format
from cushion.quantization.formats.registry import register
from cushion.quantization.numerics import Grid


class PowersOfTwo(Grid):
    """Codes 0, +-1, +-2, +-4, ... of which the largest stands for the end of the range."""

    @property
    def steps(self) -> int:
        """The largest code: there are 2^(bits - 1) - 1 powers of either sign."""
        return int(2 ** (2 ** (self.bits - 1) - 2))

    def rounded(self, units: Tensor) -> Tensor:
        """The nearest code: 1.5 goes to 2, 3 to 4, and below 0.5 all is 0."""
        size = units.abs().clamp(max=self.steps)
        power = 2 ** torch.floor(torch.log2(size.clamp(min=0.5) * 4 / 3))
        return torch.where(size < 0.5, 0, power.clamp(min=1)) * units.sign()


register(
    Format(
        name="powers_of_two",
        title="powers of two",
        grid=f"{__name__}:PowersOfTwo",
        bits=(3, 4),
        symmetric_only=True,
    )
)
