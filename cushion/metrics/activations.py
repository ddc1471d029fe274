"""Activations of the full-precision model behind a row's prefix: magnitudes, and L_q.

`last_block_*` are what CushionCache's Table 5 has: |X| at the input of the last decoder block, averaged over texts.
`worst_block_*` are the same at the block whose top-1 is largest without a prefix, whichever prefix the row has.

| column | content |
|---|---|
| `largest_activation` | the largest magnitude at any block's input in any text, full-precision model behind this row's prefix |
| `quantization_error` | L_q, likewise |
| `last_block_top1`, `last_block_top10_percent`, `last_block_median` | magnitudes at the input of the last block, likewise, averaged over texts (CushionCache, Table 5) |
| `worst_block_top1`, `worst_block_top10_percent`, `worst_block_median` | the same at the block whose `top1` is largest without a prefix, whichever prefix the row has |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from cushion.metrics.columns import EVERYWHERE, Column, Measured, Metric, Place, Row, Values, register

_LARGEST = Column(
    "largest_activation",
    "largest activation",
    format=lambda value: f"{value:.1f}",
    lower_is_better=True,
    places=EVERYWHERE - {Place.SWEEP},
    titles={Place.TRACKER_TABLE: "largest_activation"},
)
_ERROR = Column(
    "quantization_error",
    "L_q",
    format=lambda value: f"{value:.3g}",
    lower_is_better=True,
    places=EVERYWHERE - {Place.SWEEP},
    titles={Place.TRACKER_TABLE: "quantization_error"},
)
_STATISTICS = {"top1": "top-1", "top10_percent": "top 10 %", "median": "median"}
"""Of a `MagnitudeCurve`."""
_BLOCKS = {"last": "last block", "worst": "worst block"}
_MAGNITUDES = {
    (block, statistic): Column(f"{block}_block_{statistic}", f"{title}, {where}", places=frozenset({Place.TRACKER_ROW}))
    for (block, where), (statistic, title) in product(_BLOCKS.items(), _STATISTICS.items())
}
"""In published tables and in a tracker's final numbers: as columns of the comparison they would be too many."""


def _columns(_: Sequence[Row]) -> list[Column]:
    return [_LARGEST, _ERROR, *_MAGNITUDES.values()]


def _values(measured: Measured) -> Values:
    values: Values = {_LARGEST.key: measured.largest_activation, _ERROR.key: measured.quantization_error}
    places = {"last": -1, "worst": measured.worst_block}
    for (block, statistic), column in _MAGNITUDES.items():
        if statistic in measured.magnitudes:
            values[column.key] = measured.magnitudes[statistic][places[block]]
    return values


_ALL = (_LARGEST, _ERROR, *_MAGNITUDES.values())
register(Metric("activations", _columns, _values, {column.key: column for column in _ALL}, order=30))
