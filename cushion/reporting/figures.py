"""Figures from result.json, as PNG files fit for a paper."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from filelock import FileLock

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from cushion.schema import NO_PREFIX

_LINES = (
    ("top1", "top-1", "#b2182b", "-"),
    ("top2", "top-2", "#ef8a62", "--"),
    ("top3", "top-3", "#fdae61", "-."),
    ("top10_percent", "top 10 %", "#4393c3", "-"),
    ("median", "median", "#2166ac", ":"),
)


def figures_of(result: dict[str, Any], folder: Path) -> dict[str, Path]:
    """The figures of the run in `folder`, by name: where they are or will be.

    The map is drawn where the result has one (older ones do not), attention where it was measured, QFeM's trade-off
    where its alpha was searched.
    """
    names = ["activation_curves"]
    names += ["activation_map"] if result["activations"].get("map") else []
    names += ["attention_maps"] if result.get("attention") else []
    names += ["qfem_tradeoff"] if alpha_searches(result) else []
    return {name: folder / "figures" / f"{name}.png" for name in names}


def draw_figures(result: dict[str, Any], folder: Path) -> None:
    """Draw every figure of a run that is not there yet; two processes that ask at once draw it once."""
    figures = figures_of(result, folder)
    if all(path.is_file() for path in figures.values()):
        return
    with FileLock(folder / ".figures.lock"):
        for name, path in figures.items():
            if not path.is_file():
                FIGURES[name](result, path)


def activation_curves(result: dict[str, Any], path: Path, dpi: int = 200) -> Path:
    """Magnitude at each block's input over the layers, one panel per prefix (CushionCache, Figure 2).

    Args:
        result: the content of result.json.
        path: the PNG file to write.
        dpi: dots per inch.

    Returns:
        `path`.

    """
    curves: dict[str, dict[str, list[float]]] = result["activations"]["curves"]
    titles = result["activations"]["titles"]
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.1), sharey=True, squeeze=False)
    for axis, (stage, curve) in zip(axes[0], curves.items(), strict=True):
        _panel(axis, curve, titles[stage])
    axes[0][0].set_ylabel("magnitude at block input")
    _describe(figure, axes[0], f"Activation magnitudes, {result['model']['label']}")
    return save(figure, path, dpi)


def activation_map(result: dict[str, Any], path: Path, dpi: int = 200) -> Path:
    """Magnitudes over token positions and channels at one block's input, one panel per prefix (Figure 1).

    All panels share one logarithmic colour scale; a magnitude of zero is blank.

    Args:
        result: the content of result.json, of a run that has a map.
        path: the PNG file to write.

    Returns:
        `path`.

    """
    drawn, titles = result["activations"]["map"], result["activations"]["titles"]
    stages: dict[str, list[list[float]]] = drawn["values"]
    there = [value for rows in stages.values() for row in rows for value in row if value > 0]
    scale = LogNorm(min(there), max(there)) if there else LogNorm(0.1, 1.0)
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(3.0 * len(stages) + 0.8, 3.3), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (stage, rows) in zip(axes[0], stages.items(), strict=True):
        by_channel = numpy.ma.masked_less_equal(numpy.asarray(rows).T, 0)
        image = axis.imshow(by_channel, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(titles[stage], fontsize=9)
        axis.set_xlabel("token position")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_yticks(range(len(drawn["channels"])), [str(channel) for channel in drawn["channels"]], fontsize=7)
    axes[0][0].set_ylabel("channel")
    figure.colorbar(image, ax=list(axes[0]), label="|X|")
    tokens = "first token" if drawn["positions"] == 1 else f"first {drawn['positions']} tokens"
    where = f"Activations at the input of block {drawn['block']}, {result['model']['label']}"
    figure.suptitle(f"{where}\none text, {tokens}", fontsize=10)
    return save(figure, path, dpi)


def qfem_tradeoff(result: dict[str, Any], path: Path, dpi: int = 200) -> Path:
    """QFeM's trade-off: linears in full precision against perplexity on calibration text, one panel per prefix.

    Args:
        result: the content of result.json, of a run that searched alpha.
        path: the PNG file to write.

    Returns:
        `path`.

    """
    searches, titles = alpha_searches(result), result["activations"]["titles"]
    figure, axes = pyplot.subplots(1, len(searches), figsize=(3.6 * len(searches), 3.1), sharey=True, squeeze=False)
    for axis, (stage, search) in zip(axes[0], searches.items(), strict=True):
        points = [point for point in search["points"] if point["perplexity"] is not None]
        kept, values = [point["kept_modules"] for point in points], [point["perplexity"] for point in points]
        axis.plot(kept, values, "o-", color="#2166ac", label="evaluated", linewidth=1.4, markersize=3.5)
        found = search["points"][search["found"]]
        if found["perplexity"] is not None:
            chosen = {"color": "#b2182b", "label": "chosen", "markersize": 11, "clip_on": False, "zorder": 3}
            axis.plot([found["kept_modules"]], [found["perplexity"]], "*", **chosen)
        reference = search["reference_perplexity"]
        axis.axhline(reference, color="0.4", linestyle=":", linewidth=1.2, label="per-token scales")
        axis.axhline(search["target"] * reference, color="0.4", linestyle="--", linewidth=1.2, label="target")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-0.15, 1.3 * max(kept, default=1))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_yscale("log")
        axis.set_xlabel("linears in full precision")
        axis.set_title(titles[stage], fontsize=9)
        tidy(axis)
    axes[0][0].set_ylabel("perplexity, calibration text")
    _describe(figure, axes[0], f"QFeM, {result['model']['label']}")
    return save(figure, path, dpi)


def alpha_searches(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """QFeM's searches for alpha in a result, by stage."""
    kept = result.get("qfem") or {}
    return {stage: record["alpha_search"] for stage, record in kept.items() if record["alpha_search"]}


