"""The lines of an experiment's table: which runs a line is of, in which order, and which configurations share it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cushion.flat import flatten
from cushion.metrics.columns import Row
from cushion.reporting.collect import Run

T = TypeVar("T")

_CLOCK = "seconds"
"""What two computations of one row differ in."""


@dataclass(frozen=True)
class Line:
    """A row of a configuration, over its seeds, or of several configurations that share it; or a failed run.

    Args:
        runs: all runs that it is of.
        configurations: one run of each configuration.
        same: the runs that its numbers are read off, each with its row: those of the first configuration.
        asked: how many seeds that configuration was run with.
        own: whether it is the row that the run is about, its last one, and no control.

    """

    runs: tuple[Run, ...]
    configurations: tuple[Run, ...]
    same: tuple[tuple[Run, dict[str, Any]], ...] = ()
    asked: int = 1
    own: bool = True

    @property
    def row(self) -> dict[str, Any] | None:
        """The row of the first seed; None of a failed run."""
        return self.same[0][1] if self.same else None

    @property
    def model(self) -> str:
        """The model of its runs."""
        return self.runs[0].model

    def content(self) -> str:
        """What another configuration must have for the line to be one with its own."""
        return json.dumps([self.model, self.asked, contents(self.same)], sort_keys=True)


def contents(rows: Iterable[tuple[Run, Row]]) -> list[dict[str, Any]]:
    """What the rows of some seeds hold but for the clock: that of the same rows in other runs is equal."""
    return [
        {"seed": run.seed, **row, "values": {key: value for key, value in row["values"].items() if key != _CLOCK}}
        for run, row in rows
    ]


def lines_of(group: Sequence[Run]) -> Iterator[Line]:
    """The lines of one configuration, whose runs differ in their seed: each of its rows, then its failed runs."""
    group = sorted(group, key=lambda run: run.seed)
    done, failed = [run for run in group if run.completed], [run for run in group if not run.completed]
    fullest = sorted(done, key=lambda run: -len(run.record["rows"]))  # a seed may find no prefix
    named = [row["name"] for run in fullest for row in run.record["rows"]]
    for name in dict.fromkeys(named):
        same = tuple((run, row) for run in done for row in run.record["rows"] if row["name"] == name)
        asked, is_own = len({run.seed for run in group}), name == fullest[0].record["rows"][-1]["name"]
        yield Line(tuple(run for run, _ in same), (group[0],), same, asked, own=is_own)
    for run in failed:
        yield Line((run,), (run,))


def shared_first(lines: Sequence[Line]) -> list[Line]:
    """The lines with each control that several configurations share once, in front of the other lines of its model.

    A row that a run is about stands where its configuration stands, with the runs that have it as a control.
    """
    own = grouped((line for line in lines if line.own), Line.content)
    controls = {same[0].content(): same for same in grouped((line for line in lines if not line.own), Line.content)}
    same_as = {id(group[0]): controls.pop(group[0].content(), []) for group in own if group[0].row is not None}
    shared = [_joined(same) for same in controls.values() if len(same) > 1]
    alone = {id(same[0]) for same in controls.values() if len(same) == 1}
    left = [_beside(line, same_as.get(id(line), [])) for line in lines if line.own or id(line) in alone]
    models = dict.fromkeys(line.model for line in lines)
    return [line for model in models for part in (shared, left) for line in part if line.model == model]


def _beside(line: Line, controls: Sequence[Line]) -> Line:
    return replace(line, runs=(*line.runs, *(run for control in controls for run in control.runs)))


def _joined(same: Sequence[Line]) -> Line:
    runs = tuple(run for line in same for run in line.runs)
    return replace(same[0], runs=runs, configurations=tuple(line.configurations[0] for line in same))


def in_order(runs: Iterable[Run], settings: Sequence[str]) -> list[list[Run]]:
    """The runs of each configuration, ascending in model and settings: what is not set, then numbers, then words."""
    groups = grouped(runs, lambda run: run.identity("seed"))
    return sorted(groups, key=lambda group: (group[0].model, place(group[0], settings)))


def place(run: Run, settings: Sequence[str]) -> list[tuple[int, float, str]]:
    """Where a run stands among others that differ in some settings: ascending in them, one after another."""
    return [_rank(value_of(run, key)) for key in settings]


def _rank(value: Any) -> tuple[int, float, str]:
    if value is None or isinstance(value, bool):
        return (0, float(bool(value)), "")
    return (1, float(value), "") if isinstance(value, (int, float)) else (2, 0.0, str(value))


def value_of(run: Run, key: str) -> Any:
    """The value that a run has for a key of its configuration, named with dots; None where it has none."""
    group = key.partition(".")[0]
    return flatten(run.config.get(group), group).get(key)


def grouped(items: Iterable[T], key: Callable[[T], str]) -> list[list[T]]:
    """Those with the same key together, in the order in which they come."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
