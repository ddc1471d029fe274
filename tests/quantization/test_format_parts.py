"""Formats in the parts of a quantizer: what is refused, what reaches linears, cache, attention and L_q."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from float_tensors import tensors
from helpers import random_texts
from torch import Tensor

from cushion.activations import observe_inputs
from cushion.config import (
    ActivationConfig,
    AttentionConfig,
    KvCacheConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    SearchConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import check_quantizer
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.formats.blocks import fake_quantize_blocks, quantizer_of
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.numerics import fake_quantize
from cushion.quantization.parts.kv_cache import CACHE_RANGES
from cushion.quantization.simulate import quantized
from cushion.search.objective import quantization_error
from cushion.tuning_loss import differentiable_error

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(2, 20)
FLOATS = ("fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp6", "mxfp4", "nvfp4")


def bits_of(name: str) -> int:
    return FORMATS[name].bits[0]


def grid_of(name: str, rule: str | None = None) -> Any:
    return FORMATS[name].make(bits_of(name), True, shared_exponent=rule)


def granularity_of(name: str) -> str:
    return "per_tensor" if FORMATS[name].block is None else "per_block"


def weights_in(name: str, **changes: Any) -> WeightConfig:
    return WeightConfig(**{"bits": bits_of(name), "granularity": granularity_of(name), "format": name, **changes})


def activations_in(name: str, **changes: Any) -> ActivationConfig:
    values = {"bits": bits_of(name), "granularity": granularity_of(name), "range": "dynamic", "format": name}
    return ActivationConfig(**{**values, **changes})


def under(**changes: Any) -> QuantizerConfig:
    """A quantizer of nothing else."""
    off = {"weights": WeightConfig(None), "activations": ActivationConfig(None)}
    return QuantizerConfig(name="under_test", **{**off, **changes})


@torch.no_grad()
def logits(lm: LanguageModel, prefix: Prefix | None = None) -> Tensor:
    prefix = prefix or Prefix.empty()
    return lm.model(TEXTS, past_key_values=prefix.cache(lm.model, len(TEXTS)), use_cache=True).logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weights_in("mxfp4", bits=8), r"bits=8 is not allowed: 4, .*\(quantizer.weights.format=mxfp4\)"),
        (lambda: weights_in("mxfp8", granularity="per_group"), "mxfp8 has a scale for every 32 values: set it to"),
        (lambda: weights_in("int", bits=4, granularity="per_block"), "format=int fixes no blocks; .* mxfp8, mxfp6"),
        (lambda: weights_in("nvfp4", estimator="mse"), "estimator='mse' is not allowed: minmax, because"),
        (lambda: activations_in("fp8_e4m3", symmetric=False), "format=fp8_e4m3 has no offset: set .*symmetric=true"),
        (lambda: activations_in("mxfp6", range="static"), "format=mxfp6 computes every scale on the fly: set"),
        (lambda: activations_in("nvfp4", range="static", estimator="mse"), "choose one of minmax, .*percentile"),
        (lambda: activations_in("fp8_e4m3", range="static", estimator="entropy"), "'entropy' is not allowed: .* mse"),
        (lambda: KvCacheConfig(8, "per_head"), "granularity='per_head' is not allowed: with .*range=dynamic choose"),
        (lambda: KvCacheConfig(8, "per_token", range="static"), "with quantizer.kv_cache.range=static choose one of"),
        (lambda: AttentionConfig(8, "per_token", format="mxfp8"), "set it to per_block"),
        (lambda: SearchConfig(format="fp8_e4m3"), "format=fp8_e4m3 has no offset: set search.symmetric=true"),
        (lambda: QuantizerConfig(shared_exponent="up"), "shared_exponent='up' is not allowed: choose one of floor"),
        (
            lambda: RunConfig(
                quantizer=under(activations=activations_in("nvfp4", range="static")),
                search=SearchConfig(method="bos"),
                tuning=TuningConfig(method="prefix", steps=1, ranges="learned"),
            ),
            "tuning.ranges=learned learns one scale for each input, and .*format=nvfp4 has scales for blocks: use",
        ),
        (
            lambda: RunConfig(
                quantizer=under(activations=activations_in("nvfp4", range="static")),
                reconstruction=ReconstructionConfig(name="scales", method="blockwise"),
            ),
            "reconstruction=scales learns one scale for each input, .* choose another quantizer",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_way_out(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_estimators_are_free_where_a_scale_is() -> None:
    for estimator in ("minmax", "percentile", "mse", "moving_average"):
        activations_in("fp8_e5m2", range="static", estimator=estimator)
    for estimator in ("minmax", "percentile", "moving_average"):
        activations_in("nvfp4", range="static", estimator=estimator)


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_blocks_that_do_not_divide_the_inputs_are_refused(tiny: Tiny, part: str) -> None:
    lm = tiny("opt")  # 32 inputs: a block of 32 fits, the 48 of another width do not
    lm.blocks[0].fc1 = torch.nn.Linear(48, 64)
    make = {"weights": weights_in, "activations": activations_in}[part]
    with pytest.raises(ConfigError, match=rf"quantizer.{part}.format=mxfp4 has blocks of 32 values.* the 48 inputs of"):
        check_quantizer(lm, under(**{part: make("mxfp4")}))
    check_quantizer(lm, under(**{part: make("nvfp4")}))


def test_only_what_a_format_reads_is_in_its_identity_and_warns_elsewhere() -> None:
    mx, fp8 = under(weights=weights_in("mxfp4")), under(weights=weights_in("fp8_e4m3"))
    assert "shared_exponent" in quantizer_identity(mx)
    assert "levels" not in quantizer_identity(mx)
    told = options_without_effect(RunConfig(quantizer=replace(fp8, shared_exponent="floor", levels="paper")))
    assert any("quantizer.shared_exponent='floor' has no effect without an MX" in text for text in told)
    assert any("quantizer.levels='paper' has no effect" in text for text in told)
    assert options_without_effect(RunConfig(quantizer=replace(mx, shared_exponent="floor"))) == []
    assert replace(mx, shared_exponent="floor").scheme == "under_test W4(mxfp4)A16"


@pytest.mark.parametrize("name", FLOATS)
def test_linears_compute_with_rounded_weights_and_inputs(tiny: Tiny, name: str) -> None:
    lm = tiny("llama")
    linear = lm.blocks[0].mlp.down_proj
    seen: list[Tensor] = []
    config = under(weights=weights_in(name), activations=activations_in(name), shared_exponent="ceil")

    def through(values: Tensor) -> Tensor:
        grid = grid_of(name, "ceil")
        if FORMATS[name].block is not None:
            return fake_quantize_blocks(values, grid)
        scale = values.abs().max() / grid.steps
        return fake_quantize(values, scale, torch.zeros(()), grid)

    with (
        quantized(lm, config),
        observe_inputs({"x": lm.blocks[0].mlp.down_proj}, lambda _, values: seen.append(values)),
    ):
        logits(lm)
        found = lm.blocks[0].mlp.down_proj(seen[0])
    expected = torch.nn.functional.linear(through(seen[0]), through(linear.weight.detach()))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, linear(seen[0]), rtol=1e-3)


AS_ONE = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt", "olmo2"])
def test_linears_that_servers_compute_as_one_have_one_tensor_scale(tiny: Tiny, family: str) -> None:
    lm, grid = tiny(family), grid_of("nvfp4")
    with torch.no_grad():
        for number, linear in enumerate(lm.linears().values()):  # each has another largest weight
            linear.weight[0, 0] = 5.0 + number / 8
    weights = {name: linear.weight.detach() for name, linear in lm.linears().items()}
    groups = dict[tuple[str, int], list[str]]()
    for number, name in enumerate(weights):
        parent, _, leaf = name.rpartition(".")
        kind = next((index for index, leaves in enumerate(AS_ONE) if leaf in leaves and family != "olmo2"), 10 + number)
        groups.setdefault((parent, kind), []).append(name)
    with quantized(lm, under(weights=weights_in("nvfp4"))):
        for names in groups.values():
            whole = torch.stack([weights[name].abs().max() for name in names]).max()
            for name in names:
                found = lm.model.get_submodule(name).weight
                assert torch.equal(found, fake_quantize_blocks(weights[name], grid, whole))
                own = fake_quantize_blocks(weights[name], grid)
                assert torch.equal(found, own) == (weights[name].abs().max() == whole)
    assert {len(names) for names in groups.values()} == {"llama": {1, 2, 3}, "mixtral": {1, 2, 3}, "opt": {1, 3}}.get(
        family, {1}
    )


@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8", "nvfp4"])
def test_gradients_pass_rounding(name: str) -> None:
    values = tensors()["plain"][:4].clone().requires_grad_()
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    fixed = (torch.tensor(-1.0), torch.tensor(1.0)) if name != "mxfp8" else None
    quantizer = quantizer_of(grid_of(name), granularity_of(name), fixed, straight_through=True)
    (quantizer(values) * weight).sum().backward()
    inside = values.detach().abs() < 1 if fixed else torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(values.grad, weight * inside)


# The key-value cache and attention.


@pytest.mark.parametrize("granularity", ["per_tensor", "per_head"])
@pytest.mark.parametrize(("form", "symmetric"), [("fp8_e4m3", True), ("int", False)])
def test_a_static_cache_is_rounded_by_calibrated_scales(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, granularity: str, form: str, symmetric: bool
) -> None:
    lm = tiny("llama")
    monkeypatch.setattr(lm.model.config, "_attn_implementation", "eager")
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    prefix = replace(prefix, keys=tuple(50 * key for key in prefix.keys))  # large, and in no range
    config = under(kv_cache=KvCacheConfig(8, granularity, symmetric, "static", form))
    fitted = fitted_behind(lm, prefix, config, random_texts(3, 16, seed=3))
    caches = []
    for text in random_texts(3, 16, seed=3):
        cache = prefix.cache(lm.model)
        with torch.no_grad():
            lm.body(text[None], past_key_values=cache, use_cache=True)
        caches.append(cache)
    ranges = fitted.inputs[CACHE_RANGES]
    for layer in range(len(lm.blocks)):
        keys = torch.cat([cache.layers[layer].keys[:, :, 2:] for cache in caches])
        low, high = ranges[f"keys of layer {layer}"]
        assert torch.equal(high, keys.amax((0, 2, 3)))
        assert torch.equal(low, keys.amin((0, 2, 3)))
    assert len(ranges) == 2 * len(lm.blocks)
    grid = FORMATS[form].make(8, symmetric)

    def by_hand(name: str, values: Tensor) -> Tensor:
        low, high = (end[:, None, None] for end in ranges[name])
        if granularity == "per_tensor":
            low, high = low.amin(), high.amax()
        own, rest = values.split([2, values.shape[2] - 2], dim=2)
        return torch.cat([own, fake_quantize(rest, *grid.parameters(low, high), grid)], dim=2)

    with fitted.on(lm):
        found = logits(lm, prefix)
    plain = logits(lm, prefix)

    def rounded_first(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = by_hand(f"keys of layer {module.layer_idx}", key)
        value = by_hand(f"values of layer {module.layer_idx}", value)
        return eager(module, query, key, value, *args, **kwargs)

    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", rounded_first)
    torch.testing.assert_close(found, logits(lm, prefix), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_a_static_cache_without_calibration_is_an_error(tiny: Tiny) -> None:
    config = under(kv_cache=KvCacheConfig(8, "per_tensor", True, "static"))
    with pytest.raises(CalibrationError, match="gather them"), FittedQuantizer(config).on(tiny("llama")):
        pass
    assert config.scheme == "under_test W16A16KV8 static KV"
    assert config.needs_calibration_text
    assert not config.spans_batch


@pytest.mark.parametrize("part", ["kv_cache", "attention"])
def test_better_formats_are_nearer_to_full_precision_inside_attention(tiny: Tiny, part: str) -> None:
    lm = tiny("llama")
    kind = {"kv_cache": KvCacheConfig, "attention": AttentionConfig}[part]
    plain, errors = logits(lm), {}
    for name in FLOATS:
        own = kind(bits_of(name), granularity_of(name), True, format=name)
        with quantized(lm, under(**{part: own})):
            errors[name] = float((logits(lm) - plain).square().mean())
    assert 0 < errors["mxfp8"] < errors["mxfp4"]
    assert errors["fp8_e4m3"] < errors["fp8_e5m2"] < errors["mxfp4"]
    assert errors["mxfp6"] < errors["nvfp4"] < errors["mxfp4"]


# L_q.


@pytest.mark.parametrize("name", [*FLOATS, "int"])
def test_l_q_is_the_error_of_each_text_by_itself(name: str) -> None:
    texts = tensors()["plain"].reshape(4, 16, 64) * torch.tensor([1.0, 5, 0.1, 30])[:, None, None]
    grid = FORMATS[name].make(bits_of(name) if name != "int" else 8, True)

    def alone(text: Tensor) -> Tensor:
        if FORMATS[name].block is not None:
            return fake_quantize_blocks(text, grid)
        return fake_quantize(text, *grid.parameters(text.min(), text.max()), grid)

    expected = torch.stack([(alone(text) - text).square().sum() for text in texts])
    torch.testing.assert_close(quantization_error(texts, grid), expected)
    for gradient in ("range", "nearest_grid_point", "straight_through"):
        torch.testing.assert_close(differentiable_error(texts, grid, gradient), expected)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_the_gradient_of_l_q_lowers_what_decides_the_scales(name: str) -> None:
    values = tensors()["planted"].reshape(1, 64, 64).clone().requires_grad_()
    grid = grid_of(name)
    differentiable_error(values, grid, "range").sum().backward()
    gradient = values.grad
    assert gradient is not None
    blocks = values.detach().reshape(-1, grid.block)
    largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
    assert torch.equal(gradient.reshape(blocks.shape) != 0, largest & (gradient.reshape(blocks.shape) != 0))
    assert float((gradient.reshape(blocks.shape)[largest] * blocks[largest]).min()) >= 0
    assert float(gradient.abs().max()) > 0
