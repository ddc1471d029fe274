"""What a statistic of a linear's input is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor


class Statistic(ABC):
    """What is kept of the inputs of one linear, text by text; its memory does not grow with the amount of text.

    The work on a text is apart from what it is added to, so that linears which read the very same tensor share it.
    What is kept is on the CPU, wherever the model is.
    """

    @staticmethod
    @abstractmethod
    def reduced(values: Tensor) -> Any:
        """What one text adds: of its input, any shape and floating dtype, at least one value."""

    @abstractmethod
    def add(self, text: Any) -> None:
        """Add what `reduced` gave."""

    def update(self, values: Tensor) -> None:
        """Add one text's input, shape (tokens, channels); a linear that no token reached (an expert) adds nothing."""
        if values.numel():
            self.add(self.reduced(values))

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no value was added, so that no range follows."""

    @property
    @abstractmethod
    def is_finite(self) -> bool:
        """Whether all values were finite; where one was not, nothing that follows means anything."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What to save."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """The statistic that was saved, ready for more."""
