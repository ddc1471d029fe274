"""The quantization error of texts, `||X - q(X)||^2`, in any format: L_q of the search and of the tuning.

q has one scale for a text, or, in a format of blocks, one for every block of a token's features, and the scale of the
tensor, where there is one, is that of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cushion.config import SearchConfig
from cushion.quantization.formats.blocks import BlockGrid, in_blocks, largest_of
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.numerics import Grid, fake_quantize


def error_grid(config: SearchConfig) -> Grid:
    """The grid of q in L_q."""
    return FORMATS[config.format].make(config.bits, config.symmetric, config.levels)


def error_identity(config: SearchConfig) -> list[Any]:
    """What of the grid of q decides an outcome, for the keys of cached steps."""
    form = FORMATS[config.format]
    levels = config.levels if "levels" in form.reads else None
    return [config.bits, config.symmetric, levels, *([] if config.format == "int" else form.identity())]


def on_scales(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Values with the scales and offsets of q.

    Args:
        values: X, (texts, tokens, features), float32.
        grid: of q.

    Returns:
        X as (texts, 1, values of a text), or (texts, tokens, blocks, values of a block); scales and offsets,
        broadcastable to it. Gradients pass from a scale to the extremes that it follows from; where it is a number of
        few bits, rounding it counts as the identity.

    """
    if not isinstance(grid, BlockGrid):
        flat = values.flatten(1)[:, None]
        low, high = torch.aminmax(flat, dim=2, keepdim=True)
        return flat, *grid.parameters(low, high)
    blocks = in_blocks(values, grid.block)
    largest = largest_of(blocks)
    constant = largest.detach()
    scale = grid.scales(constant, constant.amax((1, 2, 3), keepdim=True))
    slope = torch.where(constant > 0, scale / constant, torch.zeros_like(scale))
    return blocks, scale + (largest - constant) * slope, torch.zeros_like(scale)


def text_errors(values: Tensor, grid: Grid) -> Tensor:
    """`||X - q(X)||^2` of each text.

    Args:
        values: X, (texts, tokens, features).
        grid: of q.

    Returns:
        float32, (texts,).

    """
    shaped, scale, offset = on_scales(values.float(), grid)
    return fake_quantize(shaped, scale, offset, grid).sub_(shaped).square_().flatten(1).sum(1)
