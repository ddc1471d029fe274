"""The comparison of a run as plain-text tables, from result.json alone."""

from __future__ import annotations

from typing import Any


def comparison_table(result: dict[str, Any]) -> str:
    """The rows of a result: perplexity, mean accuracy, largest activation, L_q and seconds, one line each."""
    rows = result["rows"]
    corpora = list(rows[0]["perplexity"]) if rows else []
    with_accuracy = any(row["accuracy"] is not None for row in rows)
    accuracy = ["accuracy"] if with_accuracy else []
    header = ["", *(f"perplexity {corpus}" for corpus in corpora), *accuracy, "largest activation", "L_q", "seconds"]
    lines = [
        [
            row["label"],
            *(_number(row["perplexity"][corpus]) for corpus in corpora),
            *([_share(row["accuracy"], row["accuracy_stderr"])] if with_accuracy else []),
            f"{row['largest_activation']:.1f}",
            f"{row['quantization_error']:.3g}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return _aligned([header, *lines])


def task_table(result: dict[str, Any]) -> str:
    """Accuracy of every row on every task, in per cent with its standard error; empty without such tasks."""
    rows = result["rows"]
    names = [task for task, score in rows[0]["tasks"].items() if score["metric"] is not None] if rows else []
    if not names:
        return ""
    header = ["accuracy, %", *names, "mean"]
    lines = [
        [
            row["label"],
            *(_share(row["tasks"][name]["value"], row["tasks"][name]["stderr"]) for name in names),
            _share(row["accuracy"], row["accuracy_stderr"]),
        ]
        for row in rows
    ]
    return _aligned([header, *lines])


def other_metrics(row: dict[str, Any]) -> list[tuple[str, str, float]]:
    """What lm-eval measured on the tasks that have no accuracy (word_perplexity, say): task, metric, value."""
    return [
        (task, metric, found["value"])
        for task, score in row["tasks"].items()
        if score["metric"] is None
        for metric, found in score["metrics"].items()
        if found["value"] is not None
    ]


def metric_table(result: dict[str, Any]) -> str:
    """Every row on the tasks that have no accuracy; empty without any."""
    names = list(dict.fromkeys((task, metric) for row in result["rows"] for task, metric, _ in other_metrics(row)))
    if not names:
        return ""
    lines = []
    for row in result["rows"]:
        values = {(task, metric): value for task, metric, value in other_metrics(row)}
        lines.append([row["label"], *(_plain(values[name]) if name in values else "-" for name in names)])
    return _aligned([["", *(f"{task} {metric}" for task, metric in names)], *lines])


def _aligned(lines: list[list[str]]) -> str:
    """Columns of one width each, the first to the left and the others to the right, a rule under the first line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def text(line: list[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return "\n".join([text(lines[0]), "  ".join("-" * width for width in widths), *map(text, lines[1:])])


def _share(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f}"


def _plain(value: float) -> str:
    return f"{value:.6g}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
