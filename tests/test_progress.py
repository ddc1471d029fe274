"""Progress bars: one per stage, with what is done of the total, closed when the run ends or breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cushion.events import Progress, RunFailed
from cushion.progress import ProgressBars


def test_a_bar_shows_stage_done_total_and_unit_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars:
        for done in range(1, 6):
            bars(Progress("search step 1", done, 5, "candidate"))
        bars(Progress("tuning", 1, 3, "step"))
        bars(RunFailed(Path(), "error"))
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("search step 1", "5/5", "candidate", "tuning", "1/3", "step"):
        assert part in captured.err
    assert captured.err.endswith("\n"), "an open bar is closed on leaving"


def test_a_broken_run_closes_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), ProgressBars() as bars:
        bars(Progress("tuning", 1, 3, "step"))
        raise RuntimeError
    assert capsys.readouterr().err.endswith("\n")


def test_a_stage_that_starts_in_the_middle_shows_what_was_done_before(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars:
        bars(Progress("tuning", 60, 90, "step"))
    assert "60/90" in capsys.readouterr().err
