"""A streaming histogram of signed values, as fine for small values as for outliers, and exact under any order of texts.

A bin is what float32 numbers have in common that agree in sign, exponent and the first bits of the mantissa: every
octave (from a power of two to the next) has `BINS` bins of equal width. Bins of one width for the whole range, as in
most calibrators, would put all of a linear's ordinary values into two or three of them where an outlier is a thousand
times as large. The bin of a value depends on nothing but the value, so no range has to be guessed from the first text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cushion.quantization.statistics.base import Statistic

BINS = 256
"""Bins of an octave: a bin is at most 1 / 256 of its values wide."""
OCTAVES = 20
"""Octaves kept below the largest magnitude, and with it: what is smaller by 2^19 or more counts as next to zero."""

_EXPONENTS = 256  # of a float32
_SHIFT = 23 - int(math.log2(BINS))  # bits of the mantissa that a bin does not see


@dataclass(frozen=True)
class Bins:
    """The bins that hold values, ascending.

    Args:
        low, high: edges, float64; none lies outside of the values seen, and no bin has zero in its inside.
        counts: float64.

    """

    low: Tensor
    high: Tensor
    counts: Tensor

    @property
    def middle(self) -> Tensor:
        """The middle of each bin."""
        return (self.low + self.high) / 2


class Histogram(Statistic):
    """Counts of values by bin, and the exact minimum, maximum and count.

    When a text brings a larger magnitude, the octaves kept move up with it, and the counts below them join those next
    to zero: bins are merged, never divided. The outcome does not depend on the order of the texts, nor on how values
    are split among them.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(2, OCTAVES, BINS, dtype=torch.int64)
        """By sign (positive, negative), octave and bin, ascending in magnitude."""
        self._small = torch.zeros(2, dtype=torch.int64)
        """By sign, how many values lie below these octaves."""
        self._top = OCTAVES - 1
        """The exponent, as float32 stores it, of the last octave."""
        self.minimum, self.maximum = math.inf, -math.inf

    @staticmethod
    def reduced(values: Tensor) -> tuple[Tensor, float, float]:
        """Counts by sign, exponent and bin, minimum and maximum."""
        flat = values.detach().float().flatten()
        low, high = torch.aminmax(flat)
        codes = (flat.view(torch.int32) >> _SHIFT).bitwise_and_(2 * _EXPONENTS * BINS - 1)
        counts = torch.bincount(codes, minlength=2 * _EXPONENTS * BINS)
        return counts.cpu().view(2, _EXPONENTS, BINS), float(low), float(high)

    def add(self, text: tuple[Tensor, float, float]) -> None:
        """Add a text's counts, and widen the extremes."""
        counts, low, high = text
        if math.isnan(low) or math.isnan(high):
            self.minimum = self.maximum = math.nan  # and stays so: every comparison with it is false
        elif not math.isnan(self.minimum):
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if self.is_finite:
            self._raise_to(_exponent(max(abs(low), abs(high))))
            lowest = self._top - OCTAVES + 1
            self._counts += counts[:, lowest : self._top + 1]
            self._small += counts[:, :lowest].sum((1, 2))

    def _raise_to(self, exponent: int) -> None:
        """Keep the octaves that end with this one, where they do not reach as far."""
        up = exponent - self._top
        if up > 0:
            self._small += self._counts[:, :up].sum((1, 2))
            kept = self._counts[:, up:]
            self._counts = torch.zeros_like(self._counts)
            self._counts[:, : kept.shape[1]] = kept
            self._top = exponent

    @property
    def count(self) -> int:
        """How many values were added, if all were finite."""
        return int(self._counts.sum() + self._small.sum())

    @property
    def is_empty(self) -> bool:
        """Whether no value was added."""
        return self.minimum == math.inf and self.maximum == -math.inf

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite."""
        return self.is_empty or (math.isfinite(self.minimum) and math.isfinite(self.maximum))

    def bins(self) -> Bins:
        """The bins that hold values."""
        first = (self._top - OCTAVES + 1) * BINS  # as float32 stores the sign-less edge, its last bits left out
        codes = torch.cat([torch.zeros(1, dtype=torch.int32), torch.arange(first, first + OCTAVES * BINS + 1)])
        edges = (codes.to(torch.int32) << _SHIFT).view(torch.float32).double()
        if not math.isfinite(edges[-1]):  # the end of the last octave that float32 has
            edges[-1] = 2.0**128
        positive, negative = torch.cat([self._small[:, None], self._counts.flatten(1)], dim=1)
        low = torch.cat([-edges[1:].flip(0), edges[:-1]])
        high = torch.cat([-edges[:-1].flip(0), edges[1:]])
        counts = torch.cat([negative.flip(0), positive])
        held = counts > 0
        low, high = (edge[held].clamp(self.minimum, self.maximum) for edge in (low, high))
        return Bins(low, high, counts[held].double())

    def tensors(self) -> dict[str, Tensor]:
        """Counts, the top octave, and the extremes."""
        return {
            "counts": self._counts,
            "small": self._small,
            "top": torch.tensor(self._top),
            "extremes": torch.tensor([self.minimum, self.maximum], dtype=torch.float64),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """The histogram that was saved."""
        new = cls()
        new._counts, new._small = tensors["counts"].cpu().clone(), tensors["small"].cpu().clone()
        new._top = int(tensors["top"])
        new.minimum, new.maximum = tensors["extremes"].tolist()
        return new


def _exponent(magnitude: float) -> int:
    """The exponent of a float32, as it is stored."""
    return int(torch.tensor(magnitude, dtype=torch.float32).view(torch.int32)) >> 23
