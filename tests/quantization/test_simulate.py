"""The quantizer on a whole model: it comes off without a trace, and what it does is what the formulas say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from conftest import FAMILIES, FEW, SMOOTHABLE, UNLIKE
from helpers import calibrated, random_texts
from torch import Tensor, nn
from untouched import assert_untouched, snapshot

from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.errors import CalibrationError, ConfigError, CushionError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import check_quantizer
from cushion.quantization.linear import QuantizedLinear
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]


def make_texts(seed: int = 0, rows: int = 3, length: int = 24) -> Tensor:
    return random_texts(rows, length, seed)


def quantizer(**changes: Any) -> QuantizerConfig:
    return QuantizerConfig(name="under_test", **changes)


def smoothing_only(alpha: float) -> QuantizerConfig:
    return quantizer(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None), smoothing_alpha=alpha)


DYNAMIC = {"activations": ActivationConfig(range="dynamic")}
QUANTIZERS = {
    "none": quantizer(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None)),
    "static": quantizer(),
    "per_tensor": quantizer(**DYNAMIC),
    "per_token": quantizer(activations=ActivationConfig(granularity="per_token", range="dynamic")),
    "weights_only": quantizer(weights=WeightConfig(bits=4), activations=ActivationConfig(bits=None)),
    "groups": quantizer(weights=WeightConfig(bits=4, granularity="per_group", group_size=16), **DYNAMIC),
    "smoothing_only": smoothing_only(0.8),
    "smoothed_static": quantizer(smoothing_alpha=0.8),
    "smoothed_per_token": quantizer(
        activations=ActivationConfig(granularity="per_token", range="dynamic"), smoothing_alpha=0.5
    ),
}


@torch.no_grad()
def logits(lm: LanguageModel, texts: Tensor) -> Tensor:
    return lm.model(texts).logits


# Nothing quantized, and the way back.


@pytest.mark.parametrize("family", FEW)
def test_with_nothing_quantized_and_no_prefix_logits_are_bit_equal(tiny: Tiny, family: str) -> None:
    lm, texts = tiny(family), make_texts()
    untouched = logits(lm, texts)
    with quantized(lm, QUANTIZERS["none"]), torch.no_grad():
        assert torch.equal(logits(lm, texts), untouched)
        behind_nothing = lm.model(texts, past_key_values=Prefix.empty().cache(lm.model, len(texts)), use_cache=True)
        assert torch.equal(behind_nothing.logits, untouched)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", name) for name in QUANTIZERS] + [(family, "smoothed_static") for family in SMOOTHABLE[1:]],
)
def test_leaving_restores_the_very_same_objects_and_bits(tiny: Tiny, family: str, name: str) -> None:
    lm, texts = tiny(family), make_texts()
    ranges, untouched, before = calibrated(lm, texts), logits(lm, texts), snapshot(lm)
    for way_out in ([], [KeyboardInterrupt]):  # the end of the block, and an exception within it
        with contextlib.suppress(*way_out), quantized(lm, QUANTIZERS[name], ranges) as same:
            assert same is lm
            changed = not torch.equal(logits(lm, texts), untouched)
            assert changed == (name != "none")
            for error in way_out:
                raise error
        assert_untouched(lm, before)
        assert torch.equal(logits(lm, texts), untouched)


def test_a_failure_on_the_way_in_is_undone_too(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), make_texts()
    ranges, before = calibrated(lm, texts), snapshot(lm)
    del ranges.minimum["model.layers.1.mlp.down_proj"]
    expected = r"no entry for model\.layers\.1\.mlp\.down_proj: calibrate this model again"
    with pytest.raises(CalibrationError, match=expected), quantized(lm, QUANTIZERS["smoothed_static"], ranges):
        pytest.fail("the body must not run")
    assert_untouched(lm, before)


@pytest.mark.parametrize("caller", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
def test_the_callers_gradient_mode_survives(tiny: Tiny, caller: bool, straight_through: bool) -> None:
    lm = tiny("llama")
    with torch.set_grad_enabled(caller):
        with quantized(lm, QUANTIZERS["per_tensor"], straight_through=straight_through):
            pass
        assert torch.is_grad_enabled() == caller
        with pytest.raises(RuntimeError, match="inside"), quantized(lm, QUANTIZERS["per_tensor"]):
            raise RuntimeError("inside")
        assert torch.is_grad_enabled() == caller


def test_straight_through_lets_gradients_reach_the_keys_of_a_prefix(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), make_texts()
    found = Prefix.from_tokens(lm.model, [1, 2, 3])
    prefix = Prefix(found.token_ids, tuple(key.clone().requires_grad_() for key in found.keys), found.values)
    with quantized(lm, QUANTIZERS["per_tensor"], straight_through=True):
        lm.model(texts[:1], past_key_values=prefix.cache(lm.model), use_cache=True).logits.square().sum().backward()
    for key in prefix.keys:
        assert key.grad is not None and torch.isfinite(key.grad).all() and key.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in lm.model.parameters())


# What is quantized, and what is refused.


def quantized_names(lm: LanguageModel) -> list[str]:
    return [name for name, module in lm.model.named_modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linears_of_the_blocks_are_quantized_and_lm_head_is_not(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    expected = list(lm.linears())
    with quantized(lm, QUANTIZERS["per_tensor"]):
        assert quantized_names(lm) == expected
        assert type(lm.model.get_output_embeddings()) is nn.Linear
        left = [n for block in lm.blocks for n, module in block.named_modules() if isinstance(module, nn.Linear)]
    assert set(left) <= set(lm.architecture.full_precision) and expected


def test_targets_select_linears_by_the_last_part_of_their_name(tiny: Tiny) -> None:
    lm = tiny("llama")
    with quantized(lm, quantizer(targets=["down_proj", "q_proj"], **DYNAMIC)):
        names = quantized_names(lm)
    assert names == [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize("use", [check_quantizer, lambda lm, config: quantized(lm, config).__enter__()])
def test_an_unknown_target_is_refused_with_a_hint(tiny: Tiny, use: Callable[..., object]) -> None:
    lm = tiny("llama")
    with pytest.raises(ConfigError, match=r"quantizer\.targets names 'down_porj'.*up_proj.*did you mean 'down_proj'"):
        use(lm, quantizer(targets=["down_porj"], **DYNAMIC))
    with pytest.raises(ConfigError, match="lm_head"):
        use(lm, quantizer(targets=["lm_head"], **DYNAMIC))


@pytest.mark.parametrize("use", [check_quantizer, lambda lm, config: quantized(lm, config).__enter__()])
def test_a_group_size_that_does_not_divide_names_the_linear(tiny: Tiny, use: Callable[..., object]) -> None:
    lm = tiny("llama")
    with pytest.raises(
        ConfigError, match=r"group_size=48 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q_proj"
    ):
        use(lm, quantizer(weights=WeightConfig(granularity="per_group", group_size=48), **DYNAMIC))
    with pytest.raises(
        ConfigError, match=r"group_size=64 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q_proj"
    ):
        use(lm, quantizer(weights=WeightConfig(granularity="per_group", group_size=64), **DYNAMIC))
    only_down = quantizer(weights=WeightConfig(granularity="per_group", group_size=64), targets=["down_proj"])
    check_quantizer(lm, only_down)  # a linear that is no target need not fit


@pytest.mark.parametrize("name", ["static", "smoothed_static", "smoothed_per_token", "smoothing_only"])
def test_missing_calibration_is_refused(tiny: Tiny, name: str) -> None:
    with (
        pytest.raises(CalibrationError, match="quantizer=under_test needs calibration statistics"),
        quantized(tiny("llama"), QUANTIZERS[name]),
    ):
        pytest.fail("the body must not run")


# What it computes.


def largest(values: Tensor) -> Tensor:
    return values.abs().max()


def inputs_of(lm: LanguageModel, names: list[str], texts: Tensor) -> dict[str, Tensor]:
    """The input of each named module during one forward pass, by plain hooks."""
    seen: dict[str, Tensor] = {}
    handles = [
        lm.model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.update({name: args[0].clone()})
        )
        for name in names
    ]
    logits(lm, texts)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("granularity", ["static", "per_tensor", "per_token"])
def test_w8a8_of_every_linear_recomputed(tiny: Tiny, family: str, granularity: str) -> None:
    lm, texts = tiny(family), make_texts()
    ranges, linears = calibrated(lm, make_texts(seed=1)), lm.linears()
    static = {
        name: max(-ranges.minimum[name].min().item(), ranges.maximum[name].max().item()) / 127 for name in linears
    }
    with quantized(lm, QUANTIZERS[granularity], ranges), torch.no_grad():
        inputs = inputs_of(lm, list(linears), texts)
        results = {name: lm.model.get_submodule(name)(values) for name, values in inputs.items()}
    assert list(results) and set(results) == set(linears)
    for name, values in inputs.items():
        weight, bias = linears[name].weight, linears[name].bias
        weight_scale = largest(weight) / 127
        if granularity == "static":
            scale = torch.tensor(static[name])
        else:
            scale = (values.abs().amax(-1, keepdim=True) if granularity == "per_token" else largest(values)) / 127
        rounded = torch.round(values / scale).clamp(-127, 127) * scale
        expected = rounded @ (torch.round(weight / weight_scale) * weight_scale).T
        expected = expected if bias is None else expected + bias
        torch.testing.assert_close(results[name], expected, rtol=1e-4, atol=1e-5)


def test_a_static_prefix_free_range_is_not_the_dynamic_one(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), make_texts()
    with quantized(lm, QUANTIZERS["static"], calibrated(lm, make_texts(seed=1))):
        static = logits(lm, texts)
    with quantized(lm, QUANTIZERS["per_tensor"]):
        assert not torch.equal(logits(lm, texts), static)


@pytest.mark.parametrize("name", ["static", "per_tensor", "per_token"])
def test_more_bits_come_closer_to_full_precision(tiny: Tiny, name: str) -> None:
    lm, texts = tiny("llama"), make_texts()
    ranges, untouched = calibrated(lm, texts), logits(lm, texts)
    activations = QUANTIZERS[name].activations
    errors = []
    for bits in (3, 5, 8):
        config = quantizer(
            weights=WeightConfig(bits=bits),
            activations=ActivationConfig(bits, activations.granularity, activations.range),
        )
        with quantized(lm, config, ranges):
            errors.append((logits(lm, texts) - untouched).square().mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


# SmoothQuant on a model.


def smoothed_linears(lm: LanguageModel, block: int) -> list[tuple[str, list[str]]]:
    """The norms of a block and the linears behind each; a router is no linear."""
    readers = lm.norm_readers(block)
    return [(norm, [name for name in names if name in lm.linears()]) for norm, names in readers]


@pytest.mark.parametrize(("family", "alpha"), [("llama", 0.5), *((family, 0.8) for family in SMOOTHABLE)])
def test_smoothing_leaves_the_full_precision_function_unchanged(tiny: Tiny, family: str, alpha: float) -> None:
    lm, texts = tiny(family), make_texts()
    ranges, untouched = calibrated(lm, make_texts(seed=1)), logits(lm, texts)
    weights = {name: linear.weight.clone() for name, linear in lm.linears().items()}
    with quantized(lm, smoothing_only(alpha), ranges):
        torch.testing.assert_close(logits(lm, texts), untouched, rtol=0, atol=1e-4)
        changed = {name for name, linear in lm.linears().items() if not torch.equal(linear.weight, weights[name])}
    assert changed == {name for block in range(3) for _, names in smoothed_linears(lm, block) for name in names}


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_norms_and_weights_are_scaled_by_equation_4(tiny: Tiny, family: str, alpha: float) -> None:
    lm, texts = tiny(family), make_texts()
    ranges = calibrated(lm, texts)
    pairs = [pair for block in range(3) for pair in smoothed_linears(lm, block)]
    inputs = inputs_of(lm, [name for _, names in pairs for name in names], texts)
    before = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    with quantized(lm, smoothing_only(alpha), ranges):
        after = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    for norm, names in pairs:
        seen = [inputs[name].flatten(0, -2) for name in names if name in inputs]  # an expert sees a part of the tokens
        activation = torch.cat(seen).abs().amax(0)
        weight = torch.cat([before[name + ".weight"] for name in names]).abs().amax(0)
        scale = activation.pow(alpha) / weight.pow(1 - alpha)
        for parameter, offset in (("weight", lm.architecture.norm_offset), ("bias", 0.0)):
            if f"{norm}.{parameter}" in before:
                old, new = (side[f"{norm}.{parameter}"] + offset for side in (before, after))
                torch.testing.assert_close(new, old / scale)
        for name in names:
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] * scale)


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_lowers_the_range_of_a_planted_outlier_channel(tiny: Tiny, family: str, alpha: float) -> None:
    lm, texts = tiny(family), make_texts()
    offset = lm.architecture.norm_offset
    for block in range(3):
        for norm, readers in lm.norm_readers(block):
            weight = lm.model.get_submodule(norm).weight
            weight[5] = 300 * (offset + weight[5]) - offset
            for name in readers.keys() - lm.linears().keys():
                readers[name].weight[:, 5] /= 300  # a router sends every token where it went before
    ranges = calibrated(lm, texts)
    with quantized(lm, smoothing_only(alpha), ranges):
        smoothed = calibrated(lm, texts)
    for block in range(3):
        for _, names in smoothed_linears(lm, block):
            reached = [
                name for name in names if name in ranges.minimum
            ]  # the outlier leaves some experts without tokens
            assert len(reached) == len(names) or len(reached) >= 4
            for name in reached:
                before = torch.maximum(ranges.maximum[name], -ranges.minimum[name])
                after = torch.maximum(smoothed.maximum[name], -smoothed.minimum[name])
                assert before.argmax() == 5
                assert after[5] < before[5] / 10
                assert after.max() < before.max() / 10
                spread_before, spread_after = before.max() / before.median(), after.max() / after.median()
                assert spread_after < spread_before / 4


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize(("alpha", "symmetric"), [(0.8, True), (0.5, False)])
def test_smoothed_static_ranges_are_those_of_calibrating_the_smoothed_model(
    tiny: Tiny, family: str, alpha: float, symmetric: bool
) -> None:
    lm, texts = tiny(family), make_texts()
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    ranges = calibrated(lm, texts, prefix)
    with quantized(lm, smoothing_only(alpha), ranges):
        found = calibrated(lm, texts, prefix)
    moved = 0
    names = list(lm.linears())
    config = quantizer(activations=ActivationConfig(symmetric=symmetric), smoothing_alpha=alpha)
    with quantized(lm, config, ranges):
        for name in names:
            module = lm.model.get_submodule(name)
            assert isinstance(module, QuantizedLinear) and module.activation is not None
            scale, offset = module.activation.parameters
            low, high = found.minimum[name].min(), found.maximum[name].max()
            expected = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
            torch.testing.assert_close(scale, expected, rtol=1e-4, atol=0)
            torch.testing.assert_close(offset, torch.zeros(()) if symmetric else low, rtol=1e-4, atol=1e-6)
            unsmoothed = torch.maximum(-ranges.minimum[name].min(), ranges.maximum[name].max()) / 127
            moved += not torch.isclose(expected, unsmoothed, rtol=1e-3) if symmetric else 1
    assert moved > 0


@torch.no_grad()
def test_a_router_follows_its_norm_and_has_no_say_in_the_scale(tiny: Tiny) -> None:
    lm, texts = tiny("mixtral"), make_texts()
    (norm, readers), name = lm.norm_readers(1)[1], "model.layers.1.mlp.gate"
    before, old_norm = readers[name].weight.clone(), lm.model.get_submodule(norm).weight.clone()
    ranges = calibrated(lm, texts)
    scales = []
    for factor in (1, 1000):  # a router with enormous weights, were it a linear, would decide every scale
        lm.model.get_submodule(name).weight.copy_(before * factor)
        with quantized(lm, smoothing_only(0.5), ranges):
            scales.append(old_norm / lm.model.get_submodule(norm).weight)
            torch.testing.assert_close(readers[name].weight, before * factor * scales[-1])
    assert torch.equal(*scales)


@torch.no_grad()
def test_an_expert_that_no_token_reached_is_named(tiny: Tiny) -> None:
    lm, texts = tiny("mixtral"), make_texts()
    lm.model.get_submodule("model.layers.2.mlp.gate").weight.zero_()  # ties go to the same two experts every time
    ranges, untouched = calibrated(lm, texts), logits(lm, texts)
    missing = sorted(lm.linears().keys() - ranges.minimum.keys())
    assert len(missing) == 6 and all(name.startswith("model.layers.2.mlp.experts.") for name in missing)
    message = rf"no entry for ({'|'.join(missing)}): .*quantizer\.calibration\.samples.*no token was routed to"
    with pytest.raises(CalibrationError, match=message), quantized(lm, QUANTIZERS["static"], ranges):
        pytest.fail("the body must not run")
    with quantized(lm, smoothing_only(0.5), ranges):  # the experts that were reached tell the range of the shared input
        torch.testing.assert_close(logits(lm, texts), untouched, rtol=0, atol=1e-4)


@torch.no_grad()
def test_folding_into_a_half_precision_norm_with_offset_keeps_what_is_left(tiny: Tiny) -> None:
    """What is left of 1 + weight is so small that bfloat16, which is coarse next to -1, would be off by half of it."""
    lm, texts = tiny("gemma"), make_texts()
    cast(Any, lm.model).to(torch.bfloat16)
    ranges = calibrated(lm, texts)
    for low, high in zip(ranges.minimum.values(), ranges.maximum.values(), strict=True):
        low.mul_(1e5), high.mul_(1e5)
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    with quantized(lm, smoothing_only(0.5), ranges):
        assert logits(lm, texts).dtype == torch.bfloat16
        for norm, readers in lm.norm_readers(1):
            for name, reader in readers.items():
                product = (1 + lm.model.get_submodule(norm).weight.float()) * reader.weight.float()
                expected = (1 + before[f"{norm}.weight"].float()) * before[f"{name}.weight"].float()
                torch.testing.assert_close(product, expected, rtol=1e-2, atol=1e-6)
                assert (1 + lm.model.get_submodule(norm).weight.float()).abs().max() < 0.1


@pytest.mark.parametrize("family", [family for family in UNLIKE if family != "mixtral"])  # an expert is not reached
@pytest.mark.parametrize("granularity", ["static", "per_tensor", "per_token"])
def test_smoothquant_o1_to_o3_of_every_linear_recomputed(tiny: Tiny, family: str, granularity: str) -> None:
    """Equation 4, then q(X / s) q(W s)^T + b, from the plain model's statistics and weights alone."""
    lm, texts = tiny(family), make_texts()
    linears = lm.linears()
    seen = [inputs_of(lm, list(linears), text[None]) for text in make_texts(seed=1)]
    largest_inputs = {name: torch.cat([s[name].flatten(0, -2) for s in seen]).abs().amax(0) for name in linears}
    scales = {name: torch.ones(linear.in_features) for name, linear in linears.items()}
    for _, names in [pair for block in range(3) for pair in smoothed_linears(lm, block)]:
        weights = torch.cat([linears[name].weight for name in names]).abs().amax(0)
        scales.update(dict.fromkeys(names, largest_inputs[names[0]] ** 0.8 / weights**0.2))
    ranges = calibrated(lm, make_texts(seed=1))
    expected_weights = {name: linear.weight * scales[name] for name, linear in linears.items()}
    biases = {name: linear.bias for name, linear in linears.items()}
    config = replace(QUANTIZERS[granularity], smoothing_alpha=0.8)
    with quantized(lm, config, ranges), torch.no_grad():
        inputs = inputs_of(lm, list(linears), texts)
        results = {name: lm.model.get_submodule(name)(values) for name, values in inputs.items()}
    for name, values in inputs.items():  # smoothed already: the norm before them was divided by s
        weight = expected_weights[name]
        scale = (values.abs().amax(-1, keepdim=True) if granularity == "per_token" else largest(values)) / 127
        if granularity == "static":
            scale = (largest_inputs[name] / scales[name]).max() / 127
        rounded = torch.round(values / scale).clamp(-127, 127) * scale
        expected = rounded @ (torch.round(weight / (largest(weight) / 127)) * (largest(weight) / 127)).T
        expected = expected if biases[name] is None else expected + biases[name]
        error = (results[name] - expected).abs()  # a value between two grid points may go either way
        assert (error < 1e-4 * expected.abs().max()).float().mean() > 0.9, name
        assert error.max() < 0.02 * expected.abs().max(), name


