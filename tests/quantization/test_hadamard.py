"""Hadamard matrices: orthogonal at every size, with entries of one magnitude wherever a construction is known."""

from __future__ import annotations

import pytest
import torch

from cushion.quantization.hadamard import hadamard, randomized_hadamard

MODEL_SIZES = {32: 32, 576: 576, 768: 768, 896: 896, 2304: 2304, 2560: 2560}
"""Hidden sizes of real models, all of which have a Hadamard matrix (SmolLM2 576 = 16 x 36, OPT-125m 768, ...)."""


def test_entries_are_ones_and_rows_are_orthogonal() -> None:
    for size in (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 60, 72, 576, 768, 1536, 284):
        matrix = hadamard(size)
        assert matrix is not None and matrix.shape == (size, size), size
        assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64)), size
        assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64)), size


def test_sizes_without_a_construction_are_told() -> None:
    sizes = [3, 5, 6, 7, 9, 10, 14, 18, 30, 52, 92, 172]
    assert [size for size in sizes if hadamard(size) is not None] == []


def test_the_rotation_is_orthogonal_for_every_size() -> None:
    for size in (*range(1, 41), 52, 92, 172, 344, *MODEL_SIZES):
        matrix = randomized_hadamard(size, seed=3)
        assert matrix.shape == (size, size)
        probes = torch.eye(size, dtype=torch.float64)
        if size > 1000:  # the identity leaves random vectors alone; whole products take a second each
            probes = torch.randn(size, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        assert (matrix @ (matrix.T @ probes) - probes).abs().max() <= 1e-12, size


@pytest.mark.parametrize("size", [12, 576, 2304])
def test_a_single_channel_is_spread_evenly_over_all(size: int) -> None:
    planted = torch.zeros(size, dtype=torch.float64)
    planted[size // 2] = 1000
    spread = (planted @ randomized_hadamard(size)).abs()
    torch.testing.assert_close(spread, torch.full_like(spread, 1000 / size**0.5))


def test_without_a_construction_the_channel_is_spread_over_more_than_the_power_of_two() -> None:
    planted = torch.zeros(8 * 43, dtype=torch.float64)
    planted[5] = 1000
    spread = (planted @ randomized_hadamard(8 * 43)).abs()
    assert (spread > 1e-3).all()
    assert spread.max() < 1000 / 8**0.5


@pytest.mark.parametrize("size", [36, 43 * 4])
def test_the_seed_decides_and_nothing_else(size: int) -> None:
    first = randomized_hadamard(size, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, randomized_hadamard(size, seed=1))
    assert not torch.equal(first, randomized_hadamard(size, seed=2))
