"""A table as plain data, and how it is written in Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field

NONE = "-"
"""What stands in a cell that has nothing to say."""


@dataclass(frozen=True)
class Cell:
    """One cell: its text, how many columns it spans (headings), what it is sorted by, and its kind.

    `kind` is empty, or `published`, `missing`, `failed`, `conflict`: pages show these apart.
    """

    text: str
    span: int = 1
    value: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Headings in one or more lines, a body of lines as wide, `labels` leading columns of words, notes below."""

    name: str
    title: str
    head: list[list[Cell]]
    body: list[list[Cell]]
    labels: int
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        widths = {sum(cell.span for cell in line) for line in (*self.head, *self.body)}
        assert len(widths) <= 1, f"{self.name}: lines of {sorted(widths)} columns"

    def headings(self) -> list[str]:
        """One heading per column: those above each other joined."""
        columns: list[list[str]] = []
        for line in self.head:
            texts = [cell.text for cell in line for _ in range(cell.span)]
            columns = columns or [[] for _ in texts]
            for column, text in zip(columns, texts, strict=True):
                if text and text not in column:
                    column.append(text)
        return [" ".join(column) for column in columns]


def markdown(table: Table) -> str:
    """The table as a pipe table with its title and notes, for GitHub and others."""

    def line(texts: list[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    aligned = [":--" if column < table.labels else "--:" for column in range(len(table.headings()))]
    lines = [f"### {escape_markdown(table.title)}", "", line([escape_markdown(text) for text in table.headings()])]
    lines += [line(aligned), *(line([escape_markdown(cell.text) for cell in row]) for row in table.body)]
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    r"""The table as a `table` environment in the style of booktabs; needs `\usepackage{booktabs}`."""
    columns = len(table.headings())
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\label{{tab:{re.sub(r'[^a-zA-Z0-9]+', '-', table.name)}}}",
        rf"\begin{{tabular}}{{{'l' * table.labels + 'r' * (columns - table.labels)}}}",
        r"\toprule",
    ]
    for number, heads in enumerate(table.head):
        lines.append(" & ".join(_latex_heading(cell) for cell in heads) + r" \\")
        if number + 1 < len(table.head):
            lines.append(_rules(heads))
    lines.append(r"\midrule")
    lines += [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.body]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {escape_latex(note)}" for note in table.notes]
    return "\n".join([*(line for line in lines if line), r"\end{table}"]) + "\n"


def _latex_cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    return "$-$" + text[1:] if cell.value is not None and cell.value < 0 and text.startswith("-") else text


def _latex_heading(cell: Cell) -> str:
    text = escape_latex(cell.text)
    return text if cell.span == 1 else rf"\multicolumn{{{cell.span}}}{{c}}{{{text}}}"


def _rules(heads: list[Cell]) -> str:
    """A thin rule under each heading that spans several columns."""
    rules, column = [], 1
    for cell in heads:
        if cell.span > 1:
            rules.append(rf"\cmidrule(lr){{{column}-{column + cell.span - 1}}}")
        column += cell.span
    return " ".join(rules)


def comma_separated(table: Table) -> str:
    """The table as CSV: one line of headings; numbers as far as cells have them, otherwise the text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.headings())
    writer.writerows([cell.text if cell.value is None else repr(cell.value) for cell in row] for row in table.body)
    return text.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Any text as LaTeX source that prints it: nothing in it is a command."""
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def escape_markdown(text: str) -> str:
    """Any text as Markdown that shows it: no column ends, no HTML and no emphasis begins within it."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]~#])", r"\\\1", text)


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
