"""How many of the positions that get the most attention are the prefix's (the sink tokens of KVSink, arXiv 2508.04257).

Where it is all of them, the text has no sink of its own that a quantized cache would have to protect.

| column | content |
|---|---|
| `sinks_in_prefix` | how many of the top-5 sinks are positions of the row's prefix ([method.md](method.md#attention)); only in rows that have one, where attention is measured |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

from cushion.metrics.columns import EVERYWHERE, Column, Measured, Metric, Place, Row, Values, register

_SINKS = Column(
    "sinks_in_prefix",
    "of the top-5 sinks, in the prefix",
    format=lambda value: f"{value:.3g}",
    places=EVERYWHERE - {Place.COMPARISON, Place.SWEEP},
    note="sinks: the five positions that get the most attention in the full-precision model, mean over texts",
)


def _columns(rows: Sequence[Row]) -> list[Column]:
    return [_SINKS] if any(_SINKS.key in row["values"] for row in rows) else []


def _values(measured: Measured) -> Values:
    count = measured.attention.get("sinks_in_prefix")  # None without a prefix
    return {} if count is None else {_SINKS.key: count}


register(Metric("sinks_in_prefix", _columns, _values, {_SINKS.key: _SINKS}, order=31))
