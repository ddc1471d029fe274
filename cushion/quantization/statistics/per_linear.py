"""One statistic for every linear; linears that read the very same tensor have one together."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cushion.errors import ArtifactError, CalibrationError
from cushion.quantization.statistics.base import Statistic


class PerLinear:
    """A statistic of one kind for each linear, by its name."""

    def __init__(self, kind: type[Statistic]) -> None:
        self._kind = kind
        self.found: dict[str, Statistic] = {}
        self._updates: dict[str, int] = {}
        self._alive: list[tuple[weakref.ref[Tensor], str]] = []

    def __call__(self, name: str, values: Tensor) -> None:
        """Add the input of the linear `name`, (..., channels)."""
        # a reference to a tensor that is gone never compares equal, so memory that is used again joins nothing
        self._alive = [(reader, first) for reader, first in self._alive if reader() is not None]
        first = next((other for reader, other in self._alive if reader() is values), None)
        if name not in self.found:
            joins = first is not None and self._updates[first] == 1
            self.found[name] = self.found[first] if joins and first is not None else self._kind()
            self._updates[name] = 0
        self._updates[name] += 1
        if first is not None and self.found[first] is self.found[name]:
            return
        if not torch.isfinite(values).all():
            raise CalibrationError(
                f"the input of {name} is not finite on the calibration text: use model.dtype=float32 or bfloat16"
            )
        self.found[name].update(values.detach().flatten(0, -2))
        self._alive.append((weakref.ref(values), name))

    def write(self, folder: Path) -> None:
        """Keep them all in one file, those that linears have in common once."""
        numbers: dict[int, int] = {}
        tensors: dict[str, Tensor] = {}
        for name, statistic in self.found.items():
            number = numbers.setdefault(id(statistic), len(numbers))
            tensors[f"linear {name}"] = torch.tensor(number)
            tensors |= {f"{number} {key}": value.contiguous().cpu() for key, value in statistic.tensors().items()}
        save_file(tensors, folder / f"{self._kind.__name__}.safetensors")


def read_per_linear(kind: type[Statistic], folder: Path, device: torch.device) -> dict[str, Statistic]:
    """What `PerLinear.write` kept: the statistic of every linear."""
    path = folder / f"{kind.__name__}.safetensors"
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete the folder {folder} and run again") from error
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(" ")
        if number != "linear":
            own.setdefault(number, {})[key] = tensor
    made = {number: kind.of(parts) for number, parts in own.items()}
    return {
        name.removeprefix("linear "): made[str(int(number))]
        for name, number in tensors.items()
        if name.startswith("linear ")
    }
