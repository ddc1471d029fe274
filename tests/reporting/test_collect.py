"""Reading results: all that are there, the newest of each configuration, and a plain word about what is damaged."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from records import failed, record, row, write

from cushion.errors import ArtifactError
from cushion.reporting.cli import write_report
from cushion.reporting.collect import collect


def test_results_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", record(seed=0), record(seed=1))
    runs = collect([tmp_path, tmp_path / "a"])
    assert [run.seed for run in runs] == [0, 1]
    assert {run.model for run in runs} == {"model"}


def test_of_one_configuration_the_completed_result_written_last_counts(tmp_path: Path) -> None:
    write(tmp_path, failed("older"), record(), record(), failed("newest"))
    for name, time in (("run00", 100), ("run01", 300), ("run02", 200), ("run03", 400)):
        os.utime(tmp_path / name / "result.json", (time, time))
    (run,) = collect([tmp_path])
    assert run.completed
    assert (run.path.parent.name, run.superseded) == ("run01", 3)


def test_of_failed_results_alone_the_one_written_last_counts(tmp_path: Path) -> None:
    write(tmp_path, failed("later"), failed("earlier"))
    for name, time in (("run00", 200), ("run01", 100)):
        os.utime(tmp_path / name / "result.json", (time, time))
    (run,) = collect([tmp_path])
    assert (run.error, run.superseded) == ("DataError: later", 1)


def test_places_and_tracking_make_no_other_configuration_and_a_seed_does(tmp_path: Path) -> None:
    elsewhere = record()
    elsewhere["config"]["paths"]["output_dir"], elsewhere["config"]["tracking"] = "elsewhere", {"name": "wandb"}
    first, second = collect([write(tmp_path, record(), elsewhere, record(seed=1))])
    assert first.identity() != second.identity()
    assert first.identity("seed") == second.identity("seed")


def test_the_error_of_a_failed_run_is_one_line(tmp_path: Path) -> None:
    (run,) = collect([write(tmp_path, failed("too\nshort"))])
    assert run.error == "DataError: too short"


def without(key: str) -> dict[str, Any]:
    content = record()
    del content[key]
    return content


DAMAGED = {
    "half a file": '{"schema_version": 2, "status"',
    "no JSON": "nothing",
    "no record": "[]",
    "other version": json.dumps({**record(), "schema_version": 99}),
    "no rows": json.dumps(without("rows")),
    "no configuration": json.dumps(without("config")),
    "rows of another kind": json.dumps({**record(), "rows": [1]}),
    "a row without label": json.dumps({**record(), "rows": [{"name": "quantized"}]}),
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    write(tmp_path, record(), record(seed=1))
    path = tmp_path / "run01" / "result.json"
    content = DAMAGED[damage]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ArtifactError, match=r"run01.result\.json is (damaged|not a result).* delete the folder .*run01 and run again"
    ):
        collect([tmp_path])


def planted(**others: Any) -> dict[str, Any]:
    """A result of one row with some of its fields replaced."""
    return {**record(), "rows": [{**row("quantized", 20.0), **others}]}


def valued(**values: Any) -> dict[str, Any]:
    """A result of one row with some of its values replaced."""
    return {**record(), "rows": [row("quantized", 20.0, **values)]}


NO_NUMBERS = {
    "rows[0].values.perplexity/wikitext2='abc' is no number": valued(**{"perplexity/wikitext2": "abc"}),
    "rows[0].values.seconds=[3.0] is no number": valued(seconds=[3.0]),
    "rows[0].values.largest_activation=True is no number": valued(largest_activation=True),
    "rows[0].values.accuracy/mean='0.5' is no number": valued(**{"accuracy/mean": "0.5"}),
    "rows[0].stage='late' is none of none, found, tuned": planted(stage="late"),
    "rows[0].values is no dict": planted(values=[1.0]),
    "evaluation.losses is no dict of dicts": {**record(), "evaluation": {"losses": {"quantized": [1.0]}}},
    "evaluation.losses.a.b is no record of nats and tokens, two lists of as many numbers": {
        **record(),
        "evaluation": {"losses": {"a": {"b": {"nats": [1.0, 2.0], "tokens": [31]}}}},
    },
    "rows[0] has no 'stage'": {**record(), "rows": [{k: v for k, v in row("quantized", 1.0).items() if k != "stage"}]},
    "rows[0].tasks.piqa.value={} is no number": planted(tasks={"piqa": {"value": {}}}),
    "rows[0].tasks.piqa is no dict": planted(tasks={"piqa": 0.5}),
    "rows[0].tasks.piqa.metrics is no dict of dicts": planted(tasks={"piqa": {"value": 0.5, "metrics": {"acc": 0.5}}}),
    "timings.total='12' is no number": {**record(), "timings": {"total": "12"}},
    "rows[0].values.perplexity/wikitext2=inf is no number": valued(**{"perplexity/wikitext2": float("inf")}),
    "rows[0].values.quantization_error=nan is no number": valued(quantization_error=float("nan")),
    "rows[0].values.seconds=-inf is no number": valued(seconds=float("-inf")),
    "search.seconds='1' is no number": {**record(), "search": {"seconds": "1", "token_forwards": 5}},
    "search.token_forwards=[5] is no number": {**record(), "search": {"token_forwards": [5]}},
    "search is no dict": {**record(), "search": [1]},
    "tuning.seconds=inf is no number": {**record(), "tuning": {"seconds": float("inf")}},
    "activations is no dict": {**record(), "activations": [1]},
    "activations.curves is no dict": {**record(), "activations": {"curves": [1]}},
    "activations.curves.none is no dict": {**record(), "activations": {"curves": {"none": [1.0]}}},
    "activations.curves.none.top1 is no list": {**record(), "activations": {"curves": {"none": {"top1": 1.0}}}},
    "activations.curves.none.top1[1]=None is no number": {
        **record(),
        "activations": {"curves": {"none": {"top1": [1.0, None, 2]}}},
    },
    "config.seed='one' is no whole number": {**record(), "config": {**record()["config"], "seed": "one"}},
}


@pytest.mark.parametrize("problem", NO_NUMBERS)
def test_what_is_no_number_is_named_with_its_file(tmp_path: Path, problem: str) -> None:
    write(tmp_path, NO_NUMBERS[problem])
    with pytest.raises(ArtifactError, match=rf"run00.result\.json is damaged \({re.escape(problem)}\): delete the"):
        collect([tmp_path])


def test_numbers_that_were_not_measured_are_no_damage(tmp_path: Path) -> None:
    sparse = {**record(), "rows": [row("quantized", None, seconds=None, tasks={"piqa": {"value": 1}})]}
    del sparse["rows"][0]["values"]["largest_activation"], sparse["timings"]["total"]
    (run,) = collect([write(tmp_path, sparse)])
    assert run.record == sparse
    write_report([tmp_path], tmp_path / "report")


def test_a_run_without_a_search_a_tuning_or_curves_is_no_damage(tmp_path: Path) -> None:
    results = [
        {**record(seed=0), "search": None, "tuning": None, "activations": None},
        {**record(seed=1), "search": {"seconds": None}, "tuning": {}, "activations": {"curves": {}}},
    ]
    assert [run.record for run in collect([write(tmp_path, *results)])] == results


def test_an_empty_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no result\.json: run an experiment first"):
        collect([tmp_path])
    with pytest.raises(ArtifactError, match=r"there is no folder .*nowhere"):
        collect([write(tmp_path / "full", record()), tmp_path / "nowhere"])
