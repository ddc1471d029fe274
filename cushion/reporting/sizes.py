"""How large a figure is: as it comes, or as wide as a column or page of a paper, with all text in 8 pt there."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from matplotlib import pyplot
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

WIDTHS = {"column": 3.25, "page": 6.75}
"""Inches of a column and of the text of a page with two columns (ICML); included at that width nothing is scaled."""

POINTS = 8.0
"""Size of every text of a figure for a paper."""

_PANEL = 1.75
"""Inches that a panel is high in a figure for a paper."""

_BELOW = 0.55
"""Inches for what stands below the panels."""


def inches(width: str | None, usual: tuple[float, float]) -> tuple[float, float]:
    """Width and height of a figure with one panel, of which `usual` is how it comes; a wide one is no higher for it."""
    if width is None:
        return usual
    across = WIDTHS[width]
    return across, min(usual[1], across * usual[1] / usual[0] + _BELOW)


def panels(number: int, usual: tuple[float, float], width: str | None, least: float) -> tuple[Figure, list[Any]]:
    """A figure of panels on one vertical scale, and its axes in order; nothing in it is cut off.

    Args:
        number: of panels. As the figure comes they stand side by side; in one for a paper as many as there is room for.
        usual: inches of the figure as it comes.
        width: one of `WIDTHS`, or None for the figure as it comes.
        least: inches that a panel needs across.

    """
    columns = number if width is None else max(1, min(number, int(WIDTHS[width] / least)))
    rows = -(-number // columns)
    size = usual if width is None else (WIDTHS[width], rows * _PANEL + _BELOW)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    every = list(axes.flatten())
    for axis in every[number:]:
        axis.remove()
    return figure, every[:number]


def set_label(figure: Figure, axes: list[Any], label: str, width: str | None) -> None:
    """Name the vertical scale that panels share: at the first one, or once where they may stand in several rows."""
    if width is None:
        axes[0].set_ylabel(label)
    else:
        figure.supylabel(label)


def whole_numbers(axis: Axis, width: str | None, most: int = 4) -> None:
    """Ticks at whole numbers; in a figure for a paper no more than `most` intervals."""
    axis.set_major_locator(MaxNLocator("auto" if width is None else most, integer=True))


def every_so_many(labels: int, width: str | None) -> int:
    """How many lines of a map one label stands for, so that in a figure for a paper they do not cover each other."""
    return 1 if width is None else -(-labels // 6)


def title(figure: Figure, text: str, width: str | None) -> None:
    """A title above the panels; a figure for a paper has its caption instead."""
    if width is None:
        figure.suptitle(text, fontsize=10)


def legend_columns(wanted: int, width: str | None) -> int:
    """In how many columns a legend below the panels stands, at most those wanted."""
    return wanted if width is None else max(1, min(wanted, int(WIDTHS[width] / 1.3)))


def broken(text: str, width: str | None, column: int = 24, page: int = 40) -> str:
    """Text in lines of as many characters as leave the panel its room, in a figure for a paper."""
    if width is None:
        return text
    return fill(text, column if width == "column" else page, break_long_words=False, break_on_hyphens=False)


def set_text(figure: Figure, width: str | None) -> None:
    """Write all text of a figure for a paper in its one size."""
    if width is None:
        return
    for axis in figure.axes:
        axis.tick_params(axis="both", which="both", labelsize=POINTS)
    for text in figure.findobj(Text):
        text.set_fontsize(POINTS)
