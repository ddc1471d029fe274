"""Comparisons with full precision as cells: value and interval, and what is within its error, one by one and together.

A table that compares many rows finds some of them different by chance: the p-values of all its comparisons are
corrected together by Holm's procedure (1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cushion.hashing import digest
from cushion.intervals import Interval, holm
from cushion.metrics.columns import Row
from cushion.reporting.collect import Run
from cushion.reporting.grid import NONE, Cell
from cushion.reporting.lines import contents
from cushion.reporting.measures import Measure, over_seeds

WITHIN = "within error"
WITHIN_TOGETHER = "within error by Holm"
DIFFERENT = "different"


def with_interval(value: float, ends: tuple[float, float], neutral: float, written: Callable[[float], str]) -> str:
    """A value with its interval in words, `1.002 [0.991, 1.013], within error`."""
    low, high = ends
    text = f"{written(value)} [{written(low)}, {written(high)}]"
    return f"{text}, {WITHIN}" if low <= neutral <= high else text


def comparison(interval: Interval, neutral: float, written: Callable[[float], str], seeds: int, asked: int) -> Cell:
    """A comparison over the seeds of a configuration; `seeds` of the `asked` have it."""
    of = f"{seeds} of {asked}" if seeds < asked else ""
    text = with_interval(interval.value, (interval.low, interval.high), neutral, written)
    verdict = WITHIN if interval.low <= neutral <= interval.high else DIFFERENT
    return Cell(
        f"{text} ({of} seeds)" if of else text,
        value=interval.value,
        error=interval.stderr,
        seeds=of,
        low=interval.low,
        high=interval.high,
        p=interval.p,
        verdict=verdict,
    )


def measured(measure: Measure, rows: Sequence[tuple[Run, Row]], asked: int) -> Cell:
    """A measure of the same row of runs that differ in their seed, of how many that were asked for.

    A comparison has its interval; what has none is mean and deviation, or the value of one seed with its error.
    """
    there = [(run, row) for run, row in rows if measure.read(run, row) is not None]
    if not there:
        return Cell(NONE)
    if measure.over_seeds is not None and measure.neutral is not None:
        interval = measure.over_seeds(there)
        if interval is not None:
            cell = comparison(interval, measure.neutral, measure.format, len(there), asked)
            return replace(cell, compared=digest([there[0][0].model, contents(there)], 16))
    values = [value for run, row in there if (value := measure.read(run, row)) is not None]
    return over_seeds(values, measure.format, measure.error(*there[0]), asked)


def judged(body: Sequence[Sequence[Cell]]) -> tuple[list[list[Cell]], list[str]]:
    """The lines of a table with its comparisons corrected together, and a note on them; none without comparisons.

    What stands in several lines, as the row without a prefix does in a sweep over prefixes, is one comparison. A table
    with a single one has nothing to correct: the interval alone says whether it is within its error.
    """
    distinct = {
        _distinct(column, cell): cell.p for line in body for column, cell in enumerate(line) if cell.p is not None
    }
    if not distinct:
        return [list(line) for line in body], []
    found = holm(list(distinct.values())) if len(distinct) > 1 else [True]
    together = dict(zip(distinct, found, strict=True))
    lines = [
        [
            _marked(cell) if cell.verdict == DIFFERENT and not together[_distinct(column, cell)] else cell
            for column, cell in enumerate(line)
        ]
        for line in body
    ]
    note = (
        "[ ] is the 95 % interval of a comparison with full precision with the same prefix in the same run: from three "
        "seeds on over seeds and blocks (records) of text, with fewer over blocks (records) alone. Comparisons in this "
        f"table: {len(distinct)}. It says {WITHIN} where the interval holds no difference, and {WITHIN_TOGETHER} where "
        "it does not and all comparisons tested together at 5 % (Holm) find none."
    )
    return lines, [note]


def mark_best(body: list[list[Cell]], lines: Sequence[int], measures: Sequence[Measure], first: int) -> None:
    """Mark the best value of each measure among some lines of a table, in place; equal ones all, and none among one.

    Args:
        body: the lines of the table.
        lines: which of them are compared.
        measures: the measures of its columns from `first` on.
        first: the first column with a measure.

    """
    for column, measure in enumerate(measures, start=first):
        there = {line: value for line in lines if (value := body[line][column].value) is not None}
        if measure.lower_is_better is None or len({body[line][column].text for line in there}) < 2:
            continue
        best = (min if measure.lower_is_better else max)(there.values())
        for line, value in there.items():
            if measure.format(value) == measure.format(best):
                body[line][column] = replace(body[line][column], best=True)


def _distinct(column: int, cell: Cell) -> tuple[Any, ...]:
    """What another cell must have to be the same comparison: equal numbers alone may be of another row."""
    return column, cell.compared, cell.value, cell.low, cell.high, cell.p


def _marked(cell: Cell) -> Cell:
    return replace(cell, text=f"{cell.text}, {WITHIN_TOGETHER}", verdict=WITHIN_TOGETHER)
