"""Gram matrices of what the linears of a block read: one collector for GPTQ, clipping and low-rank compensation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from cushion.float64 import in_float64

Key = TypeVar("Key", bound=Hashable)


def whole(values: Tensor) -> Tensor:
    """`X^T X` of a text, (..., in_features): (in_features, in_features), float64."""
    inputs = in_float64(values.flatten(0, -2))
    return inputs.T @ inputs


def within_groups(values: Tensor, size: int) -> Tensor:
    """`X^T X` within every group of `size` channels of a text, (..., in_features): (groups, size, size), float32."""
    groups = values.flatten(0, -2).float().unflatten(1, (-1, size)).transpose(0, 1)
    return torch.bmm(groups.transpose(1, 2), groups)


def gram_matrices(
    inputs: Iterable[tuple[Key, Tensor]], of_text: Callable[[Tensor], Tensor] = whole
) -> dict[Key, Tensor]:
    """The sum over all texts, by who reads: the names of linears, as `Turn.shared_inputs` yields them with the inputs.

    Args:
        inputs: text by text; who reads nothing of a text, such as an expert, is not in it.
        of_text: the matrix, or matrices, of one text.

    """
    sums: dict[Key, Tensor] = {}
    for readers, values in inputs:
        found = of_text(values)
        sums[readers] = sums[readers].add_(found) if readers in sums else found
    return sums
