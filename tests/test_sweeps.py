"""What a sweep says of itself: which keys it sweeps, its table behind the last run, its runs' names in W&B."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from reporting.records import failed, record, row, write

from cushion import sweeps
from cushion.config import RunConfig, TrackingConfig, to_dict
from cushion.events import RunStarted
from cushion.swept import own_overrides, swept_keys
from cushion.tracking import WandbTracker

JOBS = [["search=none", f"search.tau={tau}", f"seed={seed}"] for tau in (0.25, 0.5) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def no_sweep() -> Iterator[None]:
    yield
    sweeps.end()


def test_what_tells_runs_apart_is_swept_and_a_launchers_process_knows_it() -> None:
    assert swept_keys(JOBS) == ("search.tau", "seed")
    assert swept_keys(JOBS[:1]) == swept_keys([]) == ()
    assert own_overrides(JOBS)[2] == JOBS[2][1:]
    assert own_overrides(JOBS[:1]) == JOBS[:1], "nothing tells a single run apart"
    sweeps.begin(sweeps.Sweep(4, ("search.tau", "seed")), JOBS, [[] for _ in JOBS])
    sweep = sweeps.current()
    assert sweep is not None
    assert sweep.heading(2, JOBS[2]) == "[3/4] search.tau=0.5 seed=0"
    sweeps.begin(sweeps.Sweep(None, ("seed",)))
    sweep = sweeps.current()
    assert sweep is not None
    assert sweep.heading(2, JOBS[2]) == "[3] seed=0", "a sweeper that chooses its runs on the way"
    assert sweeps.closing() is None
    sweeps.end()
    assert sweeps.current() is None
    assert not [name for name in os.environ if name.startswith("CUSHION_SWEEP")]


def test_the_closing_table_has_the_last_row_of_every_run_and_counts_failures(tmp_path: Path) -> None:
    ratio = {"ratio/wikitext2": 1.5, "ratio_low/wikitext2": 1.25, "ratio_high/wikitext2": 1.75}
    rows = [row("full_precision", 10.0), row("quantized", 15.0, seconds=7.0, **ratio)]
    write(tmp_path, record(rows=rows), failed("no room"), record(rows=rows[:1]))
    folders = [[tmp_path / "cuda", tmp_path / f"run{number:02}"] for number in range(4)]
    sweeps.begin(sweeps.Sweep(4, swept_keys(JOBS)), JOBS, folders)
    text = sweeps.closing()
    assert text is not None
    title, _, head, _, *runs = text.splitlines()
    assert title == "the last row of each run"
    assert head.split() == [
        "run", "search.tau", "seed", "row", "perplexity", "wikitext2", "ratio", "wikitext2", "seconds",
    ]  # fmt: skip
    assert runs[0].split() == ["1", "0.25", "0", "W8A8", "15.00", "1.500", "[1.250,", "1.750]", "7"]
    assert runs[1].split() == ["2", "0.25", "1", "failed", "-", "-", "-"]
    assert runs[2].split() == ["3", "0.5", "0", "full", "precision", "10.00", "-", "3"]
    assert runs[3].split() == ["4", "0.5", "1", "no", "result", "-", "-", "-"]
    assert runs[-1] == "4 runs: 2 completed, 1 failed, 1 no result"


def test_a_sweep_without_a_single_result_still_has_a_table(tmp_path: Path) -> None:
    sweeps.begin(sweeps.Sweep(4, swept_keys(JOBS)), JOBS, [[tmp_path] for _ in JOBS])
    text = sweeps.closing()
    assert text is not None
    assert text.splitlines()[-1] == "4 runs: 4 no result"


def test_a_run_of_a_sweep_has_what_was_swept_in_its_name_and_tags_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def init(**given: Any) -> None:
        asked.update(given)
        raise OSError("enough")

    monkeypatch.setattr(wandb, "init", init)
    config = TrackingConfig(mode="offline", tags=["mine"])
    long = f"search.tokens=[{'a' * 80}]"
    WandbTracker(config, ["search.tau=0.5", long])(RunStarted(tmp_path, "a-run", to_dict(RunConfig())))
    assert asked["name"] == f"a-run search.tau=0.5 {long}"
    assert asked["tags"][0] == "mine"
    assert asked["tags"][-2:] == ["search.tau=0.5", long[:64]], "W&B takes tags of 64 characters"
