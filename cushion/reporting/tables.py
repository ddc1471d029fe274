"""The comparison of a run as a plain-text table, from result.json alone."""

from __future__ import annotations

from typing import Any


def comparison_table(result: dict[str, Any]) -> str:
    """The rows of a result: perplexity, largest activation, L_q and seconds, one line each."""
    rows = result["rows"]
    corpora = list(rows[0]["perplexity"]) if rows else []
    header = ["", *(f"perplexity {corpus}" for corpus in corpora), "largest activation", "L_q", "seconds"]
    lines = [
        [
            row["label"],
            *(_number(row["perplexity"][corpus]) for corpus in corpora),
            f"{row['largest_activation']:.1f}",
            f"{row['quantization_error']:.3g}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def text(line: list[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return "\n".join([text(header), "  ".join("-" * width for width in widths), *map(text, lines)])


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
