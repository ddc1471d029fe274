"""Figures from result.json, as PNG files fit for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_LINES = (
    ("top1", "top-1", "#b2182b", "-"),
    ("top2", "top-2", "#ef8a62", "--"),
    ("top3", "top-3", "#fdae61", "-."),
    ("top10_percent", "top 10 %", "#4393c3", "-"),
    ("median", "median", "#2166ac", ":"),
)


def figures_of(folder: Path) -> dict[str, Path]:
    """The figures of the run in `folder`, by name: where they are or will be."""
    return {name: folder / "figures" / f"{name}.png" for name in FIGURES}


def draw_figures(result: dict[str, Any], folder: Path) -> None:
    """Draw every figure of a run that is not there yet."""
    for name, path in figures_of(folder).items():
        if not path.is_file():
            FIGURES[name](result, path)


def activation_curves(result: dict[str, Any], path: Path) -> Path:
    """Magnitude at each block's input over the layers, one panel per prefix (CushionCache, Figure 2).

    Args:
        result: the content of result.json.
        path: the PNG file to write.

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
    return _save(figure, path)


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


def attention_maps(result: dict[str, Any], path: Path) -> Path | None:
    """Share of attention per layer and head on the first tokens and on the prefix, before and after (Figure 3).

    Returns:
        `path`, or None where the result has no attention and nothing is drawn.

    """
    attention = result["attention"]
    if attention is None:
        return None
    titles = result["activations"]["titles"]
    panels = [(f"{titles[stage]}:\nfirst {attention['first']} tokens", shares["first"])
              for stage, shares in attention["stages"].items()]  # fmt: skip
    panels += [(f"{titles[stage]}:\nthe prefix", shares["prefix"])
               for stage, shares in attention["stages"].items() if stage != "none"]  # fmt: skip
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.4 * len(panels) + 0.6, 3.4), sharey=True, squeeze=False)
    for axis, (title, shares) in zip(axes[0], panels, strict=True):
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("head")
    axes[0][0].set_ylabel("block")
    figure.suptitle(f"Share of attention, {result['model']['label']}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    figure.colorbar(image, cax=figure.add_axes((0.945, 0.15, 0.012, 0.65)))
    return _save(figure, path)


FIGURES = {"activation_curves": activation_curves, "attention_maps": attention_maps}
"""Every figure of a run by name, and what draws it."""


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure whole, so that a reader never finds half of one; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=200, format="png")
    temporary.replace(path)
    pyplot.close(figure)
    return path
