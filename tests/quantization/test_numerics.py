"""The grid: against torch's own quantizers, against its definition, and its properties at every number of bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import random_values
from torch import Tensor

from cushion.quantization.numerics import Grid, dynamic_range, fake_quantize, quantize_weight

ALL_BITS = tuple(range(2, 9))
GRIDS = [
    Grid(bits, symmetric, levels) for bits in ALL_BITS for symmetric in (True, False) for levels in ("full", "paper")
]
"""Every grid with a real offset. A test goes over all of them and names the one at which it fails."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random_values(*shape, seed=seed) * 3


def quantize_to_range(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The values quantized with the range that they span themselves, with its scale and offset."""
    scale, offset = grid.parameters(values.min(), values.max())
    return fake_quantize(values, scale, offset, grid), scale, offset


def away_from_ties(positions: Tensor) -> Tensor:
    """Where `positions`, in units of the scale, are not so close to a half that x / s and x * (1 / s) may part."""
    keep = ((positions - positions.floor()) - 0.5).abs() > 1e-3
    assert keep.float().mean() > 0.98, "the comparison would leave out too much"
    return keep


# Against torch's own quantizers. Theirs has an integer zero point and rounds x / s before adding it; ours has the real
# offset z and rounds (x - z) / s. They coincide when z is a multiple of s, but for ties: shifting a tie by an odd
# number changes which neighbour is even.


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_per_tensor_agrees_with_torch(bits: int) -> None:
    grid = Grid(bits, symmetric=True)
    values = draw(64, 32)
    scale, _ = grid.parameters(*dynamic_range(values))
    torch.testing.assert_close(scale, values.abs().max().reshape(1, 1) / (2 ** (bits - 1) - 1), rtol=0, atol=0)
    values = torch.cat([values, values[:8] * 4])  # some overflow the range, as under a static scale
    low, high = -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    expected = torch.fake_quantize_per_tensor_affine(values, scale.item(), 0, low, high)
    keep = away_from_ties(values / scale)
    assert torch.equal(fake_quantize(values, scale, torch.zeros(()), grid)[keep], expected[keep])


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_per_channel_agrees_with_torch(bits: int) -> None:
    grid = Grid(bits, symmetric=True)
    weight = draw(24, 96) * torch.logspace(-3, 2, 24)[:, None]
    scale = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    zero_points = torch.zeros(24, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale, zero_points, 0, -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    )
    keep = away_from_ties(weight / scale[:, None])
    assert torch.equal(quantize_weight(weight, grid, "per_channel").dequantize()[keep], expected[keep])


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_per_tensor_agrees_with_torch(bits: int) -> None:
    grid = Grid(bits, symmetric=False)
    steps, scale = 2**bits - 1, 0.0371
    for zero_point in (0, round(0.3 * steps), round(0.5 * steps), steps):
        low, high = torch.tensor(-zero_point * scale), torch.tensor((steps - zero_point) * scale)
        own_scale, own_offset = grid.parameters(low, high)
        assert own_scale.item() == pytest.approx(scale), zero_point
        values = draw(64, 64) * steps * scale / 6 + (low + high) / 2  # both ends are overflowed
        assert values.min() < low and values.max() > high
        expected = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, steps)
        keep = away_from_ties(values / scale)
        result = fake_quantize(values, own_scale, own_offset, grid)
        assert torch.allclose(result[keep], expected[keep], rtol=1e-5, atol=1e-6), zero_point


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_per_channel_agrees_with_torch(bits: int) -> None:
    grid = Grid(bits, symmetric=False)
    steps = 2**bits - 1
    scale = torch.logspace(-3, 1, 16)
    zero_points = torch.arange(16, dtype=torch.int32) * steps // 15
    low, high = (-zero_points * scale)[:, None], ((steps - zero_points) * scale)[:, None]
    values = (low + high) / 2 + draw(16, 256) * (high - low) / 6
    expected = torch.fake_quantize_per_channel_affine(values, scale, zero_points, 0, 0, steps)
    keep = away_from_ties(values / scale[:, None])
    result = fake_quantize(values, *grid.parameters(low, high), grid)
    torch.testing.assert_close((result / scale[:, None])[keep], (expected / scale[:, None])[keep], rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_go_to_the_even_code_bit_for_bit_as_in_torch(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, symmetric)
    low, high = grid.bounds
    scale, zero_point = 0.125, 0 if symmetric else 2 ** (bits - 1)  # a power of two is exact; an even zero point
    ties = (torch.arange(low, high) - zero_point + 0.5) * scale
    offset = torch.tensor(-zero_point * scale)
    result = fake_quantize(ties, torch.tensor(scale), offset, grid)
    assert torch.equal(result, torch.fake_quantize_per_tensor_affine(ties, scale, zero_point, low, high))
    assert torch.all(torch.remainder((result - offset) / scale, 2) == 0)


def test_at_an_odd_offset_ties_are_even_as_counted_from_the_offset() -> None:
    grid, scale, zero_point = Grid(4, symmetric=False), 0.125, 3
    ties = (torch.arange(0, 15) - zero_point + 0.5) * scale
    result = fake_quantize(ties, torch.tensor(scale), torch.tensor(-zero_point * scale), grid)
    assert torch.all(torch.remainder(result / scale + zero_point, 2) == 0)
    theirs = torch.fake_quantize_per_tensor_affine(ties, scale, zero_point, 0, 15)
    assert torch.all((result - theirs).abs() == scale), "here the two definitions part, by one step"


# Against the definition.


@pytest.mark.parametrize(
    ("symmetric", "levels", "denominator"),
    [
        (True, "full", lambda n: 2 ** (n - 1) - 1),
        (False, "full", lambda n: 2**n - 1),
        (True, "paper", lambda n: 2 ** (n - 1) - 1),
        (False, "paper", lambda n: 2 ** (n - 1) - 1),
    ],
)
def test_scale_and_offset_follow_the_definition(
    symmetric: bool, levels: str, denominator: Callable[[int], int]
) -> None:
    low, high = torch.tensor([-1.5, -7.0]), torch.tensor([4.0, 2.0])
    width = [4.0, 7.0] if symmetric and levels == "full" else [5.5, 9.0]
    for bits in ALL_BITS:
        scale, offset = Grid(bits, symmetric, levels).parameters(low, high)
        assert scale.tolist() == pytest.approx([value / denominator(bits) for value in width], rel=1e-6), bits
        assert torch.equal(offset, torch.zeros(2) if symmetric else low), bits


def test_values_agree_with_the_formula_in_plain_python() -> None:
    for grid in GRIDS:
        values = draw(50)
        result, scale, offset = quantize_to_range(values, grid)
        s, z = scale.item(), offset.item()
        for value, quantized in zip(values.tolist(), result.tolist(), strict=True):
            if abs((value - z) / s % 1 - 0.5) > 1e-3:
                assert quantized == pytest.approx(s * round((value - z) / s) + z, rel=1e-5, abs=1e-5), (grid, value)


def test_a_dense_range_uses_all_codes_and_no_others() -> None:
    values = torch.linspace(-1.9999, 1.9999, 4001)  # not quite to the ends, which are ties under `paper`
    for grid in GRIDS:
        full = 2**grid.bits - 1 if grid.symmetric else 2**grid.bits
        paper = 2 ** (grid.bits - 1) - 1 if grid.symmetric else 2 ** (grid.bits - 1)  # half of the codes lie idle
        scale, offset = grid.parameters(torch.tensor(-2.0), torch.tensor(2.0))
        codes = ((fake_quantize(values, scale, offset, grid) - offset) / scale).round().unique()
        assert len(codes) == (full if grid.levels == "full" else paper), grid
        assert grid.bounds[0] <= codes.min() and codes.max() <= grid.bounds[1], grid


# Properties.


def test_the_error_in_range_is_at_most_half_a_step() -> None:
    both_signs = draw(400)
    above = both_signs.abs()
    for grid in GRIDS:
        for values in (both_signs, above, -above, above + 20, -above - 20):
            result, scale, _ = quantize_to_range(values, grid)
            assert (result - values).abs().max() <= scale / 2 * (1 + 1e-4), (grid, values.min(), values.max())


def test_quantizing_twice_changes_nothing() -> None:
    for grid in GRIDS:
        once, scale, offset = quantize_to_range(draw(500), grid)
        assert torch.equal(fake_quantize(once, scale, offset, grid), once), grid


def test_order_is_kept() -> None:
    for grid in GRIDS:
        result, _, _ = quantize_to_range(draw(500).sort().values, grid)
        assert torch.all(result.diff() >= 0), grid


def test_overflow_of_a_static_range_is_clamped_to_its_ends() -> None:
    for grid in GRIDS:
        scale, offset = grid.parameters(torch.tensor(-1.0), torch.tensor(1.0))
        ends = fake_quantize(torch.tensor([-1e6, 1e6]), scale, offset, grid)
        assert torch.allclose(ends, scale * torch.tensor(grid.bounds) + offset, rtol=1e-6), grid
        if grid.levels == "full":
            assert ends.tolist() == pytest.approx([-1.0, 1.0], rel=1e-6), grid


def test_a_range_of_width_zero_is_reproduced() -> None:
    for grid in GRIDS:
        for value in (0.0, 5.3, -0.0007, 1e6, -41.0):
            constant = torch.full((7,), value)
            result, scale, _ = quantize_to_range(constant, grid)
            assert torch.isfinite(scale) and scale > 0, (grid, value)
            # symmetric is abs-max / steps * steps: exact but for the rounding of floating point
            rounding = 3e-7 if grid.symmetric else 0.0
            assert torch.allclose(result, constant, rtol=rounding, atol=0), (grid, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(dtype: torch.dtype) -> None:
    values = draw(40, 8).to(dtype)
    for grid in (Grid(8, True), Grid(8, False), Grid(3, False, "paper")):
        scale, offset = grid.parameters(values.float().min(), values.float().max())
        result = fake_quantize(values, scale, offset, grid)
        assert result.dtype == dtype and result.shape == values.shape, grid
        assert torch.equal(result, fake_quantize(values.float(), scale, offset, grid).to(dtype)), grid
        for granularity in ("per_tensor", "per_channel", "per_group"):
            weight = quantize_weight(values, grid, granularity, 4).dequantize()
            assert weight.dtype == dtype and weight.shape == values.shape, (grid, granularity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("grid", [Grid(8, True), Grid(8, False), Grid(4, True, "paper")])
def test_the_input_is_never_changed_in_place(dtype: torch.dtype, grid: Grid) -> None:
    values = draw(12, 8).to(dtype)
    before = values.clone()
    low, high = dynamic_range(values, (1,))
    limits = low.clone(), high.clone()
    scale, offset = grid.parameters(low, high)
    parameters = scale.clone(), offset.clone()
    results = [fake_quantize(values, scale, offset, grid)]
    results += [
        quantize_weight(values, grid, name, 4).dequantize() for name in ("per_tensor", "per_channel", "per_group")
    ]
    for result in results:
        assert result.data_ptr() != values.data_ptr()
        result.fill_(0)
    assert torch.equal(values, before)
    assert torch.equal(low, limits[0]) and torch.equal(high, limits[1])
    assert torch.equal(scale, parameters[0]) and torch.equal(offset, parameters[1])


# Granularities of weights.


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_groups_are_channels_of_the_reshaped_weight(group_size: int) -> None:
    weight = draw(6, 16)
    for bits in ALL_BITS:
        grid = Grid(bits, symmetric=True)
        channels = quantize_weight(weight.reshape(-1, group_size), grid, "per_channel").dequantize().reshape(6, 16)
        groups = quantize_weight(weight, grid, "per_group", group_size).dequantize()
        assert torch.equal(groups, channels), bits
        # a group knows nothing of the others
        first = quantize_weight(weight[2:3, :group_size], grid, "per_tensor").dequantize()
        assert torch.equal(groups[2:3, :group_size], first), bits


def test_the_whole_row_as_one_group_is_per_channel() -> None:
    weight = draw(6, 16)
    assert torch.equal(
        quantize_weight(weight, Grid(4, True), "per_group", 16).dequantize(),
        quantize_weight(weight, Grid(4, True), "per_channel").dequantize(),
    )


def test_finer_granularity_confines_an_outlier_to_its_own_scale() -> None:
    weight = draw(8, 32)
    weight[3, 5] = 1000.0
    errors = {
        name: (quantize_weight(weight, Grid(8, True), name, 8).dequantize() - weight).abs()
        for name in ("per_tensor", "per_channel", "per_group")
    }
    everywhere_else = torch.arange(8) != 3
    assert errors["per_tensor"][everywhere_else].mean() > 10 * errors["per_channel"][everywhere_else].mean()
    assert errors["per_channel"][3, 8:].mean() > 10 * errors["per_group"][3, 8:].mean()


def test_dynamic_range_over_some_and_over_all_dimensions() -> None:
    values = draw(3, 5, 7)
    low, high = dynamic_range(values)
    assert low.shape == (1, 1, 1) and low.item() == values.min() and high.item() == values.max()
    low, high = dynamic_range(values, (-1,))
    assert low.shape == (3, 5, 1)
    for i in range(3):
        for j in range(5):
            assert low[i, j, 0] == min(values[i, j].tolist()) and high[i, j, 0] == max(values[i, j].tolist())


# The integer zero point of kernels, beside the paper's real offset.


@pytest.mark.parametrize("levels", ["full", "paper"])
def test_an_integer_zero_point_puts_zero_on_the_grid(levels: str) -> None:
    for bits, shift in itertools.product(ALL_BITS, (-100.0, -4.0, -0.3, 0.0, 0.3, 4.0, 100.0)):
        grid, where = Grid(bits, symmetric=False, levels=levels, zero_point="integer"), (bits, shift)
        values = torch.cat([draw(500) + shift, torch.zeros(1)])
        scale, offset = grid.parameters(values[:-1].min(), values[:-1].max())
        result = fake_quantize(values, scale, offset, grid)
        assert result[-1] == 0, where
        steps = -offset / scale
        assert steps == pytest.approx(round(steps.item()), abs=1e-3), where
        assert 0 <= round(steps.item()) <= grid.steps, where
        assert (result - values).abs().max() <= scale * 1.001, where  # rounding the zero point may clip half a step
        assert len(result.unique()) <= grid.steps + 1, where


@pytest.mark.parametrize("bits", [4, 8])
def test_an_integer_zero_point_agrees_with_torch(bits: int) -> None:
    grid = Grid(bits, symmetric=False, zero_point="integer")
    for shift in (-100.0, -4.0, 0.0, 1.0, 100.0):
        values = draw(64, 64) + shift
        low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero_point = round(-low / scale)
        expected = torch.fake_quantize_per_tensor_affine(values * 1.2, scale, zero_point, 0, 2**bits - 1)
        own_scale, own_offset = grid.parameters(values.min(), values.max())
        assert own_scale.item() == pytest.approx(scale), shift
        keep = away_from_ties(values * 1.2 / scale)
        result = fake_quantize(values * 1.2, own_scale, own_offset, grid)
        assert torch.allclose(result[keep], expected[keep], rtol=1e-5, atol=1e-4 * scale), shift


def test_a_real_offset_leaves_zero_off_the_grid_and_that_is_the_difference() -> None:
    values = torch.cat([torch.tensor([-1.0, 1000.0]), torch.full((1000,), 1e-3)])
    for zero_point, share in (("real", 0.1), ("integer", 1e-6)):
        grid = Grid(8, symmetric=False, zero_point=zero_point)
        result = fake_quantize(values, *grid.parameters(values.min(), values.max()), grid)
        assert (result[2:].abs().max() > share) == (zero_point == "real")


@pytest.mark.parametrize("levels", ["full", "paper"])
def test_the_zero_point_has_no_effect_on_a_symmetric_grid(levels: str) -> None:
    values = draw(100)
    real, integer = (Grid(8, True, levels, zero_point) for zero_point in ("real", "integer"))
    assert torch.equal(quantize_to_range(values, real)[0], quantize_to_range(values, integer)[0])


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_range_of_one_value_is_reproduced_with_an_integer_zero_point(value: float) -> None:
    grid = Grid(8, symmetric=False, zero_point="integer")
    result, scale, _ = quantize_to_range(torch.full((4,), value), grid)
    torch.testing.assert_close(result, torch.full((4,), value))
    assert scale > 0


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        (Grid(4, False, zero_point="integer"), torch.tensor([-7.5, 0.0, 7.5])),  # 7.5 steps become 8
        (Grid(8, True), torch.tensor([100.0, 180.0]) * 2**-149),  # the step 180 / 127 is not a subnormal number, 1 is
    ],
)
def test_a_dynamic_range_needs_the_clamp_too_where_the_step_or_zero_is_rounded(grid: Grid, values: Tensor) -> None:
    result, scale, offset = quantize_to_range(values, grid)
    _, high = grid.bounds
    assert torch.round((values - offset) / scale).max() > high
    assert torch.round((result - offset) / scale).max() == high


@pytest.mark.parametrize("shape", [(3, 5, 33), (1, 1), (4, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges_are_those_of_one_pass_for_both_ends_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = draw(*shape).to(dtype)
    for dim in range(-len(shape), len(shape)):
        low, high = torch.aminmax(values, dim=dim, keepdim=True)
        found = dynamic_range(values, (dim,))
        assert torch.equal(found[0], low) and torch.equal(found[1], high)
    values[..., 0] = torch.nan
    assert all(end.isnan().all() for end in dynamic_range(values, (-1,))), "what is not a number stays visible"
