"""What is gathered of the inputs of all linears at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class InputObserver(ABC):
    """Sees the inputs of all linears, text by text, and keeps what it found in files of its own."""

    @abstractmethod
    def __call__(self, name: str, values: Tensor) -> None:
        """Add the input of the linear `name`, (1, tokens, channels) or (tokens, channels)."""

    def watch(self, cache: DynamicCache) -> None:
        """Before a text is run with this cache: see what enters it, where that is of interest."""
        return

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
