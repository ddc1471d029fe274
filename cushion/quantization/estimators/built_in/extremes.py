"""Estimators from the extremes of texts."""

from __future__ import annotations

from cushion.quantization.estimators.base import Estimator, number
from cushion.quantization.estimators.registry import register

register(Estimator(name="minmax", title="min-max"))
register(
    Estimator(
        name="moving_average",
        title="moving average",
        statistic="cushion.quantization.statistics.moving_ranges:MovingRanges",
        range="cushion.quantization.estimators.moving_average:range_of",
        options={"averaging": number(0.01, above=0, at_most=1)},
        gathers=("averaging",),
    )
)
