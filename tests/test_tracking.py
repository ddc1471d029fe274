"""Tracking: offline without key or network, always closed, and never a reason for a run to fail."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from offline_wandb import read_offline
from tiny_run import processes, small_config, tuning_config
from wandb.sdk.wandb_setup import _WandbSetup

from cushion import cli, pipeline
from cushion.artifacts import Checkpoint
from cushion.config import ReconstructionConfig, RunConfig, SearchConfig, TrackingConfig, to_dict
from cushion.events import Event, Progress, Record, RunFailed, RunFinished, RunStarted
from cushion.final_numbers import final_numbers
from cushion.flat import flatten
from cushion.metrics.columns import Measured, row_values
from cushion.reporting import figures
from cushion.results import finished_result
from cushion.tracking import TRACKING_FILE, WandbTracker, _say_offline, choose_mode, summed_up

OFFLINE = TrackingConfig(mode="offline")


@pytest.fixture
def no_figures() -> Iterator[None]:
    """Draw nothing: what is tested is the same without figures, and they take longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_figures", lambda *_: None)
        yield


# ---- a real run ---------------------------------------------------------------------------------------------------


def drawn(event: Event) -> None:
    if isinstance(event, RunFinished):
        figures.draw_figures(event.result, event.folder)


@pytest.mark.usefixtures("blank_figures")
def test_an_offline_run_is_kept_in_the_runs_folder_with_everything_it_logged(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.experiment, config.tracking = "an_experiment", OFFLINE
    config.tracking.tags = ["mine"]
    tracker = WandbTracker(config.tracking)
    result = pipeline.run(config, [drawn, tracker])
    folder = pipeline.run_folder(config)
    assert wandb.run is None, "the run is closed"
    assert tracker.location is not None
    assert folder.resolve() in Path(tracker.location).resolve().parents
    said = json.loads((folder / TRACKING_FILE).read_text())
    assert (said["location"], said["ended"], said["exit_code"]) == (tracker.location, True, 0)

    run = read_offline(folder)
    assert run.exit_code == 0
    assert (run.group, run.job_type) == ("an_experiment", "tuning")
    assert run.tags == ["mine", "tiny_llama", "file", "per_tensor_static", "greedy_sampled", "short"]
    assert run.config["reconstruction"] == "none", "what is not there is no tag"
    names = ("model", "data", "quantizer", "search", "tuning")
    assert [run.config[name] for name in names] == [*run.tags[1:]], "runs can be grouped by what was chosen"
    assert run.config["search/tau"] == 1.0
    assert run.config["quantizer/activations/bits"] == 8

    assert result.search is not None and result.tuning is not None and result.prefix is not None
    for kind, steps, keys in (
        ("search", result.search["steps"], ("objective_after", "token")),
        ("tuning", result.tuning["steps"], ("loss", "error")),
    ):
        for key in keys:
            expected = [(step["step"], step[key]) for step in steps]
            assert run.series(f"{kind}/step", f"{kind}/{key}") == expected, "each step once, in order"
    for stage, curve in result.activations["curves"].items():
        for key in ("top1", "top2", "top3", "top10_percent", "median"):
            assert run.series("activations/block", f"activations/{stage}/{key}") == list(enumerate(curve[key]))
    assert run.own_summary == {"search/*", "activations/*"}
    for stage, curve in result.activations["curves"].items():
        assert run.summary[f"activations/{stage}/top1"] == max(curve["top1"]), "not that of the last block"
    (chart,) = folder.glob("wandb/offline-run-*/files/media/table/largest_activation_by_block_table*.json")
    drawn_lines = {line[1] for line in json.loads(chart.read_text())["data"]}
    assert drawn_lines == set(result.activations["titles"].values()) and len(drawn_lines) == 3
    said_of_prefix = run.artifacts["prefix"]
    assert said_of_prefix["model"]["fingerprint"] == result.model["fingerprint"]
    assert said_of_prefix["prefix"]["fingerprint"] == result.prefix["fingerprint"]
    assert said_of_prefix["metrics"]["ratio/text"] == result.metrics["ratio/text"]
    assert run.step_metrics == {
        "search/*": "search/step", "tuning/*": "tuning/step", "activations/*": "activations/block",
    }  # fmt: skip

    for row in result.rows:
        assert run.summary[f"perplexity/text/{row.name}"] == row.values["perplexity/text"]
        assert run.summary.get(f"ratio_stderr/text/{row.name}") == row.values.get("ratio_stderr/text")
        assert run.summary[f"largest_activation/{row.name}"] == row.values["largest_activation"]
    assert run.summary["perplexity/text"] == result.metrics["perplexity/text"]
    assert not any(key.startswith("perplexity/") for values in run.history for key in values), "numbers, not curves"
    assert run.summary["tuning/total_seconds"] == result.tuning["seconds"]
    assert {"comparison", "figures/activation_curves"} <= {
        key.partition(".")[0] for values in run.history for key in values
    }
    table = next(folder.glob("wandb/offline-run-*/files/media/table/comparison*.json"))
    assert [line[0] for line in json.loads(table.read_text())["data"]] == [row.name for row in result.rows]


def test_the_summary_of_a_search_is_its_last_accepted_step() -> None:
    steps = [
        {"step": 0, "token": "a", "objective_after": 2.0, "accepted": True, "finalists": [{"token": "b"}]},
        {"step": 1, "token": "c", "objective_after": 1.5, "accepted": False, "finalists": []},
    ]
    result: dict[str, Any] = {"activations": {}, "search": {"steps": steps}}
    assert summed_up(result) == {"search/token": "a", "search/objective_after": 2.0, "search/accepted": True}
    steps[0]["accepted"] = False
    assert summed_up(result) == {}, "nothing was found"


def test_runs_with_different_quantizers_have_the_same_keys(text_file: Path, tmp_path: Path) -> None:
    one = asdict(pipeline.run(small_config(text_file, tmp_path / "out")))
    other_config = small_config(text_file, tmp_path / "out")
    other_config.quantizer.name, other_config.quantizer.weights.bits = "other", 4
    other = asdict(pipeline.run(other_config))
    assert final_numbers(one).keys() == final_numbers(other).keys()
    assert final_numbers(one)["perplexity/text/quantized"] != final_numbers(other)["perplexity/text/quantized"]


def scored(metric: str | None, **metrics: float | None) -> dict[str, Any]:
    value = None if metric is None else metrics[metric]
    return {
        "metric": metric,
        "value": value,
        "stderr": None,
        "metrics": {k: {"value": v, "stderr": None} for k, v in metrics.items()},
    }


def test_what_a_task_measures_that_is_no_accuracy_is_in_the_summary() -> None:
    tasks = {"one": scored("acc", acc=0.5, f1=0.4), "two": scored(None, word_perplexity=12.5, overflown=None)}
    values = row_values(Measured({}, tasks, (0.5, None), 1.0, 2.0, 3.0))
    row = {"name": "quantized", "label": "naive", "values": values, "tasks": tasks}
    found = final_numbers({"rows": [row], "metrics": {}, "search": None, "tuning": None, "prefix": None})
    of_tasks = {key: value for key, value in found.items() if key.startswith(("accuracy/", "tasks/"))}
    assert of_tasks == {
        "accuracy/one/quantized": 0.5, "accuracy/mean/quantized": 0.5, "tasks/two/word_perplexity/quantized": 12.5,
    }  # fmt: skip


# ---- a run that goes on -------------------------------------------------------------------------------------------


def tracked_until_killed(text: Path, output: Path, stage: str, done: int) -> None:
    """In a process of its own: a tracked run that dies without a word at a moment; `finished` is after its result."""
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("WANDB_SERVICE", None)  # W&B's own process is not shared with the test's process, which lives on
    torch.set_num_threads(1)
    Checkpoint.due = lambda self: True  # type: ignore[method-assign]

    def kill(event: Event) -> None:
        progress = (event.stage, event.done) if isinstance(event, Progress) else ("", 0)
        if (progress == (stage, done)) or (stage == "finished" and isinstance(event, RunFinished)):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(tuning_config(text, output), [kill, WandbTracker(OFFLINE)])


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("stage", "done"), [("tuning", 4), ("finished", 0)])
def test_a_run_that_goes_on_after_a_kill_is_one_run_and_logs_nothing_twice(
    text_file: Path, tmp_path: Path, stage: str, done: int
) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.tracking = OFFLINE
    folder = pipeline.run_folder(config)
    worker = processes().Process(target=tracked_until_killed, args=(text_file, tmp_path / "out", stage, done))
    worker.start()
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL
    before = json.loads((folder / TRACKING_FILE).read_text())
    assert before["ended"] is False

    cli.execute(config)
    after = json.loads((folder / TRACKING_FILE).read_text())
    assert (after["id"], after["ended"]) == (before["id"], True)
    assert after["location"] != before["location"]
    run = read_offline(folder)
    assert run.exit_code == 0
    result = finished_result(folder)
    assert result is not None and result.search is not None and result.tuning is not None
    for kind, record in (("search", result.search), ("tuning", result.tuning)):
        assert [row[f"{kind}/step"] for row in run.history if f"{kind}/step" in row] == list(
            range(len(record["steps"]))
        )
    assert run.summary["perplexity/text"] == result.metrics["perplexity/text"]

    cli.execute(config)
    assert json.loads((folder / TRACKING_FILE).read_text()) == after, "what was logged to its end is left alone"


