"""The campaigns of scripts/fuzz.py: a seed makes the same cases, and what ends badly is told from what ends well."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import SCRIPTS, load_script

ERROR = "cushion: error: search.tau=2 is not below 1"
TRACEBACK = "Traceback (most recent call last)\n  File x\nKeyError: 1"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    names = (
        "fuzz_report",
        "check_sweep",
        "compare_results",
        "fuzz_runs",
        "fuzz_damage",
        "fuzz_signals",
        "fuzz_configs",
    )
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield {name: load_script(name) for name in names}
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == SCRIPTS:
            del sys.modules[name]


def test_a_seed_makes_the_same_configurations_and_another_makes_others(scripts: dict[str, ModuleType]) -> None:
    keys, options = {"search.tau": 0.5, "eval.blocks": 4, "name": "x"}, {"search": ["none", "bos"]}

    def words(seed: int) -> list[Any]:
        limits = scripts["fuzz_report"].Limits(seed, 20, 60.0, Path())
        return [scripts["fuzz_configs"].drawn(draw, keys, options) for _, draw in limits.draws()]

    assert words(0) == words(0) != words(1)
    assert len({tuple(found) for found in words(0)}) > 10


@pytest.mark.parametrize(
    ("status", "printed", "verdict", "is_bad"),
    [
        (0, "results\n{path}", "done", False),
        (0, "results\n/nowhere/result.json", "done", True),
        (1, ERROR, "refused in one line", False),
        (1, f"{ERROR}\n{ERROR}", "2 errors", True),
        (1, "cushion: error: something", "refused without naming a key of the case", True),
        (1, TRACEBACK, "traceback", True),
        (-11, "", "traceback", True),
        (None, "", "hang", True),
    ],
)
def test_the_end_of_a_configuration_is_judged(
    scripts: dict[str, ModuleType], tmp_path: Path, status: int | None, printed: str, verdict: str, is_bad: bool
) -> None:
    (tmp_path / "result.json").touch()
    ended = scripts["fuzz_runs"].Ended(status, printed.format(path=tmp_path / "result.json"))
    case = scripts["fuzz_configs"].judged("case", ["+search.tau=2"], ended, tmp_path)
    assert (case.verdict, case.is_bad) == (verdict, is_bad)


@pytest.mark.parametrize(
    ("sent", "broken", "again", "is_different", "twice", "verdict"),
    [
        (signal.SIGINT, (130, "WARNING: x\ncushion: stopped"), (0, ""), False, [], "SIGINT: went on"),
        (signal.SIGKILL, (-9, ""), (0, ""), False, [], "SIGKILL: went on"),
        (signal.SIGINT, (1, "cushion: error: x"), (0, ""), False, [], "status 1 of an interrupted run (bad)"),
        (signal.SIGINT, (130, ""), (0, ""), False, [], "status 130 of an interrupted run (bad)"),
        (signal.SIGTERM, (-15, TRACEBACK), (0, ""), False, [], "traceback (bad)"),
        (signal.SIGTERM, (-15, ""), (1, ERROR), False, [], "the second start failed (bad)"),
        (signal.SIGTERM, (-15, ""), (0, ""), True, [], "a silent difference (bad)"),
        (signal.SIGTERM, (-15, ""), (0, ""), False, ["search/1"], "computed twice (bad)"),
        (signal.SIGTERM, (-15, ""), (None, ""), False, [], "hang (bad)"),
    ],
)
def test_the_end_of_a_broken_run_is_judged(
    scripts: dict[str, ModuleType], sent: signal.Signals, broken: Any, again: Any, is_different: bool,
    twice: list[str], verdict: str,
) -> None:  # fmt: skip
    ended = scripts["fuzz_runs"].Ended
    case = scripts["fuzz_signals"].judged("case", sent, ended(*broken), ended(*again), is_different, twice)
    assert case.verdict + (" (bad)" if case.is_bad else "") == verdict


@pytest.mark.parametrize(
    ("command", "status"), [("sleep 60", None), ("while :; do :; done", None), ("sleep 0.1; exit 3", 3)]
)
def test_a_run_hangs_that_works_or_waits_too_long(
    scripts: dict[str, ModuleType], tmp_path: Path, command: str, status: int | None
) -> None:
    (tmp_path / "printed").touch()
    runs = object.__new__(scripts["fuzz_runs"].Runs)  # what it makes and imports is not needed
    runs._deadline = 0.3
    started = subprocess.Popen(["sh", "-c", command])
    assert runs.wait(started.pid, tmp_path).status == status
    started.returncode = 0  # it was waited for


def test_a_campaign_begins_with_any_case_and_draws_the_same_for_it(scripts: dict[str, ModuleType]) -> None:
    limits = scripts["fuzz_report"].Limits
    whole, second = (list(limits(0, 6, 60.0, Path(), first=first).draws()) for first in (0, 4))
    assert [index for index, _ in second] == [4, 5, 6, 7, 8, 9]
    assert [draw.random() for _, draw in whole][4:] == [draw.random() for _, draw in second][:2]


def test_a_campaign_is_well_where_there_were_cases_and_none_was_bad(scripts: dict[str, ModuleType]) -> None:
    case, report = scripts["fuzz_report"].Case, scripts["fuzz_report"].report
    well, bad = case("one", "done"), case("two", "hang", is_bad=True, seen="line")
    assert [report(cases) for cases in ([], [well], [well, bad])] == [False, True, False]


def test_every_damage_changes_what_is_there(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    for name, way in scripts["fuzz_damage"].WAYS.items():
        root = tmp_path / name.replace(" ", "_")
        for artifact in ("a", "b"):
            (root / artifact).mkdir(parents=True)
            (root / artifact / "file.json").write_text(f'{{"{artifact}": 12}}')
        before = scripts["fuzz_runs"].contents(root)
        assert way(root / "a" / "file.json", random.Random(0)), name
        assert scripts["fuzz_runs"].contents(root) != before, name
