"""Minimum and maximum of all inputs seen: the range that min-max takes where channels were mixed after calibration."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from cushion.quantization.statistics.ranges import RangeStatistic


class Extremes(RangeStatistic):
    """Minimum and maximum over all texts."""

    @staticmethod
    def reduced(values: Tensor) -> Tensor:
        """Minimum and maximum of a text, (2,) float32."""
        return torch.stack(torch.aminmax(values.detach())).float().cpu()

    def add(self, text: Tensor) -> None:
        """Widen the range by a text's."""
        if self._range is None:
            self._range = text
        else:  # neither minimum nor maximum loses what is not a number
            low, high = torch.minimum(self._range[0], text[0]), torch.maximum(self._range[1], text[1])
            self._range = torch.stack([low, high])

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum, float32."""
        assert self._range is not None, "nothing was added"
        return self._range[0], self._range[1]

    def tensors(self) -> dict[str, Tensor]:
        """The range, empty before the first text."""
        return {"range": self._saved(torch.float32)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """The extremes that were saved."""
        new = cls()
        new._restore(tensors["range"])
        return new
