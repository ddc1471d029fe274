"""The range with the smallest expected squared quantization error, what is clipped included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.statistics.histogram import Bins, Histogram

_SYMMETRIC = 256, 32
"""First fractions 2^(-k / 32) of the range, k below 256: down to 1 / 250."""
_ASYMMETRIC = 32, 4
"""First fractions 2^(-k / 4) of either side, k below 32: down to 1 / 215."""
_FINEST = 128
"""The search ends among neighbours that differ by 2^(1 / 128), 0.5 %."""
_KEPT = 8
"""Ranges whose neighbours are tried: the error has many local minima, one for every place of the center on the grid."""
_COARSE = 64
"""Bins of an octave for the first ranges of an asymmetric grid, of which there are many."""


def range_of(observed: Histogram, grid: Grid, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The best of the ranges that are searched: fractions of the observed one, then neighbours of the best few.

    On a symmetric grid both ends shrink together, towards 0. On an asymmetric one each end has a fraction of its own,
    and they shrink towards the median; each range is tried as it is, and moved by half a step at most so that the
    median is a point of the grid, without which a coarse grid moves all ordinary values.
    """
    bins = observed.bins()
    largest = max(abs(observed.minimum), abs(observed.maximum))
    if largest == 0:
        return torch.zeros(()), torch.zeros(())
    ends = torch.tensor([observed.minimum, observed.maximum], dtype=torch.float64) / largest
    values, weights = bins.middle / largest, bins.counts
    if grid.symmetric:
        count, step = _SYMMETRIC
        fractions = (2.0 ** -(torch.arange(count, dtype=torch.float64) / step))[:, None]
        center = torch.zeros((), dtype=torch.float64)
        best = _best(fractions * ends, values, weights, grid)
    else:
        count, step = _ASYMMETRIC
        center = _median(bins) / largest
        fractions = _pairs(2.0 ** -(torch.arange(count, dtype=torch.float64) / step))
        first = center + (ends - center) * fractions
        if grid.zero_point == "real":
            first = torch.cat([first, _on_grid(first, center, grid)])
        merged, counts = _merged(bins)
        best = _best(first, merged / largest, counts, grid)
    while step < _FINEST:
        step *= 2
        factors = 2.0 ** (torch.tensor([0.0, -2.0, -1.0, 1.0, 2.0], dtype=torch.float64) / step)
        around = factors[:, None] if grid.symmetric else _pairs(factors)
        near = (center + (best[:, None] - center) * around).flatten(0, 1)
        best = _best(near, values, weights, grid)
    low, high = (best[0] * largest).float()
    return low, high


def _best(ranges: Tensor, values: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """The few ranges, (candidates, 2), with the smallest error, ascending by it."""
    low, high = ranges.float().T[..., None]
    scale, offset = grid.parameters(low, high)
    values, weights = values.float(), (weights / weights.sum()).float()
    parts = []
    for some in range(0, len(ranges), 64):  # temporaries that fit a cache
        part = slice(some, some + 64)
        difference = fake_quantize(values[None], scale[part], offset[part], grid).sub_(values)
        parts.append(difference.square_() @ weights)
    return ranges[torch.cat(parts).sort(stable=True).indices[:_KEPT]]


def _on_grid(ranges: Tensor, center: Tensor, grid: Grid) -> Tensor:
    """The ranges moved so that the center is a point of the grid."""
    low, high = ranges.T
    step = (high - low) / grid.steps
    below = torch.where(step > 0, (center - low) / step, 0).round()
    low = center - below * step
    return torch.stack([low, low + grid.steps * step], dim=1)


def _merged(bins: Bins) -> tuple[Tensor, Tensor]:
    """Mean values and counts of bins of which an octave has `_COARSE` only."""
    mantissas, exponents = bins.middle.frexp()  # magnitudes of mantissas: 0.5 to 1
    places = torch.stack([exponents.double(), (mantissas * 2 * _COARSE).trunc()])
    group = places.unique_consecutive(return_inverse=True, dim=1)[1]
    sums = torch.zeros(2, int(group[-1]) + 1, dtype=torch.float64)
    sums.index_add_(1, group, torch.stack([bins.middle * bins.counts, bins.counts]))
    return sums[0] / sums[1], sums[1]


def _pairs(steps: Tensor) -> Tensor:
    """Every pair of them, (candidates, 2): of the lower end and of the upper."""
    return torch.cartesian_prod(steps, steps)


def _median(bins: Bins) -> Tensor:
    up_to = bins.counts.cumsum(0)
    return bins.middle[int((up_to < up_to[-1] / 2).sum())]
