"""A sweep is refused before its first run if any of its combinations is invalid; its plan names every run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Outcome, arguments, cushion, one_error  # noqa: F401 - fixtures

from cushion import preflight
from cushion.errors import CushionError
from cushion.reporting.cli import write_report
from cushion.reporting.status import survey, without_result
from cushion.results import FILE_NAME

Command = Callable[..., Outcome]


@pytest.fixture
def only_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep ends with the error "planned" when its plan is written."""
    write_plan = preflight.write_plan

    def write(*planned: Any) -> None:
        write_plan(*planned)
        raise CushionError("planned")

    monkeypatch.setattr(preflight, "write_plan", write)


@pytest.mark.parametrize(
    ("sweep", "wrong", "named", "which"),
    [
        (["seed=0,1", "search.tau=0.5,2"], "2 of the 4 runs", "search.tau=2.0 is not", "run 2 and 1 more: seed=0"),
        (["bos=never,alway"], "1 of the 2 runs", "did you mean 'always'?", "run 2: bos=alway"),
        (["quantizer=none,per_tensor_sttic"], "1 of the 2 runs", "mean 'per_tensor_static'?", "run 2: quantizer="),
        (["tuning=none,short"], "1 of the 2 runs", "tuning=short has no prefix to tune", "run 2: tuning=short"),
        (["eval.include_path=null,."], "1 of the 2 runs", "='.' is read with", "run 2: eval.include_path=."),
        (["device=cpu,gpu"], "1 of the 2 runs", "device='gpu' is not supported", "run 2: device=gpu"),
    ],
)  # fmt: skip
def test_one_invalid_combination_refuses_the_sweep_before_its_first_run(
    cushion: Command, arguments: list[str], sweep: list[str], wrong: str, named: str, which: str  # noqa: F811
) -> None:  # fmt: skip
    line = one_error(cushion("-m", *arguments, *sweep))
    assert f"{wrong} of this sweep are invalid, none was started" in line
    assert named in line
    assert which in line
    assert not Path("outputs").exists(), "no run began"


def test_every_reason_is_said_once(cushion: Command, arguments: list[str]) -> None:  # noqa: F811
    line = one_error(cushion("-m", *arguments, "seed=0,1,2", "bos=alway,never", "eval.block_length=1,32"))
    assert line.count("bos='alway' is not allowed") <= 2  # alone, and not once for every seed
    assert line.count("eval.block_length=1 is not allowed") == 1


