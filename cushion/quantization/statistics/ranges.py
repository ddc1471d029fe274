"""What statistics that keep one range have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.quantization.statistics.base import Statistic


class RangeStatistic(Statistic):
    """A statistic that is a minimum and a maximum, (2,); none before the first text."""

    def __init__(self) -> None:
        self._range: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no text was added."""
        return self._range is None

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite: a range that once was not stays so."""
        return self._range is None or bool(torch.isfinite(self._range).all())

    def _saved(self, dtype: torch.dtype) -> Tensor:
        """The range to save, empty before the first text."""
        return torch.zeros(0, dtype=dtype) if self._range is None else self._range

    def _restore(self, saved: Tensor) -> None:
        """Take the range over that `_saved` gave."""
        self._range = saved.cpu() if len(saved) else None
