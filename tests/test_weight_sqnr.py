"""The script that measures what smoothing costs the weights: its ratio by hand, and a planted outlier channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from helpers import calibrated, load_script, random_texts, random_values

from cushion.config import QuantizerConfig, WeightConfig
from cushion.models import LanguageModel


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("weight_sqnr")


def test_the_ratio_is_that_of_the_formula(script: ModuleType) -> None:
    weight = random_values(8, 32)
    step = weight.abs().max() / 127
    noise = weight - step * torch.round(weight / step)
    expected = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
    assert script.sqnr(weight, 8, "per_tensor", 16) == pytest.approx(expected, abs=1e-3)
    uniform = torch.linspace(-1, 1, 4001).reshape(1, -1)
    of_bits = [script.sqnr(uniform, bits, "per_tensor", 1) for bits in (7, 8)]
    assert of_bits[1] - of_bits[0] == pytest.approx(20 * math.log10(127 / 63), abs=0.2)


def test_a_channel_that_smoothing_blows_up_costs_a_tensors_scale_more_than_a_groups(
    script: ModuleType, tiny: Callable[..., LanguageModel]
) -> None:
    lm = tiny("llama")
    names = script.smoothed_linears(lm)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    with torch.no_grad():
        for block in lm.blocks:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[5] *= 300.0  # one channel of the inputs stands out
    config = QuantizerConfig(weights=WeightConfig(bits=8, group_size=16), smoothing_alpha=0.8)
    before = {name: linear.weight.clone() for name, linear in lm.linears().items()}
    found = script.ratios(lm, config, calibrated(lm, random_texts(3, 24)))
    losses = {granularity: plain - smoothed for granularity, (plain, smoothed) in found.items()}
    assert losses["per_tensor"] > losses["per_group"] + 3 > 3
    assert all(torch.equal(linear.weight, before[name]) for name, linear in lm.linears().items())
    alone = script.ratios(lm, replace(config, smoothing_alpha=0.0), calibrated(lm, random_texts(3, 24)))
    assert alone["per_tensor"][0] == found["per_tensor"][0]
