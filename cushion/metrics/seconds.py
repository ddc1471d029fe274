"""What a row cost in all, as first computed, also where the cache had it.

| column | content |
|---|---|
| `seconds` | finding and tuning the prefix, calibrating, choosing linears by QFeM, reconstruction and evaluating |
"""

from __future__ import annotations

from collections.abc import Sequence

from cushion.metrics.columns import EVERYWHERE, Column, Measured, Metric, Place, Row, Values, register

_SECONDS = Column(
    "seconds",
    "seconds",
    format=lambda value: f"{value:.0f}",
    lower_is_better=True,
    places=EVERYWHERE - {Place.RUN},
)


def _columns(_: Sequence[Row]) -> list[Column]:
    return [_SECONDS]


def _values(measured: Measured) -> Values:
    return {_SECONDS.key: measured.seconds}


register(Metric("seconds", _columns, _values, {_SECONDS.key: _SECONDS}, order=90))
