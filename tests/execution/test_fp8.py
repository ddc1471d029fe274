"""Linears on FP8 numbers: those of the simulation, padded as a GPU wants them, and what is refused in advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts, random_values
from omegaconf import OmegaConf
from on_codes import SHAPES, assert_every_linear_agrees, assert_near, assert_what_is_not_finite_stays_so
from torch import Tensor, nn

from cushion.checks import structured
from cushion.cli import config_folder
from cushion.config import (
    ActivationConfig,
    CompensationConfig,
    KvCacheConfig,
    QuantizerConfig,
    RunConfig,
    WeightConfig,
)
from cushion.errors import ConfigError, NotFiniteError
from cushion.execution import fp8
from cushion.execution.fp8 import Fp8, Fp8Linear, check_fp8_matmul
from cushion.execution.simulated import Simulated
from cushion.models import LanguageModel
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.formats.floats import Fp8E4M3
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid, quantize_weight

Tiny = Callable[..., LanguageModel]
GRID = Fp8E4M3(8, True)
INPUTS = {"static": ("per_tensor", True), "dynamic": ("per_tensor", False), "token": ("per_token", False)}


def quantizer_of(case: str) -> ActivationQuantizer:
    granularity, is_static = INPUTS[case]
    return ActivationQuantizer(GRID, granularity, (torch.tensor(-2.0), torch.tensor(1.5)) if is_static else None)


def pair(case: str, granularity: str, inputs: int, outputs: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    """The same linear on FP8 numbers and simulated."""
    found = quantize_weight(random_values(outputs, inputs, seed=1), GRID, granularity)
    offset = random_values(outputs, seed=2) if bias else None
    execution = Fp8()
    return execution.linear(found, offset, quantizer_of(case)), Simulated().linear(found, offset, quantizer_of(case))


@pytest.mark.parametrize("on_gpu", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("case", INPUTS)
def test_a_linear_on_fp8_numbers_is_the_simulated_one(case: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_gpu:
        padded = fp8.padded_weight
        monkeypatch.setattr(fp8, "padded_weight", lambda numbers, _: padded(numbers, True))
    for granularity, bias, rows, inputs, outputs in SHAPES:
        exact, simulated = pair(case, granularity, inputs, outputs, bias)
        assert isinstance(exact, Fp8Linear)
        assert exact.numbers.shape == ((-(-inputs // 16) * 16, 16) if on_gpu else (inputs, outputs))
        values = 1.5 * random_values(2, rows, inputs, seed=rows)
        assert_near(exact(values), simulated(values), (granularity, rows, inputs, outputs))


@pytest.mark.parametrize("case", INPUTS)
def test_what_is_not_finite_stays_so(case: str) -> None:
    exact, simulated = pair(case, "per_channel", 16, 4, bias=True)
    assert_what_is_not_finite_stays_so(exact, simulated, 16)
    weight = random_values(4, 16)
    weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="a weight is not finite"):
        Fp8().linear(quantize_weight(weight, GRID, "per_tensor"), None, quantizer_of(case))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_every_linear_of_a_model_agrees_on_the_very_same_input(tiny: Tiny, family: str) -> None:
    lm, text = tiny(family), random_texts(4, 24)
    config = option("fp8_static")
    fitted = FittedQuantizer(config, calibrated(lm, text))
    assert_every_linear_agrees(lm, text, fitted, "fp8")


def option(name: str) -> QuantizerConfig:
    file = config_folder() / "quantizer" / f"{name}.yaml"
    found: QuantizerConfig = structured(QuantizerConfig, OmegaConf.load(file), "quantizer")
    return found


def test_of_the_options_those_in_e4m3_run() -> None:
    names = [path.stem for path in (config_folder() / "quantizer").glob("*.yaml")]
    assert {name for name in names if fp8.unsupported(option(name)) is None} == {"fp8_static", "fp8_token"}
    assert RunConfig(execution="fp8").execution == "fp8"


def in_e4m3(**changes: Any) -> QuantizerConfig:
    weights = WeightConfig(format="fp8_e4m3", **changes.pop("weights", {}))
    inputs = ActivationConfig(range="dynamic", format=changes.pop("inputs", "fp8_e4m3"))
    return QuantizerConfig(weights=weights, activations=inputs, **changes)


REFUSED = {
    r"quantizer=none quantizes nothing": QuantizerConfig("none", WeightConfig(None), ActivationConfig(None)),
    r"quantizer\.weights\.format=int, .* set it to fp8_e4m3": QuantizerConfig(),
    r"quantizer\.activations\.format=fp8_e5m2": in_e4m3(inputs="fp8_e5m2"),
    r"quantizer\.weights\.granularity=per_group": in_e4m3(weights={"granularity": "per_group", "group_size": 8}),
    r"quantizer\.compensation\.method=lqer": in_e4m3(compensation=CompensationConfig("lqer")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_made_of_e4m3_numbers_is_refused_with_the_way_out(tiny: Tiny, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"execution=fp8 cannot run {reason}.*or use execution=simulated"):
        Fp8().check(tiny("llama"), REFUSED[reason])


def test_a_part_that_changed_weights_or_inputs_is_refused() -> None:
    weight = quantize_weight(random_values(4, 16), GRID, "per_channel")
    with pytest.raises(ConfigError, match="execution=fp8 needs symmetric codes of every weight"):
        Fp8().linear(weight.dequantize(), None, quantizer_of("token"))
    with pytest.raises(ConfigError, match="execution=fp8 needs 8-bit codes of every input"):
        Fp8().linear(weight, None, ActivationQuantizer(Grid(8, True), "per_token"))


def test_a_product_that_is_wrong_or_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device, product = torch.device("cpu"), fp8.functional.scaled_mm
    check_fp8_matmul(device)
    monkeypatch.setattr(fp8.functional, "scaled_mm", lambda *given, **named: 1.02 * product(*given, **named))
    with pytest.raises(ConfigError, match="on cpu it is wrong for 1 x 40 x 24 values: use execution=simulated"):
        check_fp8_matmul(device)

    def missing(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("not implemented\nmore of it")

    monkeypatch.setattr(fp8.functional, "scaled_mm", missing)
    with pytest.raises(ConfigError, match=r"fails on cpu .*8\.9 on\): not implemented; use execution=simulated$"):
        check_fp8_matmul(device)


def test_a_cpu_and_what_stays_simulated_are_said(tiny: Tiny) -> None:
    first, second = Fp8().warnings(tiny("llama"), in_e4m3(kv_cache=KvCacheConfig(bits=8)))
    assert "figures of speed mean nothing here" in first
    assert "execution=fp8 runs linears on FP8 numbers; quantizer.kv_cache stays simulated" in second
