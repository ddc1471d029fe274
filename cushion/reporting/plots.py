"""The figures of a report, drawn from result.json: what several runs share is drawn once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cushion.hashing import digest
from cushion.reporting.alike import alike
from cushion.reporting.collect import Run
from cushion.reporting.figures import (
    activation_curves,
    activation_map,
    activation_ratios,
    alpha_searches,
    attention_maps,
    qfem_tradeoff,
    save,
    spike_cosines,
    tidy,
)
from cushion.reporting.lines import value_of as setting
from cushion.reporting.ratios import compared, draw_comparison
from cushion.reporting.runs import varying
from cushion.reporting.settings import runs_in_words
from cushion.reporting.sizes import inches, set_text
from cushion.reporting.tradeoffs import NumberedRun, draw_tradeoff, tradeoffs

PAPER_DPI = 220
"""Of the figures for a paper, which are smaller."""

DPI = 110
"""Sharp on a phone, and small enough for a page that carries every figure inside."""


Draw = Callable[[dict[str, Any], Path, int, str | None], object]
"""Draws the content of a result.json: into a file, with dots per inch, of a width for a paper or as it comes."""


@dataclass(frozen=True)
class Drawing:
    """A PNG file, what it shows, and the numbers (from 1, as in the table of runs) of the runs that it stands for.

    `experiments` are those of the runs, in their order.
    """

    path: Path
    title: str
    runs: tuple[int, ...]
    experiments: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The title with the numbers of the runs."""
        return f"{self.title}; {runs_in_words(self.runs)}"


@dataclass
class _Shared:
    """A figure of the runs that have the same numbers for it; the first one's are drawn."""

    kind: str
    content: Any
    draw: Draw
    of: list[NumberedRun]
    equal: bool = True
    """Whether the numbers are the same, and not only alike."""


def draw_all(runs: Sequence[Run], folder: Path, width: str | None = None) -> list[Drawing]:
    """Draw every figure that the runs have numbers for into `folder`; those that would look the same once.

    Comparisons of methods and trade-offs come last.

    Args:
        runs: the results, in the order of their numbers.
        folder: where the files go.
        width: one of `sizes.WIDTHS`, for a paper; None: as they come.

    """
    dpi = DPI if width is None else PAPER_DPI
    shared: list[_Shared] = []
    together: dict[tuple[str, str], list[NumberedRun]] = {}
    for number, run in enumerate(runs, start=1):
        together.setdefault((run.experiment, run.model), []).append((number, run))
        for kind, content, draw in _figures_of(run):
            one = next((one for one in shared if one.kind == kind and _is_of(one, run, content)), None)
            if one is None:
                shared.append(_Shared(kind, content, draw, [(number, run)]))
            else:
                one.of.append((number, run))
                one.equal = one.equal and one.content == content
    keys = {group: varying(run for _, run in members) for group, members in together.items()}
    drawings = []
    folder.mkdir(parents=True, exist_ok=True)
    for kind in TITLES:
        for one in (one for one in shared if one.kind == kind):
            first = one.of[0][1]
            path = folder / f"{kind}-{digest([first.model, one.content], 12)}.png"
            one.draw(first.record, path, dpi, width)
            title = f"{_title(kind, one.of)}{_in_scale(scale_of(kind, first.record))}, {first.model}"
            title += f"; {_told_apart(one.of, together, keys)}"
            if not one.equal:
                title += f"; drawn for run {one.of[0][0]}, from which the others differ by less than 1 % of the scale"
            drawings.append(_drawing(path, title, one.of))
    for (experiment, model), members in together.items():
        if comparison := compared(members):
            path = folder / f"ratios-{digest([experiment, model], 12)}.png"
            draw_comparison(comparison, path, dpi, width)
            drawn = [(number, run) for number, run in members if number in comparison.runs]
            title = f"Methods compared: {comparison.title}{_in_scale(comparison.scale)}, {model}"
            drawings.append(_drawing(path, f"{title}; {_told_apart(drawn, together, keys)}", drawn))
        for tradeoff in tradeoffs(members):
            path = folder / f"{tradeoff.kind}-{digest([experiment, model, tradeoff.axis], 12)}.png"
            draw_tradeoff(tradeoff, path, dpi, width)
            drawn = [(number, run) for number, run in members if number in tradeoff.runs]
            title = f"Perplexity ({tradeoff.corpus}) against {tradeoff.axis}{_in_scale(tradeoff.scale)}, {model}"
            drawings.append(_drawing(path, f"{title}; {_told_apart(drawn, together, keys)}", drawn))
    return drawings


