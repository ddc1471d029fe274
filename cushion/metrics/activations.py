"""Activations of the full-precision model behind a row's prefix: the largest magnitude, and L_q."""

from __future__ import annotations

from collections.abc import Sequence

from cushion.metrics.columns import Column, Measured, Metric, Place, Row, Values, register

_LARGEST = Column(
    "largest_activation",
    "largest activation",
    format=lambda value: f"{value:.1f}",
    lower_is_better=True,
    titles={Place.TRACKER_TABLE: "largest_activation"},
)
_ERROR = Column(
    "quantization_error",
    "L_q",
    format=lambda value: f"{value:.3g}",
    lower_is_better=True,
    titles={Place.TRACKER_TABLE: "quantization_error"},
)


def _columns(_: Sequence[Row]) -> list[Column]:
    return [_LARGEST, _ERROR]


def _values(measured: Measured) -> Values:
    return {_LARGEST.key: measured.largest_activation, _ERROR.key: measured.quantization_error}


register(Metric("activations", _columns, _values, {column.key: column for column in (_LARGEST, _ERROR)}, order=30))
