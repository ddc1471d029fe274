"""result.json: comes back as it was written, says which schema it is of, and a failed one is not taken for finished."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest

import cushion
from cushion.config import RunConfig, to_dict
from cushion.errors import ArtifactError
from cushion.results import FILE_NAME, SCHEMA_VERSION, Row, RunResult, environment, finished_result


def result() -> RunResult:
    row = Row("quantized", "naive W8A8", "\n", True, "none", {"perplexity/text": 12.5, "seconds": 1.5})
    return RunResult("completed", to_dict(RunConfig()), environment("cpu"), prefix=None, rows=[row], warnings=["a"])


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = result().write(tmp_path / "run")
    assert path == tmp_path / "run" / FILE_NAME
    assert RunResult.read(path) == result()
    assert json.loads(path.read_text()) == asdict(result())
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


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
        finished_result(tmp_path)


def test_the_environment_names_versions_and_device() -> None:
    record = environment("cuda:1")
    assert record["device"] == "cuda:1"
    assert record["cushion"] == cushion.__version__
    assert record["packages"]["torch"] == version("torch")
    assert record["packages"]["transformers"] == version("transformers")
    json.dumps(record)
