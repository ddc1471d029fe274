"""Tables as text: whatever a cell holds, it stays a cell."""

from __future__ import annotations

import csv
import io
import re

import pytest

from cushion.reporting.grid import Cell, Table, comma_separated, escape_latex, escape_markdown, latex, markdown

NASTY = [
    "<s>",
    "</script><script>alert(1)</script>",
    "a|b",
    "50 % & more_of #1 {x} $y^2~\\",
    "two\nlines",
    "`*_[x](y)_*`",
    "Ġ\x00",
]


def table(*texts: str) -> Table:
    head = [[Cell(""), Cell("model", span=2)], [Cell("row"), Cell("published"), Cell("ours")]]
    return Table(
        "a_name", "A title", head, [[Cell(text), Cell("1.00", value=1.0), Cell(text)] for text in texts], 1, ["A note"]
    )


def test_headings_above_each_other_are_joined_per_column() -> None:
    assert table("x").headings() == ["row", "model published", "model ours"]


@pytest.mark.parametrize("text", NASTY)
def test_markdown_keeps_its_columns_and_holds_no_html(text: str) -> None:
    lines = markdown(table(text)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, row
    assert "<" not in rows[-1]


@pytest.mark.parametrize("text", NASTY)
def test_latex_holds_no_command_of_the_text(text: str) -> None:
    source = escape_latex(text)
    allowed = (
        r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}|\\symbol\{34\}|\\[{}&%$#_]"
    )
    left = re.sub(allowed, "", source).replace("{[}", "").replace("{]}", "")
    assert not re.search(r"[\\{}&%$#_^~<>|]", left)
    assert "\n" not in source
    assert [line for line in latex(table(text)).splitlines() if line.startswith(source)]


def test_latex_spans_headings_and_rules_under_them() -> None:
    source = latex(table("x"))
    assert r"\multicolumn{2}{c}{model}" in source
    assert r"\cmidrule(lr){2-3}" in source
    assert r"\begin{tabular}{lrr}" in source
    assert source.index(r"\toprule") < source.index(r"\midrule") < source.index(r"\bottomrule")
    body = source[source.index(r"\midrule") : source.index(r"\bottomrule")]
    assert body.splitlines()[1:] == [r"x & 1.00 & x \\"]


@pytest.mark.parametrize(
    ("widths", "wide"), [([20, 5, 8], False), ([17, 12, 8], False), ([18, 12, 10], True), ([18, 12, *[8] * 6], True)]
)
def test_a_table_too_wide_for_a_column_has_the_page(widths: list[int], wide: bool) -> None:
    body = [[Cell("x") for _ in widths], [Cell("x" * width) for width in widths]]
    source = latex(Table("n", "t", [[Cell("a heading over all", len(widths))], [Cell("a") for _ in widths]], body, 1))
    assert (r"\begin{table*}" in source, r"\end{table*}" in source) == (wide, wide)
    assert (r"\begin{adjustbox}{max width=\textwidth}" in source, r"\end{adjustbox}" in source) == (wide, wide)
    places = [
        source.find(part) for part in (r"{adjustbox}{max", r"\begin{tabular}", r"\end{tabular}", r"\end{adjustbox}")
    ]
    assert places[int(not wide) : 4 - int(not wide)] == sorted(places[int(not wide) : 4 - int(not wide)])


def test_latex_writes_what_pdflatex_cannot_print_as_an_escape() -> None:
    assert escape_latex("'Ġthe'") == r"'\textbackslash{}u0120the'"
    assert escape_latex("\u4e2d\U0001f600") == r"\textbackslash{}u4e2d\textbackslash{}U0001f600"
    assert escape_latex("Schrödinger \u03c4 \u2264 1") == r"Schrödinger $\tau$ $\leq$ 1"
    printable = {chr(code) for code in range(0x20, 0x7F)} | {chr(code) for code in range(0xC0, 0x100)}
    assert all(set(escape_latex(chr(code))) <= printable for code in range(0x20, 0x3000))


def test_csv_has_a_column_for_what_stands_behind_a_value() -> None:
    several = Cell("50.0 ± 1.4 (2 of 3 seeds)", value=50.0, deviation=1.375, seeds="2 of 3")
    body = [
        [Cell("a"), Cell("44.6 ± 2.3", value=44.64, error=2.25), Cell("1.00", value=1.0)],
        [Cell("b"), several, Cell("-")],
    ]
    exact = Table("n", "t", [[Cell("row"), Cell("ours"), Cell("difference")]], body, 1)
    assert list(csv.reader(io.StringIO(comma_separated(exact)))) == [
        ["row", "ours", "ours standard error", "ours deviation", "ours seeds", "difference"],
        ["a", "44.64", "2.25", "", "", "1.0"],
        ["b", "50.0", "", "1.375", "2 of 3", "-"],
    ]
    empty = Table("n", "t", [[Cell("row"), Cell("ours")]], [], 1)
    assert comma_separated(empty) == "row,ours\n"


def test_csv_gives_back_every_text_and_the_whole_number() -> None:
    exact = Table("n", "t", [[Cell("a"), Cell("b")]], [[Cell(text), Cell("0.33", value=1 / 3)] for text in NASTY], 1)
    lines = list(csv.reader(io.StringIO(comma_separated(exact), newline="")))
    assert lines[0] == ["a", "b"]
    assert [line[0] for line in lines[1:]] == NASTY
    assert {float(line[1]) for line in lines[1:]} == {1 / 3}


def test_a_line_of_another_width_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="columns"):
        Table("n", "t", [[Cell("a")]], [[Cell("a"), Cell("b")]], 1)


def test_the_best_value_is_bold() -> None:
    table = Table("t", "T", [[Cell("a"), Cell("b")]], [[Cell("x"), Cell("-1.5", value=-1.5, best=True)]], 1)
    assert "| x | **-1.5** |" in markdown(table)
    assert r"x & \textbf{$-$1.5} \\" in latex(table)


def test_plain_words_stay_as_they_are() -> None:
    assert escape_markdown("full precision + tuned prefix") == "full precision + tuned prefix"
    assert escape_latex("full precision + tuned prefix") == "full precision + tuned prefix"


def test_a_negative_number_has_a_minus_in_latex_and_a_word_keeps_its_hyphen() -> None:
    source = latex(Table("n", "t", [[Cell("a"), Cell("b")]], [[Cell("-x"), Cell("-1.50", value=-1.5)]], 1))
    assert r"-x & $-$1.50 \\" in source
