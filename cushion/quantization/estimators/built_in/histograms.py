"""Estimators from the histogram of a linear's input."""

from __future__ import annotations

from cushion.quantization.estimators.base import Estimator, number
from cushion.quantization.estimators.registry import register

_HISTOGRAM = "cushion.quantization.statistics.histogram:Histogram"

register(
    Estimator(
        name="percentile",
        title="percentile",
        statistic=_HISTOGRAM,
        range="cushion.quantization.estimators.percentile:range_of",
        options={"percentile": number(99.99, above=50, at_most=100)},
    )
)
register(
    Estimator(
        name="mse",
        title="MSE",
        statistic=_HISTOGRAM,
        range="cushion.quantization.estimators.mse:range_of",
        rounds=True,
    )
)
register(
    Estimator(
        name="entropy",
        title="entropy",
        statistic=_HISTOGRAM,
        range="cushion.quantization.estimators.entropy:range_of",
        rounds=True,
        equal_steps=True,
    )
)
