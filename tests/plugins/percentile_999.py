"""A range estimator in one file: the 99.9th percentile of the magnitudes of a linear's input."""

from __future__ import annotations

from typing import Any

from cushion.quantization.estimators.base import Estimator
from cushion.quantization.estimators.registry import register

SHARE = 0.999


def range_of(observed: Any, grid: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The range that holds this share of the values, symmetric around 0; of a `Histogram`."""
    import torch  # only here: a configuration is checked without it

    bins = observed.bins()
    edges, order = torch.maximum(-bins.low, bins.high).sort()
    up_to = bins.counts[order].cumsum(0)
    end = edges[int((up_to < SHARE * up_to[-1]).sum())].float()
    return -end, end


register(
    Estimator(
        name="percentile_999",
        title="99.9th percentile",
        statistic="cushion.quantization.statistics.histogram:Histogram",
        range=f"{__name__}:range_of",
    )
)
