"""NVFP4: blocks of 16 E2M1 numbers, an E4M3 scale for each block and a float32 scale for the tensor.

As NVIDIA describes it for Blackwell ("Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 2 and
appendix C): with t the scale of the tensor and b that of a block, a value is `b t` times an E2M1 number,

    t = max |X| / (448 * 6)        b = E4M3(max |block| / 6 / t)

so that the largest block has the largest scale, 448. A scale that would round to 0 is the smallest E4M3 number, 2^-9.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cushion.quantization.formats.blocks import BlockGrid
from cushion.quantization.formats.floats import E2M1, E4M3, round_in_place

_SMALLEST = 2.0**-9


def tensor_scale(whole: Tensor) -> Tensor:
    """t, from the largest magnitude of the tensor, float32; 1 where all is zero."""
    scale = whole / (E4M3.largest * E2M1.largest)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def block_scale(largest: Tensor, whole_scale: Tensor) -> Tensor:
    """b, from the largest magnitude of each block and t, float32, an E4M3 number above 0; 448 for any larger."""
    return round_in_place(largest / E2M1.largest / whole_scale, E4M3).clamp_(min=_SMALLEST)


class Nvfp4(BlockGrid):
    """The grid of NVFP4."""

    element = E2M1
    block: ClassVar[int] = 16

    def scales(self, largest: Tensor, whole: Tensor) -> Tensor:
        """`b t`."""
        own = tensor_scale(whole)
        return block_scale(largest, own) * own
