"""The options `cushioncache_*` do to a model what CushionCache says, computed again by torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from composing import composed
from helpers import calibrated, random_texts
from torch import Tensor

from cushion.config import QuantizerConfig, to_dict
from cushion.models import LanguageModel
from cushion.quantization.linear import QuantizedLinear
from cushion.quantization.simulate import quantized

GROUP = 16
"""Of the 32 features of a tiny model, in place of the options' 64."""
LINEAR = "model.layers.1.mlp.down_proj"


def option(name: str) -> QuantizerConfig:
    config = composed(f"quantizer={name}").quantizer
    return replace(config, weights=replace(config.weights, group_size=GROUP))


def zero_points(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of unsigned 8-bit integers, as kernels have them; the range is widened to contain 0."""
    low, high = low.clamp(max=0).double(), high.clamp(min=0).double()
    scale = torch.where(high > low, (high - low) / 255, 1.0)
    return scale, torch.round(-low / scale)


def assert_same_but_for_ties(ours: Tensor, theirs: Tensor, scale: Tensor) -> None:
    away = (ours.double() - theirs.double()).abs() / scale
    assert away.max() < 1.01
    assert (away > 1e-3).double().mean() < 2e-3


@pytest.mark.parametrize(
    ("name", "dims", "is_static"),
    [("cushioncache_static", None, True), ("cushioncache_dynamic", None, False), ("cushioncache_token", (-1,), False)],
)
def test_weights_are_symmetric_by_group_and_inputs_have_an_integer_zero_point(
    tiny: Callable[..., LanguageModel], name: str, dims: tuple[int, ...] | None, is_static: bool
) -> None:
    lm = tiny("llama")
    ranges = calibrated(lm, random_texts(3, 24))
    weight = lm.linears()[LINEAR].weight.detach().clone()
    values = torch.randn(2, 10, weight.shape[1], generator=torch.Generator().manual_seed(3)) + 1.5
    values[0, 0, 0], values[1, 4] = -0.7, 0.0
    with quantized(lm, option(name), ranges):
        linear = lm.model.get_submodule(LINEAR)
        assert isinstance(linear, QuantizedLinear) and linear.activation is not None
        inputs, own_weight = linear.activation(values), linear.weight.detach().clone()

    groups = weight.reshape(-1, GROUP)
    steps = groups.abs().amax(1) / 127
    none = torch.zeros(len(groups), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(groups, steps, none, 0, -127, 127)
    assert_same_but_for_ties(own_weight.reshape(-1, GROUP), expected, steps[:, None].double())

    if is_static:
        low, high = ranges.minimum[LINEAR].min(), ranges.maximum[LINEAR].max()
    elif dims is None:
        low, high = values.min(), values.max()
    else:
        low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    scale, zero = zero_points(low, high)
    codes = (torch.round(values.double() / scale) + zero).clamp(0, 255)
    assert_same_but_for_ties(inputs, (codes - zero) * scale, scale)
    assert (zero != 0).any(), "the range is not one-sided: an offset is at work"
    assert (inputs[1, 4] == 0).all(), "zero stays zero"


def test_with_smoothing_nothing_else_changes() -> None:
    for smoothed, plain in (("o1", "token"), ("o2", "dynamic"), ("o3", "static")):
        with_alpha, without = (to_dict(option(f"cushioncache_{name}")) for name in (smoothed, plain))
        assert {**with_alpha, "name": "", "smoothing_alpha": None} == {**without, "name": ""}
        assert (with_alpha["smoothing_alpha"], without["smoothing_alpha"]) == (0.8, None)