def test_smoothing_rescues_static_quantization_from_an_outlier_channel(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), make_texts()
    for block in range(3):
        for norm, names in smoothed_linears(lm, block):
            lm.model.get_submodule(norm).weight[5] *= 300
            for name in names:
                lm.model.get_submodule(name).weight[:, 5] /= 300  # the function is an ordinary one
    ranges, untouched = calibrated(lm, texts), logits(lm, texts)
    errors = {}
    for name in ("static", "smoothed_static"):
        with quantized(lm, QUANTIZERS[name], ranges):
            errors[name] = (logits(lm, texts) - untouched).square().mean()
    assert errors["smoothed_static"] < errors["static"] / 10


@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [("opt", "do_layer_norm_before", False), ("bloom", "apply_residual_connection_post_layernorm", True)],
)
def test_smoothing_refuses_a_model_whose_norms_feed_more_than_the_linears(
    tiny: Tiny, family: str, attribute: str, value: bool
) -> None:
    """Two variants of a family in which folding scales into the norms would change the function without a word."""
    lm, texts = tiny(family), make_texts()
    setattr(lm.model.config, attribute, value)
    for block in lm.blocks:
        setattr(block, attribute, value)
    ranges = calibrated(lm, texts)
    with pytest.raises(CushionError, match=attribute), quantized(lm, smoothing_only(0.8), ranges):
        pass


