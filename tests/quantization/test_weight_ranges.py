"""Ranges of weights by their squared error: against brute force, at every granularity."""

from __future__ import annotations

import pytest
import torch
from helpers import random_values
from torch import Tensor

from cushion.quantization import weight_ranges
from cushion.quantization.numerics import Grid, dynamic_range, fake_quantize
from cushion.quantization.weight_ranges import mse_ranges

GRANULARITIES = {"per_tensor": ((24, 64), (0, 1)), "per_channel": ((24, 64), (1,)), "per_group": ((24, 4, 16), (2,))}


def planted(shape: tuple[int, ...]) -> Tensor:
    weight = random_values(*shape)
    weight[0] *= 6
    weight[3].view(-1)[5] = 25
    return weight


def errors(weight: Tensor, dims: tuple[int, ...], grid: Grid, low: Tensor, high: Tensor) -> Tensor:
    scale, offset = grid.parameters(low, high)
    return (fake_quantize(weight, scale, offset, grid) - weight).square().sum(dims, keepdim=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("grid", [Grid(8, True), Grid(4, True), Grid(4, True, "paper"), Grid(4, False)])
def test_no_range_is_worse_than_min_max_and_all_are_close_to_brute_force(granularity: str, grid: Grid) -> None:
    shape, dims = GRANULARITIES[granularity]
    weight = planted(shape)
    low, high = dynamic_range(weight, dims)
    found = mse_ranges(weight, dims, grid)
    assert all(end.shape == low.shape and end.dtype == torch.float32 for end in found)
    error = errors(weight, dims, grid, *found)
    assert (error <= errors(weight, dims, grid, low, high)).all()
    brute = torch.stack([errors(weight, dims, grid, low * f, high * f) for f in torch.linspace(0.2, 1, 60)]).amin(0)
    assert (error.sum() <= 1.05 * brute.sum()).item()


def test_weights_in_chunks_give_what_they_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, dims in GRANULARITIES.values():
        weight = planted(shape)
        whole = mse_ranges(weight, dims, Grid(4, True))
        monkeypatch.setattr(weight_ranges, "_CHUNK", 100)
        for one, other in zip(mse_ranges(weight, dims, Grid(4, True)), whole, strict=True):
            torch.testing.assert_close(one, other)
        monkeypatch.undo()


def test_equal_weights_keep_their_range() -> None:
    for value in (0.0, 0.5, -0.5):
        weight = torch.full((4, 8), value)
        for grid in (Grid(4, True), Grid(4, False)):
            low, high = mse_ranges(weight, (1,), grid)
            scale, offset = grid.parameters(low, high)
            torch.testing.assert_close(fake_quantize(weight, scale, offset, grid), weight)


def test_half_precision_is_searched_in_float32_and_not_changed() -> None:
    weight = planted((24, 64)).bfloat16()
    before = weight.clone()
    found, expected = (mse_ranges(one, (1,), Grid(4, True)) for one in (weight, weight.float()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(weight, before)
