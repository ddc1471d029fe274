"""Rows against full precision with the same prefix: planted numbers in values, tables, and over seeds in reports."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from records import record, row, write
from scipy import stats

from cushion.intervals import Interval
from cushion.metrics.columns import Losses, Measured, Values, row_values
from cushion.reporting.cli import write_report
from cushion.reporting.collect import collect
from cushion.reporting.comparisons import DIFFERENT, WITHIN, WITHIN_TOGETHER, comparison, judged
from cushion.reporting.grid import Cell, Table
from cushion.reporting.published import compare, load_published, published_folder
from cushion.reporting.runs import experiment_table
from cushion.reporting.tables import comparison_table, further_tables
from cushion.schema import current

TOKENS = [31] * 8


def losses(level: float, generator: numpy.random.Generator) -> Losses:
    return Losses((31 * (level + generator.normal(0, 0.02, 8))).tolist(), TOKENS)


def measured(of: Losses, ceiling: Measured | None = None, **others: Any) -> Measured:
    perplexity = math.exp(sum(of.nats) / sum(of.tokens))
    return Measured({"wikitext2": perplexity}, others.pop("tasks", {}), None, 1.0, 1.0, 1.0,
                    losses={"wikitext2": of}, ceiling=ceiling, **others)  # fmt: skip


def planted_run(seed: int, ratio: float, noise: float = 0.01, **others: Any) -> dict[str, Any]:
    """A result whose quantized row is so many times its full precision; each block has its own difference."""
    generator = numpy.random.default_rng(seed)
    full = losses(3.0, generator)
    nats = [n + 31 * (math.log(ratio) + d) for n, d in zip(full.nats, generator.normal(0, noise, 8), strict=True)]
    ceiling = measured(full)
    mine = measured(Losses(nats, TOKENS), ceiling)
    rows = []
    for name, found in (("full_precision", ceiling), ("quantized", mine)):
        rows.append(row(name, None, **row_values(found)))
    kept = {name: {"wikitext2": {"nats": list(of.losses["wikitext2"].nats), "tokens": TOKENS}}
            for name, of in (("full_precision", ceiling), ("quantized", mine))}  # fmt: skip
    evaluation = {"losses": kept, "ceilings": {"full_precision": None, "quantized": "full_precision"}}
    return record(seed=seed, rows=rows, evaluation=evaluation, **others)


# ---- values ---------------------------------------------------------------------------------------------------------


def test_a_ratio_needs_a_ceiling_of_its_own_and_a_second_block() -> None:
    full = measured(Losses([90.0], [31]))
    assert not any("ratio" in key for key in row_values(full))
    found = row_values(measured(Losses([93.1], [31]), full))
    assert found["ratio/wikitext2"] == pytest.approx(math.exp(0.1))
    assert [found[f"ratio_{end}/wikitext2"] for end in ("stderr", "low", "high")] == [None] * 3


def accuracies(right: dict[str, list[float]], ceiling: Measured | None = None) -> Measured:
    tasks = {
        name: {"metric": "acc", "value": sum(of) / len(of), "stderr": 0.1, "metrics": {}} for name, of in right.items()
    }
    shares = {"a": {"a": 1.0}, "group": {"b": 0.25, "c": 0.75}, "b": {"b": 1.0}, "c": {"c": 1.0}}
    tasks["group"] = {**tasks["b"], "value": 0.25 * tasks["b"]["value"] + 0.75 * tasks["c"]["value"]}
    mean = ((tasks["a"]["value"] + tasks["group"]["value"]) / 2, 0.1)
    return Measured(
        {}, tasks, mean, 1.0, 1.0, 1.0, records=right, shares=shares, in_mean=("a", "group"), ceiling=ceiling
    )


def test_an_accuracy_difference_is_paired_by_record_and_goes_through_groups_into_the_mean() -> None:
    generator = numpy.random.default_rng(2)
    full = {name: generator.integers(0, 2, 200).astype(float).tolist() for name in "abc"}
    flipped = {name: [1 - x if place < 20 else x for place, x in enumerate(of)] for name, of in full.items()}
    ceiling = accuracies(full)
    found, plain = row_values(accuracies(flipped, ceiling)), row_values(ceiling)
    for name in ("a", "b", "c", "group", "mean"):
        difference = (found[f"accuracy/{name}"] or 0) - (plain[f"accuracy/{name}"] or 0)
        assert found[f"accuracy_difference/{name}"] == pytest.approx(difference)
    errors = {
        name: numpy.std([y - x for x, y in zip(full[name], flipped[name], strict=True)]) / math.sqrt(200)
        for name in "abc"
    }
    assert found["accuracy_difference_stderr/a"] == pytest.approx(errors["a"], rel=0.03)
    unpaired = math.sqrt(2 * 0.25 / 200)
    assert (found["accuracy_difference_stderr/a"] or 0) < unpaired / 2, "nine records of ten are the same"
    weighted = math.sqrt((errors["a"] / 2) ** 2 + (errors["b"] / 8) ** 2 + (errors["c"] * 3 / 8) ** 2)
    assert found["accuracy_difference_stderr/mean"] == pytest.approx(weighted, rel=0.03)
    same = row_values(accuracies(full, ceiling))
    assert [same[f"accuracy_difference{what}/mean"] for what in ("", "_low", "_high")] == [0.0, 0.0, 0.0]


def test_a_score_that_is_no_mean_of_its_records_is_not_compared() -> None:
    full = accuracies({"a": [1.0, 0.0], "b": [1.0], "c": [0.0]})
    mine = accuracies({"a": [1.0, 1.0], "b": [1.0], "c": [0.0]}, full)
    mine.records["b"] = ()  # type: ignore[index]
    compared = {key for key in row_values(mine) if key.startswith("accuracy_difference/")}
    assert compared == {"accuracy_difference/a", "accuracy_difference/c"}


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_the_printed_table_has_the_ratio_with_its_interval_and_says_what_is_within_error() -> None:
    for ratio, within in ((1.2, False), (1.0, True)):
        lines = comparison_table(planted_run(1, ratio)).splitlines()
        assert "ratio wikitext2" in lines[0]
        assert ("within error" in lines[3]) is within
        assert lines[3].count("[") == 1 and "[" not in lines[2]
        assert lines[-1].startswith("ratio: perplexity over that of full precision with the same prefix")


def test_the_printed_table_of_accuracies_has_a_table_of_differences() -> None:
    ceiling = accuracies({"a": [1.0, 0.0], "b": [1.0], "c": [0.0]})
    rows = []
    for found in (ceiling, accuracies({"a": [0.0, 0.0], "b": [1.0], "c": [0.0]}, ceiling)):
        rows.append({**row("quantized", 5.0, tasks=dict(found.tasks)), "values": row_values(found)})
    _, differences = further_tables({"rows": rows})
    header, _, full, quantized, note = differences.splitlines()
    assert header.startswith("accuracy less full precision with the same prefix, %")
    assert full.split()[-5:] == ["-"] * 5
    assert "-50.0 [-100.0, +0.0], within error" in quantized
    assert "bootstrap" in note


# ---- reports --------------------------------------------------------------------------------------------------------

RATIO = "ratio to full precision with the same prefix, wikitext2"


def lines_of(folder: Path) -> list[dict[str, str]]:
    titles, *lines = csv.reader((folder / "runs" / "default.csv").read_text(encoding="utf-8").splitlines())
    return [dict(zip(titles, line, strict=True)) for line in lines]


def test_a_report_of_three_seeds_has_the_geometric_mean_with_the_error_of_seeds_and_blocks(tmp_path: Path) -> None:
    runs = [planted_run(seed, ratio) for seed, ratio in enumerate((1.10, 1.15, 1.30))]
    write_report([write(tmp_path / "results", *runs)], tmp_path / "report")
    full, quantized = lines_of(tmp_path / "report")
    assert full[RATIO] == "-"
    kept = [run["evaluation"]["losses"] for run in runs]
    logs = numpy.array([
        [(mine - theirs) / 31 for mine, theirs in zip(of["quantized"]["wikitext2"]["nats"],
                                                      of["full_precision"]["wikitext2"]["nats"], strict=True)]
        for of in kept
    ])  # fmt: skip
    assert float(quantized[RATIO]) == pytest.approx(math.exp(logs.mean()))
    low, high = (math.log(float(quantized[f"{RATIO} {end}"])) for end in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(logs.mean())
    seeds_alone = stats.ttest_1samp(logs.mean(1), 0).confidence_interval()
    assert (high - low) == pytest.approx(seeds_alone.high - seeds_alone.low, rel=0.1), "here the seeds are most of it"
    assert quantized[f"{RATIO} verdict"] == (DIFFERENT if low > 0 else WITHIN)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "Comparisons in this table: 1." in text


def test_one_seed_of_a_report_is_the_interval_of_its_run(tmp_path: Path) -> None:
    run = planted_run(4, 1.05)
    write_report([write(tmp_path / "results", run)], tmp_path / "report")
    quantized, values = lines_of(tmp_path / "report")[1], run["rows"][1]["values"]
    for end in ("low", "high"):
        assert float(quantized[f"{RATIO} {end}"]) == pytest.approx(values[f"ratio_{end}/wikitext2"])


def cell(p: float, low: float, high: float) -> Cell:
    return comparison(Interval((low + high) / 2, 0.1, low, high, p), 1.0, lambda value: f"{value:.2f}", 1, 1)


def test_many_comparisons_are_corrected_together_and_each_once() -> None:
    strong, weak, none = cell(0.001, 1.1, 1.3), cell(0.03, 1.01, 1.2), cell(0.6, 0.9, 1.3)
    (first, second), notes = judged([[strong, weak], [none, weak]])
    assert [one.verdict for one in (*first, *second)] == [DIFFERENT, WITHIN_TOGETHER, WITHIN, WITHIN_TOGETHER]
    assert first[1].text == "1.10 [1.01, 1.20], within error by Holm" and "Comparisons in this table: 3." in notes[0]
    alone, _ = judged([[weak]])
    assert alone[0][0].verdict == DIFFERENT
    others = [replace(none, compared=row) for row in ("one", "another", "one")]
    assert "Comparisons in this table: 2." in judged([[other] for other in others])[1][0], "equal numbers of two rows"
    unlike = cell(0.06, 1.01, 1.2)  # of an older result, whose p-value is not of its interval
    assert judged([[unlike], [unlike]])[0][0][0].verdict == DIFFERENT, "one comparison, in two lines"
    assert judged([[Cell("1.0", value=1.0)]]) == ([[Cell("1.0", value=1.0)]], [])


def test_accuracy_differences_over_seeds_are_in_points(tmp_path: Path) -> None:
    def run(seed: int, difference: float) -> dict[str, Any]:
        ends = {"": difference, "_stderr": 0.01, "_low": difference - 0.02, "_high": difference + 0.02}
        values: Values = {f"accuracy_difference{what}/mean": value for what, value in ends.items()}
        return record(seed=seed, rows=[row("quantized", 20.0, accuracy=0.5, accuracy_stderr=0.02, **values)])

    folder = write(tmp_path, *(run(seed, difference) for seed, difference in enumerate((-0.02, -0.03, -0.04))))
    table = experiment_table("default", collect([folder]))
    place = table.headings().index("accuracy less full precision with the same prefix, %")
    found = table.body[0][place]
    assert found.value == pytest.approx(-3.0)
    assert found.error == pytest.approx(100 * math.sqrt(0.01**2 / 3 + 0.01**2))
    assert found.text.startswith("-3.0 [") and found.verdict == DIFFERENT


def test_the_p_value_of_one_seed_is_that_of_its_bootstrap(tmp_path: Path) -> None:
    for name, kept in {"now": {"_p": 0.04}, "before": {}}.items():
        ends = {"": -0.02, "_stderr": 0.02, "_low": -0.05, "_high": -0.001} | kept
        values = {f"accuracy_difference{what}/mean": value for what, value in ends.items()}
        one = record(rows=[row("quantized", 20.0, **values)])
        table = experiment_table("default", collect([write(tmp_path / name, one)]))
        (found,) = [cell for line in table.body for cell in line if cell.p is not None]
        assert found.p == pytest.approx(kept.get("_p", 2 * stats.norm.sf(1.0)))
        assert found.verdict == DIFFERENT


def test_seeds_whose_blocks_are_of_different_text_have_no_interval(tmp_path: Path) -> None:
    """As many blocks each, of other numbers of tokens: what `eval.prefix_in_block` gives prefixes of other lengths."""
    runs = [planted_run(seed, 1.1) for seed in range(3)]
    for of in runs[2]["evaluation"]["losses"].values():
        of["wikitext2"]["tokens"] = [30] * 8
    for name, those, has_interval in (("same", runs[:2], True), ("different", runs, False)):
        table = experiment_table("default", collect([write(tmp_path / name, *those)]))
        found = table.body[1][table.headings().index(RATIO)]
        assert (found.p is not None) is has_interval
        assert ("±" in found.text) is not has_interval


@pytest.mark.parametrize("what", ["data", "model"])
def test_seeds_of_another_text_or_other_weights_have_no_interval_and_it_is_said(tmp_path: Path, what: str) -> None:
    def table(**changed: dict[str, Any]) -> Table:
        runs = [planted_run(seed, 1.1) for seed in range(3)]
        for run in runs:
            run |= {"data": {"evaluation": {"sha256": "a"}, "search": {"sha256": str(run["config"]["seed"])}}}
            run |= {"model": {"fingerprint": "b"}}
        runs[2] |= changed
        return experiment_table("default", collect([write(tmp_path / str(len(changed)), *runs)]))

    same = table()
    other = table(**{what: {"data": {"evaluation": {"sha256": "c"}}, "model": {"fingerprint": "c"}}[what]})
    place, said = same.headings().index(RATIO), {"data": "content of the measured text", "model": "model's weights"}
    assert same.body[1][place].p is not None and "varies" not in " ".join(same.notes)
    assert other.body[1][place].p is None and f"the {said[what]} varies" in " ".join(other.notes).lower()


# ---- published tables -----------------------------------------------------------------------------------------------


def published(folder: Path, name: str, *records: dict[str, Any]) -> tuple[list[dict[str, Cell]], list[str]]:
    """The lines of a published table by its headings, without the models, and its notes."""
    table = compare(load_published(published_folder(), name), collect([write(folder, *records)]))
    titles = [title.removeprefix("model ") for title in table.headings()]
    return [dict(zip(titles, line, strict=True)) for line in table.body], table.notes


def of_scheme(lines: list[dict[str, Cell]], scheme: str) -> dict[str, Cell]:
    found = [line for line in lines if (line["scheme"].text, line["prefix"].text) == (scheme, "none")]
    return found[-1]  # the group of our own quantizers


def test_a_published_table_has_the_ratio_of_the_table_of_runs_beside_ours(tmp_path: Path) -> None:
    runs = [planted_run(seed, ratio) for seed, ratio in enumerate((1.10, 1.15, 1.30))]
    old = record(quantizer="smoothquant_o3")
    lines, notes = published(tmp_path / "both", "cushioncache_table1", *runs, old)
    whole = experiment_table("default", collect([write(tmp_path / "runs", *runs)]))
    naive = of_scheme(lines, "Per-tensor static")
    assert naive["ratio"] == whole.body[1][whole.headings().index(RATIO)] and naive["ratio"].low is not None
    assert [line["ratio"].text for line in lines if line["scheme"].text == "FP16"] == ["-"], "it is the ceiling"
    dash = of_scheme(lines, "SmoothQuant-O3")
    assert (dash["ours"].text, dash["ratio"].text) == ("20.00 (1 of 3 seeds)", "-")
    assert f"ratio: {RATIO}." in notes and any("Comparisons in this table: 1." in note for note in notes)
    uncompared = "not compared with full precision with the same prefix: "
    assert [note.partition(uncompared)[2][:2] for note in notes if uncompared in note] == ["1."]
    lines, notes = published(tmp_path / "old", "cushioncache_table1", old)
    assert "ratio" not in lines[0] and sum(uncompared in note for note in notes) == 1
    _, notes = published(tmp_path / "now", "cushioncache_table1", *runs)
    assert not any(uncompared in note for note in notes)


def test_a_published_table_has_the_difference_of_the_mean_accuracy(tmp_path: Path) -> None:
    ends = {"": -0.02, "_stderr": 0.02, "_low": -0.05, "_high": -0.001, "_p": 0.04}
    values = {f"accuracy_difference{what}/mean": value for what, value in ends.items()}
    one = record(rows=[row("quantized", 20.0, accuracy=0.5, accuracy_stderr=0.03, **values)])
    two = [record(model="some/other", seed=seed, rows=[row("quantized", 20.0, accuracy=0.5)]) for seed in (0, 1)]
    lines, notes = published(tmp_path, "cushioncache_table2", one, *two)
    found = of_scheme(lines, "Per-tensor static")
    assert found["less full precision"].text == "-2.0 [-5.0, -0.1]"
    assert found["ours"].text == "50.00 ± 3.00 (one seed)"
    assert "other less full precision" not in found
    assert "less full precision: accuracy less full precision with the same prefix, %." in notes


def test_results_without_losses_report_as_they_did(tmp_path: Path) -> None:
    plain = record()
    assert current(plain, tmp_path) == plain
    write_report([write(tmp_path / "results", plain)], tmp_path / "report")
    assert not any("ratio" in title for line in lines_of(tmp_path / "report") for title in line)
