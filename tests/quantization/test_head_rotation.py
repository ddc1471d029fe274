"""Rotation of heads, R2 and R3: the function stays, what is rounded is rotated, a prefix is turned with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import POST_NORM, UNLIKE, VARIANTS
from helpers import random_texts
from torch import Tensor
from transformers.models.llama import modeling_llama
from untouched import assert_untouched, snapshot

from cushion.config import ActivationConfig, AttentionConfig, KvCacheConfig, QuantizerConfig, RunConfig, WeightConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix, PrefixCache
from cushion.quantization.attention import AttentionQuantizer
from cushion.quantization.check import check_quantizer
from cushion.quantization.hadamard import HadamardTransform, randomized_hadamard
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.parts.activations import EXTREMES
from cushion.quantization.parts.kv_cache import CACHE_RANGES, cache_ranges
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(2, 20)


def heads(**changes: Any) -> QuantizerConfig:
    """A quantizer that rotates heads and nothing else, but for the changes."""
    off: dict[str, Any] = {"weights": WeightConfig(None), "activations": ActivationConfig(None), "head_rotation": "all"}
    return QuantizerConfig(name="under_test", **{**off, **changes})


def tuned(lm: LanguageModel, prompt: list[int]) -> Prefix:
    """A prefix whose keys and values no tokens have."""
    made = Prefix.from_tokens(lm.model, prompt)
    keys, values = (tuple(t + torch.randn_like(t) for t in tensors) for tensors in (made.keys, made.values))
    return replace(made, keys=keys, values=values, tuned=True)


def cached(lm: LanguageModel, prefix: Prefix | None = None) -> tuple[Tensor, PrefixCache]:
    """The logits, and the cache behind them."""
    cache = (prefix or Prefix.empty()).cache(lm.model, len(TEXTS))
    return lm.model(TEXTS, past_key_values=cache, use_cache=True).logits, cache


@torch.no_grad()
def logits(lm: LanguageModel, prefix: Prefix | None = None) -> Tensor:
    return cached(lm, prefix)[0]


# The function stays as it was.


@pytest.mark.parametrize("family", VARIANTS)
def test_every_family_computes_the_same_behind_any_prefix(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    before, prefixes = snapshot(lm), [Prefix.empty(), tuned(lm, [17, 42, 99])]
    with torch.no_grad():
        plain = [cached(lm, prefix) for prefix in prefixes]
    with quantized(lm, heads()), torch.no_grad():
        for prefix, (expected, cache) in zip(prefixes, plain, strict=True):
            found, turned = cached(lm, prefix)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            for own, its in zip(turned.layers, cache.layers, strict=True):
                values: Tensor = its.values
                matrix = randomized_hadamard(values.shape[-1]).float()
                torch.testing.assert_close(own.values, values @ matrix, rtol=0, atol=1e-4)
                assert not torch.allclose(own.values, values, rtol=0, atol=1e-2)
    every = heads(rotation="none" if family in POST_NORM else "hadamard", input_rotation="all")
    with quantized(lm, every):
        torch.testing.assert_close(logits(lm, prefixes[1]), plain[1][0], rtol=0, atol=1e-4)
    assert_untouched(lm, before)
    torch.testing.assert_close(logits(lm, prefixes[1]), plain[1][0], rtol=0, atol=0)


def test_scores_of_rotated_queries_and_keys_are_the_same() -> None:
    query, key, value = torch.randn(2, 4, 5, 12), torch.randn(2, 2, 9, 12), torch.randn(2, 2, 9, 12)
    found = []
    for which in ("none", "keys"):
        config = heads(head_rotation=which, attention=AttentionConfig(8))
        attention = AttentionQuantizer(config, straight_through=False)
        attention._inputs = None  # nothing is rounded
        found.append(attention(query, key, value, None, 0.3, None))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", UNLIKE)
def test_generation_goes_on_in_the_turned_cache(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    prefix = tuned(lm, [17, 42, 99])

    def generated() -> Tensor:
        inputs = prefix.prepend({"input_ids": TEXTS})
        found: Tensor = lm.model.generate(
            **inputs, past_key_values=prefix.cache(lm.model, 2), max_new_tokens=6, do_sample=False, pad_token_id=258
        )
        return found

    expected = generated()
    with quantized(lm, heads()):
        assert torch.equal(generated(), expected)


def test_gradients_reach_the_prefix_as_in_the_plain_model(tiny: Tiny) -> None:
    lm = tiny("llama")
    prefix, found = tuned(lm, [17, 42]), list[Tensor]()
    for which in ("none", "all"):
        values = tuple(value.clone().requires_grad_() for value in prefix.values)
        with quantized(lm, heads(head_rotation=which)):
            cached(lm, replace(prefix, values=values))[0].square().mean().backward()
        found.append(torch.stack([value.grad for value in values if value.grad is not None]))
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-7)


# What is rounded is rotated.


def test_weights_are_rounded_in_the_rotated_basis(tiny: Tiny) -> None:
    lm = tiny("llama")
    block = lm.blocks[1].self_attn
    matrix, grid = randomized_hadamard(8), Grid(4, True)
    whole = {count: torch.block_diag(*[matrix] * count) for count in (2, 4)}
    turned = {
        "v_proj": whole[2].T @ block.v_proj.weight.double(),
        "o_proj": block.o_proj.weight.double() @ whole[4],
        "q_proj": block.q_proj.weight.double(),
    }
    with quantized(lm, heads(weights=WeightConfig(4, "per_channel"))):
        for name, weight in turned.items():
            rows = grid.parameters(weight.amin(1, keepdim=True).float(), weight.amax(1, keepdim=True).float())
            expected = fake_quantize(weight.float(), *rows, grid)
            torch.testing.assert_close(getattr(block, name).weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("range_", ["dynamic", "static"])
def test_the_cache_is_rounded_in_the_rotated_basis(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, range_: str) -> None:
    """Against transformers' own attention on the plain model, with rotated heads put into its hands."""
    lm, rotate, grid = tiny("llama"), HadamardTransform(), Grid(4, False)
    monkeypatch.setattr(lm.model.config, "_attn_implementation", "eager")
    prefix, calibration = tuned(lm, [17, 42]), random_texts(3, 16, seed=3)
    granularity = "per_token" if range_ == "dynamic" else "per_tensor"
    config = heads(kv_cache=KvCacheConfig(4, granularity, False, range_))
    plain, fitted = logits(lm, prefix), fitted_behind(lm, prefix, config, calibration)
    with fitted.on(lm):
        found = logits(lm, prefix)
    ranges: dict[str, Any] = {}
    if range_ == "static":
        assert cache_ranges(config) != CACHE_RANGES
        seen = fitted.inputs[cache_ranges(config)]
        for layer in range(3):
            for name in ("keys", "values"):
                both = []
                for text in calibration:
                    cache: Any = prefix.cache(lm.model)
                    with torch.no_grad():
                        lm.body(text[None], past_key_values=cache, use_cache=True)
                    both.append(rotate(getattr(cache.layers[layer], name)[:, :, 2:]))
                low, high = torch.cat(both).amin((0, 2, 3)), torch.cat(both).amax((0, 2, 3))
                own = seen[f"{name} of layer {layer}"]
                torch.testing.assert_close(torch.stack(own), torch.stack((low, high)), rtol=1e-4, atol=1e-5)
                ranges[name, layer] = own[0].amin(), own[1].amax()

    def rounded(values: Tensor, name: str, layer: int) -> Tensor:
        own, rest = rotate(values).split([2, values.shape[2] - 2], dim=2)
        ends = ranges.get((name, layer), (rest.amin(-1, keepdim=True), rest.amax(-1, keepdim=True)))
        return torch.cat([own, fake_quantize(rest, *grid.parameters(*ends), grid)], dim=2)

    eager = modeling_llama.eager_attention_forward

    def rotated_first(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = module.layer_idx
        output, weights = eager(
            module, rotate(query), rounded(key, "keys", layer), rounded(value, "values", layer), *args, **kwargs
        )
        return output @ randomized_hadamard(output.shape[-1]).float().T, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", rotated_first)
    torch.testing.assert_close(found, logits(lm, prefix), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


def test_static_ranges_are_those_of_the_rotated_input(tiny: Tiny) -> None:
    lm = tiny("llama")
    prefix, config = tuned(lm, [17, 42]), heads(activations=ActivationConfig(8))
    found = fitted_behind(lm, prefix, config, TEXTS).inputs[EXTREMES]
    plain = fitted_behind(lm, prefix, heads(activations=ActivationConfig(8), head_rotation="none"), TEXTS).ranges
    seen: list[Tensor] = []
    handle = lm.blocks[1].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits(lm, prefix)
    handle.remove()
    turned = torch.cat(seen).unflatten(-1, (4, 8)) @ randomized_hadamard(8).float()
    low, high = found["model.layers.1.self_attn.o_proj"].range
    torch.testing.assert_close((low, high), (turned.amin(), turned.amax()), rtol=1e-4, atol=1e-5)
    assert plain is not None
    name = "model.layers.1.self_attn.q_proj"
    torch.testing.assert_close(found[name].range[1], plain.maximum[name].amax(), rtol=1e-5, atol=1e-5)


def test_it_rescues_a_coarse_cache_from_outlier_channels(tiny: Tiny) -> None:
    lm = tiny("llama")
    with torch.no_grad():
        for block in lm.blocks:
            block.self_attn.v_proj.weight[3] *= 30
            block.self_attn.o_proj.weight[:, [3, 11]] /= 30
    untouched, errors = logits(lm), {}
    for which in ("none", "values"):
        with quantized(lm, heads(head_rotation=which, kv_cache=KvCacheConfig(4))):
            errors[which] = float((logits(lm) - untouched).square().mean())
    assert errors["values"] < errors["none"] / 2


# What does not fit, and what decides nothing.


def test_what_does_not_fit_is_refused(tiny: Tiny) -> None:
    lm = tiny("llama")
    with pytest.raises(ConfigError, match=r"quantizer\.head_rotation='value' is not allowed.*did you mean 'values'"):
        heads(head_rotation="value")
    _, plain = cached(lm)
    with quantized(lm, heads()), pytest.raises(ConfigError, match="filled by the plain model cannot be continued"):
        lm.model(TEXTS, past_key_values=plain, use_cache=True)
    lm.architecture = replace(lm.architecture, values=None)
    with pytest.raises(ConfigError, match=r"head_rotation=all cannot be used with tiny_llama: .*use .*=none"):
        check_quantizer(lm, heads())
    check_quantizer(lm, heads(head_rotation="keys", kv_cache=KvCacheConfig(4)))


def test_rotated_keys_that_nothing_rounds_decide_nothing() -> None:
    assert heads(head_rotation="keys").is_full_precision
    assert heads(head_rotation="keys").scheme == "under_test W16A16"
    assert quantizer_identity(heads()) == quantizer_identity(heads(head_rotation="values"))
    rounded = heads(kv_cache=KvCacheConfig(4))
    assert rounded.scheme == "under_test W16A16KV4 values and keys rotated"
    assert quantizer_identity(rounded) != quantizer_identity(replace(rounded, head_rotation="values"))
    (warning,) = options_without_effect(RunConfig(quantizer=heads()))
    assert warning.startswith("quantizer.head_rotation='all' has no effect on queries and keys with")
    assert options_without_effect(RunConfig(quantizer=rounded)) == []
    assert options_without_effect(RunConfig(quantizer=heads(head_rotation="values"))) == []


def test_a_prefix_is_made_before_heads_are_rotated(tiny: Tiny) -> None:
    lm = tiny("llama")
    with quantized(lm, heads()), pytest.raises(ConfigError, match="make the prefix before the quantizer is put on"):
        Prefix.from_tokens(lm.model, [17, 42])
