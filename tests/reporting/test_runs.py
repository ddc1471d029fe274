"""The table of an experiment's runs: what varies, means over seeds, failed and missing lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from records import failed, record, row, write

from cushion.reporting.collect import collect
from cushion.reporting.grid import Table, folded
from cushion.reporting.runs import experiment_table, provenance_table, varying
from cushion.reporting.settings import numbered


def column(table: Table, title: str) -> list[str]:
    place = table.headings().index(title)
    return [line[place].text for line in table.body]


def test_rows_that_differ_only_in_seed_become_mean_and_deviation(tmp_path: Path) -> None:
    values = [20.0, 23.0, 29.0]
    runs = collect([write(tmp_path, *(record(seed=s, rows=[row("quantized", v)]) for s, v in enumerate(values)))])
    table = experiment_table("default", runs)
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert column(table, "perplexity wikitext2") == [f"{mean:.2f} ± {deviation:.2f}"]
    assert column(table, "seeds") == ["3"]
    assert "standard deviation" in table.notes[0]


def test_other_configurations_stay_apart_and_what_tells_them_apart_has_a_column(tmp_path: Path) -> None:
    taus = [0.3, 0.5, 0.9]
    runs = collect(
        [write(tmp_path, *(record(**{"search.tau": tau}, rows=[row("quantized", 10 * tau)]) for tau in taus))]
    )
    assert varying(runs) == ["search.tau"]
    table = experiment_table("default", runs)
    assert column(table, "search.tau") == [str(tau) for tau in taus]
    assert column(table, "perplexity wikitext2") == [f"{10 * tau:.2f}" for tau in taus]


def test_runs_that_differ_in_bos_or_execution_alone_are_told_apart(tmp_path: Path) -> None:
    keys = {"config.bos": ("never", "tokenizer"), "config.execution": ("int8", "simulated")}
    for key, values in keys.items():
        runs = collect([write(tmp_path / key, *(record(**{key: value}) for value in values))])
        assert column(experiment_table("default", runs), key.removeprefix("config.")) == list(values)


def test_models_of_one_name_and_folders_of_data_are_told_apart(tmp_path: Path) -> None:
    for key, values in {"model.path": ("a/final", "b/final"), "paths.data_dir": ("a", "b")}.items():
        records = []
        for value in values:
            records.append(record())
            group, name = key.split(".")
            records[-1]["config"].setdefault(group, {})[name] = value
        runs = collect([write(tmp_path / key, *records)])
        assert varying(runs) == [key]
        assert column(experiment_table("default", runs), key) == list(values)


def test_what_follows_from_the_option_is_not_named_beside_it(tmp_path: Path) -> None:
    records = [record(quantizer="w8"), record(quantizer="w4", **{"quantizer.weights": {"bits": 4}})]
    assert varying(collect([write(tmp_path, *records)])) == ["quantizer.name"]
    records.append(record(quantizer="w4", **{"quantizer.weights": {"bits": 3}}))
    assert varying(collect([write(tmp_path, *records)])) == ["quantizer.name", "quantizer.weights.bits"]


def test_failed_and_missing_runs_are_lines_of_their_own(tmp_path: Path) -> None:
    runs = collect([write(tmp_path, record(), failed("text too short", seed=1))])
    table = experiment_table("default", runs, missing=["seed=2"])
    assert column(table, "row") == ["W8A8", "failed: DataError: text too short", "missing: seed=2"]
    assert column(table, "perplexity wikitext2") == ["20.00", "failed", "missing"]
    assert [line[-1].kind for line in table.body] == ["", "failed", "missing"]
    assert column(table, "run") == ["1", "2", "-"]
    assert column(table, "seeds") == ["1 of 2", "seed 1", "-"], "a count, of how many, and which seed failed"


def test_lines_name_their_runs_by_the_numbers_of_the_provenance(tmp_path: Path) -> None:
    records = [record(experiment="other"), record(seed=0), record(seed=1), record(quantizer="w4")]
    everything = collect([write(tmp_path, *records)])
    mine = [run for run in everything if run.experiment == "default"]
    table = experiment_table("default", mine, numbers=numbered(everything))
    assert column(table, "run") == ["2, 3", "4"]
    places = dict(zip(column(provenance_table(everything, tmp_path), "run"), everything, strict=True))
    assert [places[number].seed for number in ("2", "3")] == [0, 1]
    assert places["4"].config["quantizer"]["name"] == "w4"
    assert [table.headings()[place] for place in table.in_view()] == ["run", "row"]


def swept(tau: float, **others: Any) -> dict[str, Any]:
    """A run of a sweep over tau: its controls are those of the others, and a search found another prefix."""
    rows = [row("full_precision", 9.0), row("quantized", 30.0, seconds=100 * tau), row("quantized_found", 20 * tau)]
    return record(**{"search.tau": tau, "rows": rows, **others})


def test_configurations_ascend_and_what_they_share_stands_once_in_front(tmp_path: Path) -> None:
    runs = collect([write(tmp_path, *(swept(tau) for tau in (10.0, 0.5, 2.0)))])
    table = experiment_table("default", runs)
    assert column(table, "search.tau") == ["all", "all", "0.5", "2.0", "10.0"], "as numbers"
    assert column(table, "row") == ["full precision", "W8A8", *["W8A8 + greedy prefix"] * 3]
    assert column(table, "run") == ["1 to 3", "1 to 3", "2", "3", "1"]
    assert any("stands once" in note for note in table.notes)


def test_a_control_that_differs_anywhere_and_the_rows_that_runs_are_about_stand_apart(tmp_path: Path) -> None:
    others = [swept(0.5), swept(2.0), swept(3.0)]
    others[1]["rows"][1]["values"]["largest_activation"] += 1.0
    others[2]["rows"][2] = others[0]["rows"][2]
    table = experiment_table("default", collect([write(tmp_path, *others)]))
    lines = list(zip(column(table, "search.tau"), column(table, "row"), strict=True))
    assert lines == [
        ("all", "full precision"), ("0.5, 3.0", "W8A8"), ("0.5", "W8A8 + greedy prefix"),
        ("2.0", "W8A8"), ("2.0", "W8A8 + greedy prefix"), ("3.0", "W8A8 + greedy prefix"),
    ]  # fmt: skip


def test_rows_are_the_same_whatever_folders_their_seeds_are_in_and_beside_runs_that_are_about_them(
    tmp_path: Path,
) -> None:
    seeds = [(tau, seed) for tau in (0.5, 2.0) for seed in (0, 1)]
    runs = collect([write(tmp_path, *(swept(tau, seed=seed) for tau, seed in [*seeds[:2], *seeds[:1:-1]]))])
    assert column(experiment_table("default", runs), "run")[:2] == ["1 to 4", "1 to 4"]
    plain = record(**{"search.tau": 9.0, "rows": swept(0.5)["rows"][:2]})
    table = experiment_table("default", collect([write(tmp_path / "b", swept(0.5), swept(2.0), plain)]))
    lines = list(zip(column(table, "run"), column(table, "search.tau"), column(table, "row"), strict=True))
    assert lines == [
        ("1 to 3", "all", "full precision"), ("1", "0.5", "W8A8 + greedy prefix"), ("2", "2.0", "W8A8 + greedy prefix"),
        ("1 to 3", "9.0", "W8A8"),
    ]  # fmt: skip


def test_the_best_quantized_value_of_each_model_is_marked(tmp_path: Path) -> None:
    runs = [swept(tau, model=model) for model in ("some/one", "some/other") for tau in (0.5, 0.25)]
    for number, run in enumerate(runs):
        run["rows"][-1]["values"]["accuracy/mean"] = 0.1 * number
    table = experiment_table("default", collect([write(tmp_path, *runs)]))
    best = {
        title: [line[0].text for line in table.body if line[place].best] for place, title in enumerate(table.headings())
    }
    assert {title: found for title, found in best.items() if found} == {
        "perplexity wikitext2": ["2", "4"], "accuracy, %": ["2", "4"],
    }  # fmt: skip


@pytest.mark.parametrize("learned", ["reconstructed", "learned_ranges"])
def test_a_row_of_which_something_was_learned_is_not_the_best_of_frozen_ones(tmp_path: Path, learned: str) -> None:
    runs = [swept(tau) for tau in (0.5, 0.25)]
    runs[-1]["rows"][-1][learned] = True  # the lower perplexity
    table = experiment_table("default", collect([write(tmp_path, *runs)]))
    assert [line[0].text for line in table.body if any(cell.best for cell in line)] == ["1"]


def test_what_every_line_says_becomes_a_note_and_lines_of_missing_runs_do_not_count(tmp_path: Path) -> None:
    table = experiment_table("default", collect([write(tmp_path, swept(0.5), swept(2.0))]), missing=["seed=2"])
    short = folded(table)
    assert short.headings() == [title for title in table.headings() if title not in ("model", "seeds")]
    assert "In every line: model model, seeds 1." in short.notes
    assert [short.headings()[place] for place in short.in_view()] == ["run", "row"]
    assert [short.headings()[place] for place in short.aside] == ["run", "search.tau", "prefix"], "on a phone"
    below = [line[short.headings().index("row")].below for line in short.body]
    assert below == ["tau=all", "tau=all", "tau=0.5", "tau=2.0", ""], "there it stands below the row's name"
    assert short.labels == table.labels - 2


def test_a_measure_that_some_seeds_lack_says_of_how_many_it_is(tmp_path: Path) -> None:
    rows = [row("quantized", 20.0, accuracy=0.5, accuracy_stderr=0.02), row("quantized", 20.0)]
    table = experiment_table(
        "default", collect([write(tmp_path, *(record(seed=s, rows=[r]) for s, r in enumerate(rows)))])
    )
    assert column(table, "seeds") == ["2"]
    assert column(table, "accuracy, %") == ["50.00 ± 2.00 (1 of 2 seeds)"]


def test_corpora_tasks_and_accuracy_have_columns_and_absence_shows(tmp_path: Path) -> None:
    tasks = {"piqa": {"metric": "acc", "value": 0.75, "stderr": 0.01, "samples": 100}}
    rows = [row("full_precision", 10.0, tasks=tasks, accuracy=0.755, accuracy_stderr=0.0125), row("quantized", 20.0)]
    rows[0]["values"]["perplexity/c4"] = 12.5
    table = experiment_table("default", collect([write(tmp_path, record(rows=rows))]))
    assert column(table, "piqa, %") == ["75.00 ± 1.00", "-"]
    assert column(table, "accuracy, %") == ["75.50 ± 1.25", "-"]
    (mean,) = [line[table.headings().index("accuracy, %")] for line in table.body[:1]]
    assert (mean.value, mean.error, mean.deviation) == (75.5, 1.25, None)
    assert "standard error" in table.notes[0] and "deviation" not in table.notes[0]
    assert column(table, "perplexity c4") == ["12.50", "-"]
    assert column(table, "perplexity wikitext2") == ["10.00", "20.00"]


def test_provenance_says_version_git_state_cost_and_what_was_left_out(tmp_path: Path) -> None:
    clean = record(seed=1)
    clean["environment"]["git"] = None
    clean |= {"search": {"seconds": 34.4, "token_forwards": 88854.9}, "tuning": {"seconds": 56.0}}
    table = provenance_table(collect([write(tmp_path, record(), record(), clean)]), tmp_path)
    assert column(table, "git") == ["0123456789, changed", "installed package"]
    assert column(table, "seconds") == ["12", "12"]
    assert column(table, "torch") == ["2", "2"]
    assert column(table, "search seconds") == ["-", "34"]
    assert column(table, "search token-forwards") == ["-", "88855"]
    assert column(table, "tuning seconds") == ["-", "56"]
    assert "1 other" in column(table, "status")[0]
