"""Columns: a metric that declares one more has it everywhere, and every column says what a table needs to know."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from records import record, row, write

from cushion.final_numbers import final_numbers
from cushion.metrics.columns import METRICS, Column, Metric, Place, Row, columns, metrics, register
from cushion.reporting.cli import write_report
from cushion.reporting.tables import comparison_table

WATTS = Column("power/mean", "power", "W", lambda value: f"{value:.1f}", lower_is_better=True, error="power/stderr")


def declared(rows: Sequence[Row]) -> list[Column]:
    return [WATTS] if any(WATTS.key in row["values"] for row in rows) else []


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric of a user's own, registered for one test."""
    metrics()
    monkeypatch.setattr(METRICS, "_items", dict(METRICS.items()))
    register(Metric("power", declared, lambda _: {}, {"power": WATTS}))


def result(*seeds: int) -> list[dict[str, Any]]:
    values = {"power/mean": 250.04, "power/stderr": 1.25}
    rows = [row("full_precision", 10.0), row("quantized", 20.0, **values)]
    found = [record(seed=seed, rows=rows, search=None, tuning=None, prefix=None) for seed in seeds]
    return [{**one, "metrics": rows[-1]["values"]} for one in found]


@pytest.mark.usefixtures("power")
def test_a_metric_with_one_more_column_has_it_in_every_table_and_in_the_tracker(tmp_path: Path) -> None:
    (one,) = result(0)
    header, _, full, quantized = comparison_table(one).splitlines()
    assert header.split()[-2:] == ["power", "seconds"]
    assert (full.split()[-2], quantized.split()[-4:-1]) == ("-", ["250.0", "±", "1.2"])
    found = final_numbers(one)
    assert {key: value for key, value in found.items() if key.startswith("power")} == {
        "power/mean": 250.04, "power/mean/quantized": 250.04, "power/stderr/quantized": 1.25,
    }  # fmt: skip
    write_report([write(tmp_path / "results", one)], tmp_path / "report")
    for name in ("report.md", "report.html", "report.tex"):
        text = (tmp_path / "report" / name).read_text(encoding="utf-8")
        assert "power, W" in text and "250.0" in text, name
    titles, *lines = csv.reader((tmp_path / "report" / "runs" / "default.csv").read_text().splitlines())
    cells = [dict(zip(titles, line, strict=True)) for line in lines]
    assert [(cell["power, W"], cell["power, W standard error"]) for cell in cells] == [("-", ""), ("250.04", "1.25")]


def test_without_its_metric_a_value_stands_nowhere(tmp_path: Path) -> None:
    (one,) = result(0)
    assert "power" not in comparison_table(one)
    assert not any(key.startswith("power") for key in final_numbers(one))
    write_report([write(tmp_path / "results", one)], tmp_path / "report")
    assert "power" not in (tmp_path / "report" / "runs" / "default.csv").read_text(encoding="utf-8")


def test_metrics_stand_in_their_order_and_no_key_is_declared_twice() -> None:
    assert [metric.name for metric in metrics()] == [
        "perplexity", "ratio", "tasks", "accuracy_difference", "activations", "sinks_in_prefix", "latency",
        "prefix_as_tokens", "seconds",
    ]  # fmt: skip
    tasks = {
        "piqa": {"metric": "acc", "value": 0.5, "stderr": 0.1},
        "wikitext": {"metric": None, "metrics": {"word_perplexity": {"value": 21.0}}},
    }
    rows = [row("quantized", 20.0, tasks=tasks, accuracy=0.5)]
    keys = [column.key for metric in metrics() for column in metric.columns(rows)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "perplexity/wikitext2" and "tasks/wikitext/word_perplexity" in keys
    own = {column.named(Place.RUN) for column in columns(rows, Place.RUN)}
    assert own == {
        "perplexity/wikitext2", "accuracy/piqa", "accuracy/wikitext", "accuracy_mean", "accuracy_stderr",
        "largest_activation", "quantization_error",
    }  # fmt: skip
