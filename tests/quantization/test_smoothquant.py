"""SmoothQuant's scales: equation 4 in plain Python, its limits, and its lower bound."""

from __future__ import annotations

import pytest
import torch

from cushion.quantization.smoothquant import SMALLEST, smoothing_scales


def example() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 3.0, 1.0, 0.5])
    return inputs, [torch.randn(rows, 6, generator=generator) for rows in (4, 9, 1)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_scales_are_equation_4_over_all_linears_that_share_the_input(alpha: float) -> None:
    inputs, weights = example()
    scales = smoothing_scales(inputs.abs().amax(0), weights, alpha)
    for channel in range(6):
        largest_input = max(abs(row[channel]) for row in inputs.tolist())
        largest_weight = max(abs(row[channel]) for weight in weights for row in weight.tolist())
        expected = largest_input**alpha / largest_weight ** (1 - alpha)
        assert scales[channel].item() == pytest.approx(expected, rel=1e-5)


def test_half_and_half_leaves_inputs_and_weights_equally_large() -> None:
    inputs, weights = example()
    scales = smoothing_scales(inputs.abs().amax(0), weights, 0.5)
    smoothed_inputs = (inputs / scales).abs().amax(0)
    smoothed_weights = torch.cat([weight * scales for weight in weights]).abs().amax(0)
    torch.testing.assert_close(smoothed_inputs, smoothed_weights)


def test_everything_into_the_weights_leaves_inputs_of_one() -> None:
    inputs, weights = example()
    scales = smoothing_scales(inputs.abs().amax(0), weights, 1.0)
    torch.testing.assert_close((inputs / scales).abs().amax(0), torch.ones(6))


def test_nothing_into_the_weights_ignores_the_inputs() -> None:
    inputs, weights = example()
    quiet, loud = (smoothing_scales(factor * inputs.abs().amax(0), weights, 0.0) for factor in (1, 1000))
    assert torch.equal(quiet, loud)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_channels_that_are_always_zero_get_a_finite_positive_scale(alpha: float) -> None:
    scales = smoothing_scales(torch.tensor([0.0, 1.0, 0.0]), [torch.tensor([[0.0, 0.0, 2.0]])], alpha)
    assert torch.isfinite(scales).all()
    assert (scales >= SMALLEST).all()


def test_an_enormous_weight_cannot_press_a_scale_below_the_bound() -> None:
    scales = smoothing_scales(torch.ones(2), [torch.tensor([[1e9, 1.0]])], 0.0)
    assert scales.tolist() == pytest.approx([SMALLEST, 1.0])


def test_half_precision_weights_give_float32_scales_and_stay_as_they_are() -> None:
    inputs, weights = example()
    half = [weight.half() for weight in weights]
    before = [weight.clone() for weight in half]
    largest = inputs.abs().amax(0)
    scales = smoothing_scales(largest, half, 0.8)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales, smoothing_scales(largest, weights, 0.8), rtol=1e-3, atol=0)
    assert all(torch.equal(weight, copy) for weight, copy in zip(half, before, strict=True))
