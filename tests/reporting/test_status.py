"""What `cushion-status` says of runs that are done, at work, killed, failed, damaged, and never started."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from filelock import FileLock
from records import failed, record, write

from cushion.errors import ArtifactError
from cushion.reporting.cli import write_report
from cushion.reporting.status import main, missing, survey


def hold(lock: str, held: Event) -> None:
    with FileLock(lock):
        held.set()
        multiprocessing.Event().wait()  # until it is killed


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[multiprocessing.Process]:
    """A process that holds the lock of tmp_path/x/run/working, the way a run does."""
    folder = tmp_path / "x" / "run" / "working"
    folder.mkdir(parents=True)
    held = multiprocessing.get_context("spawn").Event()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(str(folder / ".lock"), held))
    process.start()
    assert held.wait(60)
    yield process  # type: ignore[misc]
    process.kill()
    process.join()


def states(root: Path) -> dict[str, str]:
    return {Path(state.place).name: state.state for state in survey(root)}


def plan(root: Path, *runs: tuple[str, str]) -> None:
    """A sweep's plan: pairs of a folder and what was swept."""
    content = [
        {"overrides": ["model=tiny", swept], "experiment": "default", "folders": [folder]} for folder, swept in runs
    ]
    (root / "sweeps").mkdir(parents=True, exist_ok=True)
    (root / "sweeps" / "plan-0.json").write_text(json.dumps({"runs": content}))


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_run_is_running_as_long_as_its_process_lives(tmp_path: Path, holder: multiprocessing.Process) -> None:
    assert states(tmp_path) == {"working": "running"}
    write(tmp_path / "x" / "run" / "working", failed("before"))  # a failed run that is tried again
    (tmp_path / "x" / "run" / "working" / "run00" / "result.json").rename(tmp_path / "x/run/working/result.json")
    assert states(tmp_path) == {"working": "running"}
    holder.kill()
    holder.join()
    assert states(tmp_path) == {"working": "failed"}
    (tmp_path / "x/run/working/result.json").unlink()
    assert states(tmp_path) == {"working": "interrupted"}


def test_done_failed_stopped_and_damaged_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = failed("", seed=2)
    stopped["error"]["type"] = "KeyboardInterrupt"
    write(tmp_path, record(), failed("text too short", seed=1), stopped, record(seed=3))
    (tmp_path / "run03" / "result.json").write_text("{")
    assert states(tmp_path) == {"run00": "done", "run01": "failed", "run02": "interrupted", "run03": "damaged"}
    code, out, err = outcome(capsys, str(tmp_path))
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["done", "failed", "damaged", "interrupted"]
    assert "DataError: text too short" in lines[1]
    assert lines[-1] == "1 done, 1 failed, 1 damaged, 1 interrupted"
    assert "run00" not in outcome(capsys, str(tmp_path), "--quiet")[1]


def test_what_a_sweep_planned_and_nobody_started_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, record())
    plan(tmp_path, ("run00", "seed=0"), ("run01", "seed=1"))
    code, out, _ = outcome(capsys, str(tmp_path))
    assert code == 3
    assert [line for line in out.splitlines() if line.startswith("missing")] == ["missing      .  seed=1"]
    write_report([tmp_path], tmp_path / "report")
    assert "missing: seed=1" in (tmp_path / "report" / "report.html").read_text()
    write(tmp_path, record(), record(seed=1))
    assert outcome(capsys, str(tmp_path))[0] == 0


def output_folder(root: Path) -> Path:
    """An output folder with two experiments of two planned runs each, of which one run of `first` is done."""
    runs = [
        {"overrides": [f"experiment={name}", f"seed={seed}"], "experiment": name, "folders": [
            f"{name}/model/row/cpu{seed}", f"{name}/model/row/cuda{seed}"]}
        for name in ("first", "second") for seed in (0, 1)
    ]  # fmt: skip
    (root / "sweeps").mkdir(parents=True)
    (root / "sweeps" / "plan-0.json").write_text(json.dumps({"runs": runs}))
    write(root, record(experiment="first"))
    folder = root / "first" / "model" / "row"
    folder.mkdir(parents=True)
    (root / "run00").rename(folder / "cuda0")
    return root


