"""Sweepers that choose the next run by the results so far: what a run gives back, Optuna, agents of W&B sweeps."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from hydra._internal.core_plugins import basic_launcher
from hydra.core.plugins import Plugins
from offline_wandb import OfflineRun, read_offline
from test_cli import SMALL, Outcome, arguments, cushion, one_error  # noqa: F401
from tiny_run import processes, small_config
from wandb import wandb_agent
from wandb.apis.public import sweeps

from cushion import cli, pipeline
from cushion.errors import ConfigError
from cushion.final_numbers import returned
from cushion.reporting import figures
from cushion.results import FILE_NAME, Row, RunResult

Command = Callable[..., Outcome]
DOCS = Path(__file__).parent.parent / "docs" / "reports.md"


def test_a_run_gives_back_the_number_that_the_objective_names(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    result = pipeline.run(config)
    path = pipeline.run_folder(config) / FILE_NAME
    first, last = result.rows[0], result.rows[-1]
    assert (first.name, last.name) == ("full_precision", "quantized")
    assert returned(path, "ratio/text") == last.values["ratio/text"]
    assert returned(path, "perplexity/text/full_precision") == first.values["perplexity/text"]
    assert returned(path, None) == str(path)
    with pytest.raises(ConfigError, match=r"it has (?!.*/quantized).*ratio/text, .*, and those of each row"):
        returned(path, "nothing")
    with pytest.raises(ConfigError, match=r"objective='ratio/txt' .* did you mean 'ratio/text'"):
        returned(path, "ratio/txt")
    with pytest.raises(ConfigError, match=r"'ratio/text/full_precision' is not a number that this run measured"):
        returned(path, "ratio/text/full_precision")


def test_the_message_for_a_wrong_objective_lists_every_name_that_is_accepted(tmp_path: Path) -> None:
    values: dict[str, float | None] = {"perplexity/quantized": 9.0, "accuracy/mean": 0.5}  # a corpus named like a row
    rows = [Row("quantized", "W8A8", "", True, "none", values)]
    path = RunResult("completed", {}, {}, metrics=values, rows=rows).write(tmp_path)
    assert (returned(path, "perplexity/quantized"), returned(path, "accuracy_mean")) == (9.0, 0.5)
    with pytest.raises(ConfigError, match=r": it has perplexity/quantized, accuracy_mean, and those of each row"):
        returned(path, "nothing")


def test_hydra_gets_the_number_also_of_a_finished_run(
    cushion: Command,  # noqa: F811
    arguments: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    launcher: Any = Plugins.instance().class_name_to_class[f"{basic_launcher.__name__}.BasicLauncher"]
    launch = launcher.launch

    def noting(*arguments: Any, **keys: Any) -> Any:
        given.extend(found := launch(*arguments, **keys))
        return found

    monkeypatch.setattr(launcher, "launch", noting)
    for objective in ("null", "ratio/text"):
        assert cushion("-m", *arguments, f"objective={objective}").code == 0
    path, ratio = (one.return_value for one in given)
    assert ratio == json.loads(Path(path).read_text())["metrics"]["ratio/text"]
    assert one_error(cushion(*arguments, "objective=ration/text")).endswith("did you mean 'ratio/text'?")


def test_a_sweeper_that_optimises_is_told_what(cushion: Command, arguments: list[str]) -> None:  # noqa: F811
    line = one_error(cushion("-m", *arguments, "hydra.sweeper._target_=hydra_plugins.any.OptunaSweeper"))
    assert "needs the number that it optimises" in line
    assert "objective=perplexity/wikitext2" in line


def test_optuna_finds_the_best_of_its_trials(cushion: Command, arguments: list[str]) -> None:  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="an optional package")
    trials = ["-m", *arguments, "hydra/sweeper=optuna", "objective=perplexity/text", "hydra.sweeper.n_trials=4",
              "hydra.sweeper.sampler.seed=1", "quantizer.weights.bits=choice(2,8)"]  # fmt: skip
    done = cushion(*trials)
    assert done.code == 0, done.err
    results = [json.loads(path.read_text()) for path in Path("outputs").rglob(FILE_NAME)]
    found = {one["config"]["quantizer"]["weights"]["bits"]: one["metrics"]["perplexity/text"] for one in results}
    assert set(found) == {2, 8}
    (said,) = Path("outputs").glob("sweeps/*/optimization_results.yaml")
    best = yaml.safe_load(said.read_text())
    assert best["best_value"] == min(found.values())
    assert found[best["best_params"]["quantizer.weights.bits"]] == best["best_value"]


# ---- an agent of a W&B sweep --------------------------------------------------------------------------------------


def documented_sweep() -> dict[str, Any]:
    """The sweep's YAML of docs/reports.md."""
    (text,) = re.findall(r"```yaml\n(program: .*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    sweep: dict[str, Any] = yaml.safe_load(text)
    return sweep


def started(command: list[str], environment: dict[str, str]) -> None:
    """In a process of its own: what the agent starts, with what it puts into the environment."""
    os.environ.update(environment)
    os.environ.pop("WANDB_SERVICE", None)  # W&B's own process is not shared with the test's process
    figures.draw_figures = lambda *_: None  # type: ignore[assignment]
    sys.argv = command
    cli.main()


class Started:
    """In place of the agent's own: a process that has Cushion imported already."""

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        self.process: ForkServerProcess = processes().Process(target=started, args=(command, env))
        self.process.start()

    def poll(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`agent(sweep, {run: parameters}, ...)`: W&B's own agent, with a server that hands out these runs, then ends."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "swept123")
    monkeypatch.setattr(wandb_agent, "AgentProcess", Started)
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(sweeps, "_register_agent", lambda *_, **__: {"id": "agent"})

    def work(sweep: dict[str, Any], runs: dict[str, dict[str, Any]]) -> None:
        waiting = [
            {"type": "run", "run_id": run, "program": sweep["program"],
             "args": {key: {"value": value} for key, value in parameters.items()}}
            for run, parameters in runs.items()
        ]  # fmt: skip
        waiting.append({"type": "exit"})
        monkeypatch.setattr(sweeps, "_sweep_with_runs", lambda *_, **__: {"config": yaml.safe_dump(sweep)})
        monkeypatch.setattr(sweeps, "_agent_heartbeat", lambda *_, **__: [waiting.pop(0)])
        wandb_agent.Agent(None, wandb_agent.multiprocessing.Queue(), sweep_id="swept123").run()

    yield work


def test_an_agents_run_gets_the_numbers_also_of_a_finished_configuration(
    agent: Callable[..., None],
    arguments: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    sweep = documented_sweep()
    small = [*(one for one in arguments if one != "tracking=none")]
    sweep["command"] = ["cushion", *small, *(word for word in sweep["command"] if word.startswith("${args"))]
    tried = {"quantizer.weights.bits": 4}
    agent(sweep, {"first": tried, "second": tried})
    (path,) = tmp_path.rglob(FILE_NAME)
    expected = json.loads(path.read_text())
    assert expected["config"]["quantizer"]["weights"]["bits"] == 4
    runs: dict[str, OfflineRun] = {}
    for name in ("first", "second"):
        (folder,) = path.parent.glob(f"wandb/offline-run-*-{name}")
        runs[name] = read_offline(path.parent, pattern=folder.name)
    for run in runs.values():
        assert run.exit_code == 0
        assert run.sweep == "swept123"
        assert run.config["quantizer.weights.bits"] == 4, "by the sweep's own name of it"
        assert run.summary["ratio/text"] == expected["metrics"]["ratio/text"]
    assert runs["first"].summary.keys() == runs["second"].summary.keys()
    metric = sweep["metric"]["name"].replace("embedded", "text")
    assert metric in runs["first"].summary
