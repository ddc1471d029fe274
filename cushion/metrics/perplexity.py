"""Perplexity: one column for each corpus.

| column | content |
|---|---|
| `perplexity/<corpus>` | a corpus is a source, a file's name without ending, or a name in `data.further`; none with `eval.perplexity=false` |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

from cushion.metrics.columns import Column, Measured, Metric, Row, Values, parts, register

KEY = "perplexity"


def key_of(corpus: str) -> str:
    """The key of the column of a corpus."""
    return f"{KEY}/{corpus}"


def corpora(rows: Sequence[Row]) -> list[str]:
    """The corpora that any of the rows was measured on, in their order."""
    return list(dict.fromkeys(corpus for row in rows for corpus in parts(row, KEY)))


def _columns(rows: Sequence[Row]) -> list[Column]:
    return [Column(key_of(corpus), f"{KEY} {corpus}", lower_is_better=True) for corpus in corpora(rows)]


def _values(measured: Measured) -> Values:
    return {key_of(corpus): value for corpus, value in measured.perplexity.items()}


register(Metric(KEY, _columns, _values, {KEY: Column(KEY, KEY, lower_is_better=True)}, order=10))
