"""Whole runs on a tiny model: their rows, what they share through the cache, what they are identified by."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tiny_run import TUNED_ROWS, processes, searching_config, small_config, tuning_config, without_seconds

from cushion import pipeline
from cushion.config import (
    ActivationConfig,
    CorpusConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    SearchConfig,
    SearchRound,
    WeightConfig,
)
from cushion.errors import ConfigError, DataError
from cushion.events import Event, Progress, Record, RunFailed, RunFinished, RunStarted
from cushion.models import load_language_model
from cushion.prefix import Prefix
from cushion.quantization.learned import Learned
from cushion.results import FILE_NAME, RunResult


def stages(events: list[Event]) -> set[str]:
    """The first words of the stages that made progress."""
    return {event.stage.split(",")[0].split(" step")[0] for event in events if isinstance(event, Progress)}


# ---- a run with everything ----------------------------------------------------------------------------------------


def test_a_run_with_search_and_tuning(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    events: list[Event] = []
    result = pipeline.run(config, [events.append])
    folder = pipeline.run_folder(config)

    assert result.status == "completed"
    assert [row.name for row in result.rows] == TUNED_ROWS
    for row in result.rows:
        ratio = [f"ratio{what}/text" for what in ("", "_stderr", "_low", "_high")] if row.quantized else []
        values = {key: value for key, value in row.values.items() if "_block_" not in key}
        sinks = [] if row.stage == "none" else ["sinks_in_prefix"]
        assert list(values) == [
            "perplexity/text",
            *ratio,
            "largest_activation",
            "quantization_error",
            *sinks,
            "seconds",
        ]
        assert all(number is not None and math.isfinite(number) and number >= 0 for number in row.values.values()), row
    assert [row.quantized for row in result.rows] == [False, False, False, True, True, True]
    assert [row.stage for row in result.rows] == ["none", "found", "tuned"] * 2
    losses, ceilings = result.evaluation["losses"], result.evaluation["ceilings"]
    for full, row in zip(result.rows[:3], result.rows[3:], strict=True):
        assert (ceilings[full.name], ceilings[row.name]) == (None, full.name)
        (mine, theirs), key = ([losses[one.name]["text"] for one in (row, full)]), "perplexity/text"
        assert sum(mine["tokens"]) == sum(theirs["tokens"]) == row.tokens["text"]
        assert math.exp(sum(mine["nats"]) / sum(mine["tokens"])) == pytest.approx(row.values[key], rel=1e-12)
        assert row.values["ratio/text"] == row.values[key] / full.values[key]  # type: ignore[operator]
        paired = stats.ttest_rel(*([nats / 31 for nats in one["nats"]] for one in (mine, theirs)))
        ends = [math.exp(end) for end in paired.confidence_interval()]
        assert [row.values["ratio_low/text"], row.values["ratio_high/text"]] == pytest.approx(ends)
    own = result.rows[-1].values
    assert result.metrics == {key: value for key, value in own.items() if key != "seconds" and "_block_" not in key}
    assert RunResult.read(folder / FILE_NAME) == result

    assert result.search is not None
    assert result.tuning is not None
    assert result.prefix is not None
    assert [step["accepted"] for step in result.search["steps"]] == [True, True]
    assert result.search["token_ids"] == [step["token_id"] for step in result.search["steps"]]
    assert result.prefix["token_ids"] == result.search["token_ids"]
    assert len(result.tuning["steps"]) == config.tuning.steps
    assert list(result.activations["curves"]) == ["none", "found", "tuned"]
    for curve in result.activations["curves"].values():
        assert {len(values) for values in curve.values()} == {result.model["blocks"]} == {3}

    curves = result.activations["curves"]
    worst = max(range(3), key=lambda block: curves["none"]["top1"][block])
    for row in result.rows:
        for key in ("top1", "top10_percent", "median"):
            assert row.values[f"last_block_{key}"] == curves[row.stage][key][2]
            assert row.values[f"worst_block_{key}"] == curves[row.stage][key][worst]

    drawn, before = result.activations["map"], result.activations["curves"]["none"]["top1"]
    assert before[drawn["block"]] == max(before)
    assert list(drawn["values"]) == ["none", "found", "tuned"]
    assert drawn["positions"] == config.eval.block_length == 32, "shorter than a map may be"
    for rows in drawn["values"].values():
        assert (len(rows), {len(row) for row in rows}) == (32, {len(drawn["channels"])}) == (32, {16})
    assert drawn["channels"] == sorted(set(drawn["channels"]))
    assert len({json.dumps(rows) for rows in drawn["values"].values()}) == 3

    saved = Prefix.load(folder / "prefix")
    assert list(saved.token_ids) == result.prefix["token_ids"]
    assert saved.fingerprint == result.prefix["fingerprint"]

    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunFinished)
    assert events[-1].result == asdict(result)
    for kind, steps in (("search", result.search["steps"]), ("tuning", result.tuning["steps"])):
        recorded = [event for event in events if isinstance(event, Record) and event.kind == kind]
        scalars = [{key: value for key, value in step.items() if not isinstance(value, list)} for step in steps]
        assert [{"step": event.step, **event.values} for event in recorded] == scalars

    later: list[Event] = []
    assert pipeline.run(config, [later.append]) == result
    assert later == [], "a finished run is returned at once"


def test_a_rows_perplexity_is_that_of_an_independent_computation(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.quantizer = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
    result = pipeline.run(config)
    assert [row.name for row in result.rows] == ["full_precision"]

    lm = load_language_model(config.model, config.paths)
    tokens = lm.encode(text_file.read_text())[: config.eval.block_length * (config.eval.blocks or 0)]
    losses = []
    for block in tokens.split(config.eval.block_length):
        scores = torch.log_softmax(lm.model(input_ids=block[None]).logits[0].double(), dim=-1)
        losses += [-scores[position, block[position + 1]].item() for position in range(len(block) - 1)]
    assert result.rows[0].under("perplexity")["text"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_without_controls_only_the_runs_own_row_is_evaluated(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.eval.controls = False
    result = pipeline.run(config)
    assert [row.name for row in result.rows] == ["quantized_tuned"]


def test_a_given_prefix_is_used_as_it_is(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.search = SearchConfig(name="tokens", method="tokens", tokens="ab")
    result = pipeline.run(config)
    assert result.prefix is not None
    assert result.prefix["text"] == "ab"
    assert [row.name for row in result.rows] == [
        "full_precision",
        "full_precision_found",
        "quantized",
        "quantized_found",
    ]


def test_a_search_that_accepts_nothing_goes_on_without_a_prefix_and_says_so(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.search.tau = 1e-9
    result = pipeline.run(config)
    assert result.prefix is None
    assert result.tuning is None
    assert [row.name for row in result.rows] == ["full_precision", "quantized"]
    assert any("found no prefix" in warning and warning.endswith("without one") for warning in result.warnings)
    config.search.start = "newline"
    result = pipeline.run(config)
    assert result.prefix is not None and result.prefix["text"] == "\n"
    assert any(warning.endswith("goes on with search.start=newline alone") for warning in result.warnings)
    config.search.max_length = 1
    message = "search.start=newline fills search.max_length=1, and nothing was searched: raise it"
    assert message in pipeline.run(config).warnings


@pytest.mark.parametrize(("budget", "found"), [(16 + 17 * 5, True), (20, False)])
def test_a_search_out_of_budget_says_so(text_file: Path, tmp_path: Path, budget: float, found: bool) -> None:
    config = searching_config(text_file, tmp_path / "out")
    config.search.budget_token_forwards = budget
    result = pipeline.run(config)
    assert result.search is not None
    assert result.search["stop_reason"] == "budget"
    assert result.search["token_forwards"] <= budget
    assert (result.prefix is not None, bool(result.search["token_ids"])) == (found, found)
    assert f"search.budget_token_forwards={budget}" in result.warnings[0]
    assert ("its budget ended before a candidate was verified" in " ".join(result.warnings)) == (not found)


def test_an_outlier_proposal_is_counted_and_kept(text_file: Path, tmp_path: Path) -> None:
    config, others = searching_config(text_file, tmp_path / "out"), searching_config(text_file, tmp_path / "out")
    config.search.proposal = others.search.proposal = "outlier"
    others.search.tau = 0.9
    one, other = pipeline.run(config).search, pipeline.run(others).search
    assert one is not None and other is not None
    cost = 2 * (16 + 1)  # a text for each of two steps, behind one token
    assert one["proposal_token_forwards"] == other["proposal_token_forwards"] == cost
    assert one["token_forwards"] == cost + sum(step["token_forwards"] for step in one["steps"])
    assert one["seconds"] == one["proposal_seconds"] + sum(step["seconds"] for step in one["steps"])
    assert one["proposal_seconds"] == other["proposal_seconds"] > 0  # it was computed once
    config.search.budget_token_forwards = cost
    with pytest.raises(ConfigError, match=rf"search.budget_token_forwards={cost} leaves nothing.*raise it"):
        pipeline.run(config)


def test_a_pruned_search_finds_a_prefix_and_is_cached_by_its_rounds(text_file: Path, tmp_path: Path) -> None:
    seen = []
    for keep in (40, 40, 50):
        config = searching_config(text_file, tmp_path / "out")
        config.search = replace(
            config.search, name=f"mine_{len(seen)}", proposal="vocabulary", scoring="pruned", batch_size=None,
            candidates=512, frequent=128, rounds=[SearchRound(0.4, 4, keep)],
        )  # fmt: skip
        events: list[Event] = []
        result = pipeline.run(config, [events.append])
        assert result.search is not None
        assert len(result.search["token_ids"]) == 2
        assert [step["candidates"] for step in result.search["steps"]] == [260, 260]
        seen.append([event.stage for event in events if isinstance(event, Progress) and "search" in event.stage])
    assert "search step 1, round 1 of 2" in seen[0]
    assert (seen[1], bool(seen[2])) == ([], True)


def test_options_without_effect_are_logged_and_kept_in_the_result(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.search.tau = 0.25
    with caplog.at_level(logging.WARNING):
        result = pipeline.run(config)
    assert ["search.tau=0.25 has no effect" in warning for warning in result.warnings] == [True]
    assert "search.tau=0.25 has no effect" in caplog.text


# ---- what runs share ----------------------------------------------------------------------------------------------


def test_two_quantizers_share_one_search_and_one_evaluation_of_full_precision(text_file: Path, tmp_path: Path) -> None:
    results = []
    for granularity in ("per_tensor", "per_token"):
        config = searching_config(text_file, tmp_path / "out")
        config.quantizer.name = granularity
        config.quantizer.activations = ActivationConfig(range="dynamic", granularity=granularity)
        events: list[Event] = []
        results.append(pipeline.run(config, [events.append]))
        assert ("search" in stages(events)) == (granularity == "per_tensor")
    cache = tmp_path / "out" / "cache"
    assert len([path for path in (cache / "search").iterdir() if path.is_dir()]) == 1
    assert results[0].search == results[1].search
    shared = [[row for row in result.rows if not row.quantized] for result in results]
    assert shared[0] == shared[1]
    assert results[0].rows[-1].under("perplexity") != results[1].rows[-1].under("perplexity")


@pytest.mark.parametrize("change", ["tau", "max_length", "seed", "text"])
def test_another_search_is_computed_anew_unless_its_steps_have_the_same_argmin(
    text_file: Path, tmp_path: Path, change: str
) -> None:
    pipeline.run(searching_config(text_file, tmp_path / "out"))
    config = searching_config(text_file, tmp_path / "out")
    if change == "tau":
        config.search.tau = 0.9
    elif change == "max_length":
        config.search.max_length = 1
    elif change == "seed":
        config.seed = 1
    else:
        text_file.write_text(text_file.read_text().replace("outlier", "inlier"))
    events: list[Event] = []
    result = pipeline.run(config, [events.append])
    assert ("search" in stages(events)) == (change in ("seed", "text"))
    assert result.search is not None
    assert len(result.search["token_ids"]) == (1 if change == "max_length" else 2)


# ---- two processes on one run -------------------------------------------------------------------------------------


def run_at_once(text: Path, output: Path, barrier: Any, report: Path) -> None:
    """In a process of its own: run together with another one, and note what was done and what came out."""
    torch.set_num_threads(1)
    events: list[Event] = []
    barrier.wait(120)
    result = pipeline.run(tuning_config(text, output), [events.append])
    done = [f"{event.stage}: {event.done}" for event in events if isinstance(event, Progress)]
    report.write_text(json.dumps({"done": done, "result": asdict(result)}))


def test_two_processes_on_one_run_compute_it_once_and_agree(text_file: Path, tmp_path: Path) -> None:
    context, output = processes(), tmp_path / "out"
    barrier = context.Barrier(2)
    reports = [tmp_path / f"report{index}.json" for index in range(2)]
    workers = [context.Process(target=run_at_once, args=(text_file, output, barrier, path)) for path in reports]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
    assert [worker.exitcode for worker in workers] == [0, 0]
    first, second = (json.loads(path.read_text()) for path in reports)
    assert first["result"] == second["result"]
    assert sorted(map(bool, (first["done"], second["done"]))) == [False, True], "one did it, the other took it over"
    (path,) = output.rglob(FILE_NAME)
    assert asdict(RunResult.read(path)) == first["result"]
    assert first["result"]["status"] == "completed"


def run_slowly(text: Path, output: Path, started: Any) -> None:
    """In a process of its own: tell when the run is under way, and let others come before it goes on."""
    torch.set_num_threads(1)

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            started.set()
            time.sleep(1)

    pipeline.run(small_config(text, output), [listen])


def test_a_second_process_that_would_fail_does_not_overwrite_a_completed_result(
    text_file: Path, tmp_path: Path
) -> None:
    config = small_config(text_file, tmp_path / "out")
    path = pipeline.run_folder(config) / FILE_NAME
    started = processes().Event()
    worker = processes().Process(target=run_slowly, args=(text_file, tmp_path / "out", started))
    worker.start()
    assert started.wait(120)
    assert not path.exists()

    def fail(_event: Event) -> None:
        worker.join(120)
        raise RuntimeError("too late")

    result = pipeline.run(config, [fail])  # waits for the first, and has nothing left to do
    worker.join(120)
    assert worker.exitcode == 0
    assert result.status == "completed"
    assert RunResult.read(path) == result


def test_a_listener_that_fails_at_the_end_leaves_the_result_completed(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")

    def fail(event: Event) -> None:
        if isinstance(event, RunFinished):
            raise RuntimeError("after the work")

    with pytest.raises(RuntimeError, match="after the work"):
        pipeline.run(config, [fail])
    path = pipeline.run_folder(config) / FILE_NAME
    assert RunResult.read(path).status == "completed"
    assert pipeline.run(config, [fail]) == RunResult.read(path)


# ---- failed runs --------------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_its_error_and_raises(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.eval.blocks = 10**6
    events: list[Event] = []
    with pytest.raises(DataError, match="1000000 were asked for"):
        pipeline.run(config, [events.append])
    assert events == []  # refused before the run began: no tracker hears of it
    result = RunResult.read(pipeline.run_folder(config) / FILE_NAME)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["type"] == "DataError"
    assert "1000000 were asked for" in result.error["message"]
    with pytest.raises(DataError):
        pipeline.run(config)  # a failed run is tried again, not skipped


def test_a_run_that_failed_is_completed_by_the_next_try(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    events: list[Event] = []

    def fail(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.stage.startswith("perplexity"):
            raise RuntimeError("in the evaluation")

    with pytest.raises(RuntimeError, match="in the evaluation"):
        pipeline.run(config, [fail])
    assert isinstance(events[-1], RunFailed)
    assert RunResult.read(pipeline.run_folder(config) / FILE_NAME).status == "failed"
    result = pipeline.run(config)
    assert (result.status, result.error) == ("completed", None)


def test_a_damaged_artifact_is_set_aside_whichever_step_it_is_of(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    perplexities = [row.under("perplexity") for row in pipeline.run(config).rows]
    steps = ("search", "tuning", "calibration", "activations", "activation_map", "perplexity")
    for step in steps:
        for path in (tmp_path / "out" / "cache" / step).glob("*/*"):
            path.write_bytes(path.read_bytes()[:7])
    (pipeline.run_folder(config) / FILE_NAME).unlink()
    assert [row.under("perplexity") for row in pipeline.run(config).rows] == perplexities
    assert {path.name for path in (tmp_path / "out" / "cache" / "set_aside").iterdir()} == set(steps)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("search", "token_ids", [5, 260], r"search\.token_ids=260 is outside the vocabulary of tiny_llama: 0 to 259"),
        ("search", "token_ids", [5] * 230, r"block_length=32 .*230 tokens.* 262 positions.*has 256"),
        ("eval", "block_length", 257, r"eval\.block_length=257"),
        ("quantizer", "targets", ["q_prj"], r"quantizer\.targets names 'q_prj'.*did you mean 'q_proj'\?"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(
    text_file: Path, tmp_path: Path, section: str, key: str, value: Any, message: str
) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[1])
    setattr(getattr(config, section), key, value)
    events: list[Event] = []
    with pytest.raises(ConfigError, match=message):
        pipeline.run(config, [events.append])
    assert stages(events) == set()


def test_a_device_that_is_not_there_is_refused(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.device = "gpu"
    with pytest.raises(ConfigError, match="device='gpu' is not allowed"):
        pipeline.run(config)


# ---- what a run is identified by ----------------------------------------------------------------------------------


def leaves(part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all single values of a configuration."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name)


def with_another_value(config: RunConfig, path: tuple[str, ...]) -> RunConfig:
    changed = copy.deepcopy(config)
    part: Any = changed
    for name in path[:-1]:
        part = getattr(part, name)
    value = getattr(part, path[-1])
    other: Any
    if value is None:
        other = "another"
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, dict):
        other = {**value, "another": CorpusConfig()}
    elif isinstance(value, list):
        other = [*value, "another"]
    elif path == ("device",):
        other = "cpu"  # the one other name that every machine has
    elif isinstance(value, str):
        other = value + "another"
    else:
        other = value + 1
    setattr(part, path[-1], other)
    return changed


LEAVES = list(leaves(RunConfig()))
UNIMPORTANT = ("tracking", "paths", "objective")


@pytest.mark.parametrize("path", [path for path in LEAVES if path[0] in UNIMPORTANT], ids=".".join)
def test_a_runs_identity_ignores_where_it_is_logged_and_kept(path: tuple[str, ...]) -> None:
    first, second = (pipeline.run_folder(c) for c in (RunConfig(), with_another_value(RunConfig(), path)))
    if path == ("paths", "data_dir"):
        assert first.name != second.name
    elif path == ("paths", "output_dir"):
        assert (first.name, first.parent.name) == (second.name, second.parent.name)
    else:
        assert first == second


def test_a_runs_identity_changes_with_everything_else() -> None:
    paths = [path for path in LEAVES if path[0] not in (*UNIMPORTANT, "experiment")]
    assert len(paths) > 60
    folders = [pipeline.run_folder(with_another_value(RunConfig(), path)) for path in paths]
    default = pipeline.run_folder(RunConfig()).name
    same = [".".join(path) for path, folder in zip(paths, folders, strict=True) if folder.name == default]
    assert same == []
    assert len(set(folders)) == len(folders)


def test_a_runs_folder_is_named_after_what_the_run_is(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.experiment = "mine"
    folder = pipeline.run_folder(config)
    expected = tmp_path / "out" / "mine" / "tiny_llama" / "per_tensor_static-greedy_sampled-short"
    assert folder.parent == expected


def test_a_runs_identity_changes_with_the_content_of_its_files(text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = small_config(text_file, tmp_path / "out")
    config.model.path = str(model)
    folders = [pipeline.run_folder(config)]
    assert pipeline.run_folder(config) == folders[0]
    text_file.write_text(text_file.read_text() + "\n\nOne more document.")
    folders.append(pipeline.run_folder(config))
    (model / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    folders.append(pipeline.run_folder(config))
    assert len(set(folders)) == 3


def test_a_runs_identity_changes_with_the_content_of_the_folder_of_named_sets(tmp_path: Path) -> None:
    path = tmp_path / "c4" / "c4.utf8"
    path.parent.mkdir()
    path.write_text("one\ntwo\nthree\n")
    config = RunConfig()
    config.data.search = CorpusConfig("c4")
    config.paths.data_dir = str(tmp_path)
    before = pipeline.run_folder(config)
    path.write_text("one\ntwo\nthree\nfour\n")
    os.utime(path, (1, 1))
    assert pipeline.run_folder(config) != before


# ---- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstruction_has_rows_of_its_own_behind_those_of_the_frozen_model(text_file: Path, tmp_path: Path) -> None:
    frozen = tuning_config(text_file, tmp_path / "out")
    frozen.quantizer.activations.bits = frozen.quantizer.weights.bits = 4
    frozen.tuning.ranges = "learned"  # a reconstruction starts from what was learned with the prefix
    config = replace(frozen, reconstruction=ReconstructionConfig("weights", "blockwise", weights=True, epochs=2))
    without = pipeline.run(frozen)
    result = pipeline.run(config)
    assert [row.name for row in result.rows] == [
        *TUNED_ROWS,
        "quantized_reconstructed",
        "quantized_tuned_reconstructed",
    ]
    assert without_seconds([asdict(row) for row in result.rows[:-2]]) == without_seconds(
        [asdict(row) for row in without.rows]
    )
    assert [row.stage for row in result.rows[-2:]] == ["none", "tuned"]
    assert [row.reconstructed for row in result.rows] == [False] * len(TUNED_ROWS) + [True] * 2
    assert without.rows[-1].label.endswith(" + tuned prefix + learned ranges")
    assert result.rows[-1].label == f"{without.rows[-1].label} + reconstruction"
    assert [row.name for row in result.rows if row.learned_ranges] == ["quantized_tuned", result.rows[-1].name]
    assert result.rows[-1].values["perplexity/text"] != without.rows[-1].values["perplexity/text"]
    assert result.reconstruction is not None and without.reconstruction is None
    assert result.reconstruction.keys() == {"none", "tuned"}
    assert all(len(record["blocks"]) == 3 for record in result.reconstruction.values())
    assert pipeline.run_folder(config).parent.name == f"{pipeline.run_folder(frozen).parent.name}-weights"
    assert RunResult.read(pipeline.run_folder(config) / FILE_NAME) == result
    kept = Learned.load(pipeline.run_folder(config) / "reconstructed.safetensors")
    assert kept.ranges and kept.weights
    keys = [json.loads(path.read_text()) for path in (tmp_path / "out/cache/perplexity").glob("*/depends_on.json")]
    assert kept.fingerprint in [
        key["quantizer"].get("learned")
        for key in keys
        if key["quantizer"] and result.prefix and key["prefix"] == result.prefix["fingerprint"]
    ]


def test_reconstruction_without_an_epoch_gives_the_frozen_row_once_more(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.reconstruction = ReconstructionConfig("scales", "blockwise", samples=3, epochs=0)
    rows = pipeline.run(config).rows
    assert [row.name for row in rows] == ["full_precision", "quantized", "quantized_reconstructed"]
    frozen, own = ({key: value for key, value in row.values.items() if key != "seconds"} for row in rows[1:])
    assert own == frozen
    (folder,) = (tmp_path / "out" / "cache" / "reconstruction").glob("*/reconstruction.json")
    assert not any(block["kept"] for block in json.loads(folder.read_text())["blocks"])
