"""What happens during a run, as plain records. The pipeline emits them; progress bars and trackers listen.

The maths below the pipeline knows none of this: its generators yield records of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage are finished; a bar with the time left can be drawn from these."""

    stage: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class Record:
    """A point of a series (`search`, `tuning`): the step's number and its values as plain scalars."""

    kind: str
    step: int
    values: dict[str, Any]


@dataclass(frozen=True)
class RowMeasured:
    """A row of the comparison is measured: its number, from 0, and the row as it will stand in result.json."""

    number: int
    row: dict[str, Any]


@dataclass(frozen=True)
class RunStarted:
    """A run begins: its folder, name and whole configuration."""

    folder: Path
    name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class RunFinished:
    """A run is complete: its result as written, and where its prefix was saved."""

    folder: Path
    result: dict[str, Any]
    prefix: Path | None


@dataclass(frozen=True)
class RunFailed:
    """A run ended with an error."""

    folder: Path
    error: str


Event = Progress | Record | RowMeasured | RunStarted | RunFinished | RunFailed


class Listener(Protocol):
    """Anything that wants to know: a tracker, progress bars, a test."""

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
