"""result.json: comes back as it was written, says which schema it is of, and a failed one is not taken for finished."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest

import cushion
from cushion.config import RunConfig, to_dict
from cushion.errors import ArtifactError
from cushion.reporting.collect import collect, read_result
from cushion.results import (
    FILE_NAME,
    SCHEMA_VERSION,
    Row,
    RunResult,
    environment,
    finished_result,
    make_folder,
    make_room,
)


def result() -> RunResult:
    row = Row("quantized", "naive W8A8", "\n", True, "none", {"perplexity/text": 12.5, "seconds": 1.5})
    return RunResult("completed", to_dict(RunConfig()), environment("cpu"), prefix=None, rows=[row], warnings=["a"])


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = result().write(tmp_path / "run")
    assert path == tmp_path / "run" / FILE_NAME
    assert RunResult.read(path) == result()
    written = json.loads(path.read_text())
    assert written.pop("integrity")["run"] == "run"
    assert written == asdict(result())
    assert written["schema_version"] == SCHEMA_VERSION


def test_only_a_completed_result_counts_as_finished(tmp_path: Path) -> None:
    assert finished_result(tmp_path) is None
    replace(result(), status="failed", error={"type": "DataError", "message": "short"}).write(tmp_path)
    assert finished_result(tmp_path) is None
    result().write(tmp_path)
    assert finished_result(tmp_path) == result()


def damaged(change: dict[str, object]) -> str:
    return json.dumps({**asdict(result()), **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"result\.json is damaged"),
        ("[]", r"result\.json is not a result of schema version 1 or 2"),
        (damaged({"schema_version": 99}), r"result\.json is not a result of schema version 1 or 2"),
        (damaged({"unknown": 1}), r"result\.json is damaged .*unknown"),
        (damaged({"rows": [{"name": "x"}]}), r"result\.json is damaged"),
        (damaged({"rows": None}), r"result\.json is damaged"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), r"result\.json is damaged"),
    ],
)
def test_a_damaged_result_is_named_with_the_way_out(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ArtifactError, match=message + r".*delete .* and run again"):
        RunResult.read(tmp_path / FILE_NAME)
    assert finished_result(tmp_path) is None


def left_by_a_run(folder: Path) -> Path:
    """The folder of a finished run that left a prefix and a sample beside its result."""
    (folder / "samples" / "row").mkdir(parents=True)
    (folder / "samples" / "row" / "task.jsonl").write_text("{}\n")
    (folder / "prefix.json").write_text("{}")
    (folder / ".lock").touch()
    (folder / "figures").mkdir()
    result().write(folder)
    return folder


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def one_digit(path: Path) -> None:
    path.write_text(path.read_text().replace("12.5", "12.6"))


def another(run: Path) -> None:
    result().write(run.with_name("other")).replace(run / FILE_NAME)


CHANGES: dict[str, Callable[[Path], object]] = {
    "was changed after it was written": lambda run: one_digit(run / FILE_NAME),
    "is damaged": lambda run: folder_for(run / FILE_NAME),
    "is damaged .*level": lambda run: loop(run / FILE_NAME),
    r"does not fit what lies beside it \(prefix.json\)": lambda run: (run / "prefix.json").write_text("{} "),
    r"beside it \(samples/row/task.jsonl\)": lambda run: (run / "samples" / "row" / "task.jsonl").unlink(),
    r"beside it \(learned.safetensors\)": lambda run: (run / "learned.safetensors").touch(),
    "cannot be compared .*IsADirectory": lambda run: folder_for(run / "prefix.json"),
    r"is the result of another run \(other\)": another,
}  # fmt: skip


@pytest.mark.parametrize("reason", CHANGES)
def test_what_does_not_fit_a_result_is_named_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    run = left_by_a_run(tmp_path / "run")
    assert make_room(run) == finished_result(run) == result()
    assert not caplog.messages
    CHANGES[reason](run)
    assert finished_result(run) is None
    assert make_room(run) is None
    (message,) = caplog.messages
    assert re.search(rf"{FILE_NAME}.* {reason}.* it was moved to .*set_aside.*, and the run is done again", message)
    assert {path.name for path in run.iterdir()} == {".lock", "set_aside"}, "figures of it go with it"
    assert make_room(run) is None
    assert caplog.messages == [message], "nothing is left that does not fit"


@pytest.mark.parametrize(
    "name", ["prefix.json", "learned.safetensors", "samples", "samples/row", "samples/row/task.jsonl"]
)
@pytest.mark.parametrize("instead", [folder_for, loop])
def test_what_stands_in_the_way_of_a_run_without_a_result_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, instead: Callable[[Path], object]
) -> None:
    run = left_by_a_run(tmp_path / "run")
    (run / FILE_NAME).unlink()
    assert make_room(run) is None
    assert not caplog.messages, "a run that was killed goes on with what it has"
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.touch()
    if path.suffix or instead is loop:
        instead(path)
    assert make_room(run) is None
    (message,) = caplog.messages
    top = name.partition("/")[0]
    assert re.search(rf"{top} is not what a run leaves there: it was moved to .*set_aside", message)
    assert not (run / top).exists()


def test_what_stands_in_place_of_a_folder_is_moved_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file")
    make_folder(tmp_path / "run")
    make_folder(tmp_path / "run")
    (aside,) = tmp_path.glob("set_aside-run-*")
    assert aside.read_text() == "a file"
    assert len(caplog.messages) == 1


def test_a_result_that_a_report_reads_is_believed_only_as_it_was_written(tmp_path: Path) -> None:
    run = left_by_a_run(tmp_path / "run")
    moved = run.rename(tmp_path / "moved")
    assert read_result(moved / FILE_NAME) == asdict(result())
    one_digit(moved / FILE_NAME)
    with pytest.raises(ArtifactError, match=r"damaged \(it was changed after it was written\): delete the folder"):
        read_result(moved / FILE_NAME)
    (moved / "set_aside").mkdir()
    (moved / FILE_NAME).rename(moved / "set_aside" / FILE_NAME)
    result().write(tmp_path / "run")
    assert [found.path.parent.name for found in collect([tmp_path])] == ["run"]


def test_the_environment_names_versions_and_device() -> None:
    record = environment("cuda:1")
    assert record["device"] == "cuda:1"
    assert record["cushion"] == cushion.__version__
    assert record["packages"]["torch"] == version("torch")
    assert record["packages"]["transformers"] == version("transformers")
    json.dumps(record)
