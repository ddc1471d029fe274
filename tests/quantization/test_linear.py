"""The quantized linear: recomputed from the formulas in plain torch, and what each granularity may depend on."""

from __future__ import annotations

import pytest
import torch
from helpers import random_values
from torch import Tensor

from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, quantize_weight


def symmetric_8_bits(values: Tensor, largest: Tensor) -> Tensor:
    """Equation 1 with z = 0: no function of Cushion, and the clamp written out."""
    scale = largest / 127
    return torch.round(values / scale).clamp(-127, 127) * scale


def asymmetric_8_bits(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = (high - low) / 255
    return torch.round((values - low) / scale).clamp(0, 255) * scale + low


@pytest.mark.parametrize("granularity", ["static", "per_tensor", "per_token"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_w8a8_is_the_product_of_what_the_formulas_give(granularity: str, symmetric: bool) -> None:
    values, weight, bias = random_values(2, 5, 16), random_values(8, 16, seed=1), random_values(8, seed=2)
    dims = (2,) if granularity == "per_token" else (0, 1, 2)
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    static_range = None
    if granularity == "static":
        low, high = torch.tensor(-1.1), torch.tensor(1.4)  # narrower than the values: they are clamped
        static_range = low, high
    expected_weight = symmetric_8_bits(weight, weight.abs().max())
    expected_input = (
        symmetric_8_bits(values, torch.maximum(high, -low)) if symmetric else asymmetric_8_bits(values, low, high)
    )
    expected = torch.einsum("bti,oi->bto", expected_input, expected_weight) + bias

    quantizer = ActivationQuantizer(
        Grid(8, symmetric), "per_token" if granularity == "per_token" else "per_tensor", static_range
    )
    linear = QuantizedLinear(quantize_weight(weight, Grid(8, True), "per_tensor").dequantize(), bias, quantizer)
    torch.testing.assert_close(linear(values), expected, rtol=1e-5, atol=1e-5)
    full_precision = values @ weight.T + bias
    assert not torch.allclose(linear(values), full_precision, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "grid", [Grid(4, True, narrow_range=False), Grid(4, False), Grid(4, False, zero_point="integer")]
)
def test_a_clipped_range_keeps_its_share_and_passes_no_gradient_beyond(grid: Grid) -> None:
    """QuaRot's dynamic scales: both ends times the ratio, codes beyond clamped, -8 among them on a symmetric grid."""
    values = random_values(3, 40).requires_grad_()
    low, high = 0.9 * values.detach().amin(1, keepdim=True), 0.9 * values.detach().amax(1, keepdim=True)
    found = ActivationQuantizer(grid, "per_token", straight_through=True, clip_ratio=0.9)(values)
    expected = ActivationQuantizer(grid, "per_token", (low, high), straight_through=True)(values)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out.sum(), values)[0] for out in (found, expected)]
    assert torch.equal(*gradients) and 0 < int((gradients[0] == 0).sum()) < values.numel() // 4
    positive = torch.tensor([[2.0, 3.0, 4.0]])  # needs no 0 in its range, but where the zero point is a code
    kept = ActivationQuantizer(grid, "per_token", clip_ratio=0.5)(positive).amax()
    limit = 2.0 if grid.symmetric or grid.zero_point == "integer" else 3.0
    torch.testing.assert_close(kept, torch.tensor(limit))


def test_a_static_range_ignores_the_input_and_clamps_it() -> None:
    quantizer = ActivationQuantizer(Grid(8, True), "per_tensor", (torch.tensor(-2.0), torch.tensor(1.0)))
    values = random_values(4, 8).clamp(-2, 2)
    with_outlier = torch.cat([values, torch.full((1, 8), 1000.0)])
    assert torch.equal(quantizer(with_outlier)[:4], quantizer(values))
    torch.testing.assert_close(quantizer(with_outlier)[4], torch.full((8,), 2.0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_is_quantized_as_if_it_were_alone(symmetric: bool) -> None:
    per_token = ActivationQuantizer(Grid(4, symmetric), "per_token")
    per_tensor = ActivationQuantizer(Grid(4, symmetric), "per_tensor")
    values = random_values(2, 6, 16) * torch.logspace(-2, 3, 6)[:, None]
    result = per_token(values)
    for text in range(2):
        for token in range(6):
            assert torch.equal(result[text, token], per_tensor(values[text, token]))


def test_an_outlier_token_spoils_the_others_per_tensor_but_not_per_token() -> None:
    values = random_values(1, 10, 32)
    values[0, 3, 5] = 5000.0
    others = [token for token in range(10) if token != 3]
    error = {
        name: (ActivationQuantizer(Grid(8, True), name)(values) - values)[0, others].abs().max().item()
        for name in ("per_tensor", "per_token")
    }
    assert error["per_token"] < 0.05
    assert error["per_tensor"] == pytest.approx(values[0, others].abs().max().item()), "everything rounds to zero"


def test_a_dynamic_per_tensor_range_spans_all_texts_of_the_batch() -> None:
    quantizer = ActivationQuantizer(Grid(4, True), "per_tensor")
    batch = torch.cat([random_values(1, 5, 8), 100 * random_values(1, 5, 8, seed=1)])
    assert not torch.equal(quantizer(batch)[:1], quantizer(batch[:1]))
    assert torch.equal(quantizer(batch)[1:], quantizer(batch[1:]))  # the text that sets the range


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_the_input_left_alone(granularity: str, dtype: torch.dtype) -> None:
    values = random_values(3, 4, 8).to(dtype)
    before = values.clone()
    result = ActivationQuantizer(Grid(8, False), granularity)(values)
    assert result.dtype == dtype and result.shape == values.shape
    assert torch.equal(values, before)
    assert not torch.equal(result, before)


def test_a_linear_without_activation_quantizer_takes_its_input_as_it_is() -> None:
    values, weight = random_values(3, 16), random_values(4, 16, seed=1)
    linear = QuantizedLinear(weight, None, None)
    assert torch.equal(linear(values), torch.nn.functional.linear(values, weight))
    assert linear.in_features == 16 and linear.out_features == 4


def test_straight_through_passes_the_gradient_and_otherwise_there_is_none() -> None:
    weight, values = random_values(4, 16, seed=1), random_values(3, 16)
    results = {}
    for straight_through in (True, False):
        inputs = values.clone().requires_grad_()
        quantizer = ActivationQuantizer(Grid(4, True), "per_tensor", straight_through=straight_through)
        output = QuantizedLinear(weight, None, quantizer)(inputs)
        results[straight_through] = output.detach()
        if straight_through:
            output.sum().backward()
            torch.testing.assert_close(inputs.grad, weight.sum(0).expand(3, 16))
        else:
            assert not output.requires_grad
    torch.testing.assert_close(results[True], results[False], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_gives_the_very_values_of_rounding(static: bool, dtype: torch.dtype) -> None:
    values = (random_values(30, 16) * torch.logspace(-3, 3, 16)).to(dtype)
    static_range = (torch.tensor(-0.7), torch.tensor(1.3)) if static else None
    plain = ActivationQuantizer(Grid(8, False), "per_tensor", static_range)
    straight = ActivationQuantizer(Grid(8, False), "per_tensor", static_range, straight_through=True)
    assert torch.equal(straight(values), plain(values))
