"""A run that is killed with SIGKILL goes on where it stopped and ends with the same result as an unbroken one."""

from __future__ import annotations

import errno
import os
import resource
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import processes, small_config, tuning_config, without_seconds

from cushion import cli, pipeline
from cushion.artifacts import Checkpoint
from cushion.events import Event, Progress
from cushion.results import RunResult, finished_result

KILLS = {
    "search step 2": 12,  # the second step of the search, in its third batch of candidates
    "tuning": 3,
    "perplexity, full precision": 3,
    "perplexity, per_tensor_static W8A8 + tuned prefix": 3,
}
"""Stage, and the unit of it that is done when the process is killed: before the checkpoint that would hold it."""


def run_until_killed(text: Path, output: Path, stage: str, done: int, threads: int) -> None:
    """In a process of its own: run, keeping a checkpoint after every unit of work, and die without a word."""
    torch.set_num_threads(threads)  # as in the unbroken run: sums may differ in their last bits otherwise
    Checkpoint.due = lambda self: True  # type: ignore[method-assign]

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.done) == (stage, done):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(tuning_config(text, output), [listen])


def outcome(result: RunResult) -> dict[str, Any]:
    record = asdict(result)
    kept = ("status", "model", "data", "prefix", "search", "tuning", "activations", "metrics", "rows", "warnings")
    return {key: without_seconds(record[key]) for key in kept}


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_run_ends_with_the_result_of_an_unbroken_one(text_file: Path, tmp_path: Path, stage: str) -> None:
    unbroken = pipeline.run(tuning_config(text_file, tmp_path / "unbroken"))

    broken = tuning_config(text_file, tmp_path / "broken")
    arguments = (text_file, tmp_path / "broken", stage, KILLS[stage], torch.get_num_threads())
    worker = processes().Process(target=run_until_killed, args=arguments)
    worker.start()
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL
    assert finished_result(pipeline.run_folder(broken)) is None

    events: list[Event] = []
    resumed = pipeline.run(broken, [events.append])
    assert outcome(resumed) == outcome(unbroken)

    progress = [event for event in events if isinstance(event, Progress)]
    assert (progress[0].stage, progress[0].done) == (stage, KILLS[stage]), "nothing finished is done again"
    assert list((tmp_path / "broken" / "cache").rglob("*.partial")) == []


def test_files_that_a_kill_cut_short_are_removed(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path)
    folder = pipeline.run_folder(config)
    folder.mkdir(parents=True)
    (folder / ".result.json-x7").write_text('{"status": "comp')
    pipeline.run(config)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "result.json"]


def test_a_run_on_a_full_disk_fails_with_its_own_error_and_goes_on_with_room(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = pipeline.run(tuning_config(text_file, tmp_path / "unbroken"))
    config = tuning_config(text_file, tmp_path / "broken")
    pipeline.run_folder(config)  # its code is hashed before files are limited
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            pipeline.run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "the failed run has no result.json" in caplog.text, "the second error; the first one is raised"
    made = {path.parent for path in (tmp_path / "broken" / "cache").glob("*/*/depends_on.json")}
    assert made, "the small steps before it are kept"
    assert outcome(pipeline.run(config)) == outcome(unbroken)
    left = [path for path in (tmp_path / "broken").rglob("*") if path.suffix in (".partial", ".part")]
    assert left == []

    cli.report(OSError(errno.ENOSPC, "No space left on device", "some file"))
    assert capsys.readouterr().err.splitlines() == [
        "cushion: error: [Errno 28] No space left on device: 'some file': make room, and give the same command again: "
        "it goes on from here"
    ]
