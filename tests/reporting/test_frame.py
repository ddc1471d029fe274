"""Results as a data frame: every number once, with its error, beside the settings of its run."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from records import record, row, write

from cushion.errors import ConfigError
from cushion.reporting.cli import write_report
from cushion.reporting.frame import load_results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [row("quantized", 20.0), row("quantized_tuned", 12.0, accuracy=0.5, accuracy_stderr=0.02,
                                        **{"of_a_plugin": 3.0})]  # fmt: skip
    write(tmp_path / "a", record(rows=rows, seed=1, **{"search.tau": 0.25}))
    write(tmp_path / "b", record(rows=rows, seed=0))
    failed = record(rows=[row("quantized", None)], seed=2, status="failed")
    write(tmp_path / "c", {**failed, "error": {"type": "E", "message": "m"}})
    return tmp_path


def test_every_number_of_every_row_of_every_run_is_one_line(folder: Path) -> None:
    frame = load_results(folder)
    assert not frame.duplicated(["result", "row", "measure"]).any()
    tuned = frame[(frame["seed"] == 1) & (frame["row"] == "quantized_tuned")].set_index("measure")
    assert tuned.loc["perplexity/wikitext2", "value"] == 12.0
    assert tuned.loc["accuracy/mean", ["value", "stderr"]].tolist() == [0.5, 0.02]
    assert tuned.loc["of_a_plugin", "value"] == 3.0 and math.isnan(tuned.loc["of_a_plugin", "stderr"])
    assert "accuracy_stderr/mean" not in tuned.index  # it stands beside its value
    assert set(tuned["search.tau"]) == {0.25} and set(tuned["quantizer.name"]) == {"per_tensor_static"}
    failed = frame[frame["status"] == "failed"]
    assert set(failed["seed"]) == {2}
    assert failed.set_index("measure").loc["perplexity/wikitext2"].isna()["value"]


def test_intervals_stand_beside_what_they_are_of(tmp_path: Path) -> None:
    values = {"ratio/wikitext2": 1.2, "ratio_low/wikitext2": 1.1, "ratio_high/wikitext2": 1.3}
    write(tmp_path, record(rows=[row("quantized", 20.0, **values)]))
    found = load_results(tmp_path).set_index("measure")
    assert found.loc["ratio/wikitext2", ["value", "low", "high"]].tolist() == [1.2, 1.1, 1.3]
    assert not any(measure.startswith("ratio_") for measure in found.index)


def test_the_settings_asked_for_are_columns(folder: Path) -> None:
    frame = load_results(folder, settings=["tuning.lambda_q", "quantizer.weights.bits"])
    assert set(frame["tuning.lambda_q"]) == {0.01} and set(frame["quantizer.weights.bits"]) == {8}
    assert "search.tau" not in frame
    with pytest.raises(ConfigError, match=r"no result has the setting 'search.tua'; did you mean 'search.tau'"):
        load_results(folder, settings=["search.tua"])


def test_a_report_writes_the_frame(folder: Path, tmp_path: Path) -> None:
    write_report([folder], tmp_path / "report")
    assert (tmp_path / "report" / "rows.csv").read_text() == load_results(folder).to_csv(index=False)
    read = pd.read_csv(tmp_path / "report" / "rows.csv")
    assert read["value"].tolist() == pytest.approx(load_results(folder)["value"].tolist(), nan_ok=True)