def _drawing(path: Path, title: str, drawn: Sequence[NumberedRun]) -> Drawing:
    experiments = dict.fromkeys(run.experiment for _, run in drawn)
    return Drawing(path, title, tuple(number for number, _ in drawn), tuple(experiments))


def _is_of(one: _Shared, run: Run, content: Any) -> bool:
    """Whether a run's figure is one that is there already: maps and curves need to be no more than alike."""
    if one.of[0][1].model != run.model:
        return False
    if one.kind in ("map", "activations", "attention"):
        return alike(one.content, content, logarithmic=one.kind != "attention")
    return bool(one.content == content)


def _in_scale(scale: str) -> str:
    return f" ({scale})" if scale else ""


def scale_of(kind: str, record: dict[str, Any]) -> str:
    """What a caption says of the scale of a figure of one run; nothing of a linear one."""
    if kind == "search":
        return "logarithmic axis" if _falls_above_zero(record["search"]) else ""
    return TITLES[kind][1]


def _falls_above_zero(search: dict[str, Any]) -> bool:
    return all(step["objective_after"] > 0 for step in search["steps"])


TITLES = {
    "map": ("Activation magnitudes by token position and channel before and after", "logarithmic colours"),
    "activations": ("Activation magnitudes before and after", "logarithmic axis"),
    "attention": ("Attention on the prefix and on the first tokens", ""),
    "sparsity": ("Share of active neurons before and after", ""),
    "spikes": ("Cosines between normalised spike tokens before and after", ""),
    "search": ("Search trajectory", ""),
    "tuning": ("Tuning loss", ""),
    "qfem": ("QFeM trade-off", "logarithmic axes"),
}
"""The figures of one run, in the order of a report: what one shows, and its scale where it always is logarithmic."""

PAPER = {
    "map": (
        "cushioncache_figure1",
        "CushionCache, Figure 1: magnitudes by token position and channel at the input of one block, before and after",
    ),
    "activations": (
        "cushioncache_figure2",
        "CushionCache, Figure 2: top-1, top-2, top-3, top 10 % and median magnitude by block, before and after",
    ),
    "attention": (
        "cushioncache_figure3",
        "CushionCache, Figure 3: share of attention by block and head, on the first tokens and on the prefix",
    ),
}
"""The experiments of the paper's figures: which kind of drawing is theirs, and how it is titled for them."""


def _title(kind: str, drawn: Sequence[NumberedRun]) -> str:
    experiment, title = PAPER.get(kind, ("", ""))
    return title if any(run.experiment == experiment for _, run in drawn) else TITLES[kind][0]


def _told_apart(
    drawn: Sequence[NumberedRun],
    together: dict[tuple[str, str], list[NumberedRun]],
    keys: dict[tuple[str, str], list[str]],
) -> str:
    """Experiments and quantizers of the runs drawn, and in what they differ from others of their experiment."""
    experiments: dict[str, list[str]] = {}
    for name in dict.fromkeys(run.experiment for _, run in drawn):
        mine = [run for _, run in drawn if run.experiment == name]
        group = (name, mine[0].model)
        beside = [run for _, run in together[group]]
        words = [_some([str(setting(run, "quantizer.name")) for run in mine], "quantizers")]
        for key in keys[group]:
            values, all_values = ([str(setting(run, key)) for run in some] for some in (mine, beside))
            if key != "quantizer.name" and set(values) != set(all_values):
                words.append(f"{key}={_some(values, 'values')}")
        seeds = [str(run.seed) for run in mine]
        if set(seeds) != {str(run.seed) for run in beside}:
            words.append(f"seed={_some(seeds, 'seeds')}")
        experiments.setdefault(", ".join(words), []).append(name)
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in experiments.items())


