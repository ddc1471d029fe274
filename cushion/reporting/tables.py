"""The comparison of a run as plain-text tables, from result.json alone: columns as the metrics declare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cushion.metrics.columns import Column, Place, columns
from cushion.reporting.comparisons import with_interval


def comparison_table(result: dict[str, Any]) -> str:
    """The rows of a result, one line each."""
    return _table("", result["rows"], columns(result["rows"], Place.COMPARISON), Place.COMPARISON)


def further_tables(result: dict[str, Any]) -> list[str]:
    """The tables of the metrics that have too many columns for the comparison; none without such numbers."""
    by_heading: dict[str, list[Column]] = {}
    for column in columns(result["rows"], Place.FURTHER):
        by_heading.setdefault(column.table or "", []).append(column)
    return [_table(heading, result["rows"], there, Place.FURTHER) for heading, there in by_heading.items()]


def _table(heading: str, rows: Sequence[dict[str, Any]], shown: Sequence[Column], place: Place) -> str:
    lines = [[row["label"], *(cell_text(column, row, place) for column in shown)] for row in rows]
    notes = dict.fromkeys(column.note for column in shown if column.note)
    return "\n".join([aligned([[heading, *(column.named(place) for column in shown)], *lines]), *notes])


def cell_text(column: Column, row: dict[str, Any], place: Place) -> str:
    """The value of a row in a place, with its interval or its standard error where it has one; `-` without a value."""
    value, error, written = column.shown(row), column.shown_error(row), column.written(place)
    if value is None:
        return "-"
    ends = column.shown_interval(row)
    if ends is not None and column.neutral is not None:
        return with_interval(value, ends, column.neutral, written)
    return written(value) if error is None else f"{written(value)} ± {written(error)}"


def aligned(lines: list[list[str]]) -> str:
    """Columns of one width each, the first to the left and the others to the right, a rule under the first line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def text(line: list[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return "\n".join([text(lines[0]), "  ".join("-" * width for width in widths), *map(text, lines[1:])])
