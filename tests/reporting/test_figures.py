"""The figures: PNG files fit for a paper, one panel per prefix, every curve with its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from drawing import assert_nothing_is_cut_off
from matplotlib import pyplot

from cushion.reporting.figures import (
    FIGURES,
    activation_curves,
    activation_map,
    attention_maps,
    draw_figures,
    figures_of,
    qfem_tradeoff,
)
from cushion.reporting.plots import search_trajectory, tuning_loss

KEYS = ("top1", "top2", "top3", "top10_percent", "median")


def result(stages: int, layers: int = 5) -> dict[str, Any]:
    """The part of result.json that the figure is drawn from."""
    names = ["none", "found", "tuned"][:stages]
    curves = {
        name: {key: [100.0 / (rank + 1) + layer + stage for layer in range(layers)] for rank, key in enumerate(KEYS)}
        for stage, name in enumerate(names)
    }
    return {
        "model": {"label": "some model"},
        "activations": {"curves": curves, "titles": {name: f"title of {name}" for name in names}},
        "attention": {
            "first": 4,
            "stages": {
                name: {"prefix": [[0.1 * stage] * 2] * layers, "first": [[0.5, 0.9 - 0.1 * stage]] * layers}
                for stage, name in enumerate(names)
            },
        },
    }


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_figure_is_a_png_whose_width_grows_with_the_panels(tmp_path: Path, stages: int) -> None:
    path = tmp_path / "new" / "curves.png"
    before = pyplot.get_fignums()
    assert activation_curves(result(stages), path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
    height, width, _ = matplotlib.image.imread(path).shape
    assert 500 <= height <= 2000
    assert 500 * stages <= width <= 1200 * stages
    assert pyplot.get_fignums() == before, "no figure stays open"


def test_every_prefix_has_a_panel_with_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = result(3)
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        activation_curves(record, tmp_path / "curves.png")
    figure = pyplot.gcf()
    try:
        curves = record["activations"]["curves"]
        assert [axis.get_title() for axis in figure.axes] == list(record["activations"]["titles"].values())
        for axis, curve in zip(figure.axes, curves.values(), strict=True):
            assert [list(line.get_ydata()) for line in axis.get_lines()] == [curve[key] for key in KEYS]
            assert axis.get_yscale() == "log"
        assert [axis.get_ylabel() for axis in figure.axes] == ["magnitude at block input (log)", "", ""]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["top-1", "top-2", "top-3", "top 10 %", "median"]
        limits = {axis.get_ylim() for axis in figure.axes}
        assert len(limits) == 1, "panels share their scale"
    finally:
        pyplot.close(figure)


def test_a_magnitude_of_zero_is_drawn_all_the_same(tmp_path: Path) -> None:
    record = result(2)
    record["activations"]["curves"]["none"]["median"] = [0.0] * 5
    assert activation_curves(record, tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.usefixtures("blank_figures")
def test_figures_are_drawn_where_they_are_missing_and_left_alone_where_they_are(tmp_path: Path) -> None:
    draw_figures(result(2), tmp_path)
    paths = figures_of(result(2), tmp_path)
    assert list(paths) == ["activation_curves", "attention_maps"]
    for path in paths.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        path.write_bytes(b"drawn before")
    draw_figures(result(2), tmp_path)
    assert all(path.read_bytes() == b"drawn before" for path in paths.values())
    for path in paths.values():
        path.unlink()
    draw_figures(result(2), tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


def test_attention_has_a_map_of_its_own_for_every_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = result(3)
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        assert attention_maps(record, tmp_path / "maps.png") == tmp_path / "maps.png"
    figure = pyplot.gcf()
    try:
        maps = [axis for axis in figure.axes if axis.images]
        stages = record["attention"]["stages"]
        expected = [stages[name]["first"] for name in stages] + [stages["found"]["prefix"], stages["tuned"]["prefix"]]
        drawn = [axis.images[0].get_array().tolist() for axis in maps if axis.get_title()]
        assert drawn == expected
        assert all(axis.images[0].get_clim() == (0, 1) for axis in maps if axis.get_title()), "maps share their scale"
        assert "first 4 tokens" in maps[0].get_title()
        assert "the prefix" in maps[-1].get_title() or "the prefix" in maps[-2].get_title()
    finally:
        pyplot.close(figure)


OF_A_REPORT: dict[str, Any] = {"search_trajectory": search_trajectory, "tuning_loss": tuning_loss}
"""The figures of one run that a report alone draws."""


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("name", "stages", "width"),
    [
        *((name, 3, width) for name in FIGURES for width in (None, "column")),
        *((name, 1, None) for name in ("activation_curves", "activation_map", "attention_maps")),
        *((name, 1, "column") for name in ("activation_map", "attention_maps")),
        ("activation_map", 3, "page"),
        ("search_trajectory", 1, "column"),
        ("tuning_loss", 1, "column"),
    ],
)
def test_nothing_in_a_figure_is_cut_off_and_for_a_paper_its_text_has_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stages: int, width: str | None
) -> None:
    record = result(stages)
    names = list(record["activations"]["titles"])
    record["activations"]["map"] = {
        "block": 7, "channels": [2, 40, 1023], "positions": 2,
        "values": {name: [[1.0, 22697.25, 0.1], [2.0, 0.5, 3.0]] for name in names},
    }  # fmt: skip
    record["qfem"] = {name: {"alpha_search": searched(2)} for name in names}
    shares = {"cett": 0.2, "ratios": [0.5] * 5}
    record["activations"]["sparsity"] = {
        "ppl": 1.0, "stages": {name: {"levels": [shares], "within_perplexity": shares} for name in names},
    }  # fmt: skip
    record["activations"]["spikes"] = {
        "stages": {name: {"cosines": [None, 1.0, 0.9, 1.0, None], "others": [0.5] * 5} for name in names}
    }
    step = {"objective_before": 12345.678, "objective_after": 9.0, "token": "a token of some length", "token_id": 1}
    record["search"] = {
        "objective": "quantization_error",
        "steps": [{**step, "step": place, "accepted": not place} for place in range(3)],
    }
    losses = [{"step": place, "loss": 12345.678 - place, "held_out_loss": 3.0} for place in range(60)]
    record["tuning"] = {"steps": losses, "initial_loss": 3.0, "best_step": 30}
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        {**FIGURES, **OF_A_REPORT}[name](record, tmp_path / "drawn.png", width=width)
    figure = pyplot.gcf()
    try:
        assert_nothing_is_cut_off(figure, width)
        if width is not None and name in FIGURES:
            assert len([axis for axis in figure.axes if axis.get_title()]) >= stages
    finally:
        pyplot.close(figure)


def test_a_pdf_stands_beside_a_png_and_alone_where_it_is_asked_for(tmp_path: Path) -> None:
    activation_curves(result(1), tmp_path / "curves.png")
    activation_curves(result(1), tmp_path / "alone.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.pdf", "curves.pdf", "curves.png"]
    pdf = (tmp_path / "alone.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and pdf == (tmp_path / "curves.pdf").read_bytes()


# ---- the map of magnitudes ----------------------------------------------------------------------------------------


def with_map(**values: list[list[float]]) -> dict[str, Any]:
    made = result(3)
    made["activations"]["map"] = {"block": 7, "channels": [2, 40], "positions": 3, "values": values}
    return made


def test_the_map_has_a_panel_per_prefix_with_positions_across_and_one_colour_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"none": [[1.0, 900.0], [2.0, 0.5], [3.0, 0.25]], "found": [[1.0, 2.0], [1.5, 0.0], [1.0, 1.0]]}
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        path = activation_map(with_map(**values), tmp_path / "new" / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = pyplot.gcf()
    try:
        panels = [axis for axis in figure.axes if axis.images and axis.get_xlabel() == "token position"]
        assert [axis.get_title() for axis in panels] == [
            "title of none\nlargest 900 at position 0, channel 40",
            "title of found\nlargest 2 at position 0, channel 40",
        ]
        for axis, rows in zip(panels, values.values(), strict=True):
            expected = [[row[channel] or None for row in rows] for channel in range(2)]
            assert axis.images[0].get_array().tolist() == expected, "zero is blank"
            assert axis.images[0].get_clim() == (0.5, 900.0), "from half the median of 0.25, 0.5, 1, ..., 900"
            assert type(axis.images[0].norm).__name__ == "LogNorm"
        assert [label.get_text() for label in panels[0].get_yticklabels()] == ["2", "40"]
        assert [axis.get_ylabel() for axis in figure.axes if axis not in panels] == ["|X| (log)"]
        assert "block 7" in figure.get_suptitle() and figure.get_suptitle().endswith("\none text, first 3 tokens")
    finally:
        pyplot.close(figure)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_map_of_equal_magnitudes_is_drawn_all_the_same(tmp_path: Path, value: float) -> None:
    path = activation_map(with_map(none=[[value, value]] * 3), tmp_path / "map.png")
    assert path.stat().st_size > 1000


@pytest.mark.usefixtures("blank_figures")
def test_the_map_is_drawn_where_the_result_has_one(tmp_path: Path) -> None:
    drawn = {**with_map(none=[[1.0, 2.0]] * 3), "attention": None}
    draw_figures(drawn, tmp_path)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"activation_curves", "activation_map"}
    del drawn["activations"]["map"]
    assert list(figures_of(drawn, tmp_path)) == ["activation_curves"], "as older results are"


# ---- QFeM's trade-off ---------------------------------------------------------------------------------------------


def searched(found: int, values: tuple[float | None, ...] = (90.0, 30.0, 12.0)) -> dict[str, Any]:
    points = [{"kept_modules": number**2, "perplexity": value} for number, value in enumerate(values)]
    return {"target": 1.05, "reference_perplexity": 11.5, "points": points, "found": found}


def with_qfem(**searches: dict[str, Any] | None) -> dict[str, Any]:
    return {**result(3), "qfem": {stage: {"alpha_search": search} for stage, search in searches.items()}}


def test_the_trade_off_has_a_panel_per_prefix_with_points_choice_reference_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = with_qfem(none=searched(2), found=searched(1, (None, 30.0, 12.0)), tuned=None)
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        path = qfem_tradeoff(record, tmp_path / "new" / "tradeoff.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = pyplot.gcf()
    try:
        assert [axis.get_title() for axis in figure.axes] == ["title of none", "title of found"]
        drawn = [
            {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}
            for axis in figure.axes
        ]
        assert drawn[0]["evaluated"] == ([0, 1, 4], [90.0, 30.0, 12.0])
        assert drawn[1]["evaluated"] == ([1, 4], [30.0, 12.0]), "what is not finite cannot be drawn"
        assert [part["chosen"] for part in drawn] == [([4], [12.0]), ([1], [30.0])]
        for part in drawn:
            assert part["per-token scales"][1] == [11.5, 11.5]
            assert part["target"][1] == pytest.approx([12.075, 12.075])
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["evaluated", "chosen", "per-token scales", "target"]
    finally:
        pyplot.close(figure)


@pytest.mark.usefixtures("blank_figures")
def test_nothing_is_drawn_where_no_attention_was_measured(tmp_path: Path) -> None:
    without = {**result(2), "attention": None}
    draw_figures(without, tmp_path)
    assert list(figures_of(without, tmp_path)) == ["activation_curves"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"activation_curves"}


@pytest.mark.usefixtures("blank_figures")
def test_the_trade_off_is_drawn_only_where_alpha_was_searched(tmp_path: Path) -> None:
    assert "qfem_tradeoff" not in figures_of(with_qfem(none=None), tmp_path)
    assert "qfem_tradeoff" not in figures_of({**result(2), "qfem": None}, tmp_path)
    record = with_qfem(none=searched(0, (None,)))
    draw_figures(record, tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"activation_curves.png", "qfem_tradeoff.png"}