def test_what_the_server_has_of_a_resumed_run_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    run = FailingRun("")
    run.resumed, run.summary = True, {"search/step": 1, "error": "no room", "comparison": {"_type": "table-file"}}

    def init(**keys: Any) -> FailingRun:
        asked.append(keys)
        return run

    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / TRACKING_FILE).write_text('{"location": "there", "id": "abc", "mode": "online", "ended": false}')
    tracker = WandbTracker(TrackingConfig(mode="online"))
    tracker(RunStarted(tmp_path, "name", to_dict(RunConfig())))
    assert "error" not in run.summary, "it may end well now"
    for kind, step in (("search", 0), ("search", 1), ("search", 2), ("tuning", 0)):
        tracker(Record(kind, step, {"value": 1.0}))
    assert (asked[0]["id"], asked[0]["resume"]) == ("abc", "allow")
    assert asked[0]["settings"].finish_timeout_raises, "else a run that was not sent to its end would count as ended"
    assert [(key, values[key]) for values in run.logged for key in values if key.endswith("step")] == [
        ("search/step", 2), ("tuning/step", 0),
    ]  # fmt: skip
    result = {"rows": [], "metrics": {}, "search": None, "tuning": None, "prefix": None, "activations": {}}
    tracker(RunFinished(tmp_path, result, None))
    assert run.finished == 1
    assert not any("comparison" in values for values in run.logged)
    del run.summary["comparison"]
    tracker(RunStarted(tmp_path, "name", to_dict(RunConfig())))
    tracker(RunFinished(tmp_path, result, None))
    assert "comparison" in run.logged[-1]

    tracker = WandbTracker(OFFLINE)
    tracker(RunStarted(tmp_path, "name", to_dict(RunConfig())))
    assert asked[1]["id"] == "abc" != asked[2]["id"], "offline all is logged anew: not under what the server knows"