def _panel(axis: Axes, curve: dict[str, list[float]], title: str) -> None:
    layers = range(len(curve["top1"]))
    for key, label, colour, style in _LINES:
        axis.plot(layers, curve[key], style, color=colour, label=label, linewidth=1.4)
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_title(title, fontsize=9)
    tidy(axis)


def _describe(figure: Figure, axes: Iterable[Axes], title: str) -> None:
    """A title above the panels, and below them one legend of what is in any of them."""
    parts = [axis.get_legend_handles_labels() for axis in axes]
    labels = {label: handle for handles, names in parts for handle, label in zip(handles, names, strict=True)}
    figure.legend(list(labels.values()), list(labels), loc="lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))


def tidy(axis: Axes) -> None:
    """Thin grid lines, and no frame above and to the right."""
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def attention_maps(result: dict[str, Any], path: Path, dpi: int = 200) -> Path:
    """Share of attention per layer and head on the first tokens and on the prefix, before and after (Figure 3).

    Args:
        result: the content of result.json, of a run that measured attention.
        path: the PNG file to write.

    Returns:
        `path`.

    """
    attention = result["attention"]
    titles = result["activations"]["titles"]
    panels = [(f"{titles[stage]}:\nfirst {attention['first']} tokens", shares["first"])
              for stage, shares in attention["stages"].items()]  # fmt: skip
    panels += [(f"{titles[stage]}:\nthe prefix", shares["prefix"])
               for stage, shares in attention["stages"].items() if stage != NO_PREFIX]  # fmt: skip
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.4 * len(panels) + 0.6, 3.4), sharey=True, squeeze=False)
    for axis, (title, shares) in zip(axes[0], panels, strict=True):
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("head")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("block")
    figure.suptitle(f"Share of attention, {result['model']['label']}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    figure.colorbar(image, cax=figure.add_axes((0.945, 0.15, 0.012, 0.65)))
    return save(figure, path, dpi)


FIGURES = {
    "activation_curves": activation_curves,
    "activation_map": activation_map,
    "attention_maps": attention_maps,
    "qfem_tradeoff": qfem_tradeoff,
}
"""Every figure of a run by name, and what draws it."""


def save(figure: Figure, path: Path, dpi: int) -> Path:
    """Write a figure whole, so that a reader never finds half of one; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=dpi, format="png")
    temporary.replace(path)
    pyplot.close(figure)
    return path
