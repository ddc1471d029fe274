"""Perplexity with the prefix as tokens that quantized linears read, and how many linears had to keep their input.

| column | content |
|---|---|
| `prefix_as_tokens/<corpus>`, `prefix_as_tokens_kept` | with `eval.prefix_as_tokens`: perplexity with the prefix as tokens that run through the quantized linears, and the number of linears that keep their input in full precision for it ([method.md](method.md#the-prefix-as-tokens)) |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cushion.metrics.columns import Column, Metric, Place, Row, Values, parts, register

_PLACES = frozenset({Place.FURTHER, Place.REPORT, Place.TRACKER_TABLE, Place.TRACKER_ROW, Place.RUN})
_TABLE = "prefix as tokens"
_PERPLEXITY = Column("prefix_as_tokens", "perplexity", lower_is_better=True, places=_PLACES, table=_TABLE)
"""Of every corpus; in `values` its name stands behind the key."""
_KEPT = Column(
    "prefix_as_tokens_kept",
    "linears with full-precision input",
    format=lambda value: f"{value:.0f}",
    places=_PLACES,
    table=_TABLE,
)
_WITH_TABLE = (Place.REPORT, Place.TRACKER_TABLE)
"""Where no heading of a table stands above the column."""


def values_of(perplexity: Mapping[str, float], kept: int) -> Values:
    """The values of a row.

    Args:
        perplexity: by corpus.
        kept: how many linears keep their input in full precision for the prefix's sake.

    """
    return {**{f"{_PERPLEXITY.key}/{corpus}": value for corpus, value in perplexity.items()}, _KEPT.key: float(kept)}


def _columns(rows: Sequence[Row]) -> list[Column]:
    corpora = list(dict.fromkeys(corpus for row in rows for corpus in parts(row, _PERPLEXITY.key)))
    if not corpora:
        return []
    found = [
        replace(_PERPLEXITY, key=f"{_PERPLEXITY.key}/{corpus}", title=f"{_PERPLEXITY.title} {corpus}")
        for corpus in corpora
    ]
    return [
        replace(column, titles=dict.fromkeys(_WITH_TABLE, f"{column.title}, {_TABLE}")) for column in (*found, _KEPT)
    ]


register(Metric("prefix_as_tokens", _columns, order=75, measure="cushion.evaluation.prefix_as_tokens:measure"))
