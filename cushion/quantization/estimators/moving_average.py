"""The range that a moving average over the texts has come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cushion.quantization.numerics import Grid
from cushion.quantization.statistics.moving_ranges import MovingRanges


def range_of(observed: MovingRanges, grid: Grid, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The running minimum and maximum, whatever the grid."""
    low, high = torch.tensor([observed.minimum, observed.maximum], dtype=torch.float32)
    return low, high
