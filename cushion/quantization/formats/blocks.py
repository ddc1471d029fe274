"""Formats of blocks: neighbouring values share a scale that is itself a number of few bits."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from cushion.quantization.formats.floats import FloatGrid
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid, QuantizedWeight, fake_quantize, quantize


class BlockGrid(FloatGrid):
    """The numbers of `element` times the scale of a block of `block` values."""

    block: ClassVar[int]

    @abstractmethod
    def scales(self, largest: Tensor, whole: Tensor) -> Tensor:
        """The scales of blocks.

        Args:
            largest: the largest magnitude of each block, float32.
            whole: the largest magnitude of the tensor that they are a part of, broadcastable to `largest`.

        Returns:
            float32, positive, of the shape of `largest`.

        """

    def parameters(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets (0) of blocks that lie in `[minimum, maximum]`; all of them together are the tensor."""
        largest = torch.maximum(maximum, -minimum)
        return self.scales(largest, largest.amax()), torch.zeros_like(largest)


def in_blocks(values: Tensor, size: int) -> Tensor:
    """`values`, (..., channels), as (..., blocks, size); the last block is filled up with zeros, which decide nothing.

    A view where `size` divides the channels.
    """
    missing = -values.shape[-1] % size
    return (functional.pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, size))


def largest_of(blocks: Tensor) -> Tensor:
    """The largest magnitude of every block, (..., blocks, size) -> (..., blocks, 1), float32."""
    size = blocks.shape[-1]
    rows = blocks.abs().reshape(-1, blocks.shape[-2] * size)
    # not amax, whose kernel for a short last dimension is not vectorized on the CPU
    return functional.max_pool1d(rows[:, None], size).reshape(*blocks.shape[:-1], 1).float()


def fake_quantize_blocks(values: Tensor, grid: BlockGrid, whole: Tensor | None = None) -> Tensor:
    """Quantize and dequantize in blocks along the last dimension.

    Args:
        values: (..., channels), any floating dtype; computed in float32.
        grid: the format.
        whole: the largest magnitude that a tensor scale is made for, a scalar; None for that of `values`.

    Returns:
        A new tensor of the shape and dtype of `values`.

    """
    blocks = in_blocks(values, grid.block)
    largest = largest_of(blocks)
    scale = grid.scales(largest, largest.amax() if whole is None else whole)
    quantized = fake_quantize(blocks, scale, torch.zeros_like(scale), grid).flatten(-2)
    return quantized if quantized.shape == values.shape else quantized[..., : values.shape[-1]].contiguous()


def quantize_weight_in_blocks(weight: Tensor, grid: BlockGrid, whole: Tensor) -> QuantizedWeight:
    """Quantize the weight of a linear layer in blocks of neighbouring inputs.

    Args:
        weight: (out_features, in_features); the blocks divide the inputs.
        grid: the format.
        whole: the largest magnitude that a tensor scale is made for, a scalar.

    """
    blocks = in_blocks(weight, grid.block)
    scale = grid.scales(largest_of(blocks), whole)
    codes = quantize(blocks, scale, torch.zeros_like(scale), grid)
    return QuantizedWeight(codes, scale, None, weight.shape, weight.dtype, whole)


class BlockQuantizer(ActivationQuantizer):
    """Quantize-dequantize in blocks along the last dimension; the scales of blocks follow from every input.

    Args:
        grid: the format.
        static_range: minimum and maximum that the tensor scale is made for, scalars fixed by calibration; None takes
            it from every input.
        straight_through: as in `ActivationQuantizer`.

    """

    def __init__(
        self, grid: BlockGrid, static_range: tuple[Tensor, Tensor] | None = None, straight_through: bool = False
    ) -> None:
        super().__init__(grid, "per_block", None, straight_through)
        self._blocks, self._whole = grid, None
        if static_range is not None:
            low, high = static_range
            self._whole = torch.maximum(high, -low).float()
            self.parameters = self._whole / grid.steps, torch.zeros_like(self._whole)

    def _quantized(self, values: Tensor) -> Tensor:
        return fake_quantize_blocks(values.detach(), self._blocks, self._whole)


def quantizer_of(
    grid: Grid,
    granularity: str,
    static_range: tuple[Tensor, Tensor] | None = None,
    straight_through: bool = False,
    clip_ratio: float = 1.0,
) -> ActivationQuantizer:
    """The quantizer of an input that fits the format; arguments as those of `ActivationQuantizer`."""
    if isinstance(grid, BlockGrid):
        assert clip_ratio == 1, "refused with the configuration"
        return BlockQuantizer(grid, static_range, straight_through)
    return ActivationQuantizer(grid, granularity, static_range, straight_through, clip_ratio)
