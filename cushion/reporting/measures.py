"""What can be read off a result: each measure by name, with its title, and how its numbers are written.

A measure that a result does not have is None, never zero: an older or a failed run shows as not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cushion.reporting.collect import Run
from cushion.reporting.grid import Cell

Row = dict[str, Any]
STAGES = ("none", "found", "tuned")
MISSING = Cell("missing", kind="missing")
FAILED = Cell("failed", kind="failed")


def stage_of(row: Row) -> str:
    """Whose prefix a row has: `none`, `found` or `tuned`."""
    ending = str(row["name"]).rpartition("_")[2]
    return ending if ending in STAGES else "none"


@dataclass(frozen=True)
class Measure:
    """A number of a row of a run: `read(run, row)` gives it, or None where it was not measured."""

    title: str
    read: Callable[[Run, Row], float | None]
    format: Callable[[float], str]
    error: Callable[[Run, Row], float | None] = lambda run, row: None
    """Reads the standard error of the number, in its unit; None where there is none."""


def ordinary(value: float) -> str:
    """Two decimals, or three digits where the number is huge."""
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"


def perplexity_of(corpus: str | None) -> Callable[[Run, Row], float | None]:
    """Reads the perplexity on a corpus; with None the only one that there is."""

    def read(_: Run, row: Row) -> float | None:
        by_corpus: dict[str, float] = row["perplexity"]
        if corpus in by_corpus:
            return by_corpus[corpus]
        return next(iter(by_corpus.values())) if len(by_corpus) == 1 else None

    return read


def task_of(task: str) -> Callable[[Run, Row], float | None]:
    """Reads the main metric of a zero-shot task, in per cent."""

    def read(_: Run, row: Row) -> float | None:
        return _per_cent((row.get("tasks") or {}).get(task, {}).get("value"))

    return read


def error_of_task(task: str) -> Callable[[Run, Row], float | None]:
    """Reads the standard error of a task's main metric, in per cent."""

    def read(_: Run, row: Row) -> float | None:
        return _per_cent((row.get("tasks") or {}).get(task, {}).get("stderr"))

    return read


def _per_cent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value


def _of_row(key: str) -> Callable[[Run, Row], float | None]:
    return lambda _, row: row.get(key)


def _magnitude(key: str) -> Callable[[Run, Row], float | None]:
    """A magnitude at the input of the block where top-1 is largest without a prefix: before and after at one place."""

    def read(run: Run, row: Row) -> float | None:
        curves = run.record.get("activations", {}).get("curves", {})
        stage = stage_of(row)
        if "none" not in curves or stage not in curves:
            return None
        largest: list[float] = curves["none"]["top1"]
        return float(curves[stage][key][largest.index(max(largest))])

    return read


def _hours(*sections: str) -> Callable[[Run, Row], float | None]:
    def read(run: Run, _: Row) -> float | None:
        parts: list[float | None] = [(run.record.get(section) or {}).get("seconds") for section in sections]
        seconds = [part for part in parts if part is not None]
        return sum(seconds) / 3600.0 if len(seconds) == len(parts) else None

    return read


def _qfem(number: Callable[[list[float], list[float]], float | None]) -> Callable[[Run, Row], float | None]:
    """A number of the ratios of all linears and of those kept in full precision, behind a row's prefix."""

    def read(run: Run, row: Row) -> float | None:
        found = (run.record.get("qfem") or {}).get(stage_of(row))
        if found is None or not found.get("ratios"):
            return None
        ratios: dict[str, float] = found["ratios"]
        return number(list(ratios.values()), [ratios[name] for name in found["kept"]])

    return read


MEASURES: dict[str, Measure] = {
    "perplexity": Measure("perplexity", perplexity_of(None), ordinary),
    "accuracy": Measure(
        "accuracy, %",
        lambda _, row: _per_cent(row.get("accuracy")),
        ordinary,
        lambda _, row: _per_cent(row.get("accuracy_stderr")),
    ),
    "largest_activation": Measure("largest activation", _of_row("largest_activation"), lambda value: f"{value:.1f}"),
    "quantization_error": Measure("L_q", _of_row("quantization_error"), lambda value: f"{value:.3g}"),
    "seconds": Measure("seconds", _of_row("seconds"), lambda value: f"{value:.0f}"),
    "top1": Measure("top-1", _magnitude("top1"), ordinary),
    "top10_percent": Measure("top 10 %", _magnitude("top10_percent"), ordinary),
    "median": Measure("median", _magnitude("median"), ordinary),
    "search_hours": Measure("search, hours", _hours("search"), lambda value: f"{value:.3g}"),
    "tuning_hours": Measure("tuning, hours", _hours("tuning"), lambda value: f"{value:.3g}"),
    "total_hours": Measure("total, hours", _hours("search", "tuning"), lambda value: f"{value:.3g}"),
    "modules_kept": Measure("modules kept", _qfem(lambda _, kept: len(kept)), lambda value: f"{value:g}"),
    "largest_ratio": Measure("largest ratio", _qfem(lambda ratios, _: max(ratios)), lambda value: f"{value:.4g}"),
    "smallest_ratio_kept": Measure(
        "smallest ratio kept", _qfem(lambda _, kept: min(kept, default=None)), lambda value: f"{value:.4g}"
    ),
}


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
    cells = [cell for line in body for cell in line]
    several, one = any(cell.deviation is not None for cell in cells), any(cell.error is not None for cell in cells)
    of_several = "the standard deviation (n - 1) over seeds"
    of_one = "the standard error over the records of the tasks"
    if several and one:
        return [f"Mean ± {of_several} where there are several, value ± {of_one} where there is one."]
    if several:
        return [f"Mean ± {of_several}."]
    return [f"Value ± {of_one}, of one seed."] if one else []
