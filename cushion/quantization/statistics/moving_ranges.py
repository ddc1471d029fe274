"""Ranges of the texts' inputs, averaged as they come: the statistic of the moving average."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from cushion.quantization.statistics.ranges import RangeStatistic


class MovingRanges(RangeStatistic):
    """Minimum and maximum of a text, in a running average: `r <- r + averaging * (new - r)`, from the first text on.

    It depends on the order of the texts: with 128 of them and 0.01 the first still weighs 0.99^127 = 0.28. It lies
    inside the true range, so that outliers of rare texts are clipped.

    Args:
        averaging: the weight of a new text.

    """

    def __init__(self, averaging: float = 0.01) -> None:
        super().__init__()
        self.averaging = averaging

    @staticmethod
    def reduced(values: Tensor) -> Tensor:
        """Minimum and maximum of a text."""
        return torch.stack(torch.aminmax(values.detach())).cpu().double()

    def add(self, text: Tensor) -> None:
        """Move the range towards a text's."""
        self._range = text if self._range is None else self._range + self.averaging * (text - self._range)

    @property
    def minimum(self) -> float:
        """The running minimum."""
        return math.nan if self._range is None else float(self._range[0])

    @property
    def maximum(self) -> float:
        """The running maximum."""
        return math.nan if self._range is None else float(self._range[1])

    def tensors(self) -> dict[str, Tensor]:
        """The range, empty before the first text, and the weight of a new one."""
        averaging = torch.tensor(self.averaging, dtype=torch.float64)
        return {"range": self._saved(torch.float64), "averaging": averaging}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """The ranges that were saved."""
        new = cls(float(tensors["averaging"]))
        new._restore(tensors["range"])
        return new