@pytest.mark.parametrize("use", [check_quantizer, lambda lm, config: quantized(lm, config).__enter__()])
def test_a_model_without_linears_is_refused(tiny: Tiny, use: Callable[..., object]) -> None:
    lm = tiny()
    lm.model.add_module("norms_only", nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)]))
    lm.architecture = replace(lm.architecture, blocks="norms_only")
    for config in (quantizer(), quantizer(weights=WeightConfig(bits=None)), quantizer(**DYNAMIC)):
        with pytest.raises(ConfigError, match=r"quantizer=under_test finds no linear layer .* of tiny_llama"):
            use(lm, config)
    check_quantizer(lm, QUANTIZERS["none"])  # nothing to quantize is nothing to miss


@pytest.mark.parametrize("use", [check_quantizer, lambda lm, config: quantized(lm, config).__enter__()])
def test_smoothing_without_pairs_of_norms_and_linears_is_refused(tiny: Tiny, use: Callable[..., object]) -> None:
    lm = tiny()
    lm.architecture = replace(lm.architecture, smoothing=())
    for config in (smoothing_only(0.5), QUANTIZERS["smoothed_static"]):
        with pytest.raises(ConfigError, match=r"quantizer\.smoothing_alpha=.* nothing to smooth in tiny_llama.*=null"):
            use(lm, config)
    check_quantizer(lm, quantizer())
    with quantized(lm, QUANTIZERS["per_tensor"]):
        assert any(isinstance(module, QuantizedLinear) for module in lm.blocks.modules())
