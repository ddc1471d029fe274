"""What a statistic of the linears' inputs is: of one linear, or of all of them at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


class Statistic(ABC):
    """What is kept of the inputs of one linear, text by text; memory does not grow with the amount of text."""

    @abstractmethod
    def update(self, values: Tensor) -> None:
        """Add one text's input, (tokens, channels)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What to keep of it."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """The statistic that `tensors` described."""


class InputObserver(ABC):
    """What is gathered of the inputs of all linears at once; it is fed texts one by one."""

    @abstractmethod
    def __call__(self, name: str, values: Tensor) -> None:
        """Add the input of the linear `name`, (1, tokens, channels) or (tokens, channels)."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Keep what was gathered, in files of this folder.

        Raises:
            CalibrationError: an activation is not finite.

        """

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, device: torch.device) -> Any:
        """What `write` kept."""
