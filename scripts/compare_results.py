"""Compare two trees of results exactly: what a change of the code changed in the numbers.

    python scripts/compare_results.py before after
    python scripts/compare_results.py before some --partial        # the runs of `some` alone

Runs are paired by their configuration, not by their folder, whose name holds the hash of the code. Everything in
result.json is compared, to the last bit, but for seconds, environment, places and fingerprints; so are the messages of
refused runs where scripts/reference_runs.py made the trees. Exit status 0: no difference, and every run has its pair.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion.results_v1 import upgraded

NOT_EXACT = ("seconds", "timings", "paths", "environment")
"""What is not compared: the clock, the folders, and the record of versions, git's state and device."""

FINGERPRINT = "fingerprint"
NOT_OF_A_RUN = ("paths", "tracking", "objective")
"""Groups and keys of the configuration that no number depends on."""

REFUSED_FILE = "refused.json"
ABSENT = "absent"
_FOLDERS = re.compile(r"(?<![\w./~])~?/(?:[^\s/'\",:;]+/)+")
"""The folders of a path that is absolute or below the home, in a message too; what is left is the last name."""


@dataclass(frozen=True)
class Run:
    """A result: its folder below the tree, its configuration, and what is compared, both flat."""

    place: str
    config: dict[str, str]
    found: dict[str, str]
    numbers: int


# ---- what is compared -----------------------------------------------------------------------------------------------


def exact(record: Any) -> Any:
    """A result without what may differ."""
    if isinstance(record, dict):
        return {
            key: exact(value) for key, value in record.items() if not (key in NOT_EXACT or key.endswith("_seconds"))
        }
    return [exact(value) for value in record] if isinstance(record, list) else record


def numbers(record: Any) -> int:
    """How many numbers a record holds."""
    if isinstance(record, (dict, list)):
        return sum(map(numbers, record.values() if isinstance(record, dict) else record))
    return isinstance(record, (int, float)) and not isinstance(record, bool)


def as_version_2(record: dict[str, Any]) -> dict[str, Any]:
    """A result in the fields of schema version 2, whatever version it is of."""
    if record["schema_version"] == 1:
        return {**upgraded(record), "schema_version": 2}
    if record["schema_version"] != 2:
        raise ValueError(f"schema version {record['schema_version']} is not known: 1 and 2 are")
    return record


def flat(record: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf by its path, as JSON, where 1, 1.0 and true are three values, and so are 0.0 and -0.0."""
    inside = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for key, value in inside:
        yield from flat(value, f"{path}/{key}" if path else str(key))
    if isinstance(record, str):
        record = _FOLDERS.sub("", record)
    if not isinstance(record, (dict, list)) or not record:
        yield path, json.dumps(record)


def configuration(config: dict[str, Any]) -> dict[str, str]:
    """What a run is paired by: its configuration without places; a list is one value."""
    groups = {key: value for key, value in config.items() if key not in NOT_OF_A_RUN}
    return dict(flat(_lists_as_text(groups)))


def _lists_as_text(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _lists_as_text(value) for key, value in record.items()}
    return json.dumps(record) if isinstance(record, list) else record


# ---- two trees ------------------------------------------------------------------------------------------------------


def read_tree(tree: Path, fingerprints: bool = False) -> list[Run]:
    """All results below a folder."""
    runs = []
    for path in sorted(tree.rglob("result.json")):
        record = as_version_2(json.loads(path.read_text(encoding="utf-8")))
        config = configuration(record.pop("config"))
        compared = exact(record)
        found = dict(flat(compared))
        if not fingerprints:
            found = {key: value for key, value in found.items() if FINGERPRINT not in key.split("/")}
        runs.append(Run(path.parent.relative_to(tree).as_posix(), config, found, numbers(compared)))
    return runs


def new_keys(old: list[Run], new: list[Run]) -> set[str]:
    """The keys of the configuration that all runs of one tree have and no run of the other: an option was added."""
    every = [set.intersection(*(set(run.config) for run in runs)) if runs else set() for runs in (old, new)]
    some = [{key for run in runs for key in run.config} for runs in (old, new)]
    return (every[0] - some[1]) | (every[1] - some[0])


def pairs(old: list[Run], new: list[Run]) -> list[tuple[list[Run], list[Run]]]:
    """The runs of both trees by configuration: one of each where all is well."""
    without = new_keys(old, new)
    found: dict[str, tuple[list[Run], list[Run]]] = defaultdict(lambda: ([], []))
    for side, runs in enumerate((old, new)):
        for run in runs:
            config = {key: value for key, value in run.config.items() if key not in without}
            found[json.dumps(config, sort_keys=True)][side].append(run)
    return list(found.values())


def differences(old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    """`path: old -> new` of every leaf that differs."""
    for path in [*old, *(path for path in new if path not in old)]:
        before, after = old.get(path, ABSENT), new.get(path, ABSENT)
        if before != after:
            yield f"{path}: {before} -> {after}"


def refused(tree: Path) -> dict[str, str]:
    """The messages of the runs that were refused, by name; none where the tree has no record of them."""
    path = tree / REFUSED_FILE
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: json.dumps(message) for name, message in record.items()}


def compare(old: Path, new: Path, partial: bool = False, fingerprints: bool = False) -> tuple[int, int, list[str]]:
    """Compare two trees.

    Args:
        old: a folder with results below it.
        new: another one.
        partial: whether `old` may have runs that `new` does not have.
        fingerprints: whether the hashes of weights and of prefixes are compared, too.

    Returns:
        How many pairs of runs and how many numbers were compared, and a line for every difference.

    """
    trees = read_tree(old, fingerprints), read_tree(new, fingerprints)
    compared, count, lines = 0, 0, []
    for ours, theirs in pairs(*trees):
        if len(ours) == len(theirs) == 1:
            compared, count = compared + 1, count + ours[0].numbers
            lines += [f"{ours[0].place} / {line}" for line in differences(ours[0].found, theirs[0].found)]
        elif theirs or not partial:
            places = [", ".join(run.place for run in runs) or ABSENT for runs in (ours, theirs)]
            lines.append(f"not a pair of runs: {places[0]} -> {places[1]}")
    before, after = refused(old), refused(new)
    if partial:
        before = {key: value for key, value in before.items() if key in after}
    lines += [f"{REFUSED_FILE} / {line}" for line in differences(before, after)]
    for key in sorted(new_keys(*trees)):
        print(f"only one of the trees has this key of the configuration: {key}")
    return compared, count, lines


def main() -> None:
    """Compare, print, exit with 1 on any difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="a folder with results below it")
    parser.add_argument("new", type=Path, metavar="NEW", help="another one")
    parser.add_argument("--partial", action="store_true", help="OLD may have runs that NEW does not have")
    parser.add_argument("--fingerprints", action="store_true",
                        help="compare the hashes of weights and of the prefixes' keys and values, too")  # fmt: skip
    given = parser.parse_args()
    for tree in (given.old, given.new):
        if not any(tree.rglob("result.json")):
            parser.error(f"{tree}: there is no result.json below it")
    compared, count, lines = compare(given.old, given.new, given.partial, given.fingerprints)
    for line in lines:
        print(line)
    print(f"{compared} runs, {count} numbers, {len(lines)} differences")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