def test_an_experiment_that_sweeps_is_checked_without_m(cushion: Command, arguments: list[str], tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\nexperiment: mine\nhydra: {mode: MULTIRUN, sweeper: {params: {search.tau: '0.5,2'}}}\n"
    (folder / "mine.yaml").write_text(text)
    own = ["--config-dir", str(tmp_path / "conf"), "experiment=mine", *arguments]
    assert "run 2: search.tau=2" in one_error(cushion(*own))
    assert not Path("outputs").exists()
    assert cushion(*own, "search.tau=0.5").code == 0, "the command line wins over the experiment's sweep"


def experiment(folder: Path, name: str, text: str = "") -> None:
    """An experiment of its own in `<folder>/conf/experiment`."""
    path = folder / "conf" / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\nexperiment: {name}\n{text}\n")


@pytest.mark.usefixtures("only_planned")
def test_several_experiments_are_refused_if_one_sweeps_by_itself(
    cushion: Command, arguments: list[str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    experiment(tmp_path, "one")
    experiment(tmp_path, "two", "seed: 2")
    experiment(tmp_path, "sweep", "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '3,4'}}}")
    own = ["-m", "--config-dir", str(tmp_path / "conf"), *arguments]
    line = one_error(cushion(*own, "experiment=one,sweep", "search.tau=0.5,2"))
    assert "experiment=one,sweep cannot be one sweep: sweep would not be swept" in line
    assert "give one command each" in line
    assert not Path("outputs").exists()
    assert "cushioncache_table1, cushioncache_table2 would not be swept" in one_error(
        cushion("-m", "experiment=cushioncache_table1,cushioncache_table2")
    )
    for several, count in (("one,two", 2), ("sweep", 2)):
        assert "planned" in one_error(cushion(*own, f"experiment={several}", "paths.output_dir=out"))
        assert len(planned(Path("out"), several.split(","))) == count


def planned(output: Path, experiments: list[str]) -> list[str]:
    """The folders of the runs that plans name for some experiments."""
    runs = [run for path in (output / "sweeps").glob("plan-*.json") for run in json.loads(path.read_text())["runs"]]
    return [run["folders"][0] for run in runs if run["experiment"] in experiments]


def test_copies_on_several_gpus_are_refused_where_each_process_has_one(
    cushion: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr("cushion.preflight._check_launcher", lambda _: None)  # refused before anything is launched
    given = [a for a in arguments if not a.startswith("search=")] + ["search=greedy_sampled", "search.replicas=1,2"]
    line = one_error(cushion("-m", *given, "hydra/launcher=joblib_local"))
    assert "1 of the 2 runs" in line
    assert "search.replicas=2 needs as many GPUs, and with hydra/launcher=joblib_local each run has one" in line
    assert "use search.replicas=1, or hydra/launcher=basic" in line
    assert not Path("outputs").exists()


def test_the_plan_names_every_run_and_a_second_start_writes_the_same(cushion: Command, arguments: list[str]) -> None:  # noqa: F811
    arguments = ["-m", *arguments, "quantizer=none,per_tensor_dynamic"]
    assert cushion(*arguments).code == 0
    (plan,) = Path("outputs/sweeps").glob("plan-*.json")
    content = plan.read_text()
    planned = json.loads(content)["runs"]
    assert len(planned) == 2
    done = {path.parent.relative_to("outputs").as_posix() for path in Path("outputs").rglob(FILE_NAME)}
    assert len(done) == 2
    assert all(len(done & set(run["folders"])) == 1 for run in planned)
    assert {state.state for state in survey(Path("outputs"))} == {"done"}
    lost = Path("outputs") / sorted(done)[0]
    for path in lost.rglob("*"):
        if path.is_file():
            path.unlink()
    assert sorted(state.state for state in survey(Path("outputs"))) == ["done", "missing"]
    assert cushion(*arguments).code == 0
    assert [path.read_text() for path in Path("outputs/sweeps").glob("plan-*.json")] == [content]
    assert {state.state for state in survey(Path("outputs"))} == {"done"}


def test_lost_seeds_are_told_by_the_plan_wherever_the_seed_was_set(
    cushion: Command,  # noqa: F811
    arguments: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Swept, shared by the whole sweep, or set by an experiment's file; and from any folder above the runs."""

    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nexperiment: cushioncache_table1\nseed: 1\n")
    monkeypatch.setattr("cushion.reporting.cli.draw_all", lambda *_: [])
    own = ["--config-dir", str(tmp_path / "conf"), *arguments, "experiment=mine"]
    assert cushion(*own, "quantizer=per_tensor_static", "seed=0").code == 0
    request.getfixturevalue("only_planned")
    for sweep in (["seed=0,1"], ["seed=1", "quantizer=none,per_tensor_dynamic"], ["quantizer=none,per_tensor_dynamic"]):
        assert "planned" in one_error(cushion("-m", *own, *sweep))
        for folder in ("outputs", "outputs/cushioncache_table1", "outputs/cushioncache_table1/tiny_llama"):
            lost = without_result(Path(folder))
            assert {(state.seed, state.model) for state in lost} == {(1, "tiny_llama")}
            write_report([Path(folder)], tmp_path / "report")
            with (tmp_path / "report" / "published" / "cushioncache_table1.csv").open(newline="") as file:
                lines = list(csv.DictReader(file))
            assert {line["tiny_llama ours seeds"] for line in lines} == {"", "1 of 2"}
        (plan,) = Path("outputs/sweeps").glob("plan-*.json")
        plan.unlink()


def test_a_plan_that_cannot_be_written_stops_the_sweep(cushion: Command, arguments: list[str]) -> None:  # noqa: F811
    Path("outputs").mkdir()
    Path("outputs/sweeps").write_text("in the way")
    outcome = cushion("-m", *arguments, "seed=0,1")
    assert outcome.code == 1
    assert "outputs/sweeps" in outcome.err
    assert not list(Path("outputs").rglob(FILE_NAME))
