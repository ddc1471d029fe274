"""FP8, MX and NVFP4 against their definitions, torch's casts, torchao and compressed-tensors, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from float_tensors import ELEMENTS, edges, numbers, tensors
from torch import Tensor

from cushion.quantization.formats.blocks import fake_quantize_blocks
from cushion.quantization.formats.floats import E2M1, E4M3, round_to_float
from cushion.quantization.formats.microscaling import power_of_two_scale
from cushion.quantization.formats.nvfp4 import block_scale, tensor_scale
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.numerics import quantize_weight

RULES = ("floor", "even", "ceil", "rceil")
MX = {"mxfp8": "E4M3", "mxfp6": "E2M3", "mxfp4": "E2M1"}


def rounded(values: Tensor, name: str) -> Tensor:
    element = ELEMENTS[name]
    return round_to_float(values, element.exponent, element.mantissa, element.largest)


def grid_of(name: str, rule: str | None = None) -> Any:
    form = FORMATS[name]
    return form.make(form.bits[0], True, shared_exponent=rule)


# Elements.


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """The nearest numbers, of two that are equally near the one with the even code; in float64, where that is exact."""
    size = values.double().abs().clamp(max=float(grid[-1]))
    distance = (size[:, None] - grid.double()).abs()
    best = distance.amin(1, keepdim=True)
    odd = torch.arange(len(grid)) % 2
    code = (torch.where(distance == best, odd, 2)).argmin(1)
    return grid[code] * values.sign()


@pytest.mark.parametrize("name", ELEMENTS)
def test_values_become_the_nearest_number(name: str) -> None:
    values = torch.cat([edges(ELEMENTS[name]), *(one.flatten()[::4] for one in tensors().values())])
    before = values.clone()
    assert torch.equal(rounded(values, name), nearest(values, numbers(ELEMENTS[name])))
    assert torch.equal(values, before)


def test_what_is_not_a_number_stays_so_and_infinity_becomes_the_largest() -> None:
    found = rounded(torch.tensor([torch.nan, torch.inf, -torch.inf]), "E4M3")
    assert found[0].isnan()
    assert found[1:].tolist() == [448, -448]


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)])
def test_fp8_is_torchs_cast_of_clamped_values(name: str, dtype: torch.dtype) -> None:
    largest = ELEMENTS[name].largest
    every = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(1))
    any_bits = every.to(torch.int32).view(torch.float32).nan_to_num()
    values = torch.cat([edges(ELEMENTS[name]), any_bits, *(one.flatten() for one in tensors().values())])
    assert torch.equal(rounded(values, name), values.clamp(-largest, largest).to(dtype).float())


# Shared exponents.


@pytest.mark.parametrize("name", MX.values())
def test_the_shared_exponent_follows_its_rule(name: str) -> None:
    element = ELEMENTS[name]
    size = torch.cat([torch.logspace(-30, 30, 2001), 2.0 ** torch.arange(-20.0, 20.0), edges(element).abs()]).float()
    size = size[size > 1e-30].sort().values
    largest = size[:, None].double()
    emax = element.largest_exponent
    scale = {rule: power_of_two_scale(size, element, rule).double()[:, None] for rule in RULES}
    for rule, own in scale.items():
        assert torch.equal(own, 2.0 ** own.log2().round()), rule
    assert torch.equal(scale["floor"], 2.0 ** (largest.log2().floor() - emax))
    assert torch.equal(scale["ceil"], 2.0 ** (largest.log2().ceil() - emax))
    over = largest / scale["rceil"]  # the smallest with which nothing is clipped
    assert bool((over <= element.largest).all())
    assert bool((2 * over > element.largest).all())
    digits = 2.0 ** (largest.log2().floor() - element.mantissa)
    up = (largest / digits + 0.5).floor() * digits  # to m bits of mantissa, ties up
    assert torch.equal(scale["even"], 2.0 ** (up.log2().floor() - emax))


def test_the_smallest_scale_is_that_of_e8m0() -> None:
    for rule in RULES:
        scale = power_of_two_scale(torch.tensor([0.0, 1e-45, 1e-38]), E4M3, rule)
        assert scale.tolist() == [2.0**-127] * 3, rule
    assert not fake_quantize_blocks(torch.zeros(2, 32), grid_of("mxfp8")).any()


# NVFP4.


@pytest.mark.parametrize("case", tensors())
def test_nvfp4_by_its_definition(case: str) -> None:
    values = tensors()[case]
    t = values.abs().max() / (448 * 6)
    blocks = values.reshape(len(values), -1, 16)
    b = (blocks.abs().amax(-1, keepdim=True) / 6 / t).to(torch.float8_e4m3fn).float()
    b = torch.where(b == 0, 2.0**-9, b)
    expected = nearest((blocks / (b * t)).flatten().clamp(-6, 6), numbers(E2M1)).reshape(blocks.shape) * (b * t)
    assert torch.equal(fake_quantize_blocks(values, grid_of("nvfp4")), expected.reshape(values.shape))


def test_a_static_tensor_scale_clips_what_lies_above_it() -> None:
    values = torch.linspace(-8, 8, 64)[None]
    found = fake_quantize_blocks(values, grid_of("nvfp4"), torch.tensor(4.0))
    assert float(found.max()) == pytest.approx(4)
    inside = values.abs() <= 2
    near = fake_quantize_blocks(values, grid_of("nvfp4"), torch.tensor(8.0))
    assert torch.allclose(found[inside], near[inside], atol=0.3)


def test_blocks_do_not_depend_on_what_fills_the_last_one_up() -> None:
    values = tensors()["plain"][:, :40]
    for name in (*MX, "nvfp4"):
        filled = torch.nn.functional.pad(values, (0, 24))
        assert torch.equal(
            fake_quantize_blocks(values, grid_of(name)), fake_quantize_blocks(filled, grid_of(name))[:, :40]
        )


@pytest.mark.parametrize("name", [*MX, "nvfp4"])
def test_weights_and_inputs_are_rounded_alike(name: str) -> None:
    values, grid = tensors()["planted"], grid_of(name)
    assert torch.equal(
        quantize_weight(values, grid, "per_group", grid.block).dequantize(), fake_quantize_blocks(values, grid)
    )
    half = values.bfloat16()
    assert torch.equal(fake_quantize_blocks(half, grid), fake_quantize_blocks(half.float(), grid).bfloat16())


# Independent implementations, where they are installed.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_is_torchaos(name: str, rule: str) -> None:
    """Also the shared exponents; torchao has the same smallest one for a block of zeros."""
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    dtype = {"mxfp8": torch.float8_e4m3fn, "mxfp6": "fp6_e2m3", "mxfp4": torch.float4_e2m1fn_x2}[name]
    for case, values in tensors().items():
        scale, data = to_mx(values, dtype, 32, ScaleCalculationMode(rule))
        expected = to_dtype(data, scale, dtype, 32, torch.float32)
        assert torch.equal(fake_quantize_blocks(values, grid_of(name, rule)), expected), case


@pytest.mark.parametrize("case", tensors())
def test_nvfp4_is_torchaos(case: str) -> None:
    """But for products of scales, which it multiplies by their reciprocals, and for block scales below 2^-6."""
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    values = tensors()[case]
    t = tensor_scale(values.abs().max())
    largest = values.reshape(len(values), -1, 16).abs().amax(-1)
    scale, _ = nvfp4_quantize(values, 16, t)
    assert torch.equal(scale.float(), block_scale(largest, t).clamp(min=2.0**-6))


def compressed(preset: str) -> tuple[Any, Any]:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    return preset_name_to_scheme(preset, ["Linear"]), fake_quantize


@pytest.mark.parametrize(("preset", "name"), [("MXFP8", "mxfp8"), ("MXFP6A16", "mxfp6"), ("MXFP4", "mxfp4")])
def test_mx_is_compressed_tensors(preset: str, name: str) -> None:
    scheme, fake = compressed(preset)
    from compressed_tensors.quantization.utils import calculate_qparams

    for case, values in tensors().items():
        blocks = values.reshape(len(values), -1, 32)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
        assert torch.equal(fake_quantize_blocks(values, grid_of(name)), fake(values, scale, zero, scheme.weights)), case


@pytest.mark.parametrize("case", tensors())
def test_nvfp4_is_compressed_tensors(case: str) -> None:
    """But for the rounding of the product of scales: it stores 1 / t."""
    scheme, fake = compressed("NVFP4A16")
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    values = tensors()[case]
    blocks = values.reshape(len(values), -1, 16)
    inverse = generate_gparam(values.min(), values.max())
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=inverse)
    own = block_scale(blocks.abs().amax(-1), tensor_scale(values.abs().max()))
    ordinary = own > 2.0**-9
    assert torch.equal(scale.float()[ordinary], own[ordinary])
    expected = fake(values, scale, zero, scheme.weights, global_scale=inverse).reshape(blocks.shape)[ordinary]
    found = fake_quantize_blocks(values, grid_of("nvfp4")).reshape(blocks.shape)[ordinary]
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_fp8_is_compressed_tensors(granularity: str) -> None:
    scheme, fake = compressed("FP8")
    from compressed_tensors.quantization.utils import calculate_qparams

    dims = (0, 1) if granularity == "per_tensor" else (1,)
    for case, values in tensors().items():
        scale, zero = calculate_qparams(
            values.amin(dims, keepdim=True), values.amax(dims, keepdim=True), scheme.weights
        )
        found = quantize_weight(values, grid_of("fp8_e4m3"), granularity).dequantize()
        assert torch.equal(found, fake(values, scale, zero, scheme.weights)), case
