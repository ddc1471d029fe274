"""Trade-off curves: the points drawn are those of the results, with means and deviations over seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from drawing import assert_nothing_is_cut_off
from matplotlib import pyplot
from records import failed, record, row, write

from cushion.reporting.collect import collect
from cushion.reporting.plots import draw_all
from cushion.reporting.tradeoffs import Tradeoff, draw_tradeoff, tradeoffs

PERPLEXITIES = {0.25: (30.0, 34.0), 0.5: (20.0, 21.0), 0.9: (12.0, 15.0)}
"""By tau: the found prefix's perplexity for two seeds; the tuned one's is half of it."""


def run_of(perplexity: float, **others: Any) -> dict[str, Any]:
    rows = [row("full_precision", 1.0), row("full_precision_tuned", 2.0), row("quantized", 900.0),
            row("quantized_found", perplexity), row("quantized_tuned", perplexity / 2)]  # fmt: skip
    for number, one in enumerate(rows):
        one["values"]["perplexity/c4"] = 5000.0 + number
    return record(rows=rows, **others)


def tau_runs(**others: Any) -> list[dict[str, Any]]:
    return [run_of(value, seed=seed, experiment="ablation_tau", **{"search.tau": tau}, **others)
            for tau, values in PERPLEXITIES.items() for seed, value in enumerate(values)]  # fmt: skip


def found_in(folder: Path, *records: dict[str, Any]) -> list[Tradeoff]:
    return list(tradeoffs(list(enumerate(collect([write(folder, *records)]), start=1))))


def lines(
    tradeoff: Tradeoff, folder: Path, monkeypatch: pytest.MonkeyPatch, width: str | None = None
) -> dict[str, tuple[list[Any], list[Any]]]:
    """What is drawn: by label x and y of every point, and (x, low, high) of every bar.

    Also the scales, as '', and (text, x, y) of what is written at points, as 'texts' with their places beside.
    """
    with monkeypatch.context() as patch:
        patch.setattr("cushion.reporting.figures.pyplot.close", lambda _figure: None)
        path = draw_tradeoff(tradeoff, folder / "drawn.png", 50, width)
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = pyplot.gcf()
    try:
        if width is not None:
            assert_nothing_is_cut_off(figure, width)
        (axis,) = figure.axes
        drawn = {"": ([axis.get_xscale()], [axis.get_yscale()])}
        if axis.texts:
            drawn["texts"] = ([text.get_text() for text in axis.texts], [text.xy for text in axis.texts])
        for container in axis.containers:
            points = [(float(x), float(y)) for x, y in container.lines[0].get_xydata()]
            bars = [
                [*map(float, (ends[0, 0], *ends[:, 1]))] for bar in container.lines[2] for ends in bar.get_segments()
            ]
            drawn[str(container.get_label())] = (points, bars)
        return drawn
    finally:
        pyplot.close(figure)


@pytest.mark.usefixtures("blank_figures")
def test_the_points_drawn_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = failed("no text", seed=2, experiment="ablation_tau", **{"search.tau": 0.5})
    (only,) = found_in(tmp_path, *tau_runs(), broken)
    assert (only.kind, only.axis, only.corpus, only.runs) == ("tradeoff", "search.tau", "wikitext2", (1, 2, 3, 4, 5, 6))
    drawn = lines(only, tmp_path, monkeypatch)
    assert list(drawn) == ["", "texts", "no prefix", "found prefix", "tuned prefix"]
    assert drawn["no prefix"][0] == [(tau, 900.0) for tau in PERPLEXITIES]
    assert drawn["texts"] == (["2 of 3"] * 3, [(0.5, 900.0), (0.5, 20.5), (0.5, 10.25)])
    for label, share in (("found prefix", 1.0), ("tuned prefix", 0.5)):
        points, bars = drawn[label]
        assert points == [(tau, share * statistics.fmean(values)) for tau, values in PERPLEXITIES.items()]
        for (tau, values), (x, low, high) in zip(PERPLEXITIES.items(), bars, strict=True):
            mean, deviation = share * statistics.fmean(values), share * statistics.stdev(values)
            assert (x, low, high) == pytest.approx((tau, mean - deviation, mean + deviation))
    assert drawn[""] == (["linear"], ["log"]), "from 10 with a tuned prefix to 900 without"


@pytest.mark.parametrize("learned", ["reconstructed", "learned_ranges"])
def test_a_row_whose_quantizer_learned_is_not_drawn(tmp_path: Path, learned: str) -> None:
    runs = tau_runs()
    for one in runs:
        one["rows"][-1][learned] = True
    (only,) = found_in(tmp_path, *runs)
    assert {stage for stage, _ in only.series} == {"none", "found"}


@pytest.mark.usefixtures("blank_figures")
def test_one_seed_has_no_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = found_in(tmp_path, *(one for one in tau_runs() if one["config"]["seed"] == 0))
    assert lines(only, tmp_path, monkeypatch)["found prefix"] == ([(0.25, 30.0), (0.5, 20.0), (0.9, 12.0)], [])
    assert {point.seeds for points in only.series.values() for point in points} == {""}


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("values", "scale"),
    [((1, 4, 16, 64), "log"), ((0, 0.001, 0.01, 1), "linear"), ((1, 2, 30), "linear"), ((1, 2, 31), "log")],
)
def test_an_axis_is_logarithmic_over_a_wide_span_of_positive_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...], scale: str
) -> None:
    (only,) = found_in(tmp_path, *(run_of(10.0, **{"tuning.lambda_q": value}) for value in values))
    assert lines(only, tmp_path, monkeypatch)[""] == ([scale], ["log"])


def test_what_else_is_swept_in_words_tells_curves_apart(tmp_path: Path) -> None:
    (only,) = found_in(tmp_path, *tau_runs(), *tau_runs(quantizer="per_token_dynamic"))
    quantizers = ("per_tensor_static", "per_token_dynamic")
    assert list(only.series) == [(stage, quantizer) for stage in ("none", "found", "tuned") for quantizer in quantizers]
    assert {len(points) for points in only.series.values()} == {3}


@pytest.mark.parametrize(
    "settings",
    [
        [{"search.tau": 0.5}, {"search.tau": 0.6}],
        [{"search.tau": 0.5, "search.length": 1}, {"search.tau": 0.6, "search.length": 2},
         {"search.tau": 0.7, "search.length": 3}],
        [{"search.tau": True}, {"search.tau": 2}, {"search.tau": 3}],
        [{"search.tau": None}, {"search.tau": 1}, {"search.tau": 2}, {"search.tau": 3}],
        [{"search.tau": "a"}, {"search.tau": "b"}, {"search.tau": "c"}],
        [{"search.seed": 0}, {"search.seed": 1}, {"search.seed": 2}],
        [{"seed": 0}, {"seed": 1}, {"seed": 2}],
    ],
)  # fmt: skip
def test_there_is_no_curve_without_exactly_one_key_of_three_numbers(
    tmp_path: Path, settings: list[dict[str, Any]]
) -> None:
    assert found_in(tmp_path, *(run_of(10.0, **one) for one in settings)) == []


def test_a_search_that_found_nothing_counts_with_the_row_without_a_prefix(tmp_path: Path) -> None:
    lone = record(experiment="ablation_tau", **{"search.tau": 0.1})  # its one row has 20.0
    beside = record(experiment="ablation_tau", seed=2, **{"search.tau": 0.5})
    (only,) = found_in(tmp_path, lone, beside, *tau_runs())
    found = {point.x: (point.perplexity, point.seeds) for point in only.series["found", ""]}
    assert found == {0.1: (20.0, ""), 0.25: (32.0, ""), 0.5: (statistics.fmean([20.0, 21.0, 20.0]), ""),
                     0.9: (13.5, "")}  # fmt: skip
    assert {point.x: point.seeds for point in only.series["tuned", ""]} == {0.25: "", 0.5: "2 of 3", 0.9: ""}
    assert only.runs == tuple(range(1, 9))
    (alone,) = found_in(tmp_path / "alone", *(record(**{"search.tau": tau}) for tau in PERPLEXITIES))
    assert {key: [point.perplexity for point in points] for key, points in alone.series.items()} == {
        ("none", ""): [20.0] * 3, ("found", ""): [20.0] * 3}  # fmt: skip


def test_runs_without_a_search_or_a_perplexity_have_no_point_of_a_prefix(tmp_path: Path) -> None:
    without = record(experiment="ablation_tau", **{"search.name": "none", "search.tau": 0.1})
    nothing = record(experiment="ablation_tau", rows=[], **{"search.tau": 0.2})
    curve = next(one for one in found_in(tmp_path, without, nothing, *tau_runs()) if one.kind == "tradeoff")
    places = {stage: {point.x for point in points} for (stage, _), points in curve.series.items() if stage != "none"}
    assert places == {"found": set(PERPLEXITIES), "tuned": set(PERPLEXITIES)}
    assert curve.runs == (1, 3, 4, 5, 6, 7, 8)
    alone = (record(**{"search.name": "none", "search.tau": tau}) for tau in PERPLEXITIES)
    assert found_in(tmp_path / "alone", *alone) == []


def test_a_run_that_quantizes_nothing_is_drawn_by_its_full_precision_rows(tmp_path: Path) -> None:
    rows = [row("full_precision", 9.0), row("full_precision_tuned", 8.0)]
    (only,) = found_in(tmp_path, *(record(rows=rows, **{"search.tau": tau}) for tau in PERPLEXITIES))
    assert {key: [point.perplexity for point in points] for key, points in only.series.items()} == {
        ("none", ""): [9.0] * 3,
        ("tuned", ""): [8.0] * 3,
    }


@pytest.mark.usefixtures("blank_figures")
def test_searches_are_compared_by_their_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"greedy_pruned": (1000.0, 3000.0), "greedy_exhaustive": (9e5, 9e5)}
    records = [
        run_of(
            10.0 * number + seed, seed=seed, search={"token_forwards": cost, "seconds": 1.0}, **{"search.name": name}
        )
        for number, (name, of_seeds) in enumerate(costs.items(), start=1)
        for seed, cost in enumerate(of_seeds)
    ]
    given = run_of(50.0, search={"method": "tokens", "seconds": 0.0}, **{"search.name": "tokens"})
    (only,) = found_in(tmp_path, *records, given)
    assert (only.kind, only.axis, only.runs) == ("cost", "token-forwards of the search", (1, 2, 3, 4))
    points = only.series["found", ""]
    assert [(point.x, point.perplexity, point.label) for point in points] == [
        (2000.0, 10.5, "greedy_pruned"), (9e5, 20.5, "greedy_exhaustive")]  # fmt: skip
    assert points[0].x_deviation == pytest.approx(statistics.stdev(costs["greedy_pruned"]))
    drawn = lines(only, tmp_path, monkeypatch, "column")
    assert drawn["tuned prefix"][0] == [(2000.0, 5.25), (9e5, 10.25)]
    assert drawn["texts"] == (["greedy_pruned", "greedy_exhaustive"] * 2, [
        (2000.0, 10.5), (9e5, 20.5), (2000.0, 5.25), (9e5, 10.25)])  # fmt: skip
    assert drawn[""] == (["log"], ["linear"])


def test_the_report_draws_them_with_their_experiment_and_quantizer(tmp_path: Path) -> None:
    runs = collect([write(tmp_path / "results", *tau_runs(), record(experiment="other"))])
    (drawing,) = draw_all(runs, tmp_path / "figures")
    assert drawing.path.name.startswith("tradeoff-") and drawing.path.stat().st_size > 1000
    shown = "Perplexity (wikitext2) against search.tau (logarithmic in perplexity), model"
    assert drawing.title == f"{shown}; ablation_tau: per_tensor_static"
    assert drawing.runs == (1, 2, 3, 4, 5, 6)
