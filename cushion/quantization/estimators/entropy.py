"""The range whose quantized values are distributed most as the values are: the entropy calibration of TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cushion.quantization.numerics import Grid
from cushion.quantization.statistics.histogram import Histogram

BINS = 2048
"""Bins of equal width between 0 and the largest magnitude."""
START = 128
"""The smallest threshold that is tried, in bins: a sixteenth of the largest magnitude."""


def range_of(observed: Histogram, grid: Grid, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The range cut at the threshold of magnitudes with the smallest Kullback-Leibler divergence.

    The threshold cuts both ends of an asymmetric grid too. A grid has `2^(bits - 1)` levels for magnitudes; where it is
    asymmetric and all values have one sign, it has all its levels for them.
    """
    largest = max(abs(observed.minimum), abs(observed.maximum))
    if largest == 0:
        return torch.zeros(()), torch.zeros(())
    one_sided = observed.minimum >= 0 or observed.maximum <= 0
    levels = grid.steps + 1 if one_sided and not grid.symmetric else 2 ** (grid.bits - 1)
    divergence = divergences(magnitudes(observed, largest), levels)
    last_minimum = len(divergence) - 1 - int(divergence.flip(0).argmin())
    threshold = largest * (START + last_minimum) / BINS
    low, high = max(observed.minimum, -threshold), min(observed.maximum, threshold)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def magnitudes(observed: Histogram, largest: float) -> Tensor:
    """Counts of magnitudes above 0 in bins of equal width, (BINS,), float64.

    The values of a bin of the histogram, which may be as wide as eight of these, are spread evenly up to its upper
    edge, so that the largest one stays where it is, and a bin is empty where values are rare.
    """
    bins = observed.bins()
    edges = largest * torch.arange(BINS + 1, dtype=torch.float64) / BINS
    positive = bins.high > 0
    up_to = _up_to(edges, bins.low[positive], bins.high[positive], bins.counts[positive])
    negative = ~positive
    low, high, counts = (of[negative].flip(0) for of in (-bins.high, -bins.low, bins.counts))
    return (up_to + _up_to(edges, low, high, counts)).diff()


def _up_to(edges: Tensor, low: Tensor, high: Tensor, counts: Tensor) -> Tensor:
    """How many values lie at or below each edge, of bins that ascend and do not overlap."""
    if not len(counts):
        return torch.zeros_like(edges)
    ends = torch.stack([low, high], dim=1).flatten()
    total = counts.cumsum(0)
    totals = torch.stack([total - counts, total], dim=1).flatten()
    after = torch.searchsorted(ends, edges, right=True)
    left, right = (after - 1).clamp(min=0), after.clamp(max=len(ends) - 1)
    share = ((edges - ends[left]) / (ends[right] - ends[left])).nan_to_num(0.0, 0.0, 0.0)
    found = torch.where(after == 0, 0, totals[left] + share * (totals[right] - totals[left]))
    return (found + 1e-6).floor()  # 1e-6: of rounding


def divergences(counts: Tensor, levels: int) -> Tensor:
    """The divergence of every threshold from START to all bins, as a number of bins.

    What is compared: the bins below the threshold, those above it added to the last one; and the same bins cut into as
    many groups as there are levels, each of them the mean of its group, empty bins left out. Sums over groups are
    differences of cumulative sums. The first bin gets the count of the second, so that zeros decide nothing. A
    threshold after an empty bin is infinitely bad: what it clips would lie where nothing does.
    """
    counts = torch.cat([counts[1:2], counts[1:]])
    counts = counts / counts.sum()
    sizes = torch.arange(START, BINS + 1)
    group_edges = -(-torch.arange(levels + 1) * sizes[:, None] // levels)  # the first bin of each group, rounded up
    sums, held, entropies = (
        torch.cat([torch.zeros(1, dtype=torch.float64), of.double().cumsum(0)])
        for of in (counts, counts > 0, torch.xlogy(counts, counts))
    )
    group_sums, group_held = sums[group_edges].diff(dim=1), held[group_edges].diff(dim=1)
    means = group_sums / group_held.clamp(min=1)
    below, last = sums[sizes], counts[sizes - 1]
    clipped = 1 - below
    last_group = ((sizes - 1) * levels // sizes)[:, None]
    own = entropies[sizes - 1] + torch.xlogy(last + clipped, last + clipped)
    grouped = torch.xlogy(group_sums, means).sum(1) + torch.xlogy(clipped, means.gather(1, last_group)[:, 0])
    return torch.where(last > 0, own - grouped + below.log(), torch.inf)
