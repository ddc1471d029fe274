"""Double precision where a device has it, and on the CPU where it has none, as GPUs of Apple (MPS)."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT = frozenset({"mps"})
"""The kinds of devices without float64."""


def place_of_float64(device: torch.device) -> torch.device:
    """Where float64 is computed for tensors of a device: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT else device


def in_float64(values: Tensor) -> Tensor:
    """`values` in float64, on their device or the CPU."""
    return values.to(place_of_float64(values.device)).double()
