"""Rotation of the inputs of linears: the function stays, an outlier channel spreads, ranges fit what is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VARIANTS
from helpers import calibrated, random_texts
from torch import Tensor
from torch.nn import functional
from untouched import assert_untouched, snapshot

from cushion.activations import observe_inputs
from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import check_quantizer
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.hadamard import randomized_hadamard
from cushion.quantization.input_statistics import observe_fitted
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.parts.activations import EXTREMES
from cushion.quantization.simulate import quantized
from cushion.quantization.statistics.extremes import Extremes
from cushion.quantization.statistics.gathered import GatheredStatistics

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 24)
OFF = {"weights": WeightConfig(bits=None), "activations": ActivationConfig(bits=None)}


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    return lm.model(TEXTS, past_key_values=Prefix.empty().cache(lm.model, len(TEXTS)), use_cache=True).logits


def inputs_of(lm: LanguageModel, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    modules = {name: lm.model.get_submodule(name) for name in names}
    with observe_inputs(modules, lambda name, values: seen.update({name: values.detach().clone()})):
        logits(lm)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["down", "all"])
def test_the_function_stays_and_the_model_comes_back(tiny: Tiny, family: str, which: str) -> None:
    lm = tiny(family)
    untouched, before = logits(lm), snapshot(lm)
    down = [name for names in lm.down_projections().values() for name in names]
    names = list(lm.linears()) if which == "all" else down
    plain = inputs_of(lm, names)
    rotation = "none" if lm.architecture.residual is None else "hadamard"
    with quantized(lm, QuantizerConfig(input_rotation=which, rotation=rotation, rotation_seed=2, **OFF)):
        torch.testing.assert_close(logits(lm), untouched, rtol=0, atol=1e-4)
    with quantized(lm, QuantizerConfig(input_rotation=which, **OFF)):
        torch.testing.assert_close(logits(lm), untouched, rtol=0, atol=1e-4)
        turned = inputs_of(lm, names)
    for name in plain:
        expected = plain[name] @ randomized_hadamard(plain[name].shape[-1]).float()
        torch.testing.assert_close(turned[name], expected, rtol=1e-3, atol=1e-4)
    assert_untouched(lm, before)
    assert not any(linear._forward_pre_hooks for linear in lm.linears().values())


@pytest.mark.parametrize("family", VARIANTS)
def test_mixing_heads_keeps_the_function_and_makes_a_hadamard_matrix_of_the_values(tiny: Tiny, family: str) -> None:
    """With the values of each head rotated, the output projection reads H x H_d of what it read: QuaRot's stage 1d."""
    lm = tiny(family)
    untouched, values = logits(lm), lm.architecture.values
    assert values is not None
    name = f"{lm.architecture.blocks}.1.{values.reader}"
    _, _, size = lm.architecture.cache_shape(lm.model.config.get_text_config())
    plain = inputs_of(lm, [name])[name]
    with quantized(lm, QuantizerConfig(input_rotation="down_and_heads", head_rotation="values", **OFF)):
        torch.testing.assert_close(logits(lm), untouched, rtol=0, atol=1e-4)
        turned = inputs_of(lm, [name])[name]
    matrix = torch.kron(randomized_hadamard(plain.shape[-1] // size), randomized_hadamard(size)).float()
    torch.testing.assert_close(turned, plain @ matrix, rtol=1e-3, atol=1e-4)


def fitted(lm: LanguageModel, config: QuantizerConfig, texts: Tensor) -> FittedQuantizer:
    """With min-max ranges, which are gathered as the linears read their inputs."""
    assert EXTREMES in config.statistics
    ranges = calibrated(lm, texts) if config.needs_calibration else None
    gathered = GatheredStatistics(Extremes)
    for _ in observe_fitted(lm, Prefix.empty(), texts, FittedQuantizer(config, ranges), [gathered]):
        pass
    return FittedQuantizer(config, ranges, inputs={EXTREMES: gathered.by_linear})


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_static_quantizer_recomputed(tiny: Tiny, alpha: float | None) -> None:
    """Smoothed, rotated, rounded on the range of what is read then; the down projection of the first block."""
    lm = tiny("llama")
    config = QuantizerConfig(
        input_rotation="all", smoothing_alpha=alpha, weights=WeightConfig(granularity="per_channel")
    )
    found = fitted(lm, config, TEXTS)
    name = "model.layers.0.mlp.down_proj"
    linear = lm.linears()[name]
    with found.on(lm):
        module: Any = lm.model.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(lambda _m, _args, out: seen.append((_args[0], out)))
        logits(lm)
        handle.remove()
    matrix = randomized_hadamard(linear.in_features).float()
    values, output = seen[0]
    low, high = found.inputs[EXTREMES][name].range
    grid, weight = Grid(8, True), (linear.weight.double() @ matrix.double()).float()
    rows = grid.parameters(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True))
    expected = functional.linear(
        fake_quantize(values, *grid.parameters(low, high), grid), fake_quantize(weight, *rows, grid)
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_it_rescues_four_bits_from_an_outlier_channel(tiny: Tiny) -> None:
    lm = tiny("llama")
    with torch.no_grad():
        for index in range(len(lm.blocks)):
            lm.model.get_submodule(f"model.layers.{index}.mlp.up_proj").weight[5] *= 30
            lm.model.get_submodule(f"model.layers.{index}.mlp.down_proj").weight[:, 5] /= 30
    untouched, errors = logits(lm), {}
    coarse = ActivationConfig(bits=4, granularity="per_token", range="dynamic")
    config = QuantizerConfig(weights=WeightConfig(bits=None), activations=coarse, targets=["down_proj"])
    for which in ("none", "down"):
        with quantized(lm, replace(config, input_rotation=which)):
            errors[which] = float((logits(lm) - untouched).square().mean())
    assert errors["down"] < errors["none"] / 3


def test_what_does_not_fit_is_refused(tiny: Tiny) -> None:
    lm = tiny("llama")
    with pytest.raises(ConfigError, match=r"input_rotation=down finds no linear in tiny_llama.*use .*none or all"):
        check_quantizer(lm, QuantizerConfig(input_rotation="down", targets=["q_proj"]))
    with pytest.raises(ConfigError, match=r"quantizer\.input_rotation='dwn' is not allowed.*did you mean 'down'"):
        QuantizerConfig(input_rotation="dwn")
    config = QuantizerConfig(input_rotation="down")
    with pytest.raises(CalibrationError, match="Extremes"), quantized(lm, config, calibrated(lm, TEXTS)):
        pytest.fail("the body must not run")


def test_extremes_are_those_of_all_texts_and_survive_saving() -> None:
    found, texts = Extremes(), torch.randn(4, 6, 5)
    for text in texts:
        found.update(text)
    found.update(torch.empty(0, 5))
    again = Extremes.of(found.tensors())
    assert torch.stack(again.range).tolist() == [float(texts.min()), float(texts.max())]
    assert again.is_finite and Extremes.of(Extremes().tensors()).is_empty
    again.update(torch.tensor([[float("nan"), 1.0]]))
    assert not again.is_finite
