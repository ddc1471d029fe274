"""A table as plain data, and how it is written in Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

NONE = "-"
"""What stands in a cell that has nothing to say."""
HEADING = 16
"""A heading of more characters stands in several lines in LaTeX, so that its column is as narrow as its values."""
WIDE = 45
"""Lines of more characters are wider than a column of a two-column paper: LaTeX gives them the whole page."""


@dataclass(frozen=True)
class Cell:
    """One cell: its text, how many columns it spans (headings), what it is sorted by, and its kind.

    `kind` is empty, or `published`, `missing`, `failed`, `conflict`: pages show these apart. What stands behind a value
    in the text is kept as a number too: `error`, the standard error of one seed, or `deviation`, that over several; and
    `seeds` says of how many seeds a cell with lost ones is, `2 of 3`. A comparison has the ends of its interval, `low`
    and `high`, its p-value, a `verdict` in words, and a digest of the rows that are `compared`. `best` is written bold.
    What stands `below` is for a page on a narrow screen: there it takes the place of columns that are left out. `link`
    is where the text leads to, from the report's own folder.
    """

    text: str
    span: int = 1
    value: float | None = None
    kind: str = ""
    error: float | None = None
    deviation: float | None = None
    seeds: str = ""
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: str = ""
    compared: str = ""
    below: str = ""
    best: bool = False
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Headings in one or more lines, a body of lines as wide, `labels` leading columns of words, notes below.

    `pinned` are the columns that stay in view where a page is narrower than the table; by default those of words.
    `name` names its file; `key` its label in LaTeX and its id in a page, where two tables of a report share a name.
    `foldable` are the columns that `folded` puts into a note where they are constant; `aside` those that a narrow
    screen leaves out until it is asked for them.
    """

    name: str
    title: str
    head: list[list[Cell]]
    body: list[list[Cell]]
    labels: int
    notes: list[str] = field(default_factory=list)
    pinned: tuple[int, ...] | None = None
    key: str = ""
    foldable: tuple[int, ...] = ()
    aside: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        widths = {sum(cell.span for cell in line) for line in (*self.head, *self.body)}
        assert len(widths) <= 1, f"{self.name}: lines of {sorted(widths)} columns"

    def place(self) -> str:
        """What a page and LaTeX refer to the table by: its key, by default its name."""
        return self.key or self.name

    def in_view(self) -> list[int]:
        """The columns that stay in view."""
        return list(range(self.labels) if self.pinned is None else self.pinned)

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


def folded(table: Table) -> Table:
    """The table without those of its `foldable` columns that say the same in every line: a note says it once.

    Lines of runs that are missing have nothing to say there, and do not count. A table with headings above each other
    keeps its columns.
    """
    lines = [line for line in table.body if not any(cell.kind == "missing" for cell in line)]
    texts = {column: {line[column].text for line in lines} for column in table.foldable}
    same = [column for column, found in texts.items() if len(found) == 1]
    if len(table.head) > 1 or not same:
        return table
    headings = table.headings()
    said = ", ".join(f"{headings[column]} {lines[0][column].text}" for column in same)
    place = {column: new for new, column in enumerate(c for c in range(len(headings)) if c not in same)}

    def moved(columns: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place[column] for column in columns if column in place)

    return replace(
        table,
        head=[[cell for column, cell in enumerate(table.head[0]) if column in place]],
        body=[[cell for column, cell in enumerate(line) if column in place] for line in table.body],
        labels=sum(column < table.labels for column in place),
        notes=[f"In every line: {said}.", *table.notes],
        pinned=None if table.pinned is None else moved(table.pinned),
        foldable=(),
        aside=moved(table.aside),
    )


