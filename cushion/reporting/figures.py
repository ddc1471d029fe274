"""Figures from result.json, as PNG files fit for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

_LINES = (
    ("top1", "top-1", "#b2182b", "-"),
    ("top2", "top-2", "#ef8a62", "--"),
    ("top3", "top-3", "#fdae61", "-."),
    ("top10_percent", "top 10 %", "#4393c3", "-"),
    ("median", "median", "#2166ac", ":"),
)


def figures_of(folder: Path) -> dict[str, Path]:
    """The figures of the run in `folder`, by name: where they are or will be."""
    return {"activation_curves": folder / "figures" / "activation_curves.png"}


def draw_figures(result: dict[str, Any], folder: Path) -> None:
    """Draw every figure of a run that is not there yet."""
    path = figures_of(folder)["activation_curves"]
    if not path.is_file():
        activation_curves(result, path)


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
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(_LINES), frameon=False, fontsize=8)
    figure.suptitle(f"Activation magnitudes, {result['model']['label']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=dpi, format="png")
    temporary.replace(path)  # a reader never finds half a figure
    pyplot.close(figure)
    return path


def _panel(axis: Axes, curve: dict[str, list[float]], title: str) -> None:
    layers = range(len(curve["top1"]))
    for key, label, colour, style in _LINES:
        axis.plot(layers, curve[key], style, color=colour, label=label, linewidth=1.4)
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_title(title, fontsize=9)
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
