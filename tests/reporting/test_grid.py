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
        r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textquotedbl)\{\}|\\[{}&%$#_]"
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


def test_csv_gives_back_every_text_and_the_whole_number() -> None:
    exact = Table("n", "t", [[Cell("a"), Cell("b")]], [[Cell(text), Cell("0.33", value=1 / 3)] for text in NASTY], 1)
    lines = list(csv.reader(io.StringIO(comma_separated(exact), newline="")))
    assert lines[0] == ["a", "b"]
    assert [line[0] for line in lines[1:]] == NASTY
    assert {float(line[1]) for line in lines[1:]} == {1 / 3}


def test_a_line_of_another_width_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="columns"):
        Table("n", "t", [[Cell("a")]], [[Cell("a"), Cell("b")]], 1)


def test_plain_words_stay_as_they_are() -> None:
    assert escape_markdown("full precision + tuned prefix") == "full precision + tuned prefix"
    assert escape_latex("full precision + tuned prefix") == "full precision + tuned prefix"


def test_a_negative_number_has_a_minus_in_latex_and_a_word_keeps_its_hyphen() -> None:
    source = latex(Table("n", "t", [[Cell("a"), Cell("b")]], [[Cell("-x"), Cell("-1.50", value=-1.5)]], 1))
    assert r"-x & $-$1.50 \\" in source
