"""What a sweep says of itself: a line before each run, its warnings once, and one table behind the last run.

`cushion.preflight` begins a sweep, in the process that was started; `cushion.cli` says the line of each run, which a
launcher may have put into a process of its own, and ends the sweep.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cushion.config import RunConfig
from cushion.errors import ArtifactError
from cushion.metrics.columns import Place, columns
from cushion.reporting.collect import FILE_NAME, read_result
from cushion.reporting.tables import aligned, cell_text
from cushion.swept import key_of, own_overrides, swept_keys

logger = logging.getLogger(__name__)

_VARIABLE = "CUSHION_SWEEP"
"""In the environment while a sweep is under way, where launchers' processes find it: a `Sweep` as JSON."""


@dataclass(frozen=True)
class Sweep:
    """How many runs a sweep has, None where its sweeper chooses them on the way, and the keys that tell them apart."""

    runs: int | None
    keys: tuple[str, ...]

    def of(self, overrides: Sequence[str]) -> list[str]:
        """Those of a run's overrides that set the swept keys."""
        return [override for override in overrides if key_of(override) in self.keys]

    def heading(self, number: int, overrides: Sequence[str]) -> str:
        """The line of a run, from 0: `[2/6] search.tau=0.5`."""
        count = f"[{number + 1}]" if self.runs is None else f"[{number + 1}/{self.runs}]"
        return " ".join([count, *self.of(overrides)])


@dataclass(frozen=True)
class _Planned:
    """A run of a sweep: its overrides, and the folders that it may have (of each kind of device, if need be)."""

    overrides: list[str]
    folders: list[Path]


_planned: list[_Planned] = []
"""The runs of the sweep that this process began; where its sweeper chooses them on the way, those so far."""

_said: set[str] = set()
"""What runs of a sweep have been warned of, where its sweeper chooses them on the way."""


def begin(sweep: Sweep, jobs: Sequence[list[str]] = (), folders: Sequence[list[Path]] = ()) -> None:
    """A sweep starts, of these runs where they are known before.

    Args:
        sweep: what its runs are told of it.
        jobs: by run its overrides.
        folders: by run the folders that it may have.

    """
    end()
    os.environ[_VARIABLE] = json.dumps(asdict(sweep))
    _planned.extend(_Planned(job, places) for job, places in zip(jobs, folders, strict=True))


def end() -> None:
    """The sweep is over."""
    os.environ.pop(_VARIABLE, None)
    _planned.clear()
    _said.clear()


def chosen(overrides: list[str]) -> None:
    """A sweeper has chosen the next run."""
    _planned.append(_Planned(overrides, []))


def placed(folder: Path, warnings: Sequence[str]) -> list[str]:
    """The run that was chosen last has this folder. Returns those of its warnings that a run before it had."""
    _planned[-1].folders.append(folder)
    before = [message for message in warnings if message in _said]
    _said.update(warnings)
    return before


def current() -> Sweep | None:
    """The sweep that is under way, if there is one."""
    said = os.environ.get(_VARIABLE)
    if said is None:
        return None
    record = json.loads(said)
    return Sweep(record["runs"], tuple(record["keys"]))


# ---- warnings -------------------------------------------------------------------------------------------------------


def warn_once(
    jobs: Sequence[list[str]], configs: Sequence[RunConfig], warnings: Callable[[RunConfig], list[str]]
) -> None:
    """Log what `warnings` says of the runs of a sweep: each message once, with the runs that it concerns."""
    concerned: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        for message in warnings(config):
            concerned.setdefault(message, []).append(number)
    for message, numbers in concerned.items():
        every = len(numbers) == len(jobs)
        logger.warning("%s (%s)", message, f"all {len(jobs)} runs" if every else which(jobs, numbers))


@contextmanager
def said_before(messages: Sequence[str]) -> Iterator[None]:
    """Within the block, the handlers of the log that are there now leave out what the sweep has said."""

    def is_new(record: logging.LogRecord) -> bool:
        return record.getMessage() not in messages

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def which(jobs: Sequence[list[str]], numbers: Sequence[int]) -> str:
    """The first of some runs by what tells it from the others of the sweep, and how many more there are."""
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"run {numbers[0] + 1}{more}: {shlex.join(own_overrides(jobs)[numbers[0]])}"


# ---- the closing table ----------------------------------------------------------------------------------------------


def closing() -> str | None:
    """The runs of the sweep that this process began, by swept keys, with numbers of the last row of each; or None."""
    if len(_planned) < 2:
        return None
    keys = swept_keys([run.overrides for run in _planned])
    found = [_outcome(run.folders) for run in _planned]
    last = [outcome["rows"][-1] if _state(outcome) == "completed" else None for outcome in found]
    rows = [row for row in last if row is not None]
    shown = columns(rows, Place.SWEEP)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    titles = ["run", *keys, *(["row"] if len(labels) > 1 else []), *(column.named(Place.SWEEP) for column in shown)]
    lines = [titles if rows else [*titles, "state"]]
    for number, (run, outcome, row) in enumerate(zip(_planned, found, last, strict=True), start=1):
        values = {key_of(override): override.partition("=")[2] for override in run.overrides}
        cells = [str(number), *(values.get(key, "-") for key in keys)]
        if row is None:
            cells += [_state(outcome), *["-"] * (len(lines[0]) - len(cells) - 1)]
        else:
            cells += [row["label"]] if len(labels) > 1 else []
            cells += [cell_text(column, row, Place.SWEEP) for column in shown]
        lines.append(cells)
    title = f"the last row of each run: {labels[0]}" if len(labels) == 1 else "the last row of each run"
    notes = dict.fromkeys(column.note for column in shown if column.note)
    return "\n".join([title, "", aligned(lines), *notes, "", _count(found)])


def _outcome(folders: Sequence[Path]) -> dict[str, Any]:
    """The newest result of a run; of one that has none, or a damaged one, a record that says so.

    A run that was refused before it had a folder has failed.
    """
    if not folders:
        return {"status": "failed"}
    there = [path for path in (folder / FILE_NAME for folder in folders) if path.is_file()]
    if not there:
        return {"status": "no result"}
    path = max(there, key=lambda path: path.stat().st_mtime)
    try:
        return read_result(path)
    except ArtifactError:
        return {"status": "damaged"}


def _state(outcome: dict[str, Any]) -> str:
    return str(outcome["status"])


def _count(found: Sequence[dict[str, Any]]) -> str:
    """`6 runs: 5 completed, 1 failed`."""
    counts = Counter(map(_state, found))
    states = sorted(counts, key=lambda state: (state != "completed", state))
    return f"{len(found)} runs: " + ", ".join(f"{counts[state]} {state}" for state in states)