def test_below_an_output_folder_the_plans_above_count_for_what_is_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = output_folder(tmp_path / "outputs")
    code, out, _ = outcome(capsys, str(root / "first"))
    assert (code, out.splitlines()[-1]) == (3, "1 done, 1 missing")
    assert "missing      model/row  experiment=first seed=1" in out
    monkeypatch.chdir(root / "first")
    assert outcome(capsys, "model")[1].splitlines()[-1] == "1 done, 1 missing", "a relative folder, and a deeper one"
    code, out, _ = outcome(capsys, str(root / "first" / "model" / "row" / "cuda0"))
    assert (code, out.splitlines()[-1]) == (0, "1 done")
    assert outcome(capsys, str(root))[1].splitlines()[-1] == "1 done, 3 missing"


def test_a_plan_of_an_older_version_holds_no_seed_and_its_folders_name_the_model(tmp_path: Path) -> None:
    root = output_folder(tmp_path / "outputs")
    path = root / "sweeps" / "plan-0.json"
    for folder in (root, root / "first", root / "first" / "model"):
        assert {(state.seed, state.model) for state in missing(folder)} == {(None, "model")}
    runs = json.loads(path.read_text())["runs"]
    path.write_text(json.dumps({"runs": [{**run, "seed": 7, "model": "other"} for run in runs]}))
    assert {(state.seed, state.model) for state in missing(root)} == {(7, "other")}
    for wrong in ({"seed": "7"}, {"seed": None}, {"seed": True}, {"model": 7}):
        path.write_text(json.dumps({"runs": [{**runs[0], **wrong}]}))
        with pytest.raises(ArtifactError, match=r"plan-0\.json is damaged: delete it; the sweep writes it again"):
            missing(root)


def report_of(tmp_path: Path, *folders: Path, experiments: tuple[str, ...] = ()) -> str:
    (page, *_) = write_report(folders, tmp_path / "report", experiments)
    return page.read_text()


def test_the_report_has_planned_experiments_without_any_result(tmp_path: Path) -> None:
    root = output_folder(tmp_path / "outputs")
    text = report_of(tmp_path, root)
    assert '1 run completed, <span class="bad">3 missing</span>' in text
    assert 'id="table-runs-second"' in text
    lines = (tmp_path / "report" / "runs" / "second.csv").read_text().splitlines()
    assert [line.split("missing: ")[1].split(",")[0] for line in lines[1:]] == [
        "experiment=second seed=0", "experiment=second seed=1",
    ]  # fmt: skip
    assert ">1 missing</span>" in report_of(tmp_path, root / "first"), "the plan above the folder, and what is inside"
    assert "3 missing" in report_of(tmp_path, root, root / "first"), "each missing run counts once"
    text = report_of(tmp_path, root, experiments=("second",))
    assert '0 runs completed, <span class="bad">2 missing</span>' in text
    assert "table-first" not in text
    with pytest.raises(ArtifactError, match=r"experiment 'secnd'; there are: first, second; did you mean 'second'"):
        write_report([root], tmp_path / "report", ["secnd"])


def test_a_planned_run_that_was_killed_is_missing_in_the_report(tmp_path: Path) -> None:
    root = output_folder(tmp_path / "outputs")
    (root / "first" / "model" / "row" / "cpu1").mkdir()
    (root / "first" / "model" / "row" / "cpu1" / ".lock").touch()
    assert states(root / "first") == {"cuda0": "done", "cpu1": "interrupted"}
    assert "missing: experiment=first seed=1" in report_of(tmp_path, root)


def test_a_published_table_that_was_planned_and_never_run_is_in_the_report(tmp_path: Path) -> None:
    write(tmp_path / "outputs", record())
    plan(tmp_path / "outputs", ("run01", "seed=1"))
    path = tmp_path / "outputs" / "sweeps" / "plan-0.json"
    path.write_text(path.read_text().replace('"default"', '"cushioncache_table1"'))
    text = report_of(tmp_path, tmp_path / "outputs")
    assert "Not run: LLaMA2-7B, LLaMA3-8B" in text
    assert "missing: model=tiny seed=1" in text


def test_mistakes_end_with_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "holds no run")):
        code, out, err = outcome(capsys, str(folder))
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert message in err
    plan(tmp_path, ("run00", "seed=0"))
    (tmp_path / "sweeps" / "plan-0.json").write_text('{"runs": [{}]}')
    assert "plan-0.json is damaged" in outcome(capsys, str(tmp_path))[2]
