"""Searched smoothing: every error of the grid recomputed, the least taken, and the function as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOOTHABLE
from helpers import random_texts
from torch import Tensor
from untouched import assert_untouched, snapshot

from cushion.config import ActivationConfig, QuantizerConfig, RunConfig, WeightConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization import smoothing_search
from cushion.quantization.awq import awq_scales
from cushion.quantization.check import check_quantizer
from cushion.quantization.estimators.registry import ESTIMATORS
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.formats.blocks import quantize_weight_in_blocks
from cushion.quantization.formats.nvfp4 import Nvfp4
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.numerics import Grid
from cushion.quantization.os_plus import threshold_scales
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.quantization.smoothing_search import SmoothingSearch, search_smoothing
from cushion.quantization.smoothquant import smoothing_scales
from cushion.quantization.statistics.histogram import Histogram

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 16)
NORM = "model.layers.1.input_layernorm"
W4, FULL = WeightConfig(4, "per_group", 8), ActivationConfig(None)


def searched(method: str, **changes: Any) -> QuantizerConfig:
    values: dict[str, Any] = {"weights": W4, "activations": FULL, "smoothing_steps": 5}
    return QuantizerConfig(name="under_test", smoothing_search=method, **{**values, **changes})


def search(lm: LanguageModel, behind: Prefix, config: QuantizerConfig) -> SmoothingSearch:
    *_, (done, found) = search_smoothing(lm, behind, TEXTS, config)
    assert done == len(lm.blocks)
    return found


def planted(tiny: Tiny) -> tuple[LanguageModel, Prefix, list[Tensor]]:
    """A model whose second block reads two channels of large values, a prefix, and what q, k and v read behind it."""
    lm = tiny("llama")
    with torch.no_grad():
        lm.blocks[1].input_layernorm.weight[[3, 17]] *= 30
    prefix, seen = Prefix.from_tokens(lm.model, [17, 42]), list[Tensor]()
    hook = lm.blocks[1].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for text in TEXTS:
            lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
    hook.remove()
    return lm, prefix, seen


def nearest(values: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    """Values rounded on symmetric grids with one scale over `dims`, spelt out."""
    top = 2 ** (bits - 1) - 1
    scale = values.abs().amax(dims, keepdim=True) / top
    return (values / scale).round().clamp(-top, top) * scale


def in_groups(weight: Tensor) -> Tensor:
    return nearest(weight.reshape(len(weight), -1, 8), 4, (2,)).reshape(weight.shape)


def projections(lm: LanguageModel) -> list[Tensor]:
    attention = lm.blocks[1].self_attn
    return [linear.weight.detach() for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]


def assert_least(found: SmoothingSearch, expected: dict[float, float]) -> None:
    """The errors are the expected ones, and what was found has the least."""
    assert dict(found.errors[NORM]) == pytest.approx(expected, rel=1e-4)
    assert found.folds[NORM].value == pytest.approx(min(expected, key=expected.__getitem__))


def test_awq_takes_the_alpha_with_the_least_output_error(tiny: Tiny) -> None:
    lm, prefix, seen = planted(tiny)
    mean, expected = torch.cat(seen).abs().mean(0), {}
    for number in range(6):
        scale = mean ** (number / 5)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = [(in_groups(weight * scale) / scale, weight) for weight in projections(lm)]
        expected[number / 5] = sum(float((x @ (q - w).T).square().sum()) for x in seen for q, w in rounded)
    found = search(lm, prefix, searched("awq"))
    assert_least(found, expected)
    assert expected[found.folds[NORM].value] < 0.5 * expected[0.0], "0 is rounding to nearest"
    torch.testing.assert_close(found.folds[NORM].scale, awq_scales(mean, found.folds[NORM].value))


@pytest.mark.parametrize("kind", ["per_token", "static", "mse"])
def test_smoothquant_takes_the_alpha_with_the_least_output_error(tiny: Tiny, kind: str) -> None:
    """With scales of tokens, and with a static one, from min-max or from the inputs behind each of the smoothings."""
    lm, prefix, seen = planted(tiny)
    static = ActivationConfig(4, estimator="mse" if kind == "mse" else "minmax")
    activations = ActivationConfig(4, "per_token", "dynamic") if kind == "per_token" else static
    largest, expected = torch.cat(seen).abs().amax(0), {}
    for number in range(6):
        weights = projections(lm)
        scale = largest ** (number / 5) / torch.cat(weights).abs().amax(0) ** (1 - number / 5)
        smoothed = torch.cat(seen) / scale
        rounded = nearest(smoothed, 4, (1,) if kind == "per_token" else (0, 1))
        if kind == "mse":
            histogram = Histogram()
            for values in seen:
                histogram.update(values / scale)
            low, high = ESTIMATORS["mse"].range_of(histogram, Grid(4, True), {})
            step = torch.maximum(-low, high) / 7
            rounded = (smoothed / step).round().clamp(-7, 7) * step
        pairs = [(nearest(weight * scale, 8, (1,)), weight) for weight in weights]
        expected[number / 5] = sum(float((rounded @ q.T - torch.cat(seen) @ w.T).square().sum()) for q, w in pairs)
    config = searched("smoothquant", weights=WeightConfig(8, "per_channel"), activations=activations)
    found = search(lm, prefix, config)
    assert_least(found, expected)
    assert len(set(expected.values())) == 6
    torch.testing.assert_close(
        found.folds[NORM].scale, smoothing_scales(largest, projections(lm), found.folds[NORM].value)
    )


def test_outlier_suppression_takes_the_threshold_with_the_least_output_error(tiny: Tiny) -> None:
    lm, prefix, _ = planted(tiny)
    with torch.no_grad():  # a channel far from zero in every token
        lm.blocks[1].input_layernorm.weight[5] = 0
        lm.blocks[1].input_layernorm.register_forward_hook(lambda _m, _a, out: out + 9 * (torch.arange(32) == 5))
    seen: list[Tensor] = []
    hook = lm.blocks[1].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    for text in TEXTS:
        logits(lm, prefix, text[None])
    hook.remove()
    inputs, weights, expected = torch.cat(seen), projections(lm), {}
    middle = (inputs.amax(0) + inputs.amin(0)) / 2
    largest = (inputs - middle).abs().amax(0)
    for number in range(5, 0, -1):
        threshold = float(largest.max()) * number / 5
        scale = torch.where(largest > threshold, largest / threshold, 1)
        rounded = nearest((inputs - middle) / scale, 4, (0, 1))
        pairs = [(nearest(weight * scale, 8, (1,)), weight) for weight in weights]
        expected[threshold] = sum(float((rounded @ q.T + w @ middle - inputs @ w.T).square().sum()) for q, w in pairs)
    config = searched("os_plus", weights=WeightConfig(8, "per_channel"), activations=ActivationConfig(4))
    found = search(lm, prefix, config)
    assert_least(found, expected)
    fold = found.folds[NORM]
    assert fold.value < max(expected) and float(middle[5]) == pytest.approx(9)
    torch.testing.assert_close(fold.shift, middle)
    assert torch.equal(threshold_scales(largest, float(largest.max())), torch.ones(32)), "the identity"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_shift_moves_the_static_range(tiny: Tiny, family: str) -> None:
    """The range is that of what the shifted linears read: its largest magnitude is on the last code."""
    lm = tiny(family)
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    fitted = fitted_behind(lm, prefix, searched("os_plus", activations=ActivationConfig(8)), TEXTS)
    name = next(name for name in lm.norm_readers(1)[0][1])
    seen: list[Tensor] = []
    with unrounded(lm, fitted.config, prefix):
        hook = lm.model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for text in TEXTS:
            logits(lm, prefix, text[None])
        hook.remove()
    with fitted.on(lm):
        placed: Any = lm.model.get_submodule(name)
        assert float(placed.activation.parameters[0]) * 127 == pytest.approx(
            max(float(one.abs().max()) for one in seen), rel=1e-5
        )


def test_weights_that_servers_compute_as_one_are_judged_with_one_tensor_scale(tiny: Tiny) -> None:
    lm, prefix, seen = planted(tiny)
    lm.blocks[1].self_attn.v_proj.weight.data *= 200
    weights = WeightConfig(4, "per_block", format="nvfp4")
    found = search(lm, prefix, searched("awq", weights=weights, activations=ActivationConfig(None)))
    own, expected = projections(lm), 0.0
    whole = torch.cat(own).abs().max()
    for weight in own:
        rounded = quantize_weight_in_blocks(weight, Nvfp4(4, True), whole).dequantize()
        expected += sum(float((x @ (rounded - weight).T).square().sum()) for x in seen)
    assert found.errors[NORM][0][1] == pytest.approx(expected, rel=1e-4)


def test_what_several_linears_read_is_rounded_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prefix, _ = planted(tiny)
    calls: dict[str, int] = {"output_error": 0, "_quantized": 0}

    def counted(name: str, own: Any) -> Any:
        def call(*given: Any) -> Any:
            calls[name] += 1
            return own(*given)

        return call

    for name in calls:
        monkeypatch.setattr(smoothing_search, name, counted(name, getattr(smoothing_search, name)))
    search(lm, prefix, searched("smoothquant"))
    assert calls["_quantized"] == calls["output_error"] > 0


def test_the_scales_of_awq_are_positive_and_their_extremes_are_inverse() -> None:
    for alpha in (0.0, 0.35, 1.0):
        scales = awq_scales(torch.tensor([0.0, 1e-9, 0.5, 400.0]), alpha)
        assert bool((scales > 0).all())
        assert float(scales.max() * scales.min()) == pytest.approx(1)
    assert torch.equal(awq_scales(torch.tensor([0.0, 7.0]), 0.0), torch.ones(2))


def logits(lm: LanguageModel, prefix: Prefix, texts: Tensor = TEXTS) -> Tensor:
    with torch.no_grad():
        return lm.model(texts, past_key_values=prefix.cache(lm.model, len(texts)), use_cache=True).logits


@contextmanager
def unrounded(lm: LanguageModel, config: QuantizerConfig, behind: Prefix) -> Iterator[dict[str, Any]]:
    """The model with the scales that were searched for a quantizer, and nothing rounded."""
    folds = search(lm, behind, config).folds
    plain = QuantizerConfig(
        weights=WeightConfig(None), activations=FULL, smoothing_search=config.smoothing_search, rotation=config.rotation
    )
    with FittedQuantizer(plain, inputs={SEARCHED: folds}).on(lm):
        yield folds


@pytest.mark.parametrize(
    ("method", "family"),
    [*(("os_plus", family) for family in SMOOTHABLE), *itertools.product(["awq", "smoothquant"], ["llama", "opt"])],
)
def test_any_scales_and_shifts_leave_the_function_as_it_was(tiny: Tiny, method: str, family: str) -> None:
    lm = tiny(family)
    prefix, before = Prefix.from_tokens(lm.model, [17, 42]), snapshot(lm)
    plain = logits(lm, prefix)
    config = searched(method, activations=ActivationConfig(4, "per_token", "dynamic"), weights=WeightConfig(4))
    with unrounded(lm, config, prefix) as folds:
        assert len(folds) == sum(len(lm.norm_readers(index)) for index in range(len(lm.blocks)))
        assert any(not torch.equal(fold.scale, torch.ones_like(fold.scale)) for fold in folds.values())
        torch.testing.assert_close(logits(lm, prefix), plain, rtol=0, atol=1e-4)
    assert_untouched(lm, before)


@pytest.mark.parametrize("method", ["awq", "os_plus"])
def test_a_search_goes_with_everything_that_needs_the_inputs_behind_it(tiny: Tiny, method: str) -> None:
    lm, prefix, _ = planted(tiny)
    config = searched(
        method, activations=ActivationConfig(8), rotation="hadamard", input_rotation="down", rotation_sites="adaptive",
        head_rotation="values",
    )  # fmt: skip
    fitted = fitted_behind(lm, prefix, config, TEXTS)
    assert fitted.inputs.keys() == config.gathered
    plain = logits(lm, prefix)
    with fitted.on(lm):
        assert (logits(lm, prefix) - plain).square().mean() < 0.1 * plain.square().mean()


def test_what_is_written_is_what_is_folded(tiny: Tiny, tmp_path: Path) -> None:
    lm = tiny("llama")
    found = search(lm, Prefix.empty(), searched("os_plus", activations=ActivationConfig(8)))
    found.write(tmp_path)
    read = SmoothingSearch.read(tmp_path, torch.device("cpu"))
    assert read.keys() == found.folds.keys()
    for norm, fold in found.folds.items():
        assert torch.equal(read[norm].scale, fold.scale) and read[norm].value == fold.value
        assert fold.shift is not None and torch.equal(read[norm].shift, fold.shift)
    with torch.no_grad():
        lm.blocks[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        search(lm, Prefix.empty(), searched("awq"))


def test_what_is_refused_and_told(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"smoothing_search=awq finds the scales, and quantizer.smoothing_alpha=0.5"):
        searched("awq", smoothing_alpha=0.5)
    with pytest.raises(ConfigError, match=r"smoothing_search=awq weighs the channels.*use input_rotation=down"):
        searched("awq", input_rotation="all")
    with pytest.raises(ConfigError, match=r"quantizer\.smoothing_search='awk' is not allowed.*mean 'awq'"):
        searched("awk")
    with pytest.raises(CalibrationError, match="SmoothingSearch"), FittedQuantizer(searched("awq")).on(tiny("llama")):
        pytest.fail("the body must not run")
    with pytest.raises(ConfigError, match=r"nothing to smooth.*use quantizer.smoothing_search=none"):
        check_quantizer(tiny("olmo2"), searched("awq"))
    for config in (searched("none"), searched("awq", weights=WeightConfig(None))):
        key = "smoothing_steps=5" if config.smoothing_search == "none" else "smoothing_search='awq'"
        assert any(f"{key} has no effect" in one for one in options_without_effect(RunConfig(quantizer=config)))
