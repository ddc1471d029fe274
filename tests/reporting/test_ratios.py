"""The figure that compares methods: the ratios drawn are those of the rows, by configuration and prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawing import assert_nothing_is_cut_off
from matplotlib import pyplot
from records import failed, record, row, write

from cushion.reporting.collect import collect
from cushion.reporting.plots import draw_all
from cushion.reporting.ratios import Comparison, compared, draw_comparison


def run_of(none: float, tuned: float, **others: Any) -> dict[str, Any]:
    rows = [row("full_precision", 10.0), row("full_precision_tuned", 10.0)]
    for name, value in (("quantized", none), ("quantized_tuned", tuned)):
        rows.append(row(name, 10.0 * value, **{"ratio/wikitext2": value, "ratio_low/wikitext2": value - 0.1,
                                                "ratio_high/wikitext2": value + 0.2}))  # fmt: skip
    return record(rows=rows, experiment="methods", **others)


def comparison_of(folder: Path, *records: dict[str, Any]) -> Comparison | None:
    return compared(list(enumerate(collect([write(folder, *records)]), start=1)))


def test_every_configuration_has_its_ratio_by_prefix_and_failed_runs_have_none(tmp_path: Path) -> None:
    runs = [
        run_of(5.0, 1.5, quantizer="static"),
        run_of(2.0, 1.25, quantizer="token"),
        failed("no", experiment="methods"),
    ]
    found = comparison_of(tmp_path, *runs)
    assert found is not None
    by_place = {(ratio.label, ratio.stage): ratio.value for ratio in found.ratios}
    assert by_place == {
        ("static", "none"): 5.0,
        ("static", "tuned"): 1.5,
        ("token", "none"): 2.0,
        ("token", "tuned"): 1.25,
    }
    assert "full precision with the same prefix" in found.title and len(found.runs) == 2


def test_one_configuration_or_results_without_ratios_are_no_comparison(tmp_path: Path) -> None:
    assert comparison_of(tmp_path / "one", run_of(5.0, 1.5, seed=0), run_of(6.0, 1.6, seed=1)) is None
    older = [record(quantizer=name, rows=[row("quantized", 20.0)]) for name in ("static", "token")]
    assert comparison_of(tmp_path / "older", *older) is None


def test_the_figure_shows_them_and_a_report_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of(5.0, 1.5, quantizer="static"), run_of(2.0, 1.25, quantizer="token")]
    found = comparison_of(tmp_path, *runs)
    assert found is not None
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        draw_comparison(found, tmp_path / "ratios.png", 50, "column")
    figure = pyplot.gcf()
    try:
        (axis,) = figure.axes
        assert [label.get_text() for label in axis.get_yticklabels()] == ["static", "token"]
        drawn = {str(one.get_label()): [float(x) for x in one.lines[0].get_xdata()] for one in axis.containers}
        assert drawn == {"no prefix": [5.0, 2.0], "tuned prefix": [1.5, 1.25]}
        assert axis.get_xscale() == "log" and axis.get_xlabel().endswith("(log)")
        assert_nothing_is_cut_off(figure, "column")
        boxes = [one.get_window_extent() for one in (*figure.legends, axis.xaxis.label)]
        assert not boxes[0].overlaps(boxes[1])
    finally:
        pyplot.close(figure)
    drawings = draw_all(collect([tmp_path]), tmp_path / "figures")
    assert [f"{found.title} (logarithmic axis), model" in one.title for one in drawings].count(True) == 1
    figures = [drawing.path for drawing in drawings]
    names = [path.name for path in figures]
    assert not [path for path in figures if b"/Type3" in path.with_suffix(".pdf").read_bytes()]
    assert sum(name.startswith("ratios-") for name in names) == 1
