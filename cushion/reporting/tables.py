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
    """Accuracy of every row on every task, in per cent with its standard error; empty without tasks."""
    rows = result["rows"]
    names = list(rows[0]["tasks"]) if rows else []
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


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
