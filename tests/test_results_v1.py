"""A result of schema version 1: it reads as its version-2 form, and reports as it did."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cushion.errors import ArtifactError
from cushion.metrics.columns import Measured, row_values
from cushion.reporting.cli import write_report
from cushion.reporting.collect import read_result
from cushion.reporting.tables import comparison_table, further_tables
from cushion.results import RunResult

STORED = Path(__file__).parent / "data"
OLD, NEW = STORED / "result_v1.json", STORED / "result_v2.json"


def content(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def test_both_readers_give_the_stored_version_2() -> None:
    assert content(OLD)["schema_version"] == 1
    assert read_result(OLD) == content(NEW)
    assert read_result(NEW) == content(NEW)
    assert RunResult.read(OLD) == RunResult.read(NEW)
    read = asdict(RunResult.read(OLD))
    assert read.pop("reconstruction") is None  # what came later is at its default
    for later in ("reconstructed", "learned_ranges"):
        assert [row.pop(later) for row in read["rows"]] == [False] * len(read["rows"])
    assert read == content(NEW)


def test_the_values_are_those_that_the_metrics_give_today() -> None:
    for old, new in zip(content(OLD)["rows"], content(NEW)["rows"], strict=True):
        mean = (old["accuracy"], old["accuracy_stderr"])
        largest, error, seconds = old["largest_activation"], old["quantization_error"], old["seconds"]
        assert new["values"] == row_values(Measured(old["perplexity"], old["tasks"], mean, largest, error, seconds))


def test_old_results_print_and_report_as_they_did(tmp_path: Path) -> None:
    record = asdict(RunResult.read(OLD))
    first, *others = further_tables(record)
    assert comparison_table(record).splitlines() == [
        "                                       perplexity text    accuracy  largest activation   L_q  seconds",
        "-------------------------------------  ---------------  ----------  ------------------  ----  -------",
        "full precision                                   12.50  75.0 ± 2.5              1234.6   250        3",
        "per_tensor_static W8A8 + tuned prefix         1.23e+05        50.0                12.0  0.25       40",
    ]
    assert first.splitlines()[2:] == [
        "full precision                         75.0 ± 2.5  75.0 ± 2.5",
        "per_tensor_static W8A8 + tuned prefix        50.0        50.0",
    ]
    assert [line.split()[-1] for line in others[0].splitlines()] == ["word_perplexity", "-" * 24, "21.25", "-"]
    for version, path in (("old", OLD), ("new", NEW)):
        (tmp_path / version).mkdir()
        shutil.copyfile(path, tmp_path / version / "result.json")
        write_report([tmp_path / version], tmp_path / f"report_{version}")
    table = (tmp_path / "report_old" / "runs" / "stored.csv").read_text(encoding="utf-8")
    assert table == (tmp_path / "report_new" / "runs" / "stored.csv").read_text(encoding="utf-8")
    titles, first_row, _ = csv.reader(table.splitlines())
    assert dict(zip(titles, first_row, strict=True))["copa, % standard error"] == "2.5"


DAMAGE = {
    r"rows\[0\]\.perplexity is no dict": ("perplexity", 12.5),
    r"rows\[0\]\.tasks is no dict": ("tasks", [1]),
    r"rows\[0\]\.tasks\.copa is no dict": ("tasks", {"copa": 0.5}),
    r"rows\[0\]\.name is no str": ("name", None),
    r"rows\[0\]\.values\.seconds='3' is no number": ("seconds", "3"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_in_an_old_result_is_named_with_the_way_out(tmp_path: Path, message: str) -> None:
    record = content(OLD)
    key, value = DAMAGE[message]
    record["rows"][0][key] = value
    path = tmp_path / "result.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"result\.json is damaged \(.*{message}.*\): delete the folder"):
        read_result(path)
