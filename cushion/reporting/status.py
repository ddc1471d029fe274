"""The command `cushion-status`: which runs under a folder are done, running, failed, interrupted, or missing."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import cushion
from cushion import system_errors
from cushion.errors import ArtifactError
from cushion.integrity import is_aside
from cushion.reporting.collect import FILE_NAME, Run, read_result
from cushion.schema import LOG, LOGGED
from cushion.swept import own_overrides

STATES = ("done", "running", "failed", "damaged", "interrupted", "missing")
LOCK, PLANS = ".lock", "sweeps/plan-*.json"
_TO_COME = ("running", "interrupted", "missing")
"""States of runs that may change by themselves, or once the command is given again."""
_CLEAR = "\x1b[H\x1b[2J"
"""What makes a terminal empty."""
_STOPPED = ("KeyboardInterrupt", "SystemExit")
"""What a run is stopped by from outside, which is no failure of its own."""


@dataclass(frozen=True)
class RunState:
    """What is known of one run: its state, where it is or what it would be, and the error or what was swept.

    Seed and model (the label that results have) are those of a planned run, None and empty of any other; the plan of
    an older version holds no seed.
    """

    state: str
    place: str
    experiment: str
    detail: str = ""
    seed: int | None = None
    model: str = ""


def survey(root: Path) -> list[RunState]:
    """The state of every run under `root`, those that a sweep planned and that were never started included.

    `root` may be an output folder, or a folder in one, such as that of an experiment.

    A run is running when a living process holds the lock of its folder, also one that failed before and is tried again.

    Raises:
        ArtifactError: there is no such folder, no run in it, or a sweep's plan is damaged.

    """
    if not root.is_dir():
        raise ArtifactError(f"there is no folder {root}: name the folder of results (paths.output_dir of the runs)")
    states = _survey(root)
    if not states:
        raise ArtifactError(f"{root} holds no run: start one first, or name the folder that results go to")
    return states


def _survey(root: Path) -> list[RunState]:
    """The states, none where there is no run."""
    paths = [path for name in (FILE_NAME, LOCK) for path in root.rglob(name)]
    folders = sorted({path.parent for path in paths if not is_aside(path.relative_to(root))})
    swept = {folder: state.detail for places, state in _planned([root]) for folder in places}
    states = [_state(folder, root, swept.get(folder.resolve(), "")) for folder in folders] + missing(root)
    return sorted(states, key=lambda state: (STATES.index(state.state), state.place))


def _state(folder: Path, root: Path, swept: str) -> RunState:
    place, path = folder.relative_to(root).as_posix(), folder / FILE_NAME
    experiment = folder.parents[2].name if len(folder.parts) > 3 else ""
    if _held(folder / LOCK):
        return RunState("running", place, experiment, ": ".join(part for part in (swept, _at_work(folder)) if part))
    if not path.is_file():
        return RunState("interrupted", place, experiment, "the same command goes on from here")
    try:
        run = Run(path, read_result(path))
    except ArtifactError as error:
        return RunState("damaged", place, experiment, str(error))
    if run.completed:
        return RunState("done", place, run.experiment)
    stopped = (run.record.get("error") or {}).get("type") in _STOPPED
    return RunState("interrupted" if stopped else "failed", place, run.experiment, run.error)


def _at_work(folder: Path) -> str:
    """What a run under way said last in its log; empty where it has none, as one started from Python."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = (match for match in map(LOGGED.fullmatch, reversed(lines)) if match is not None)
    found = next((match for match in told if match["level"] == "INFO"), None)  # a stage or a row, not a warning
    return f"{found['message']}, since {found['time']}" if found is not None else ""