def test_where_wandb_is_disabled_no_run_is_named_or_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("it is disabled"))
    monkeypatch.setattr(wandb, "setup", lambda: _WandbSetup(os.getpid()))
    tracker = WandbTracker(TrackingConfig())
    tracker(RunStarted(tmp_path, "name", to_dict(RunConfig())))
    tracker(Record("search", 0, {"value": 1.0}))
    assert tracker.location is None and tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_logged_before_is_removed_once_there_is_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TRACKING_FILE).write_text('{"location": "x", "id": "abc", "mode": "offline", "ended": false}')
    old, new = (tmp_path / "wandb" / f"offline-run-{number}-abc" for number in (1, 2))
    old.mkdir(parents=True)
    run = FailingRun("init")
    run.dir = str(new / "files")

    def init(**_: Any) -> FailingRun:
        run._call("init")
        Path(run.dir).mkdir(parents=True)
        return run

    monkeypatch.setattr(wandb, "init", init)
    started = RunStarted(tmp_path, "name", to_dict(RunConfig()))
    WandbTracker(OFFLINE)(started)
    assert old.is_dir(), "W&B did not start: all that there is of the run"
    run.failing = ""
    WandbTracker(OFFLINE)(started)
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == [new.name]


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_is_logged_again_only_if_its_wandb_run_ended_badly(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.tracking = OFFLINE
    place = cli.execute(config).parent / TRACKING_FILE
    said = json.loads(place.read_text())
    place.write_text(json.dumps({**said, "exit_code": 1}))
    cli.execute(config)
    after = json.loads(place.read_text())
    assert (after["id"], after["exit_code"]) == (said["id"], 0)
    assert after["location"] != said["location"]

    for damaged in ('{"location": ', "[]"):
        place.write_text(damaged)
        capsys.readouterr()
        with caplog.at_level(logging.WARNING):
            cli.execute(config)
        assert f"{place} is damaged" in caplog.text
        caplog.clear()
        assert "W&B run  none" in capsys.readouterr().out.splitlines()
        assert place.read_text() == damaged


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
    folder = pipeline.run_folder(config)
    failed = read_offline(folder)
    assert (failed.exit_code, failed.summary["error"]) == (1, "RuntimeError: in the middle")
    said = json.loads((folder / TRACKING_FILE).read_text())
    assert (said["ended"], said["exit_code"]) == (True, 1)
    pipeline.run(config, [WandbTracker(OFFLINE)])
    mended = read_offline(folder)
    assert mended.exit_code == 0, "tried again it is the same run, and the only one"
    assert "error" not in mended.summary

    (sent,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    sent.with_suffix(".wandb.synced").touch()
    (folder / "result.json").unlink()
    pipeline.run(config, [WandbTracker(OFFLINE)])
    kept = {path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(kept) == 2 and sent.name in kept, "what the server has stays, and is not written over"


# ---- failing trackers ---------------------------------------------------------------------------------------------


class FailingRun:
    """A W&B run of which one method raises."""

    def __init__(self, failing: str) -> None:
        self.failing, self.finished = failing, 0
        self.url, self.dir, self.id = "", "", "id"
        self.summary: dict[str, Any] = {}
        self.resumed = False
        self.logged: list[dict[str, Any]] = []

    def _call(self, name: str) -> None:
        if name == self.failing:
            raise OSError(f"{name} is out of order")

    def log(self, values: dict[str, Any]) -> None:
        self._call("log")
        self.logged.append(values)

    def define_metric(self, *_: Any, **__: Any) -> None:
        self._call("define_metric")

    def log_artifact(self, artifact: Any) -> None:
        self._call("log_artifact")

    def finish(self, exit_code: int) -> None:
        self.finished += 1
        self._call("finish")


@pytest.mark.usefixtures("no_figures")
def test_the_ranges_that_a_reconstruction_learned_are_an_artifact(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    run = FailingRun("nothing")
    monkeypatch.setattr(run, "log_artifact", logged.append)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    config = small_config(text_file, tmp_path / "out")
    config.reconstruction = ReconstructionConfig("scales", "blockwise", epochs=1)
    config.eval.controls = False
    config.tracking = OFFLINE
    cli.execute(config)
    assert [(one.type, list(one.manifest.entries)) for one in logged] == [
        ("reconstruction", ["reconstructed.safetensors"])
    ]


@pytest.mark.usefixtures("no_figures")
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
    said = json.loads((path.parent / TRACKING_FILE).read_text())
    assert said["ended"] is False

    monkeypatch.undo()
    cli.execute(config)
    again = json.loads((path.parent / TRACKING_FILE).read_text())
    assert (again["id"], again["ended"]) == (said["id"], True), "the same command catches up on it"
    assert read_offline(path.parent).exit_code == 0


def test_a_tracker_that_failed_stays_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def init(**keys: Any) -> None:
        calls.append(keys)
        raise OSError("no server")

    monkeypatch.setattr(wandb, "init", init)
    tracker = WandbTracker(OFFLINE)
    started = RunStarted(tmp_path, "name", to_dict(RunConfig()))
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
    monkeypatch.chdir(tmp_path)  # W&B reads ./wandb/settings too
    monkeypatch.setattr(wandb, "setup", lambda: _WandbSetup(os.getpid()))  # reads settings anew, and starts no process


def answering(answer: bool, asked: list[tuple[str, int]] | None = None) -> Callable[[str, int], bool]:
    def reachable(host: str, port: int) -> bool:
        if asked is not None:
            asked.append((host, port))
        return answer

    return reachable


@pytest.mark.usefixtures("without_settings")
def test_without_a_key_a_run_is_offline_asks_nobody_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    _say_offline.cache_clear()
    asked: list[tuple[str, int]] = []
    with caplog.at_level("INFO"):
        assert choose_mode(answering(True, asked)) == "offline"
    assert asked == []
    assert "W&B is offline, since there is no key for api." in caplog.text


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


@pytest.mark.usefixtures("without_settings")
def test_a_key_and_a_server_are_found_where_wandb_login_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    assert choose_mode(answering(True, asked)) == "online"  # of the name that W&B's own server had
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example\n")
    assert choose_mode(answering(True, asked)) == "offline"  # another server, and no key for it
    with (tmp_path / "netrc").open("a") as file:
        file.write(f"machine wandb.example login user password {'k' * 40}\n")
    assert choose_mode(answering(True, asked)) == "online"
    assert [host for host, _ in asked][1:] == ["wandb.example"]


@pytest.mark.usefixtures("without_settings")
@pytest.mark.parametrize(
    ("mode", "expected"),
    [("online", "online"), ("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")],
)
def test_wandbs_own_setting_of_the_mode_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, expected: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    earlier = _WandbSetup(os.getpid())
    assert earlier.settings.mode == "online"  # read before the variable was set, as in a notebook's first run
    monkeypatch.setattr(wandb, "setup", lambda: earlier)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert choose_mode(answering(expected != "online")) == expected
    monkeypatch.setattr(wandb, "setup", lambda: _WandbSetup(os.getpid()))
    if expected != "online":  # what `wandb offline` and `wandb disabled` write
        monkeypatch.delenv("WANDB_MODE")
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text(f"[default]\nmode = {mode}\n")
        assert choose_mode(answering(True)) == expected


def test_nested_values_are_joined_with_slashes() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}, separator="/") == {"a/b": 1, "a/c/d": 2, "e": 3}
