"""Hooks that live as long as their block, and running statistics against sorting and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from conftest import FAMILIES, FEW
from helpers import random_values
from torch import Tensor, nn

from cushion.activations import (
    ChannelRanges,
    MagnitudeCurve,
    MagnitudeStatistics,
    TokenScales,
    max_over_median,
    observe_inputs,
    observe_outputs,
)
from cushion.models import LanguageModel

Tiny = Callable[..., LanguageModel]
FIELDS = ("top1", "top2", "top3", "top10_percent", "median", "maximum")


def number_of_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def blocks_of(lm: LanguageModel) -> dict[str, nn.Module]:
    return {str(index): block for index, block in enumerate(lm.blocks)}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_observers_see_what_the_model_itself_reports(tiny: Tiny, family: str) -> None:
    lm, ids = tiny(family), torch.arange(14).reshape(2, 7)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    blocks = blocks_of(lm)
    with observe_inputs(blocks, inputs.__setitem__), observe_outputs(blocks, outputs.__setitem__):
        states = lm.body(ids, output_hidden_states=True).hidden_states
    assert list(inputs) == list(outputs) == ["0", "1", "2"]
    for index in range(3):
        assert torch.equal(inputs[str(index)], states[index])
    for index in range(2):  # the last state of the model has a norm behind it
        assert torch.equal(outputs[str(index)], states[index + 1])
    assert outputs["2"].shape == states[3].shape


@pytest.mark.parametrize("observe", [observe_inputs, observe_outputs])
@torch.no_grad()
def test_hooks_are_gone_afterwards_also_when_the_body_or_the_observer_raises(
    tiny: Tiny, observe: Callable[..., AbstractContextManager[None]]
) -> None:
    lm, ids = tiny("llama"), torch.arange(7)[None]
    calls: list[str] = []

    def count(name: str, _values: Tensor) -> None:
        calls.append(name)

    def fail(name: str, _values: Tensor) -> None:
        raise RuntimeError(f"observer of {name}")

    with observe(blocks_of(lm), count):
        assert number_of_hooks(lm.model) == 3
        lm.body(ids)
    assert calls == ["0", "1", "2"] and number_of_hooks(lm.model) == 0
    with pytest.raises(RuntimeError, match="body"), observe(blocks_of(lm), count):
        raise RuntimeError("body")
    assert number_of_hooks(lm.model) == 0
    with pytest.raises(RuntimeError, match="observer of 0"), observe(blocks_of(lm), fail):
        lm.body(ids)
    assert number_of_hooks(lm.model) == 0
    lm.body(ids)
    assert len(calls) == 3


@pytest.mark.parametrize("observe", [observe_inputs, observe_outputs])
@torch.no_grad()
def test_what_an_observer_returns_changes_nothing(
    tiny: Tiny, observe: Callable[..., AbstractContextManager[None]]
) -> None:
    lm, ids = tiny("llama"), torch.arange(7)[None]
    expected = lm.model(ids).logits
    with observe(blocks_of(lm), lambda _name, values: torch.zeros_like(values)):
        assert torch.equal(lm.model(ids).logits, expected)


# Magnitudes.


def by_sorting(texts: Tensor) -> dict[str, float]:
    """The statistics of one layer by sorting each text in plain Python."""
    columns: dict[str, list[float]] = {field: [] for field in FIELDS}
    for text in texts.tolist():
        magnitudes = sorted(abs(value) for token in text for value in token)
        columns["top1"].append(magnitudes[-1])
        columns["top2"].append(magnitudes[-2])
        columns["top3"].append(magnitudes[-3])
        ordered = torch.tensor(magnitudes)
        columns["top10_percent"].append(torch.quantile(ordered, 0.9, interpolation="nearest").item())
        columns["median"].append(torch.quantile(ordered, 0.5, interpolation="lower").item())
    means = {field: sum(values) / len(values) for field, values in columns.items() if values}
    return means | {"maximum": max(columns["top1"])}


@pytest.mark.parametrize(("tokens", "features"), [(1, 3), (3, 5), (7, 11), (16, 32), (10, 10), (4, 4)])
def test_statistics_agree_with_sorting(tokens: int, features: int) -> None:
    layers = {name: random_values(5, tokens, features, seed=seed) for seed, name in enumerate(["a", "b", "c"])}
    statistics = MagnitudeStatistics()
    for name, values in layers.items():
        statistics(name, values)
    curve = statistics.curve()
    for index, values in enumerate(layers.values()):
        for field, expected in by_sorting(values).items():
            assert getattr(curve, field)[index] == pytest.approx(expected, rel=1e-5), field
    assert curve.largest == pytest.approx(max(values.abs().max().item() for values in layers.values()))


def test_texts_one_by_one_or_all_at_once_give_the_same_curve() -> None:
    texts = random_values(6, 9, 8)
    together, apart = MagnitudeStatistics(), MagnitudeStatistics()
    together("layer", texts)
    for text in texts:
        apart("layer", text[None])
    for field in FIELDS:
        assert getattr(apart.curve(), field) == pytest.approx(getattr(together.curve(), field))


def test_planted_outliers_of_either_sign_show_up_in_order() -> None:
    values = random_values(2, 9, 8)
    values[0, 3, 4], values[0, 0, 1], values[0, 8, 7] = -900.0, 500.0, -40.0
    values[1] = values[1].clamp(-2, 2)
    values[1, 5, 5] = 100.0
    statistics = MagnitudeStatistics()
    statistics("layer", values)
    curve = statistics.curve()
    assert curve.top1 == [pytest.approx(500.0)], "the mean over the two texts"
    assert curve.maximum == [900.0] and curve.largest == 900.0
    assert 250 <= curve.top2[0] <= 251.0 + 1 and 20 <= curve.top3[0] <= 21.0 + 1
    assert curve.top3[0] > curve.top10_percent[0] > curve.median[0] > 0


def test_layers_keep_the_order_in_which_they_were_first_seen() -> None:
    statistics = MagnitudeStatistics()
    for _ in range(2):
        for size, name in enumerate(["z", "a", "m"], start=1):
            statistics(name, torch.full((1, 2, 4), float(size)))
    assert statistics.curve().top1 == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_gradients_are_taken_as_they_come(dtype: torch.dtype) -> None:
    values = random_values(2, 5, 6).to(dtype).requires_grad_()
    before = values.detach().clone()
    half, full = MagnitudeStatistics(), MagnitudeStatistics()
    half("layer", values)
    full("layer", values.detach().float())
    assert half.curve() == full.curve()
    assert torch.equal(values, before)


# Ranges.


def test_channel_ranges_agree_with_plain_loops_over_everything_seen() -> None:
    batches = [random_values(2, 5, 4), 3 * random_values(1, 7, 4, seed=1), random_values(6, 4, seed=2)]
    ranges = ChannelRanges()
    for batch in batches:
        ranges("linear", batch)
    ranges("other", torch.tensor([[9.0, -9.0]]))
    rows = [row for batch in batches for row in batch.reshape(-1, 4).tolist()]
    assert ranges.minimum["linear"].tolist() == [min(row[channel] for row in rows) for channel in range(4)]
    assert ranges.maximum["linear"].tolist() == [max(row[channel] for row in rows) for channel in range(4)]
    assert ranges.minimum["other"].tolist() == ranges.maximum["other"].tolist() == [9.0, -9.0]


def test_channel_ranges_keep_no_view_of_what_they_saw() -> None:
    values = random_values(1, 1, 4)
    expected = values.flatten().clone()
    ranges = ChannelRanges()
    ranges("linear", values)
    values.fill_(1000.0)
    assert torch.equal(ranges.minimum["linear"], expected) and torch.equal(ranges.maximum["linear"], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("first", [True, False])
def test_channel_ranges_do_not_hide_what_is_not_finite(bad: float, first: bool) -> None:
    spoiled = random_values(1, 3, 4)
    spoiled[0, 1, 2] = bad
    batches = [spoiled, random_values(1, 3, 4, seed=1)]
    ranges = ChannelRanges()
    for batch in batches if first else reversed(batches):
        ranges("linear", batch)
    low, high = ranges.minimum["linear"], ranges.maximum["linear"]
    finite = torch.isfinite(low) & torch.isfinite(high)
    assert finite.tolist() == [True, True, False, True]
    assert low.isnan()[2] == high.isnan()[2] == (bad != bad)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_the_largest_magnitude_is_not_finite_where_one_layer_is_not(layer: int, fault: float) -> None:
    statistics = MagnitudeStatistics()
    for index in range(3):
        values = random_values(2, 5, 8, seed=index)
        assert statistics(str(index), values) is None
        if index == layer:
            values[1, 2, 3] = fault
            statistics(str(index), values)
    curve = statistics.curve()
    assert [math.isfinite(value) for value in curve.maximum] == [index != layer for index in range(3)]
    assert math.isnan(curve.largest) if math.isnan(fault) else curve.largest == math.inf


def test_the_largest_magnitude_is_that_of_any_layer() -> None:
    maximum = [1.5, 4.25, 3.0]
    assert MagnitudeCurve([0.0], [0.0], [0.0], [0.0], [0.0], maximum).largest == max(maximum)
    assert math.isnan(MagnitudeCurve([0.0], [0.0], [0.0], [0.0], [0.0], [*maximum, math.nan]).largest)


# Token scales.


def ratio_by_sorting(scales: list[float]) -> float:
    return max(scales) / sorted(scales)[(len(scales) - 1) // 2]


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 6, 7])
def test_token_scales_and_their_ratios_agree_with_plain_loops(tokens: int, flattened: bool) -> None:
    batches = [random_values(3, tokens, 5, seed=seed) for seed in range(2)]
    scales = TokenScales(texts=3)
    for batch in batches:
        scales("a", batch.flatten(0, 1) if flattened else batch)
        scales("b", 10 * batch)
    rows = [[max(abs(value) for value in token) for token in text] for batch in batches for text in batch.tolist()]
    assert scales.names == ["a", "b"]
    assert scales.scales("a").dtype == torch.float32 and scales.scales("a").tolist() == rows
    expected = sum(ratio_by_sorting(row) for row in rows) / len(rows)
    assert scales.ratios() == {"a": pytest.approx(expected), "b": pytest.approx(expected)}


def test_a_planted_token_sets_the_ratio_of_its_linear_alone() -> None:
    scales = TokenScales()
    for seed in range(2):
        values = torch.full((1, 9, 4), 2.0)
        scales("plain", values)
        spoiled = values.clone()
        spoiled[0, 3, 1] = -200.0 * (seed + 1)
        scales("planted", spoiled)
    assert scales.ratios() == {"plain": 1.0, "planted": 150.0}
    assert scales.scales("planted")[:, 3].tolist() == [200.0, 400.0]


def test_texts_of_several_lengths_and_linears_that_read_no_token_have_ratios_too() -> None:
    scales = TokenScales()
    for tokens in (3, 0, 5):
        scales("expert", torch.arange(1.0, tokens + 1)[:, None])
        scales("idle", torch.zeros(0, 4))
    assert [len(row) for row in scales.rows("expert")] == [3, 0, 5]
    assert scales.ratios() == {"expert": pytest.approx((3 / 2 + 5 / 3) / 2), "idle": 1.0}


def test_ratios_over_a_median_of_zero_and_over_what_is_not_finite() -> None:
    assert max_over_median(torch.tensor([0.0, 0.0, 3.0])) == math.inf
    assert max_over_median(torch.zeros(3)) == 1.0
    assert math.isnan(max_over_median(torch.tensor([1.0, math.nan, 3.0])))
    assert max_over_median(torch.tensor([1.0, math.inf, 3.0])) == math.inf


@torch.no_grad()
@pytest.mark.parametrize("family", (*FEW, "bloom", "gemma2"))
def test_token_scales_of_a_batch_are_those_of_its_texts_one_by_one(tiny: Tiny, family: str) -> None:
    lm, ids = tiny(family), torch.arange(21).reshape(3, 7)
    together, apart = TokenScales(texts=3), TokenScales()
    with observe_inputs(lm.linears(), together):
        lm.body(ids)
    with observe_inputs(lm.linears(), apart):
        for text in ids:
            lm.body(text[None])
    assert together.names == apart.names and set(together.names) == set(lm.linears())
    for name in together.names:
        assert together.scales(name).shape == (3, 7)
        torch.testing.assert_close(together.scales(name), apart.scales(name))
