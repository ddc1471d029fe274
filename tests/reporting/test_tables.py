"""The comparison table: a line for every row, with its numbers under their headings."""

from __future__ import annotations

from typing import Any

from cushion.metrics.columns import Measured, row_values
from cushion.reporting.tables import comparison_table, further_tables


def row(label: str, perplexity: dict[str, float], **others: Any) -> dict[str, Any]:
    """A row; `others` are what was found on it beyond its perplexities."""
    found = {"tasks": {}, "accuracy": None, **others}
    measured = Measured(perplexity, largest_activation=1234.56, quantization_error=98765.4, seconds=12.4, **found)
    return {"label": label, "values": row_values(measured), "tasks": found["tasks"]}


def task_table(*rows: dict[str, Any]) -> list[str]:
    (table,) = further_tables({"rows": rows})
    return table.splitlines()


def test_there_is_a_line_for_every_row_with_its_numbers() -> None:
    labels = ["full precision", "naive W8A8", "naive W8A8 + greedy prefix"]
    rows = [row(label, {"wikitext2": 10.0 + index}) for index, label in enumerate(labels)]
    lines = comparison_table({"rows": rows}).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "perplexity wikitext2" in lines[0]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    for index, (label, line) in enumerate(zip(labels, lines[2:], strict=True)):
        assert line.startswith(label)
        assert line[len(label) :].split()[-4:] == [f"{10 + index}.00", "1234.6", "9.88e+04", "12"]


def test_every_corpus_has_a_column() -> None:
    lines = comparison_table({"rows": [row("x", {"one": 1.0, "two": 2.0})]}).splitlines()
    assert lines[0].index("perplexity one") < lines[0].index("perplexity two")
    assert lines[2].split()[1:3] == ["1.00", "2.00"]


def test_accuracies_stand_in_per_cent_with_their_standard_errors() -> None:
    tasks = {
        "piqa": {"metric": "acc", "value": 0.625, "stderr": 0.034, "metrics": {}},
        "mmlu_stem": {"metric": "acc", "value": 0.25, "stderr": None, "metrics": {}},
    }
    with_tasks = row("naive", {}, tasks=tasks, accuracy=(0.4375, 0.017))
    header, _, line = task_table(with_tasks)
    assert header.split() == ["accuracy,", "%", "piqa", "mmlu_stem", "mean"]
    assert line.split("  ")[0] == "naive"
    assert [cell for cell in line.split("  ")[1:] if cell.strip()] and line.endswith("43.8 ± 1.7")
    assert line.split() == ["naive", "62.5", "±", "3.4", "25.0", "43.8", "±", "1.7"]
    comparison = comparison_table({"rows": [with_tasks, row("without", {})]}).splitlines()
    assert "accuracy" in comparison[0]
    assert "43.8 ± 1.7" in comparison[2]
    assert comparison[3].split()[1] == "-"


def test_what_a_task_measures_that_is_no_accuracy_has_a_table_of_its_own() -> None:
    def tasks(word_perplexity: float | None) -> dict[str, Any]:
        metrics = {"word_perplexity": {"value": word_perplexity, "stderr": None}, "bits": {"value": 0.5, "stderr": 0.1}}
        return {"wikitext": {"metric": None, "value": None, "stderr": None, "metrics": metrics}}

    rows = [row("full precision", {}, tasks=tasks(21.25)), row("naive", {}, tasks=tasks(None))]
    header, _, first, second = task_table(*rows)
    assert "accuracy" not in header, "none of it is an accuracy"
    assert header.split("  ")[-2:] == ["wikitext word_perplexity", "wikitext bits"]
    assert first.split() == ["full", "precision", "21.25", "0.5"]
    assert second.split() == ["naive", "-", "0.5"], "it overflowed"


def test_there_is_no_table_of_tasks_without_tasks() -> None:
    assert further_tables({"rows": [row("x", {"one": 1.0})]}) == further_tables({"rows": []}) == []
    assert "accuracy" not in comparison_table({"rows": [row("x", {"one": 1.0})]})


def test_a_result_without_rows_has_a_table_without_lines() -> None:
    assert len(comparison_table({"rows": []}).splitlines()) == 2
