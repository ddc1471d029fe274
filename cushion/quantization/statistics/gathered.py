"""A statistic for every linear, gathered in a pass over texts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cushion.artifacts import read_tensors
from cushion.errors import input_not_finite
from cushion.quantization.statistics.base import Statistic

FILE_NAME = "statistics.safetensors"


class ByLinear(dict[str, Statistic]):
    """Statistics of the inputs of linears, by full name.

    Args:
        rotation: under which rotation of the model they were gathered, and its seed: they fit no other.

    """

    def __init__(self, rotation: tuple[str, int] = ("none", 0)) -> None:
        super().__init__()
        self.rotation = rotation


class GatheredStatistics:
    """An observer (`cushion.activations.observe_inputs`) that keeps one statistic by linear.

    Linears that read the very same tensor one after the other (query, key and value; gate and up) share the work on it.

    Args:
        new: makes an empty statistic.

    """

    def __init__(self, new: Callable[[], Statistic]) -> None:
        self._new = new
        self.by_linear = ByLinear()
        self._last: tuple[weakref.ref[Tensor], int, Any] | None = None

    def __call__(self, name: str, values: Tensor) -> None:
        """Add the input of the linear `name`, shape (..., channels)."""
        statistic = self.by_linear.setdefault(name, self._new())
        if not values.numel():
            return
        source, version, text = self._last or (None, -1, None)
        if source is None or source() is not values or version != values._version:
            text = statistic.reduced(values)
            self._last = weakref.ref(values), values._version, text
        statistic.add(text)

    def check(self) -> None:
        """Refuse values that are not finite.

        Raises:
            CalibrationError: naming the first linear whose input had one.

        """
        for name, statistic in self.by_linear.items():
            if not statistic.is_finite:
                raise input_not_finite(name)

    def write(self, folder: Path) -> None:
        """Keep all of them in one file of this folder.

        Raises:
            CalibrationError: an activation is not finite.

        """
        self.check()
        tensors = {
            f"{key} {name}": value.clone().contiguous()  # linears that read one tensor may share it
            for name, statistic in self.by_linear.items()
            if not statistic.is_empty
            for key, value in statistic.tensors().items()
        }
        save_file(tensors, folder / FILE_NAME)


def read_statistics(kind: type[Statistic], folder: Path, rotation: tuple[str, int] = ("none", 0)) -> ByLinear:
    """What `GatheredStatistics.write` kept, of a model under this rotation; a linear that no token reached has none."""
    tensors = read_tensors(folder / FILE_NAME, artifact=folder.parent)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        own, _, name = key.partition(" ")
        parts.setdefault(name, {})[own] = value
    found = ByLinear(rotation)
    found.update({name: kind.of(own) for name, own in parts.items()})
    return found
