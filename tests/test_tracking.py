"""Tracking: offline without key or network, always closed, and never a reason for a run to fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from tiny_run import searching_config, small_config

from cushion import cli, pipeline
from cushion.config import SearchConfig, TrackingConfig
from cushion.events import Event, Progress, Record, RunFailed, RunFinished, RunStarted
from cushion.reporting.figures import draw_figures
from cushion.results import finished_result
from cushion.tracking import WandbTracker, choose_mode, flatten

OFFLINE = TrackingConfig(mode="offline")


# ---- a real run ---------------------------------------------------------------------------------------------------


def test_an_offline_run_is_kept_in_the_runs_folder_with_everything_it_logged(text_file: Path, tmp_path: Path) -> None:
    config = searching_config(text_file, tmp_path / "out")
    tracker = WandbTracker(OFFLINE)
    logged: list[dict[str, Any]] = []
    summaries: dict[str, Any] = {}

    def watch(event: Event) -> None:
        if isinstance(event, RunStarted):
            assert wandb.run is not None
            assert wandb.run.config.as_dict()["search"]["tau"] == 1.0
            original: Callable[..., None] = wandb.run.log
            wandb.run.log = lambda values: (logged.append(values), original(values))[1]  # type: ignore[method-assign, assignment]
            finish = wandb.run.finish
            live = wandb.run

            def finished(exit_code: int) -> None:
                summaries.update(dict(live.summary))
                finish(exit_code=exit_code)

            live.finish = finished  # type: ignore[method-assign, assignment]

    def draw(event: Event) -> None:
        if isinstance(event, RunFinished):
            draw_figures(event.result, event.folder)

    result = pipeline.run(config, [draw, tracker, watch])
    folder = pipeline.run_folder(config)
    assert wandb.run is None, "the run is closed"
    assert tracker.location is not None
    assert Path(tracker.location).is_dir()
    assert folder.resolve() in Path(tracker.location).resolve().parents
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))

    assert result.search is not None
    steps = [values for values in logged if "search/step" in values]
    assert [values["search/objective_after"] for values in steps] == [
        step["objective_after"] for step in result.search["steps"]
    ]
    curve = [values for values in logged if "curve/step" in values]
    for key in ("top1", "top2", "top3", "top10_percent", "median"):
        expected = result.activations["curves"]["found"][key]
        assert [values[f"curve/found/{key}"] for values in curve] == expected
    keys = {key for values in logged for key in values}
    assert {"comparison", "figures/activation_curves"} <= keys
    assert summaries["perplexity/text"] == result.metrics["perplexity"]["text"]


def test_a_run_that_breaks_is_closed_all_the_same(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    tracker = WandbTracker(OFFLINE)

    def fail(event: Event) -> None:
        if isinstance(event, Progress):
            assert wandb.run is not None
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        pipeline.run(config, [tracker, fail])
    assert wandb.run is None
    assert list(pipeline.run_folder(config).glob("wandb/offline-run-*"))


# ---- failing trackers ---------------------------------------------------------------------------------------------


class FailingRun:
    """A W&B run of which one method raises."""

    def __init__(self, failing: str) -> None:
        self.failing, self.finished = failing, 0
        self.url, self.dir, self.id = "", "", "id"
        self.summary: dict[str, Any] = {}

    def _call(self, name: str) -> None:
        if name == self.failing:
            raise OSError(f"{name} is out of order")

    def log(self, values: dict[str, Any]) -> None:
        self._call("log")

    def define_metric(self, *_: Any, **__: Any) -> None:
        self._call("define_metric")

    def log_artifact(self, artifact: Any) -> None:
        self._call("log_artifact")

    def finish(self, exit_code: int) -> None:
        self.finished += 1
        self._call("finish")


@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "log_artifact", "finish"])
def test_a_failing_tracker_warns_once_and_the_run_completes(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    run = FailingRun(failing)

    def init(**_: Any) -> FailingRun:
        run._call("init")
        return run

    monkeypatch.setattr(wandb, "init", init)
    config = small_config(text_file, tmp_path / "out")
    config.search = SearchConfig(name="tokens", method="tokens", tokens="a")
    config.tracking = OFFLINE
    with caplog.at_level(logging.WARNING):
        path = cli.execute(config)
    assert finished_result(path.parent) is not None
    warnings = [record for record in caplog.records if record.name == "cushion.tracking"]
    assert len(warnings) == 1
    assert f"{failing} is out of order" in warnings[0].getMessage()
    assert run.finished == (0 if failing == "init" else 1)


def test_a_tracker_that_failed_stays_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def init(**keys: Any) -> None:
        calls.append(keys)
        raise OSError("no server")

    monkeypatch.setattr(wandb, "init", init)
    tracker = WandbTracker(OFFLINE)
    started = RunStarted(tmp_path, "name", {"experiment": "x"})
    for event in (started, Record("search", 0, {"a": 1}), started, RunFailed(tmp_path, "error")):
        tracker(event)
    tracker.close()
    assert len(calls) == 1
    assert tracker.location is None


# ---- the mode -----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B settings of this machine: no mode, key or server in the environment, an empty home folder."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def answering(answer: bool, asked: list[tuple[str, int]] | None = None) -> Callable[[str, int], bool]:
    def reachable(host: str, port: int) -> bool:
        if asked is not None:
            asked.append((host, port))
        return answer

    return reachable


@pytest.mark.usefixtures("without_settings")
def test_without_a_key_a_run_is_offline_and_asks_nobody() -> None:
    asked: list[tuple[str, int]] = []
    assert choose_mode(answering(True, asked)) == "offline"
    assert asked == []


@pytest.mark.usefixtures("without_settings")
def test_with_a_key_the_network_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert choose_mode(answering(False)) == "offline"
    assert choose_mode(answering(True)) == "online"


@pytest.mark.usefixtures("without_settings")
@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("http://localhost:8080", ("localhost", 8080)),
        ("https://wandb.example", ("wandb.example", 443)),
        ("http://wandb.example", ("wandb.example", 80)),
    ],
)
def test_the_users_own_server_is_asked(monkeypatch: pytest.MonkeyPatch, server: str, expected: tuple[str, int]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    asked: list[tuple[str, int]] = []
    assert choose_mode(answering(True, asked)) == "online"
    assert asked == [expected]


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_wandbs_own_setting_of_the_mode_wins(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert choose_mode(answering(False)) == mode


def test_nested_values_are_joined_with_slashes() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
