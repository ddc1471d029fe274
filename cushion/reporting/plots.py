"""The figures of a report, drawn from result.json: what several runs share is drawn once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cushion.hashing import digest
from cushion.reporting.collect import Run
from cushion.reporting.figures import activation_curves, alpha_searches, attention_maps, qfem_tradeoff, save, tidy

DPI = 110
"""Sharp on a phone, and small enough for a page that carries every figure inside."""


@dataclass(frozen=True)
class Drawing:
    """A PNG file, what it shows, and the numbers (from 1, as in the table of runs) of the runs that it stands for."""

    path: Path
    title: str
    runs: tuple[int, ...]


def draw_all(runs: Sequence[Run], folder: Path) -> list[Drawing]:
    """Draw every figure that the runs have numbers for into `folder`; equal ones once."""
    shared: dict[str, tuple[str, Run, Callable[[dict[str, Any], Path], object], list[int]]] = {}
    for number, run in enumerate(runs, start=1):
        for kind, content, draw in _figures_of(run):
            key = f"{kind}-{digest([run.model, content], 12)}"
            shared.setdefault(key, (kind, run, draw, []))[3].append(number)
    drawings = []
    folder.mkdir(parents=True, exist_ok=True)
    for kind in TITLES:
        for key, (of_kind, run, draw, numbers) in shared.items():
            if of_kind == kind:
                path = folder / f"{key}.png"
                draw(run.record, path)
                drawings.append(Drawing(path, f"{TITLES[kind]}, {run.model}", tuple(numbers)))
    return drawings


TITLES = {
    "activations": "Activation magnitudes before and after",
    "attention": "Attention on the prefix and on the first tokens",
    "search": "Search trajectory",
    "tuning": "Tuning loss",
    "qfem": "QFeM trade-off",
}


def _figures_of(run: Run) -> Iterator[tuple[str, Any, Callable[[dict[str, Any], Path], object]]]:
    record = run.record
    if curves := (record.get("activations") or {}).get("curves"):
        yield "activations", curves, partial(activation_curves, dpi=DPI)
    if stages := (record.get("attention") or {}).get("stages"):
        yield "attention", stages, partial(attention_maps, dpi=DPI)
    if steps := (record.get("search") or {}).get("steps"):
        yield "search", [(s["objective_before"], s["objective_after"], s["accepted"]) for s in steps], search_trajectory
    if steps := (record.get("tuning") or {}).get("steps"):
        yield "tuning", [step["loss"] for step in steps], tuning_loss
    if searches := alpha_searches(record):
        yield "qfem", searches, partial(qfem_tradeoff, dpi=DPI)


def search_trajectory(result: dict[str, Any], path: Path) -> None:
    """The objective of each greedy step without and with its best candidate; a rejected step is marked."""
    search = result["search"]
    figure, axis = pyplot.subplots(figsize=(4.6, 3.0))
    for step in search["steps"]:
        colour = "#2166ac" if step["accepted"] else "#b2182b"
        places, heights = [step["step"], step["step"] + 1], [step["objective_before"], step["objective_after"]]
        axis.plot(places, heights, "o-", color=colour, linewidth=1.4, markersize=4)
        verdict = "" if step["accepted"] else " (rejected)"
        name = repr(step.get("token", step["token_id"])).replace("$", r"\$") + verdict  # no formula begins in a token
        axis.annotate(name, (places[1], heights[1]), textcoords="offset points", xytext=(-6, 6), ha="right", fontsize=7)
    if all(step["objective_after"] > 0 for step in search["steps"]):
        axis.set_yscale("log")
    axis.set_xticks(range(len(search["steps"]) + 1))
    axis.set_xlabel("tokens in the prefix beyond its start")
    axis.set_ylabel(str(search.get("objective", "objective")).replace("_", " "))
    axis.margins(y=0.2)
    _finish(figure, axis, path)


def tuning_loss(result: dict[str, Any], path: Path) -> None:
    """Loss of every tuning step, and the held-out loss where it was measured; the step that was kept is marked."""
    tuning = result["tuning"]
    figure, axis = pyplot.subplots(figsize=(4.6, 3.0))
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
    _finish(figure, axis, path)


def _finish(figure: Figure, axis: Axes, path: Path) -> None:
    tidy(axis)
    figure.tight_layout()
    save(figure, path, DPI)
