"""Our number for a published one, and that number compared with full precision with the same prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cushion.flat import flatten
from cushion.metrics.columns import Place, Row
from cushion.metrics.perplexity import KEY as PERPLEXITY
from cushion.metrics.perplexity import corpora as corpora_of
from cushion.metrics.tasks import ACCURACY
from cushion.reporting.collect import Run
from cushion.reporting.comparisons import measured
from cushion.reporting.grid import NONE, Cell
from cushion.reporting.measures import FAILED, MISSING, Measure, measure_of, measures, over_seeds
from cushion.schema import is_frozen

SAME = 1e-3
"""Relative difference up to which a number that several runs measured counts as one number."""
COMPARED = (PERPLEXITY, ACCURACY)
"""The measures of which a quantized row without a comparison is said to have none."""


@dataclass
class Seen:
    """What our numbers in a table were read from, for its headings and notes.

    `corpora` are those of perplexities, `scored` the tasks of mean accuracies; `headings` are those of the comparisons,
    by measure, `titles` what they say in full, by heading; `uncompared` counts quantized rows without one.
    """

    corpora: set[str] = field(default_factory=set)
    scored: set[tuple[str, ...]] = field(default_factory=set)
    headings: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    uncompared: int = 0

    def notes(self) -> list[str]:
        """What the columns of comparisons are, and how many of our numbers have none."""
        found = [f"{heading}: {title}." for heading, title in self.titles.items()]
        if self.uncompared:
            found.append(
                "Ours of quantized rows that are not compared with full precision with the same prefix: "
                f"{self.uncompared}. Their results are from before there were comparisons, without the row of full "
                "precision (eval.controls=false), or of tasks whose score is not a mean over records."
            )
        return found


def ours(
    specification: Mapping[str, Any], at: Mapping[str, str], runs: Sequence[Run], seeds: int, seen: Seen
) -> tuple[Cell, Cell]:
    """Our number for one published one: mean and deviation over seeds of the rows that fit; and its comparison.

    Args:
        specification: the content of the table's table.yaml.
        at: where the published number stands, by dimension.
        runs: those of the model.
        seeds: how many seeds the model was run with.
        seen: what was read is added to it.

    """
    wanted: dict[str, Any] = {}
    for dimension, selections in specification.get("select", {}).items():
        wanted |= selections.get(at[dimension], {})
    fitting = [run for run in runs if _fits(run, wanted)]
    done = [run for run in fitting if run.completed]
    if not done:
        return FAILED if fitting else MISSING, Cell(NONE)
    measure = measures(specification.get("corpus"))[at["measure"]]
    by_seed: dict[int, list[tuple[float, Run, Row]]] = {}
    for run, row in _rows(done, wanted):
        value = measure.read(run, row)
        if value is not None:
            by_seed.setdefault(run.seed, []).append((value, run, row))
            if at["measure"] == PERPLEXITY:
                there = corpora_of([row])
                seen.corpora |= set(there) if len(there) == 1 else set()
            if at["measure"] == ACCURACY and row.get("tasks"):
                seen.scored.add(tuple(task for task, score in row["tasks"].items() if score["metric"] is not None))
    if not by_seed:
        return Cell("not measured", kind="missing"), Cell(NONE)
    for found in by_seed.values():
        values = [value for value, _, _ in found]
        if not _agree(values):
            return _conflict(measure, values), Cell(NONE)
    values = [value for found in by_seed.values() for value, _, _ in found]
    if not (_is_of_one_configuration(by_seed.values()) or _agree(values)):
        return _conflict(measure, values, ", seeds of several configurations"), Cell(NONE)
    errors = [measure.error(run, row) for found in by_seed.values() for _, run, row in found]
    error = next((error for error in errors if error is not None), None)
    cell = over_seeds([found[0][0] for found in by_seed.values()], measure.format, error, seeds)
    return cell, _compared(measure, at["measure"], [found[0][1:] for found in by_seed.values()], seeds, seen)


def _agree(values: Sequence[float]) -> bool:
    """Whether numbers that several runs measured count as one."""
    return max(values) - min(values) <= SAME * max(abs(value) for value in values)


def _conflict(measure: Measure, values: Sequence[float], why: str = "") -> Cell:
    different = " or ".join(dict.fromkeys(measure.format(value) for value in values))
    return Cell(f"conflict: {different}{why}", kind="conflict")


def _is_of_one_configuration(by_seed: Iterable[Sequence[tuple[float, Run, Row]]]) -> bool:
    """Whether some configuration has a number for every seed; others that have one too agree with it within a seed."""
    return bool(set.intersection(*({run.identity("seed") for _, run, _ in found} for found in by_seed)))


def _rows(runs: Sequence[Run], wanted: Mapping[str, Any]) -> list[tuple[Run, Row]]:
    """The rows of runs of the stage asked for, quantized or not, of the frozen model or reconstructed."""
    stage, quantized, reconstructed = (wanted.get(key) for key in ("stage", "quantized", "reconstructed"))
    return [
        (run, row)
        for run in runs
        for row in run.record["rows"]
        if (row.get("reconstructed", False) if reconstructed else is_frozen(row))
        and stage in (None, row["stage"])
        and quantized in (None, row["quantized"])
    ]


def _compared(measure: Measure, name: str, rows: Sequence[tuple[Run, Row]], seeds: int, seen: Seen) -> Cell:
    """The comparison of rows that differ in their seed, each with full precision in its own run, with its interval."""
    columns = [measure.comparison(row) for _, row in rows]
    column = next((column for column in columns if column is not None), None)
    if column is None:
        seen.uncompared += name in COMPARED and any(row["quantized"] for _, row in rows)
        return Cell(NONE)
    heading = column.named(Place.PUBLISHED)
    seen.headings[name], seen.titles[heading] = heading, column.named(Place.REPORT)
    return measured(measure_of(column), rows, seeds)


def _fits(run: Run, wanted: Mapping[str, Any]) -> bool:
    """Whether a run's configuration has all the values asked for; of a list, one of them."""
    config = flatten(run.config, "config")
    for key, value in wanted.items():
        if key.startswith("config."):
            allowed = value if isinstance(value, list) else [value]
            if config.get(key) not in allowed:
                return False
    return True
