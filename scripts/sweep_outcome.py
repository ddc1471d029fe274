"""What a sweep left in its folder, and how that differs from what another one left (scripts/check_sweep.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_results import exact


@dataclass
class Outcome:
    """What a folder of results holds when a sweep has ended, and what was seen on the way."""

    way: str
    seconds: float
    results: dict[str, Any]
    attempts: dict[str, int]
    kills: int = 0
    problems: list[str] = field(default_factory=list)


def artifacts(output: Path) -> dict[str, Path]:
    """The finished steps, by `<step>/<key>`."""
    found = output.glob("cache/*/*/depends_on.json")
    return {f"{path.parent.parent.name}/{path.parent.name}": path for path in found if path.parent.name[0] != "."}


def completed(output: Path) -> dict[str, Path]:
    """The results of completed runs, by their folder."""
    found = {path.parent.relative_to(output).as_posix(): path for path in output.glob("*/*/*/*/result.json")}
    return {place: path for place, path in found.items() if json.loads(path.read_text())["status"] == "completed"}


def written(output: Path) -> dict[str, tuple[int, int]]:
    """Which file every finished step and run is: computed again, it would be another one."""
    files = {**artifacts(output), **completed(output)}
    return {key: (path.stat().st_ino, path.stat().st_mtime_ns) for key, path in files.items()}


def look(way: str, output: Path, seconds: float, status: int | None) -> Outcome:
    """Read everything that a sweep left, and note what should not be there."""
    results = {place: exact(json.loads(path.read_text())) for place, path in completed(output).items()}
    attempts = {
        key: len(json.loads(path.with_name("made.json").read_text())["attempts"])
        for key, path in artifacts(output).items()
    }
    outcome = Outcome(way, seconds, results, attempts)
    if status != 0:
        outcome.problems.append(f"exit status {status}")
    left = [path for path in output.rglob("*") if path.suffix == ".partial" or is_temporary(path)]
    left = [path for path in left if ".submitit" not in path.parts]  # SLURM's own files
    outcome.problems += [f"left behind: {path.relative_to(output)}" for path in left]
    for place in results:
        kept, said = list((output / place).glob("wandb/offline-run-*")), output / place / "tracking.json"
        if len(kept) > 1 or (said.is_file() and len(kept) != 1):
            outcome.problems.append(f"{len(kept)} W&B runs in {place}")
        if said.is_file() and not json.loads(said.read_text())["ended"]:
            outcome.problems.append(f"the W&B run of {place} was not ended")
        if not list((output / place / "figures").glob("*.png")):
            outcome.problems.append(f"no figure in {place}")
    return outcome


def is_temporary(path: Path) -> bool:
    """A file or folder that was to be moved to its place when it is whole."""
    known = (".lock", ".figures.lock", ".submitit")
    return path.name.endswith(".part") or (path.name.startswith(".") and path.name not in known)


def again(before: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> list[str]:
    """What was finished before and is another file now, or none."""
    return [f"{key} was finished, and is {'written again' if key in now else 'gone'}"
            for key, file in before.items() if now.get(key) != file]  # fmt: skip


def compare(whole: Outcome, other: Outcome) -> None:
    """Note how a sweep differs from the unbroken one, and what it computed more than once."""
    for place in sorted(whole.results.keys() | other.results.keys()):
        if place not in other.results:
            other.problems.append(f"{place} is missing")
        elif place not in whole.results:
            other.problems.append(f"{place} is more than was asked for")
        elif whole.results[place] != other.results[place]:
            fields = [key for key, value in whole.results[place].items() if other.results[place].get(key) != value]
            other.problems.append(f"{place} differs in {', '.join(fields)}")
    if whole.attempts.keys() != other.attempts.keys():
        other.problems.append(f"{len(whole.attempts.keys() ^ other.attempts.keys())} steps are not those of the other")
    if other.way != "full":  # there every attempt that failed for want of room may have been one
        tried = sum(other.attempts.values()) - len(other.attempts)
        if tried > other.kills:
            other.problems.append(f"{tried} attempts at steps more than steps, with {other.kills} kills")
