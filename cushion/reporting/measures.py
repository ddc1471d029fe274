"""What can be read off a result: each measure by name, with its title, and how its numbers are written.

A measure that a result does not have is None, never zero: an older or a failed run shows as not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from cushion.intervals import Interval
from cushion.metrics.columns import Column, Place, Row, comparing, metrics, parts
from cushion.reporting.collect import Run
from cushion.reporting.grid import Cell

MISSING = Cell("missing", kind="missing")
FAILED = Cell("failed", kind="failed")


_COSTS = ("seconds",)
"""What a row took to compute is no merit of it: the cheapest row is not the best one."""


@dataclass(frozen=True)
class Measure:
    """A number of a row of a run: `read(run, row)` gives it, or None where it was not measured."""

    title: str
    read: Callable[[Run, Row], float | None]
    format: Callable[[float], str]
    error: Callable[[Run, Row], float | None] = lambda run, row: None
    """Reads the standard error of the number, in its unit; None where there is none."""
    over_seeds: Callable[[Sequence[tuple[Run, Row]]], Interval | None] | None = None
    """Of a comparison: reads it with its interval off the same row of runs that differ in their seed, in its unit."""
    neutral: float | None = None
    """Of a comparison: the value of no difference."""
    comparison: Callable[[Row], Column | None] = lambda row: None
    """The column that compares the number with full precision with the same prefix; None in a row without."""
    lower_is_better: bool | None = None
    """None where no value is better than another."""


def measure_of(column: Column) -> Measure:
    """A column of the rows as a measure."""
    return Measure(
        column.named(Place.REPORT),
        lambda _, row: column.shown(row),
        column.written(Place.REPORT),
        lambda _, row: column.shown_error(row),
        _comparison_of(column),
        column.neutral,
        lower_is_better=None if column.key in _COSTS else column.lower_is_better,
    )


def _comparison_of(column: Column) -> Callable[[Sequence[tuple[Run, Row]]], Interval | None] | None:
    found = column.over_seeds
    if found is None:
        return None

    def read(rows: Sequence[tuple[Run, Row]]) -> Interval | None:
        interval = found([(run.record, row) for run, row in rows])
        return None if interval is None else column.in_unit(interval)

    return read


def of_part(column: Column, part: str | None) -> Measure:
    """What a published table names: the column, or the one below its key for `part`; by default the only one there."""

    def key_in(row: Row) -> str | None:
        if column.key in row["values"]:
            return column.key
        there = parts(row, column.key)
        known = part if part in there else next(iter(there)) if len(there) == 1 else None
        return None if known is None else f"{column.key}/{known}"

    def read(_: Run, row: Row) -> float | None:
        key = key_in(row)
        return None if key is None else replace(column, key=key).shown(row)

    def comparison(row: Row) -> Column | None:
        key = key_in(row)
        return None if key is None else comparing(row, key)

    return replace(measure_of(column), read=read, comparison=comparison)


def _hours(*sections: str) -> Callable[[Run, Row], float | None]:
    def read(run: Run, _: Row) -> float | None:
        parts: list[float | None] = [(run.record.get(section) or {}).get("seconds") for section in sections]
        seconds = [part for part in parts if part is not None]
        return sum(seconds) / 3600.0 if len(seconds) == len(parts) else None

    return read


def _qfem(number: Callable[[list[float], list[float]], float | None]) -> Callable[[Run, Row], float | None]:
    """A number of the ratios of all linears and of those kept in full precision, behind a row's prefix."""

    def read(run: Run, row: Row) -> float | None:
        found = (run.record.get("qfem") or {}).get(row["stage"])
        if found is None or not found.get("ratios"):
            return None
        ratios: dict[str, float] = found["ratios"]
        return number(list(ratios.values()), [ratios[name] for name in found["kept"]])

    return read


_OF_A_RUN: dict[str, Measure] = {
    "search_hours": Measure("search, hours", _hours("search"), lambda value: f"{value:.3g}"),
    "tuning_hours": Measure("tuning, hours", _hours("tuning"), lambda value: f"{value:.3g}"),
    "total_hours": Measure("total, hours", _hours("search", "tuning"), lambda value: f"{value:.3g}"),
    "modules_kept": Measure("modules kept", _qfem(lambda _, kept: len(kept)), lambda value: f"{value:g}"),
    "largest_ratio": Measure("largest ratio", _qfem(lambda ratios, _: max(ratios)), lambda value: f"{value:.4g}"),
    "smallest_ratio_kept": Measure(
        "smallest ratio kept", _qfem(lambda _, kept: min(kept, default=None)), lambda value: f"{value:.4g}"
    ),
}
"""What is read off a run's search, tuning and QFeM, by the name that a published table gives it."""


def measures(part: str | None = None) -> dict[str, Measure]:
    """What a published table can name, by name; `part` chooses among a metric's columns: a corpus."""
    of_rows = {name: of_part(column, part) for metric in metrics() for name, column in metric.measures.items()}
    return of_rows | _OF_A_RUN


def over_seeds(
    values: Sequence[float], written: Callable[[float], str], error: float | None = None, asked: int = 0
) -> Cell:
    """Mean and standard deviation (n - 1) of values of different seeds; of a single one the value and its error.

    Args:
        values: one value per seed.
        written: how a value is written.
        error: standard error of the value, of a single seed.
        asked: how many seeds there should be; where there are fewer, the cell says so.

    """
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    error = error if deviation is None else None
    behind = deviation if error is None else error
    text = written(mean) if behind is None else f"{written(mean)} ± {written(behind)}"
    seeds = f"{len(values)} of {asked}" if len(values) < asked else ""
    return Cell(f"{text} ({seeds} seeds)" if seeds else text, 1, mean, "", error, deviation, seeds)


def spread_notes(body: Iterable[Sequence[Cell]]) -> list[str]:
    """What ± means in a table: a deviation over seeds, the standard error of one seed, or one of the two."""
    cells = [cell for line in body for cell in line if not cell.verdict]  # a comparison has an interval
    several, one = any(cell.deviation is not None for cell in cells), any(cell.error is not None for cell in cells)
    of_several = "the standard deviation (n - 1) over seeds"
    of_one = "the standard error over the records of the tasks"
    if several and one:
        return [f"Mean ± {of_several} where there are several, value ± {of_one} where there is one."]
    if several:
        return [f"Mean ± {of_several}."]
    return [f"Value ± {of_one}, of one seed."] if one else []
