"""Whether two figures would look the same: of those that would, a report draws one."""

from __future__ import annotations

from typing import Any

import numpy

TOLERANCE = 0.01
"""Of the span of a figure's scale: about two pixels of a panel."""


def alike(first: Any, second: Any, logarithmic: bool) -> bool:
    """Whether what two figures show differs nowhere by more than `TOLERANCE` of their scale.

    Args:
        first: plain JSON. Its floating-point numbers are what is drawn; all else (stages, channels, positions) must be
            the same in both.
        second: likewise.
        logarithmic: whether the scale is; numbers that are not above zero count as the smallest that is.

    """
    drawn: tuple[list[float], list[float]] = ([], [])
    if _frame(first, drawn[0]) != _frame(second, drawn[1]):
        return False
    if not drawn[0]:
        return True
    values = numpy.array(drawn)
    if logarithmic:
        positive = values[values > 0]
        if not positive.size:
            return True
        values = numpy.log(numpy.maximum(values, positive.min()))
    return bool(abs(values[0] - values[1]).max() <= TOLERANCE * (values.max() - values.min()))


def _frame(value: Any, numbers: list[float]) -> Any:
    """What is left of plain JSON without its floating-point numbers, which are put into a list in order."""
    if isinstance(value, dict):
        return {key: _frame(value[key], numbers) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_frame(item, numbers) for item in value]
    if isinstance(value, float):
        numbers.append(value)
        return float
    return value