def _some(values: Sequence[str], what: str) -> str:
    """The different ones of some values, or their number where they are more than a caption should name."""
    different = list(dict.fromkeys(values))
    return " or ".join(different) if len(different) <= 3 else f"{len(different)} {what}"


def _figures_of(run: Run) -> Iterator[tuple[str, Any, Draw]]:
    record = run.record
    activations = record.get("activations") or {}
    if drawn := activations.get("map"):
        yield "map", drawn, activation_map
    if curves := activations.get("curves"):
        yield "activations", curves, activation_curves
    if stages := (record.get("attention") or {}).get("stages"):
        yield "attention", stages, attention_maps
    if drawn := activations.get("sparsity"):
        yield "sparsity", drawn, activation_ratios
    if drawn := activations.get("spikes"):
        yield "spikes", drawn, spike_cosines
    if steps := (record.get("search") or {}).get("steps"):
        keys = ("step", "objective_before", "objective_after", "accepted", "token", "token_id")
        drawn = [[step.get(key) for key in keys] for step in steps]
        yield "search", [record["search"].get("objective"), drawn], search_trajectory
    if steps := (record.get("tuning") or {}).get("steps"):
        drawn = [[step.get(key) for key in ("step", "loss", "held_out_loss")] for step in steps]
        yield "tuning", [[record["tuning"].get(key) for key in ("initial_loss", "best_step")], drawn], tuning_loss
    if searches := alpha_searches(record):
        yield "qfem", searches, qfem_tradeoff


def search_trajectory(result: dict[str, Any], path: Path, dpi: int = DPI, width: str | None = None) -> None:
    """The objective of each greedy step without and with its best candidate; a rejected step is marked."""
    search = result["search"]
    figure, axis = pyplot.subplots(figsize=inches(width, (4.6, 3.0)))
    for step in search["steps"]:
        colour = "#2166ac" if step["accepted"] else "#b2182b"
        places, heights = [step["step"], step["step"] + 1], [step["objective_before"], step["objective_after"]]
        axis.plot(places, heights, "o-", color=colour, linewidth=1.4, markersize=4)
        verdict = "" if step["accepted"] else " (rejected)"
        name = repr(step.get("token", step["token_id"])).replace("$", r"\$") + verdict  # no formula begins in a token
        falls = heights[1] < heights[0]  # the line then comes from above, and the name stands below it
        at, side = (-5, -4 if falls else 4), "top" if falls else "bottom"
        axis.annotate(
            name, (places[1], heights[1]), textcoords="offset points", xytext=at, ha="right", va=side, fontsize=7
        )
    is_log = _falls_above_zero(search)
    if is_log:
        axis.set_yscale("log")
    axis.set_xticks(range(len(search["steps"]) + 1))
    axis.set_xlabel("tokens in the prefix beyond its start")
    axis.set_ylabel(str(search.get("objective", "objective")).replace("_", " ") + (" (log)" if is_log else ""))
    axis.margins(y=0.2)
    _finish(figure, axis, path, dpi, width)


def tuning_loss(result: dict[str, Any], path: Path, dpi: int = DPI, width: str | None = None) -> None:
    """Loss of every tuning step, and the held-out loss where it was measured; the step that was kept is marked."""
    tuning = result["tuning"]
    figure, axis = pyplot.subplots(figsize=inches(width, (4.6, 3.0)))
    steps = [step["step"] + 1 for step in tuning["steps"]]
    axis.plot(steps, [step["loss"] for step in tuning["steps"]], color="#92c5de", linewidth=1.0, label="batch")
    held_out = [
        (step["step"] + 1, step["held_out_loss"]) for step in tuning["steps"] if step.get("held_out_loss") is not None
    ]
    if tuning.get("initial_loss") is not None:
        held_out.insert(0, (0, tuning["initial_loss"]))
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="#2166ac", linewidth=1.4, markersize=3, label="held out")
    if tuning.get("best_step") is not None:
        axis.axvline(tuning["best_step"], color="#b2182b", linestyle=":", linewidth=1.0, label="kept")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=8)
    _finish(figure, axis, path, dpi, width)


def _finish(figure: Figure, axis: Axes, path: Path, dpi: int, width: str | None) -> None:
    tidy(axis)
    set_text(figure, width)
    figure.tight_layout()
    save(figure, path, dpi, width)