def _held(lock: Path) -> bool:
    """Whether a living process holds a lock. The lock of a process that was killed is free, and its file stays."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise ArtifactError(f"whether a run is at work cannot be told without write access to {lock}") from error


def missing(*roots: Path) -> list[RunState]:
    """The runs inside some folders that sweeps planned and of which there is no folder, each once."""
    return [state for folders, state in _planned(roots) if not _there(folders, FILE_NAME, LOCK)]


def without_result(*roots: Path) -> list[RunState]:
    """The runs inside some folders that sweeps planned and that have no result, begun or not, each once."""
    return [state for folders, state in _planned(roots) if not _there(folders, FILE_NAME)]


def _there(folders: Sequence[Path], *names: str) -> bool:
    return any((folder / name).exists() for folder in folders for name in names)


def _planned(roots: Sequence[Path]) -> list[tuple[tuple[Path, ...], RunState]]:
    """The runs inside some folders that sweeps planned, each once: the folders it may have, and its state if missing.

    A plan lies beside the experiments' folders, so those above a folder are read too.
    """
    found: dict[tuple[Path, ...], RunState] = {}
    for root in (root.resolve() for root in roots):
        above = [path for parent in root.parents for path in sorted(parent.glob(PLANS))]
        for plan in [*above, *sorted(root.rglob(PLANS))]:
            runs = _plan(plan)
            for run, own in zip(runs, own_overrides([run["overrides"] for run in runs]), strict=True):
                folders = tuple(plan.parent.parent / folder for folder in run["folders"])
                if any(folder.is_relative_to(root) for folder in folders):
                    above_it = folders[0].parent
                    place = above_it.relative_to(root).as_posix() if above_it.is_relative_to(root) else "."
                    model = run.get("model", folders[0].parents[1].name)  # a plan of an older version has none
                    found[folders] = RunState(
                        "missing", place, run["experiment"], shlex.join(own), run.get("seed"), model
                    )
    return list(found.items())


def _plan(path: Path) -> list[dict[str, Any]]:
    try:
        runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if all(
            run["overrides"] is not None
            and run["folders"]
            and run["experiment"]
            and type(run.get("seed", 0)) is int
            and isinstance(run.get("model", ""), str)
            for run in runs
        ):
            return runs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it; the sweep writes it again") from error
    raise ArtifactError(f"{path} is damaged: delete it; the sweep writes it again")


def _seconds(text: str) -> float:
    """The number of an argument that must be above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: above 0")
    return value


def exit_status(states: Sequence[RunState]) -> int:
    """0 when every run is done, 1 when one failed or is damaged, 3 when one is running, interrupted or missing."""
    there = {state.state for state in states}
    return 1 if there & {"failed", "damaged"} else 0 if there <= {"done"} else 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `cushion-status`."""
    parser = argparse.ArgumentParser(
        prog="cushion-status",
        description="Which runs are done, running, failed, interrupted or missing.",
        epilog="Exit status: 0 all done, 1 some failed or damaged, 3 none failed but some not done.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {cushion.__version__}")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of results, for example outputs")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the counts and what is not done")
    parser.add_argument("-w", "--watch", action="store_true", help="show it again as it changes, until all runs ended")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="how often (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        states = watch(given.folder, given.every, given.quiet) if given.watch else survey(given.folder)
    except system_errors.MENDABLE as error:
        system_errors.end("cushion-status", error, "name another DIR")
    if not given.watch:
        print(_shown(states, given.quiet))
    sys.exit(exit_status(states))


def _shown(states: Sequence[RunState], quiet: bool) -> str:
    """A line for each run, those that are done only if not `quiet`, and how many there are of each state."""
    lines = [
        f"{state.state:<11}  {state.place}{'  ' + state.detail if state.detail else ''}"
        for state in states
        if not (quiet and state.state == "done")
    ]
    counts = Counter(state.state for state in states)
    return "\n".join([*lines, ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])])


def watch(root: Path, every: float, quiet: bool) -> list[RunState]:
    """Show the states again whenever they change, until no run is left that is at work or to come.

    A terminal shows the newest state alone, a file all of them below each other, each with its time. A folder that is
    not there yet is waited for.

    Args:
        root: as for `survey`.
        every: seconds between two looks.
        quiet: whether runs that are done are only counted.

    """
    before, is_terminal = "", sys.stdout.isatty()
    while True:
        states = _survey(root)
        text = _shown(states, quiet) if states else f"no run in {root} yet"
        if text != before:
            print(f"{_CLEAR if is_terminal else ''}{datetime.now():%H:%M:%S}\n{text}", flush=True)
        if states and not {state.state for state in states} & set(_TO_COME):
            return states
        before = text
        time.sleep(every)


if __name__ == "__main__":
    main()
