"""Statistics of a linear's input: against the values themselves, and under any order, split and size of them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from helpers import random_values
from safetensors.torch import load, save
from torch import Tensor

from cushion.errors import CalibrationError
from cushion.quantization.statistics.base import Statistic
from cushion.quantization.statistics.gathered import GatheredStatistics, read_statistics
from cushion.quantization.statistics.histogram import BINS, OCTAVES, Histogram
from cushion.quantization.statistics.moving_ranges import MovingRanges


def planted(seed: int = 0, outlier: float = 900.0) -> list[Tensor]:
    """Four texts, each larger than the one before it, with outliers in the last."""
    texts = [random_values(32, 24, seed=seed + number) * 3**number for number in range(4)]
    texts[3][0, 5], texts[3][7, 5] = outlier, -outlier / 3
    return texts


def histogram_of(*texts: Tensor) -> Histogram:
    histogram = Histogram()
    for text in texts:
        histogram.update(text)
    return histogram


def same(one: Statistic, other: Statistic) -> bool:
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_histogram_counts_every_value_in_a_narrow_bin_that_holds_it() -> None:
    texts = planted()
    values = torch.cat(texts).flatten().double()
    histogram = histogram_of(*texts)
    bins = histogram.bins()
    assert histogram.count == len(values) == bins.counts.sum()
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    assert (bins.low[1:] >= bins.high[:-1]).all() and (bins.counts > 0).all()
    for low, high, count in zip(bins.low, bins.high, bins.counts, strict=True):
        inside = (values >= low) & (values <= high)
        assert inside.sum() == count, f"{float(low)} to {float(high)}"
    away = torch.minimum(bins.low.abs(), bins.high.abs()) > values.abs().max() / 2 ** (OCTAVES - 1)
    assert away.sum() > 1000
    assert ((bins.high - bins.low)[away] <= bins.low.abs().maximum(bins.high.abs())[away] / BINS).all()


def test_texts_in_any_order_and_any_pieces_give_the_very_same_histogram() -> None:
    texts = [*planted(), torch.full((3, 24), 1e-6), torch.full((2, 24), 3e5)]  # the octaves move up beyond the small
    whole = histogram_of(torch.cat(texts))
    assert int(whole.tensors()["small"][0]) >= 3 * 24, "no bins were merged"
    for order in list(permutations(texts))[::29]:
        assert same(histogram_of(*order), whole)
    assert same(histogram_of(*torch.cat(texts).split(1)), whole)


def test_statistics_are_saved_and_go_on_where_they_were() -> None:
    texts = planted()
    for new in (Histogram, lambda: MovingRanges(0.25)):
        kept, saved = new(), new()
        for text in texts[:2]:
            kept.update(text)
            saved.update(text)
        before = {name: tensor.clone() for name, tensor in saved.tensors().items()}
        read = type(saved).of(load(save(saved.tensors())))
        for text in texts[2:]:
            kept.update(text)
            read.update(text)
        assert same(read, kept)
        assert all(torch.equal(before[name], tensor) for name, tensor in saved.tensors().items())
        empty = type(saved).of(load(save(new().tensors())))
        assert empty.is_empty and not read.is_empty


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(4, 8),
        torch.full((4, 8), -2.5),
        torch.tensor([[0.0, -0.0, 1e-40, -1e-40]]),  # subnormal
        torch.tensor([[1.0, -1.0, 3e38, 0.0]]),
        torch.tensor([[1.0, 2.0, 4.0, torch.finfo(torch.float32).max]]),
    ],
    ids=["zeros", "constant", "subnormal", "one huge", "largest"],
)
def test_a_histogram_of_few_or_extreme_values(values: Tensor) -> None:
    bins = histogram_of(values).bins()
    assert bins.counts.sum() == values.numel()
    assert torch.isfinite(bins.middle).all()
    assert (bins.low[0], bins.high[-1]) == (values.double().min(), values.double().max())
    if len(values.unique()) == 1:
        assert bins.middle.tolist() == [float(values[0, 0])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_as_the_same_values_in_float32(dtype: torch.dtype) -> None:
    values = random_values(16, 8).to(dtype)
    assert same(histogram_of(values), histogram_of(values.float()))


def test_values_need_not_be_contiguous_and_are_not_changed() -> None:
    values = random_values(16, 8)
    before = values.clone()
    assert same(histogram_of(values.T), histogram_of(values))
    assert torch.equal(values, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_statistic_tells_that_a_value_was_not_finite(bad: float) -> None:
    values = random_values(4, 8)
    spoilt = values.clone()
    spoilt[1, 3] = bad
    for new in (Histogram, MovingRanges):
        for order in ([values, spoilt], [spoilt, values], [values, spoilt, values]):
            statistic = new()
            for text in order:
                statistic.update(text)
            assert not statistic.is_finite
        assert new().is_finite


def test_moving_ranges_are_the_running_average_from_the_first_text_on() -> None:
    texts = planted()
    ranges = MovingRanges(0.01)
    for text in texts:
        ranges.update(text)
    low, high = float(texts[0].min()), float(texts[0].max())
    for text in texts[1:]:
        low, high = 0.99 * low + 0.01 * float(text.min()), 0.99 * high + 0.01 * float(text.max())
    assert (ranges.minimum, ranges.maximum) == pytest.approx((low, high), rel=1e-12)


def test_gathering_shares_the_work_on_one_tensor_and_gives_what_each_linear_would_have() -> None:
    done = []

    class Counted(Histogram):
        @staticmethod
        def reduced(values: Tensor) -> tuple[Tensor, float, float]:
            done.append(values.shape)
            return Histogram.reduced(values)

    gathered = GatheredStatistics(Counted)
    texts = planted()
    for text in texts:
        for name in ("q", "k", "v"):
            gathered(name, text)
        gathered("o", text * 2)
    assert len(done) == 2 * len(texts)
    for name, factor in (("q", 1), ("k", 1), ("v", 1), ("o", 2)):
        assert same(gathered.by_linear[name], histogram_of(*(text * factor for text in texts))), name
    gathered("q", texts[0])
    gathered("k", texts[0].mul_(2))  # the same tensor with other values
    assert gathered.by_linear["k"].maximum == histogram_of(*texts, texts[0]).maximum
    assert same(gathered.by_linear["k"], histogram_of(texts[0] / 2, texts[0], *texts[1:]))


def test_a_linear_that_no_token_reached_stays_empty() -> None:
    gathered = GatheredStatistics(Histogram)
    gathered("expert", torch.zeros(0, 8))
    assert gathered.by_linear["expert"].is_empty
    gathered.check()


def test_the_linear_with_values_that_are_not_finite_is_named() -> None:
    gathered = GatheredStatistics(Histogram)
    gathered("fine", random_values(2, 4))
    gathered("layers.0.down", torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(CalibrationError, match=r"layers\.0\.down is not finite.*float32"):
        gathered.check()


def test_linears_that_share_a_tensor_are_kept_and_read_again_after_one_text(tmp_path: Path) -> None:
    gathered = GatheredStatistics(lambda: MovingRanges(0.01))
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for name in ("gate", "up"):
        gathered(name, values)
    gathered.write(tmp_path)
    found = read_statistics(MovingRanges, tmp_path)
    for name in ("gate", "up"):
        for key, tensor in found[name].tensors().items():
            assert torch.equal(tensor, gathered.by_linear[name].tensors()[key])
