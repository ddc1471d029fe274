"""The ranges of cached keys and values over calibration text, by layer and head: what static scales follow from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from cushion.artifacts import read_tensors
from cushion.errors import CalibrationError
from cushion.quantization.hadamard import HadamardTransform
from cushion.quantization.statistics.observer import InputObserver

FILE_NAME = "cache_ranges.safetensors"


def keys_of(layer: int) -> str:
    """What the keys of a layer are called."""
    return f"keys of layer {layer}"


def values_of(layer: int) -> str:
    """What the values of a layer are called."""
    return f"values of layer {layer}"


class CacheRanges(InputObserver):
    """Minimum and maximum of every head's keys and values, as they enter the cache.

    A prefix is in the cache from the start, and so never among them.

    Args:
        rotated_keys: take those of keys that are rotated as they are read, as `quantizer.head_rotation` says.
        protect: how many tokens at the start of a text stay in full precision and are left out.

    """

    def __init__(self, rotated_keys: bool = False, protect: int = 0) -> None:
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self._protect = protect
        self._rotated = HadamardTransform() if rotated_keys else None

    def __call__(self, name: str, values: Tensor) -> None:
        """The inputs of linears are of no interest."""

    def watch(self, cache: DynamicCache) -> None:
        """See what is added to this cache, which holds a prefix or nothing yet."""
        update, before = cache.update, cache.get_seq_length()

        def watched(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            protected = max(0, before + self._protect - cache.get_seq_length(layer_idx))
            if protected < key_states.shape[2]:
                keys = key_states if self._rotated is None else self._rotated(key_states)
                self._widen(keys_of(layer_idx), keys[:, :, protected:])
                self._widen(values_of(layer_idx), value_states[:, :, protected:])
            return update(key_states, value_states, layer_idx, *args, **kwargs)

        setattr(cache, "update", watched)  # noqa: B010  # a method of this object alone, which lives for one text

    def _widen(self, name: str, values: Tensor) -> None:
        """Widen a range by (batch, key-value heads, tokens, head size)."""
        low, high = values.amin((0, 2, 3)).float().cpu(), values.amax((0, 2, 3)).float().cpu()
        if name in self.ranges:
            low, high = torch.minimum(low, self.ranges[name][0]), torch.maximum(high, self.ranges[name][1])
        self.ranges[name] = low, high

    def write(self, folder: Path) -> None:
        """Keep all ranges in one file.

        Raises:
            CalibrationError: a key or a value is not finite.

        """
        for name, ends in self.ranges.items():
            if not torch.stack(ends).isfinite().all():
                raise CalibrationError(
                    f"the {name} are not finite on the calibration text: use model.dtype=float32 or bfloat16"
                )
        save_file({name: torch.stack(ends) for name, ends in self.ranges.items()}, folder / FILE_NAME)

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Minimum and maximum of each head, (key-value heads,), by `keys_of` and `values_of` the layer's number."""
        tensors = read_tensors(folder / FILE_NAME, str(device), artifact=folder.parent)
        return {name: (ends[0], ends[1]) for name, ends in tensors.items()}
