"""scripts/check_sweep.py: a killed sweep ends with the results of an unbroken one, and what differs is told."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import SCRIPTS, load_script
from programs import Program


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE", "CUDA_VISIBLE_DEVICES", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # the script sets them, and they are set back after the test
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])  # the folder of a script that is started
    monkeypatch.setitem(sys.modules, "check_sweep", ModuleType("check_sweep"))
    return load_script("check_sweep")


def test_a_sweep_that_is_killed_ends_with_the_same_results_each_step_computed_once(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(self: Any, arguments: list[str], log: Path) -> Program:
        self._started.append(Program("cli", arguments, folder=log.parent, out=log, err=log))
        return self._started[-1]

    folder = tmp_path / "check"
    # of seed 1: after the sixth step of 31, in the first of two runs, so that it cannot be at its end before
    words = ["--runs", "2", "--kills", "1", "--only", "killed", "--seed", "1", "--without-wandb", "--deadline", "300"]
    monkeypatch.setattr(check.Processes, "start", start)
    monkeypatch.setattr(sys, "argv", ["check_sweep.py", *words, "--folder", str(folder)])
    check.main()
    printed = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if re.match(r"(un|k)\w+ +\d", line)}
    assert table["unbroken"][:2] == ["0", "2"]
    assert table["killed"][:2] == ["1", "2"]
    assert table["unbroken"][2] == table["killed"][2], "as many steps"
    assert table["unbroken"][3] == "0"
    results = list((folder / "killed").glob("default/*/*/*/result.json"))
    assert len(results) == 2
    made = [json.loads(path.read_text()) for path in (folder / "killed").glob("cache/*/*/made.json")]
    assert len(made) == int(table["killed"][2])
    assert {key for record in made for attempt in record["attempts"] for key in attempt} == {
        "started", "host", "process",
    }  # fmt: skip


def test_a_sweep_that_hangs_is_ended_and_stands_in_the_table(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@" > "$0.arguments"\necho $$ > "$0.pid"\nsleep 600 &\nwait\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(
        sys, "argv", ["check_sweep.py", "--runs", "2", "--deadline", "3", "--folder", str(tmp_path / "check")]
    )
    with pytest.raises(SystemExit, match="1"):
        check.main()
    printed = capsys.readouterr()
    assert re.search(r"^unbroken +0 +0 +0 .* 2$", printed.out, re.MULTILINE)
    assert "unbroken: hangs" in printed.err
    group = int((tmp_path / "python.pid").read_text())
    left = [path for path in Path("/proc").glob("[0-9]*/stat") if in_group(path, group)]
    assert left == [], "nothing of it is at work any more"
    started = (tmp_path / "python.arguments").read_text()
    assert started.startswith("-c from cushion.cli import main; main() -m model=tiny "), "as the installed command"


def in_group(stat: Path, group: int) -> bool:
    """Whether a process is of a group and alive, by its `/proc/<id>/stat`."""
    try:
        state, _, its = stat.read_text().rpartition(") ")[2].split()[:3]
    except OSError:
        return False
    return int(its) == group and state != "Z"


@pytest.mark.parametrize(("runs", "searches", "seeds"), [(2, 1, 1), (4, 2, 1), (6, 1, 3), (20, 2, 5)])
def test_a_sweep_has_as_many_runs_as_asked_for(
    check: ModuleType, tmp_path: Path, runs: int, searches: int, seeds: int
) -> None:
    values = dict(argument.split("=") for argument in check.sweep(tmp_path, tmp_path, runs, [])[1:])
    assert (values["search"].count(",") + 1, values["seed"].count(",") + 1) == (searches, seeds)
    assert 2 * searches * seeds == runs


def outcome(check: ModuleType, value: float, **attempts: int) -> object:
    return check.Outcome("some", 1.0, {"run": {"status": "completed", "metrics": {"perplexity": value}}}, attempts)


def test_what_differs_from_the_unbroken_sweep_is_told(check: ModuleType) -> None:
    whole, same = outcome(check, 1.0, a=1, b=1), outcome(check, 1.0, a=1, b=1)
    check.compare(whole, same)
    assert same.problems == []
    for other, expected in (
        (outcome(check, 1.0 + 1e-15, a=1, b=1), "run differs in metrics"),
        (outcome(check, 1.0, a=2, b=1), "1 attempts at steps more than steps, with 0 kills"),
        (outcome(check, 1.0, a=1, c=1), "2 steps are not those of the other"),
        (check.Outcome("some", 1.0, {}, {"a": 1, "b": 1}), "run is missing"),
    ):
        check.compare(whole, other)
        assert other.problems == [expected]
    assert check.again({"a": (1, 2), "b": (3, 4), "c": (5, 6)}, {"a": (1, 2), "b": (3, 5)}) == [
        "b was finished, and is written again", "c was finished, and is gone",
    ]  # fmt: skip


def test_what_a_kill_left_behind_is_told(check: ModuleType, tmp_path: Path) -> None:
    run, step = tmp_path / "default" / "m" / "q-s-t" / "hash", tmp_path / "cache" / "search" / "key"
    for folder, files in ((run / "figures", ["a.png"]), (run, [".lock", ".figures.lock"]), (step, ["depends_on.json"])):
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).touch()
    (run / "result.json").write_text('{"status": "completed", "metrics": {"perplexity": 1.5}, "timings": {"total": 2}}')
    (step / "made.json").write_text('{"attempts": [{}, {}]}')
    clean = check.look("some", tmp_path, 1.0, 0)
    assert clean.problems == []
    assert clean.attempts == {"search/key": 2}
    assert check.numbers(clean.results) == 1, "seconds are not compared"
    for name in (".result.json-abc", "prefix.safetensors.part"):
        (run / name).touch()
    (tmp_path / "cache" / "search" / "other.partial").mkdir()
    left = check.look("some", tmp_path, 1.0, 1).problems
    assert left[0] == "exit status 1"
    assert {line.rpartition("/")[2] for line in left[1:]} == {
        ".result.json-abc", "prefix.safetensors.part", "other.partial",
    }  # fmt: skip
