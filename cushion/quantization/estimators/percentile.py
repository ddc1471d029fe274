"""The range that holds a given percentage of the values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cushion.quantization.numerics import Grid
from cushion.quantization.statistics.histogram import Histogram


def range_of(observed: Histogram, grid: Grid, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The smallest range that holds `percentile` percent of the values, to within the width of a bin.

    On a symmetric grid the percentile is that of the magnitudes. On an asymmetric one the rest is cut off in equal
    shares from both ends.
    """
    bins = observed.bins()
    outside = 1 - options["percentile"] / 100
    if grid.symmetric:
        threshold = _quantile(torch.maximum(-bins.low, bins.high), bins.counts, 1 - outside)
        low, high = max(observed.minimum, -threshold), min(observed.maximum, threshold)
    else:
        low = -_quantile(-bins.low, bins.counts, 1 - outside / 2)
        high = _quantile(bins.high, bins.counts, 1 - outside / 2)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def _quantile(edges: Tensor, counts: Tensor, share: float) -> float:
    """The upper edge of the first bin up to which at least this share of the values lies; edges in any order."""
    order = edges.argsort()
    up_to = counts[order].cumsum(0)
    rank = min(math.ceil(share * float(up_to[-1]) - 1e-6), int(up_to[-1]))  # 1e-6: 0.9999 of 10 000 is 9999
    return float(edges[order][int((up_to < rank).sum())])
