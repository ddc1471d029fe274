"""scripts/sync_wandb.sh: what is sent, what is left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "sync_wandb.sh"


@pytest.fixture
def wandb_that_says_what_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ASKED"\nexit "${STATUS:-0}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))


def sync(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=60)


@pytest.mark.usefixtures("wandb_that_says_what_it_is_asked")
def test_ended_runs_are_sent_and_those_under_way_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("one run", '{"ended": true}'), ("other", '{"ended": false}'), ("older", '{"location": "x"}')):
        (tmp_path / "out" / name / "wandb" / f"offline-run-{name[:2]}").mkdir(parents=True)
        (tmp_path / "out" / name / "tracking.json").write_text(said)
    done = sync(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == ["sync", "--no-include-synced"]
    assert {Path(path).name for path in asked[2:]} == {"offline-run-on", "offline-run-ol"}
    assert done.stdout.splitlines() == [f"left for later: {tmp_path}/out/other/wandb/offline-run-ot"]
    monkeypatch.setenv("STATUS", "1")
    assert sync(tmp_path / "out").returncode != 0


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = sync(tmp_path / "absent")
    assert done.returncode == 1
    assert f"there is no folder {tmp_path}/absent" in done.stderr
