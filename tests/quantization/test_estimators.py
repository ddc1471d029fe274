"""Range estimators: their declarations, and their ranges against the values themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import random_values
from torch import Tensor

from cushion.errors import ConfigError
from cushion.quantization.estimators.registry import ESTIMATORS
from cushion.quantization.numerics import Grid
from cushion.quantization.statistics.histogram import BINS

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
    assert average.gathering(one) != average.gathering(other)
    percentile = ESTIMATORS["percentile"]
    one, other = ({"percentile": value} for value in (99.0, 99.9))
    assert percentile.gathering(one) == percentile.gathering(other)
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
