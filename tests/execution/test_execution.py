"""Executions: the registry decides what stands for a linear, and what it is given says all of a weight."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import registered
from tiny_run import small_config
from torch import Tensor, nn
from torch.nn import functional

from cushion import pipeline
from cushion.config import ActivationConfig, QuantizerConfig, RunConfig, WeightConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError
from cushion.execution.base import Execution
from cushion.execution.registry import load_execution
from cushion.models import LanguageModel
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, QuantizedWeight, quantize_weight
from cushion.registry import EXECUTIONS

Tiny = Callable[..., LanguageModel]


def old_formula(weight: Tensor, grid: Grid, granularity: str, size: int) -> Tensor:
    """Quantize-dequantize row by row and group by group, as the definition has it, in float32."""
    rows = {"per_tensor": [weight], "per_channel": list(weight), "per_group": list(weight.reshape(-1, size))}
    found = []
    for part in rows[granularity]:
        values = part.float()
        low, high = values.min(), values.max()
        if not grid.symmetric:
            steps = 2**grid.bits - 1 if grid.levels == "full" else 2 ** (grid.bits - 1) - 1
            scale = (high - low) / steps
            codes = torch.clamp(torch.round((values - low) / scale), 0, steps)
            found.append((codes * scale + low).to(weight.dtype))
        else:
            steps = 2 ** (grid.bits - 1) - 1
            width = torch.maximum(high, -low) if grid.levels == "full" else high.clamp(min=0) - low.clamp(max=0)
            scale = width / steps
            codes = torch.clamp(torch.round(values / scale), -steps, steps)
            found.append((codes * scale).to(weight.dtype))
    return torch.cat([part.reshape(-1) for part in found]).reshape(weight.shape)


def bits_of(values: Tensor) -> Tensor:
    return values.contiguous().view({2: torch.int16, 4: torch.int32}[values.element_size()])


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dequantized_weight_is_that_of_the_formula_bit_for_bit(granularity: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for grid in (Grid(bits, symmetric, levels) for bits in (2, 4, 8) for symmetric in (True, False)
                 for levels in ("full", "paper")):  # fmt: skip
        found = quantize_weight(weight, grid, granularity, 4)
        values = found.dequantize()
        assert (values.shape, values.dtype) == (weight.shape, dtype)
        assert torch.equal(bits_of(values), bits_of(old_formula(weight, grid, granularity, 4)))
        assert torch.equal(bits_of(found.dequantize()), bits_of(values)), "it can be asked twice"


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_whole_numbers_of_the_grid(symmetric: bool) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, symmetric)
    found = quantize_weight(weight, grid, "per_group", 4)
    low, high = grid.bounds
    assert found.codes.shape == (6, 4, 4)
    assert found.scale.shape == (6, 4, 1)
    assert (found.offset is None) == symmetric
    assert torch.equal(found.codes, found.codes.round())
    if symmetric:  # the largest of every group is at an end of the grid
        assert (found.codes.abs().amax(2) == high).all()
    else:
        assert (found.codes.amin(2) == low).all()
        assert (found.codes.amax(2) == high).all()


def test_a_weight_that_is_not_finite_stays_so() -> None:
    weight = torch.tensor([[1.0, float("nan")], [2.0, -1.0]])
    for granularity in ("per_tensor", "per_channel"):
        values = quantize_weight(weight, Grid(8, True), granularity).dequantize()
        assert values[0, 1].isnan()


class Doubled(nn.Module):
    """Gives twice what the linear gives, and remembers the weight that it was made of."""

    def __init__(self, weight: QuantizedWeight | Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.given, self.bias = weight, bias

    def forward(self, values: Tensor) -> Tensor:
        weight = self.given.dequantize() if isinstance(self.given, QuantizedWeight) else self.given
        return 2 * functional.linear(values, weight, self.bias)


class Doubling(Execution):
    def check(self, lm: LanguageModel, quantizer: QuantizerConfig) -> None:
        if quantizer.weights.bits == 5:
            raise ConfigError("execution=doubling takes no quantizer.weights.bits=5: use 4")

    def linear(self, weight: Any, bias: Tensor | None, activation: ActivationQuantizer | None) -> nn.Module:
        return Doubled(weight, bias)


@pytest.fixture
def doubling() -> Iterator[str]:
    with registered(EXECUTIONS, "doubling", f"{__name__}:Doubling"):
        yield "doubling"


def test_the_execution_of_a_run_computes_its_quantized_rows_and_nothing_else(
    text_file: Path, tmp_path: Path, doubling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cushion.execution.registry.version_at", lambda place: "of the test")
    config = small_config(text_file, tmp_path)
    simulated = pipeline.run(config)
    doubled = pipeline.run(replace(config, execution=doubling))
    for row, other in zip(simulated.rows, doubled.rows, strict=True):
        same = row.under("perplexity") == other.under("perplexity")
        assert same == (not row.quantized), row.name
    assert simulated.search == doubled.search
    weights = replace(config.quantizer.weights, bits=5)
    refused = replace(config, execution=doubling, quantizer=replace(config.quantizer, weights=weights))
    with pytest.raises(ConfigError, match=r"execution=doubling takes no quantizer\.weights\.bits=5"):
        pipeline.run(refused)


def test_an_execution_that_there_is_not_is_refused_and_one_without_effect_warned_of() -> None:
    with pytest.raises(ConfigError, match=r"execution='simulate' is not allowed: .*did you mean 'simulated'"):
        RunConfig(execution="simulate")
    plain = QuantizerConfig("none", WeightConfig(None), ActivationConfig(None))
    with registered(EXECUTIONS, "other", "somewhere:Other"):
        assert "execution='other' has no effect with quantizer=none" in options_without_effect(
            RunConfig(quantizer=plain, execution="other")
        )


@pytest.mark.usefixtures("doubling")
def test_linears_are_built_by_the_execution_alone(tiny: Tiny) -> None:
    lm = tiny()
    names, before = set(lm.linears()), list(lm.model.modules())
    for weight_bits in (4, None):
        config = QuantizerConfig("q", WeightConfig(weight_bits), ActivationConfig(8, range="dynamic"))
        with FittedQuantizer(config).on(lm, execution="doubling"):
            found = {name: module for name, module in lm.model.named_modules() if isinstance(module, Doubled)}
            assert set(found) == names
            assert not any(isinstance(module, QuantizedLinear) for module in lm.model.modules())
            for module in found.values():
                assert isinstance(module.given, Tensor if weight_bits is None else QuantizedWeight)
        with FittedQuantizer(config).on(lm):
            assert {n for n, module in lm.model.named_modules() if isinstance(module, QuantizedLinear)} == names
    assert list(lm.model.modules()) == before


def test_the_simulated_execution_takes_quantized_and_plain_weights() -> None:
    weight, bias = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    execution = load_execution("simulated")
    rounded = quantize_weight(weight, Grid(3, True), "per_channel")
    for given, used in ((weight, weight), (rounded, rounded.dequantize())):
        assert torch.equal(execution.linear(given, bias, None)(values), functional.linear(values, used, bias))


def test_the_registry_needs_no_torch() -> None:
    script = "import sys, cushion.execution.registry; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
