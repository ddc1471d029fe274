"""What the tests of figures share: whether all of a figure is inside of it, and for a paper in its one size of text."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.text import Text

from cushion.reporting.sizes import WIDTHS


def assert_nothing_is_cut_off(figure: Figure, width: str | None) -> None:
    """Lays the figure out, and compares what is drawn with its edges."""
    figure.draw_without_rendering()
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert whole.xmin <= drawn.xmin and drawn.xmax <= whole.xmax
    assert whole.ymin <= drawn.ymin and drawn.ymax <= whole.ymax
    sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text() and text.get_visible()}
    if width is not None:
        assert (whole.width, sizes) == (WIDTHS[width], {8.0})
