"""Linears on 8-bit codes: exact sums, the very codes of the simulation, and refusals before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts, random_values
from on_codes import SHAPES, assert_every_linear_agrees, assert_near, assert_what_is_not_finite_stays_so
from tiny_run import small_config
from torch import Tensor, nn

from cushion import pipeline
from cushion.config import (
    ActivationConfig,
    AttentionConfig,
    CalibrationConfig,
    CompensationConfig,
    KvCacheConfig,
    QuantizerConfig,
    WeightConfig,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError, NotFiniteError
from cushion.execution import int8, int8_matmul
from cushion.execution.int8 import Int8, Int8Linear
from cushion.execution.simulated import Simulated
from cushion.models import LanguageModel
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, quantize_weight

Tiny = Callable[..., LanguageModel]

INPUTS = {
    "static": (Grid(8, True), "per_tensor", (-2.0, 1.5)),
    "static, full range": (Grid(8, True, narrow_range=False), "per_tensor", (-2.0, 1.5)),
    "static, zero point": (Grid(8, False, zero_point="integer"), "per_tensor", (-0.7, 2.0)),
    "static, zero point, paper": (Grid(8, False, "paper", "integer"), "per_tensor", (-0.7, 2.0)),
    "dynamic": (Grid(8, True), "per_tensor", None),
    "dynamic, zero point": (Grid(8, False, zero_point="integer"), "per_tensor", None),
    "token": (Grid(8, True), "per_token", None),
    "token, zero point": (Grid(8, False, zero_point="integer"), "per_token", None),
}


def quantizer_of(case: str) -> ActivationQuantizer:
    grid, granularity, fixed = INPUTS[case]
    ends = None if fixed is None else (torch.tensor(fixed[0]), torch.tensor(fixed[1]))
    return ActivationQuantizer(grid, granularity, ends)


def pair(case: str, granularity: str, inputs: int, outputs: int, bias: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """The same linear on codes and simulated, and its weight."""
    weight = random_values(outputs, inputs, seed=1)
    found = quantize_weight(weight, Grid(8, True), granularity)
    offset = random_values(outputs, seed=2) if bias else None
    execution = Int8()
    return (
        execution.linear(found, offset, quantizer_of(case)),
        Simulated().linear(found, offset, quantizer_of(case)),
        found.codes,
    )


@pytest.mark.parametrize("on_gpu", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("case", INPUTS)
def test_a_linear_on_codes_is_the_simulated_one(case: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_gpu:  # the padding that a GPU needs changes nothing; the product itself is the same one
        padded, product = int8_matmul.padded_weight, int8_matmul.int8_matmul
        monkeypatch.setattr(int8, "padded_weight", lambda codes, _: padded(codes, True))
        monkeypatch.setattr(
            int8, "int8_matmul", lambda values, weight, outputs, _: product(values, weight, outputs, True)
        )
    for granularity, bias, rows, inputs, outputs in SHAPES:
        exact, simulated, _ = pair(case, granularity, inputs, outputs, bias)
        assert isinstance(exact, Int8Linear)
        values = 1.5 * random_values(2, rows, inputs, seed=rows)
        assert_near(exact(values), simulated(values), (granularity, rows, inputs, outputs))


@pytest.mark.parametrize("case", INPUTS)
def test_the_sums_are_those_of_whole_numbers(case: str) -> None:
    """Recomputed from the definition in float64, in which they are exact."""
    exact, _, weight_codes = pair(case, "per_channel", 64, 6, bias=False)
    assert isinstance(exact, Int8Linear)
    values = 2 * random_values(9, 64, seed=3)
    found = quantizer_of(case).codes(values)
    zero = torch.round(-found.offset.double() / found.scale.double())
    sums = (found.values.double() - zero) @ weight_codes.double().t()
    wanted = sums * found.scale.double() * exact.scale.double()
    assert torch.allclose(exact(values).double(), wanted, rtol=1e-6, atol=0)


def test_the_narrow_range_decides_the_lowest_code_and_nothing_else() -> None:
    values = torch.tensor([-5.0, -1.0, 0.25, 5.0])
    codes = {}
    for narrow in (True, False):
        grid = Grid(8, True, narrow_range=narrow)
        codes[narrow] = ActivationQuantizer(grid, "per_tensor", (torch.tensor(-1.0), torch.tensor(1.0))).codes(values)
    assert codes[True].values.tolist() == [-127, -127, 32, 127]
    assert codes[False].values.tolist() == [-128, -127, 32, 127]
    assert torch.equal(codes[True].scale, codes[False].scale)
    assert Grid(8, False, narrow_range=False).bounds == Grid(8, False).bounds == (0, 255)


def test_the_narrow_range_is_in_a_key_where_it_can_have_an_effect() -> None:
    def key(**changes: Any) -> Any:
        quantizer = QuantizerConfig(activations=ActivationConfig(**changes))
        warned = any("narrow_range" in warning for warning in options_without_effect(config_with(quantizer)))
        return quantizer_identity(quantizer)["activations"], warned

    def config_with(quantizer: QuantizerConfig) -> Any:
        from cushion.config import RunConfig

        return RunConfig(quantizer=quantizer)

    assert key(narrow_range=False) == ({**key()[0], "narrow_range": False}, False)
    for changes in ({"symmetric": False}, {"range": "dynamic"}):
        assert key(narrow_range=False, **changes) == (key(**changes)[0], True)


@pytest.mark.parametrize(
    "family",
    [
        "llama", "opt", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmo2", "granite", "starcoder2", "gemma3_text",
    ],
)  # fmt: skip
def test_every_linear_of_a_model_agrees_on_the_very_same_input(tiny: Tiny, family: str) -> None:
    lm, text = tiny(family), random_texts(4, 24)  # every expert sees some of it
    config = QuantizerConfig("int8", WeightConfig(granularity="per_channel"), ActivationConfig(narrow_range=False))
    fitted = FittedQuantizer(config, calibrated(lm, text))
    assert_every_linear_agrees(lm, text, fitted, "int8")


def test_linears_that_read_one_tensor_quantize_it_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, calls = tiny("llama"), []
    original = ActivationQuantizer.codes
    monkeypatch.setattr(ActivationQuantizer, "codes", lambda own, values: calls.append(1) or original(own, values))
    config = QuantizerConfig("int8", activations=ActivationConfig(range="dynamic"))
    with torch.no_grad(), FittedQuantizer(config).on(lm, execution="int8"):
        lm.body(random_texts(1, 8))
        kept = [module.activation._last for module in lm.model.modules() if isinstance(module, Int8Linear)]
    assert len(calls) == 4 * len(lm.blocks)  # q/k/v, o, gate/up, down
    assert kept == [None] * 7 * len(lm.blocks), "nothing is kept when all have read it"


def test_kept_linears_stay_in_floating_point(tiny: Tiny) -> None:
    lm = tiny("llama")
    name = next(iter(lm.linears()))
    config = QuantizerConfig("int8", activations=ActivationConfig(range="dynamic"))
    with FittedQuantizer(config, keep=frozenset({name})).on(lm, execution="int8"):
        kept = lm.model.get_submodule(name)
        assert isinstance(kept, QuantizedLinear)
        assert kept.activation is None


@pytest.mark.parametrize("case", ["static", "token, zero point", "dynamic"])
def test_what_is_not_finite_stays_so(case: str) -> None:
    exact, simulated, _ = pair(case, "per_channel", 16, 4, bias=True)
    assert_what_is_not_finite_stays_so(exact, simulated, 16)
    weight = random_values(4, 16)
    weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="a weight is not finite"):
        Int8().linear(quantize_weight(weight, Grid(8, True), "per_tensor"), None, quantizer_of(case))


DYNAMIC = ActivationConfig(range="dynamic")
REFUSED = {
    r"quantizer=none quantizes nothing": QuantizerConfig("none", WeightConfig(None), ActivationConfig(None)),
    r"quantizer\.weights\.bits=4, .* set it to 8, or use execution=simulated": QuantizerConfig(weights=WeightConfig(4)),
    r"quantizer\.weights\.bits=null": QuantizerConfig(weights=WeightConfig(None)),
    r"quantizer\.activations\.bits=null": QuantizerConfig(activations=ActivationConfig(None)),
    r"quantizer\.activations\.bits=6": QuantizerConfig(activations=replace(DYNAMIC, bits=6)),
    r"quantizer\.weights\.granularity=per_group .* per_channel": QuantizerConfig(
        weights=WeightConfig(granularity="per_group", group_size=8)
    ),
    r"quantizer\.compensation\.method=lqer .* set it to none": QuantizerConfig(compensation=CompensationConfig("lqer")),
    r"quantizer\.zero_point=real .* set it to integer": QuantizerConfig(activations=replace(DYNAMIC, symmetric=False)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_codes_cannot_express_is_refused_with_the_way_out(tiny: Tiny, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"execution=int8 cannot run {reason}"):
        Int8().check(tiny("llama"), REFUSED[reason])


def test_more_inputs_than_32_bits_hold_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8.MOST_INPUTS * 255 * 128 < 2**31 <= (int8.MOST_INPUTS + 1) * 255 * 128
    monkeypatch.setattr(int8, "MOST_INPUTS", 40)
    with pytest.raises(ConfigError, match=r"hold up to 40 inputs, and model\.layers\.0\.mlp\.down_proj has 64"):
        Int8().check(tiny("llama"), QuantizerConfig())


def test_a_product_that_is_wrong_or_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device, product = torch.device("cpu"), torch._int_mm
    int8_matmul.check_int8_matmul(device)

    def saturating(values: Tensor, weight: Tensor) -> Tensor:  # as 16-bit sums of pairs are
        return product(values, weight).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.raises(ConfigError, match=r"needs an exact torch\._int_mm, and on cpu it is wrong"):
        int8_matmul.check_int8_matmul(device)

    def missing(values: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch, "_int_mm", missing)
    with pytest.raises(ConfigError, match="fails on cpu: not implemented; use execution=simulated"):
        int8_matmul.check_int8_matmul(device)


def test_a_slow_processor_and_what_stays_simulated_are_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, slow = tiny("llama"), "multiplies int8 17.0 times slower than float32"
    config = QuantizerConfig(kv_cache=KvCacheConfig(bits=8), attention=AttentionConfig(bits=8))
    monkeypatch.setattr(int8, "slowdown", lambda device: 17.0)
    first, second = Int8().warnings(lm, config)
    assert slow in first
    assert "quantizer.kv_cache and quantizer.attention stays simulated" in second
    monkeypatch.setattr(int8, "slowdown", lambda device: 0.4)
    assert Int8().warnings(lm, QuantizerConfig()) == []
    assert 0 < int8_matmul.slowdown(torch.device("cpu"), repeats=1) < 1e4


def test_a_run_on_codes_says_so_and_agrees_in_perplexity(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "slowdown", lambda device: 17.0)
    config = small_config(text_file, tmp_path)
    config.quantizer = QuantizerConfig(
        "int8_static",
        WeightConfig(granularity="per_channel"),
        ActivationConfig(narrow_range=False),
        calibration=CalibrationConfig(2, 16),
    )
    simulated, real = pipeline.run(config), pipeline.run(replace(config, execution="int8"))
    assert [row.label for row in real.rows] == ["full precision", "int8_static W8A8 (int8)"]
    assert any("multiplies int8 17.0 times slower" in warning for warning in real.warnings)
    (before,), (found,) = (list(result.rows[-1].under("perplexity").values()) for result in (simulated, real))
    assert found == pytest.approx(before, rel=1e-3)
    with pytest.raises(ConfigError, match=r"execution=int8 cannot run quantizer\.weights\.bits=4"):
        pipeline.run(replace(config, execution="int8", quantizer=replace(config.quantizer, weights=WeightConfig(4))))