def markdown(table: Table) -> str:
    """The table as a pipe table with its title and notes, for GitHub and others."""

    def line(texts: list[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    aligned = [":--" if column < table.labels else "--:" for column in range(len(table.headings()))]
    lines = [f"### {escape_markdown(table.title)}", "", line([escape_markdown(text) for text in table.headings()])]
    lines += [line(aligned), *(line([_markdown_cell(cell) for cell in row]) for row in table.body)]
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    if cell.link:
        return f"[{text}]({cell.link})"
    return f"**{text}**" if cell.best else text


def latex(table: Table) -> str:
    r"""The table as a `table` environment in the style of booktabs; needs `\usepackage{booktabs}`.

    A table whose lines have more than `WIDE` characters is a `table*`, made smaller where the page is not wide enough;
    that needs `adjustbox` as well.
    """
    columns = len(table.headings())
    environment, begin, end = "table", "", ""
    if _characters(table) > WIDE:
        environment = "table*"
        begin, end = r"\begin{adjustbox}{max width=\textwidth}", "\n" + r"\end{adjustbox}"
    lines = [
        rf"\begin{{{environment}}}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\label{{tab:{re.sub(r'[^a-zA-Z0-9]+', '-', table.place())}}}",
        begin,
        rf"\begin{{tabular}}{{{'l' * table.labels + 'r' * (columns - table.labels)}}}",
        r"\toprule",
    ]
    for number, heads in enumerate(table.head):
        lines.append(" & ".join(_latex_headings(heads, table.labels)) + r" \\")
        if number + 1 < len(table.head):
            lines.append(_rules(heads))
    lines.append(r"\midrule")
    lines += [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.body]
    lines += [r"\bottomrule", rf"\end{{tabular}}{end}"]
    lines += [rf"\par\smallskip\raggedright\footnotesize {escape_latex(note)}" for note in table.notes]
    return "\n".join([*(line for line in lines if line), rf"\end{{{environment}}}"]) + "\n"


def _characters(table: Table) -> int:
    """How wide the table is: the longest text of each column, with room between them."""
    heads = [max(map(len, _lines(cell.text))) * "x" for cell in table.head[-1]]
    columns = zip(heads, *([cell.text for cell in row] for row in table.body), strict=True)
    return sum(max(map(len, texts)) + 2 for texts in columns)


def _latex_cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    if cell.value is not None and cell.value < 0 and text.startswith("-"):
        text = "$-$" + text[1:]
    return rf"\textbf{{{text}}}" if cell.best else text


def _latex_headings(heads: list[Cell], labels: int) -> Iterator[str]:
    """The headings of a line: those of one column in as many lines as it takes, set as the column is."""
    column = 0
    for cell in heads:
        lines = [escape_latex(line) for line in _lines(cell.text)]
        if cell.span > 1:
            yield rf"\multicolumn{{{cell.span}}}{{c}}{{{escape_latex(cell.text)}}}"
        elif len(lines) == 1:
            yield lines[0]
        else:
            side = "l" if column < labels else "r"
            yield rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}" + r" \\ ".join(lines) + r"\end{tabular}"
        column += cell.span


def _lines(heading: str) -> list[str]:
    return textwrap.wrap(heading, HEADING, break_long_words=False, break_on_hyphens=False) or [""]


def _rules(heads: list[Cell]) -> str:
    """A thin rule under each heading that spans several columns."""
    rules, column = [], 1
    for cell in heads:
        if cell.span > 1:
            rules.append(rf"\cmidrule(lr){{{column}-{column + cell.span - 1}}}")
        column += cell.span
    return " ".join(rules)


def comma_separated(table: Table) -> str:
    """The table as CSV: one line of headings; numbers as far as cells have them, otherwise the text.

    What stands behind a value has a column of its own, where any cell has it: `standard error`, `deviation`, `seeds`,
    and of comparisons `low`, `high`, `p` and `verdict`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    behind = [list(_behind(cells)) for cells in zip(*table.body, strict=True)] or [[] for _ in table.headings()]
    writer.writerow(
        name
        for heading, further in zip(table.headings(), behind, strict=True)
        for name in (heading, *(f"{heading} {title}" for title, _ in further))
    )
    for row in table.body:
        fields = []
        for cell, further in zip(row, behind, strict=True):
            values = [getattr(cell, key) for _, key in further]
            fields.append(cell.text if cell.value is None else repr(cell.value))
            fields += ["" if value is None else str(value) for value in values]
        writer.writerow(fields)
    return text.getvalue()


_BEHIND = {"standard error": "error"} | {key: key for key in ("deviation", "seeds", "low", "high", "p", "verdict")}


def _behind(cells: tuple[Cell, ...]) -> Iterator[tuple[str, str]]:
    """What any cell of a column has behind its value: the title of a column for it, and the cell's attribute."""
    for title, key in _BEHIND.items():
        if any(getattr(cell, key) not in (None, "") for cell in cells):
            yield title, key


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\symbol{34}", "±": r"$\pm$", "[": "{[}", "]": "{]}",
    "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "\N{EM DASH}": "---",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{LESS-THAN OR EQUAL TO}": r"$\leq$", "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\u03b1": r"$\alpha$", "\u03b7": r"$\eta$", "\u03bb": r"$\lambda$", "\u03bc": r"$\mu$", "\u03c4": r"$\tau$",
}  # fmt: skip
_LETTERS = {chr(code) for code in range(0xC0, 0x100)} - {chr(code) for code in (0xD0, 0xD7, 0xDE, 0xF0, 0xF7, 0xFE)}
"""The letters beyond ASCII that pdflatex prints in every font encoding: Latin-1's without eth and thorn."""


def escape_latex(text: str) -> str:
    r"""Any text as LaTeX source that prints it: nothing in it is a command.

    What pdflatex cannot print, as in a token, is written as in a Python string: `\u0120`.
    """
    return "".join(map(_latex_character, _one_line(text)))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii() or character in _LETTERS:
        return character
    return character.encode("unicode_escape").decode("ascii").replace("\\", _LATEX["\\"])


def escape_markdown(text: str) -> str:
    """Any text as Markdown that shows it: no column ends, no HTML and no emphasis begins within it."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]~#])", r"\\\1", text)


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
