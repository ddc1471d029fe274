"""Range estimators: their declarations, and their ranges against the values themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import random_values
from torch import Tensor

from cushion.errors import ConfigError
from cushion.quantization.estimators import entropy
from cushion.quantization.estimators.registry import ESTIMATORS
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.statistics.histogram import BINS, Histogram

SYMMETRIC, ASYMMETRIC = Grid(8, True), Grid(8, False)
KEY = "quantizer.activations.options"


def planted(seed: int = 0) -> Tensor:
    """Values with a few outliers, farther above than below."""
    values = random_values(64, 256, seed=seed)
    values[0, :2], values[9, 0] = 300.0, -80.0
    return values


def estimated(name: str, values: Tensor, grid: Grid, **given: float) -> tuple[float, float]:
    estimator = ESTIMATORS[name]
    options = estimator.values(given, KEY)
    observed = estimator.new_statistic(options)
    for text in values.split(16):
        observed.update(text)
    low, high = estimator.range_of(estimator.load_statistic(observed.tensors()), grid, options)
    assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == ()
    assert low <= high
    return float(low), float(high)


WITH_STATISTIC = [name for name, estimator in ESTIMATORS.items() if estimator.statistic is not None]


def test_the_declarations_are_read_without_torch() -> None:
    code = (
        "import sys; from cushion.quantization.estimators.registry import ESTIMATORS; "
        "assert 'minmax' in ESTIMATORS; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_checked_and_completed() -> None:
    estimator = ESTIMATORS["percentile"]
    assert estimator.values({}, KEY) == {"percentile": 99.99}
    assert estimator.values({"percentile": 99}, KEY) == {"percentile": 99}
    for value in (50, 100.1, "99", True, None, float("nan")):
        with pytest.raises(ConfigError, match=r"quantizer\.activations\.options\.percentile=.*above 50, at most 100"):
            estimator.values({"percentile": value}, KEY)
    with pytest.raises(ConfigError, match=r"percentil=99 .*reads percentile; did you mean 'percentile'"):
        estimator.values({"percentil": 99}, KEY)
    with pytest.raises(ConfigError, match="estimator=minmax reads none"):
        ESTIMATORS["minmax"].values({"percentile": 99}, KEY)


def test_estimators_share_a_statistic_exactly_where_it_is_the_same() -> None:
    average = ESTIMATORS["moving_average"]
    one, other = ({"averaging": value} for value in (0.01, 0.1))
    assert average.needed(one) != average.needed(other)
    percentile = ESTIMATORS["percentile"]
    one, other = ({"percentile": value} for value in (99.0, 99.9))
    assert percentile.needed(one) == percentile.needed(other)
    assert percentile.identity(one) != percentile.identity(other)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
def test_a_percentile_is_that_of_the_values_to_within_a_bin(percentile: float) -> None:
    values = planted()
    count = values.numel()
    low, high = estimated("percentile", values, SYMMETRIC, percentile=percentile)
    exact = float(values.abs().flatten().sort().values[round(-(-count * percentile // 100)) - 1])
    assert exact <= high <= exact * (1 + 1 / BINS)
    assert low == pytest.approx(max(-exact, float(values.min())), rel=1 / BINS)
    low, high = estimated("percentile", values, ASYMMETRIC, percentile=percentile)
    ordered = values.flatten().sort().values
    outside = int(count * (100 - percentile) / 200)
    assert float(ordered[-1 - outside]) == pytest.approx(high, rel=1 / BINS)
    assert float(ordered[outside]) == pytest.approx(low, rel=1 / BINS)


def test_the_percentile_of_everything_is_min_max() -> None:
    values = planted()
    for grid in (SYMMETRIC, ASYMMETRIC):
        assert estimated("percentile", values, grid, percentile=100) == (values.min(), values.max())


def test_the_moving_average_lies_between_the_texts() -> None:
    values = planted()
    low, high = estimated("moving_average", values, SYMMETRIC)
    texts = values.split(16)
    expected = float(texts[0].max())
    for text in texts[1:]:
        expected += 0.01 * (float(text.max()) - expected)
    assert high == pytest.approx(expected, rel=1e-6)
    assert float(values.min()) < low < 0


@pytest.mark.parametrize("name", WITH_STATISTIC)
@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC, Grid(4, False, zero_point="integer"), Grid(8, True, "paper")])
def test_values_that_are_all_the_same_give_their_own_range(name: str, grid: Grid) -> None:
    for value in (0.0, 2.5, -2.5):
        assert estimated(name, torch.full((32, 8), value), grid) == (value, value)


@pytest.mark.parametrize("name", WITH_STATISTIC)
def test_a_range_scales_with_the_values(name: str) -> None:
    values = planted()
    for grid in (SYMMETRIC, ASYMMETRIC):
        low, high = estimated(name, values, grid)
        for factor in (2.0**-20, 2.0**30):
            assert estimated(name, values * factor, grid) == pytest.approx((low * factor, high * factor), rel=1e-6)


def squared_errors(values: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """The mean squared error of each range on the values themselves."""
    found = []
    for some_low, some_high in zip(low.split(64), high.split(64), strict=True):
        scale, offset = grid.parameters(some_low[:, None], some_high[:, None])
        difference = fake_quantize(values.flatten()[None], scale, offset, grid) - values.flatten()
        found.append(difference.square().mean(1))
    return torch.cat(found)


def by_brute_force(values: Tensor, grid: Grid) -> float:
    """The smallest mean squared error of many ranges, of either end on its own where the grid is asymmetric."""
    fractions = 2 ** -(torch.arange(240) / 30) if grid.symmetric else 2 ** -(torch.arange(36) / 5)
    center = torch.zeros(()) if grid.symmetric else values.median()
    down, up = fractions, fractions
    if not grid.symmetric:
        down, up = torch.cartesian_prod(fractions, fractions).T
    low, high = center + (values.min() - center) * down, center + (values.max() - center) * up
    return float(squared_errors(values, low, high, grid).min())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["outliers", "heavy", "heavier", "one-sided", "normal", "shifted"])
def test_the_mse_range_is_as_good_as_brute_force_on_the_values(kind: str, bits: int) -> None:
    outliers, normal = planted()[::4], random_values(64, 64)
    outliers[1, :2], outliers[2, 0] = 300.0, -80.0
    values = {
        "outliers": outliers,
        "heavy": outliers * outliers.abs().sqrt(),
        "heavier": outliers**3,
        "one-sided": outliers.abs(),
        "normal": normal,
        "shifted": normal + 20,
    }[kind]
    histogram = Histogram()
    histogram.update(values)
    bins = histogram.bins()
    # a value lies half a bin from the middle at most, and its distance to the grid differs by no more than this
    unseen = float(((bins.high - bins.low).square() * bins.counts).sum() / bins.counts.sum()) ** 0.5
    grids = [Grid(bits, True), Grid(bits, True, "paper"), Grid(bits, False), Grid(bits, False, zero_point="integer")]
    for grid in grids:
        low, high = (torch.tensor([end]) for end in estimated("mse", values, grid))
        found = float(squared_errors(values, low, high, grid)) ** 0.5
        assert found <= 1.005 * by_brute_force(values, grid) ** 0.5 + unseen, grid


def kl_divergence(counts: Tensor, kept: int, levels: int) -> float:
    """Of one threshold, bin by bin as pytorch-quantization computes it."""
    counts = counts.clone()
    counts[0] = counts[1]
    group = torch.arange(kept) * levels // kept
    coarse = torch.zeros(kept, dtype=torch.float64)
    for level in group.unique():
        members = (group == level) & (counts[:kept] > 0)
        coarse[members] = counts[:kept][members].mean()
    reference = counts[:kept].clone()
    reference[-1] += counts[kept:].sum()
    reference, coarse = reference / reference.sum(), coarse / coarse.sum()
    return float(torch.where(reference > 0, reference * (reference / coarse).log(), 0).sum())


@pytest.mark.parametrize("levels", [8, 128, 256])
def test_divergences_are_those_of_the_definition(levels: int) -> None:
    for values in (planted(), random_values(64, 64)):
        counts = torch.histc(values.abs().double(), entropy.BINS, 0, float(values.abs().max()))
        found = entropy.divergences(counts, levels)
        for kept in (128, 129, 200, 256, 333, 1024, 1500, 2047, 2048):
            expected = kl_divergence(counts, kept, levels)
            assert float(found[kept - entropy.START]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_magnitudes_are_spread_over_bins_of_equal_width() -> None:
    for values in (random_values(64, 256), planted(), -planted(), planted().abs() + 5):
        histogram = Histogram()
        histogram.update(values)
        largest = float(values.abs().max())
        found = entropy.magnitudes(histogram, largest).cumsum(0)
        exact = torch.histc(values.abs().double(), entropy.BINS, 0, largest).cumsum(0)
        assert found[-1] == exact[-1] == values.numel()
        # a bin of the histogram is as wide as eight of these at most
        assert (found[8:] >= exact[:-8]).all() and (found[:-8] <= exact[8:]).all()
        assert (found == found.round()).all() and found[-1] > found[-2]


def long_tailed() -> Tensor:
    """Values with a long tail, but no outlier apart."""
    return random_values(256, 256) * (1 + random_values(256, 256, seed=1).abs()).exp()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_entropy_threshold_is_near_the_best_one_of_the_values(bits: int) -> None:
    values = long_tailed()
    largest = float(values.abs().max())
    exact = entropy.divergences(torch.histc(values.abs().double(), entropy.BINS, 0, largest), 2 ** (bits - 1))
    low, high = estimated("entropy", values, Grid(bits, True))
    assert 0.1 * largest < high < 0.5 * largest
    assert low == max(-high, float(values.min()))
    place = round(high / largest * entropy.BINS) - entropy.START
    near = exact[place - 4 : place + 5]  # the bin itself may hold none of the values
    assert float(near.min()) <= 1.02 * float(exact.min()) < 0.5 * float(exact[-1])
    assert estimated("entropy", values, Grid(bits, False)) == (low, high)


def test_values_of_one_sign_have_all_levels_of_an_asymmetric_grid_for_their_entropy() -> None:
    values = long_tailed().abs()
    thresholds = []
    for grid in (Grid(4, True), Grid(4, False), Grid(5, True)):
        low, high = estimated("entropy", values, grid)
        assert low == values.min()
        assert estimated("entropy", -values, grid) == (-high, -low)
        thresholds.append(high)
    symmetric, asymmetric, one_bit_more = thresholds
    assert symmetric < asymmetric == one_bit_more
