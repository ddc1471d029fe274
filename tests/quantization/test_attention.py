"""Quantization inside attention, against attention computed by hand; the prefix's positions stay out of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from helpers import random_texts
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cushion.activations import observe_inputs
from cushion.config import ActivationConfig, AttentionConfig, KvCacheConfig, QuantizerConfig, WeightConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix, PrefixCache
from cushion.quantization.check import check_quantizer
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
REPLACEABLE = ("llama", "mistral", "qwen2", "opt")
TEXTS = random_texts(2, 20)


def inside(**changes: Any) -> QuantizerConfig:
    """A quantizer that leaves every linear alone."""
    return QuantizerConfig(
        name="under_test", weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None), **changes
    )


@torch.no_grad()
def logits(lm: LanguageModel, prefix: Prefix | None = None, texts: Tensor = TEXTS) -> Tensor:
    prefix = prefix or Prefix.empty()
    return lm.model(texts, past_key_values=prefix.cache(lm.model, len(texts)), use_cache=True).logits


# Recomputed by hand.


def rounded(values: Tensor, bits: int, dims: tuple[int, ...], symmetric: bool) -> Tensor:
    """The formulas of docs/method.md, on all of `values`, one scale over `dims`."""
    if symmetric:
        scale = values.abs().amax(dims, keepdim=True) / (2 ** (bits - 1) - 1)
        return torch.round(values / scale) * scale
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return torch.round((values - low) / scale) * scale + low


EVERYTHING, PER_TOKEN = (0, 1, 2, 3), (3,)
CASES = {
    "cache per token": inside(kv_cache=KvCacheConfig(bits=4)),
    "cache per tensor": inside(kv_cache=KvCacheConfig(4, "per_tensor", symmetric=True)),
    "inputs per tensor": inside(attention=AttentionConfig(bits=6)),
    "inputs per token": inside(attention=AttentionConfig(6, "per_token", symmetric=False)),
    "both": inside(kv_cache=KvCacheConfig(bits=4), attention=AttentionConfig(bits=8)),
}


def attention_by_hand(lm: LanguageModel, hidden: Tensor, prefix: Prefix, config: QuantizerConfig) -> Tensor:
    """What the first block's o_proj reads, from the block's input, head by head."""
    block, length = lm.blocks[0], len(prefix)
    x = block.input_layernorm(hidden)
    batch, tokens = x.shape[:2]
    query, key, value = (
        getattr(block.self_attn, name)(x).view(batch, tokens, -1, 8).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    positions = torch.arange(length, length + tokens)[None].expand(batch, -1)
    query, key = apply_rotary_pos_emb(query, key, *lm.model.model.rotary_emb(x, positions))

    def through(values: Tensor, part: KvCacheConfig | AttentionConfig) -> Tensor:
        if part.bits is None:
            return values
        dims = PER_TOKEN if part.granularity == "per_token" else EVERYTHING
        return rounded(values, part.bits, dims, part.symmetric)

    key, value = through(key, config.kv_cache), through(value, config.kv_cache)
    query, key, value = (through(part, config.attention) for part in (query, key, value))
    if length:
        key = torch.cat([prefix.keys[0].expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix.values[0].expand(batch, -1, -1, -1), value], dim=2)
    weights = torch.zeros(batch, query.shape[1], tokens, length + tokens)
    for head in range(query.shape[1]):
        for token in range(tokens):
            seen = length + token + 1
            scores = key[:, head // 2, :seen] @ query[:, head, token, :, None] / math.sqrt(8)
            weights[:, head, token, :seen] = torch.softmax(scores[..., 0], dim=-1)
    weights = torch.cat([weights[..., :length], through(weights[..., length:], config.attention)], dim=-1)
    heads = [weights[:, head] @ value[:, head // 2] for head in range(query.shape[1])]
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("planted", [None, 1, 50], ids=["no prefix", "prefix", "prefix with outliers"])
def test_attention_recomputed(tiny: Tiny, case: str, planted: float | None) -> None:
    lm, config = tiny("llama"), CASES[case]
    prefix = Prefix.empty()
    if planted is not None:  # keys and values fifty times larger than any of the text's must enter no scale
        found = Prefix.from_tokens(lm.model, [17, 42, 99])
        prefix = replace(
            found, keys=tuple(k * planted for k in found.keys), values=tuple(v * planted for v in found.values)
        )
    seen: dict[str, Tensor] = {}
    modules = {"block": lm.blocks[0], "o_proj": lm.blocks[0].self_attn.o_proj}
    with quantized(lm, config), observe_inputs(modules, lambda name, values: seen.update({name: values.clone()})):
        logits(lm, prefix)
    with torch.no_grad():
        expected = attention_by_hand(lm, seen["block"], prefix, config)
        plain = attention_by_hand(lm, seen["block"], prefix, inside())
    torch.testing.assert_close(seen["o_proj"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("part", ["kv_cache", "attention"])
@pytest.mark.parametrize("prompt", [[], [17, 42]], ids=["plain", "prefix"])
def test_fewer_bits_go_further_from_full_precision(tiny: Tiny, family: str, part: str, prompt: list[int]) -> None:
    lm = tiny(family)
    prefix = Prefix.from_tokens(lm.model, prompt)
    untouched, errors = logits(lm, prefix), []
    for bits in (8, 5, 3):
        grid = {"kv_cache": KvCacheConfig, "attention": AttentionConfig}[part](bits=bits)
        with quantized(lm, inside(**{part: grid})):
            errors.append(float((logits(lm, prefix) - untouched).square().mean()))
    assert 0 < 4 * errors[0] < errors[1] < errors[2] / 2
    assert errors[0] < 1e-3 * untouched.square().mean()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("prompt", [[], [17, 42, 99]], ids=["plain", "prefix"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_text_in_pieces_gives_what_it_gives_at_once(
    tiny: Tiny, window: int | None, prompt: list[int], chunk: int
) -> None:
    """Also where a sliding window has dropped the prefix, or a part of it, from the cache."""
    lm = tiny("mistral")
    lm.model.config.sliding_window = window
    prefix = Prefix.from_tokens(lm.model, prompt)
    with quantized(lm, inside(kv_cache=KvCacheConfig(bits=3))), torch.no_grad():
        whole = logits(lm, prefix)
        cache = prefix.cache(lm.model, len(TEXTS))
        parts = [lm.model(part, past_key_values=cache, use_cache=True).logits for part in TEXTS.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, logits(lm, prefix), atol=1e-2)


def test_a_sliding_window_hides_the_same_positions_as_without_the_quantizer(tiny: Tiny) -> None:
    lm = tiny("mistral")
    lm.model.config.sliding_window = 7
    prefix = Prefix.from_tokens(lm.model, [17, 42, 99])
    untouched = logits(lm, prefix)
    with quantized(lm, inside(kv_cache=KvCacheConfig(bits=8))):
        narrow = logits(lm, prefix)
    torch.testing.assert_close(narrow, untouched, rtol=0, atol=0.05)
    lm.model.config.sliding_window = None
    assert not torch.allclose(logits(lm, prefix), untouched, atol=0.1)


def test_learned_sinks_take_their_share_as_without_the_quantizer(tiny: Tiny) -> None:
    lm = tiny("gpt_oss")
    prefix = Prefix.from_tokens(lm.model, [17, 42, 99])
    untouched = logits(lm, prefix)
    with quantized(lm, inside(kv_cache=KvCacheConfig(bits=8))):
        fine = logits(lm, prefix)
        for block in lm.blocks:
            block.self_attn.sinks.fill_(-30)
        without = logits(lm, prefix)
    torch.testing.assert_close(fine, untouched, rtol=0, atol=0.05)
    assert (without - untouched).abs().max() > 0.5


def test_a_cache_that_is_no_prefix_is_quantized_as_ordinary_tokens(tiny: Tiny) -> None:
    lm = tiny("llama")
    prefix = Prefix.from_tokens(lm.model, [17, 42, 99])
    assert prefix.cache(lm.model).prefix_length == 3
    assert Prefix.empty().cache(lm.model).prefix_length == 0
    ordinary = PrefixCache(config=lm.model.config)
    for index, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        ordinary.update(key[None], value[None], index)
    with quantized(lm, inside(kv_cache=KvCacheConfig(bits=3))), torch.no_grad():
        protected = logits(lm, prefix, TEXTS[:1])
        exposed = lm.model(TEXTS[:1], past_key_values=ordinary, use_cache=True).logits
    assert not torch.allclose(protected, exposed, atol=1e-3)


# On and off.


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_leaving_restores_the_attention(tiny: Tiny, family: str, raises: bool) -> None:
    lm = tiny(family)
    untouched, before = logits(lm), lm.model.config._attn_implementation
    try:
        with quantized(lm, CASES["both"]):
            assert not torch.equal(logits(lm), untouched)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert lm.model.config._attn_implementation == before
    assert not lm.model.base_model._forward_pre_hooks
    assert torch.equal(logits(lm), untouched)


def test_two_models_are_quantized_each_in_its_own_way(tiny: Tiny) -> None:
    one, other = tiny("llama"), tiny("llama")
    with quantized(one, CASES["cache per token"]):
        alone = logits(one)
        with quantized(other, CASES["inputs per tensor"]):
            assert torch.equal(logits(one), alone)
            assert not torch.equal(logits(other), alone)
        assert torch.equal(logits(one), alone)


@pytest.mark.parametrize("use", [check_quantizer, lambda lm, config: quantized(lm, config).__enter__()])
@pytest.mark.parametrize("part", ["kv_cache", "attention"])
def test_attention_outside_the_interface_is_refused_by_name(tiny: Tiny, use: Callable[..., Any], part: str) -> None:
    assert set(REPLACEABLE) <= set(FAMILIES)
    grid = {"kv_cache": KvCacheConfig, "attention": AttentionConfig}[part](bits=8)
    expected = rf"quantizer\.{part}\.bits=8 cannot be used with tiny_bloom.*'bloom'.*quantizer\.{part}\.bits=null"
    with pytest.raises(ConfigError, match=expected):
        use(tiny("bloom"), inside(**{part: grid}))
    check_quantizer(tiny("bloom"), inside())


@pytest.mark.parametrize("case", CASES)
def test_gradients_pass_straight_through_to_the_prefix(tiny: Tiny, case: str) -> None:
    lm = tiny("llama")
    found = Prefix.from_tokens(lm.model, [1, 2, 3])

    def gradients(config: QuantizerConfig) -> list[Tensor]:
        keys = tuple(key.clone().requires_grad_() for key in found.keys)
        prefix = replace(found, keys=keys)
        with quantized(lm, config, straight_through=True):
            lm.model(TEXTS[:1], past_key_values=prefix.cache(lm.model), use_cache=True).logits.square().sum().backward()
        assert all(key.grad is not None for key in keys)
        return [key.grad for key in keys if key.grad is not None]

    for quantized_gradient, plain in zip(gradients(CASES[case]), gradients(inside()), strict=True):
        assert quantized_gradient.abs().max() > 0
        assert torch.cosine_similarity(quantized_gradient.flatten(), plain.flatten(), dim=0) > 0.5


def test_attention_composes_with_everything_else(tiny: Tiny) -> None:
    """Rotation does not touch what is inside attention: the same keys and values are rounded in the same way."""
    lm = tiny("llama")
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    with quantized(lm, CASES["both"]):
        plain = logits(lm, prefix)
    with quantized(lm, replace(CASES["both"], rotation="hadamard")):
        difference = (logits(lm, prefix) - plain).abs()
    assert difference.median() < 1e-3  # single values that lie between two grid points may go either way


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("bloom", "falcon")])
@torch.no_grad()
def test_a_text_gives_the_same_at_once_and_token_by_token_through_the_whole_model(tiny: Tiny, family: str) -> None:
    """Through `model(...)`, as generation and tasks run it, and not through the decoder alone."""
    lm = tiny(family)
    prefix, tokens = Prefix.from_tokens(lm.model, [17, 42, 99]), torch.arange(40, 46)[None]
    config = QuantizerConfig(
        weights=WeightConfig(bits=None),
        activations=ActivationConfig(bits=None),
        kv_cache=KvCacheConfig(bits=2, granularity="per_token"),
    )
    with quantized(lm, config):
        at_once = lm.model(input_ids=tokens, past_key_values=prefix.cache(lm.model), use_cache=True).logits
        cache = prefix.cache(lm.model)
        passes = [lm.model(input_ids=token[None, None], past_key_values=cache, use_cache=True) for token in tokens[0]]
        pieces = [one.logits for one in passes]
    untouched = lm.model(input_ids=tokens, past_key_values=prefix.cache(lm.model), use_cache=True).logits
    error = (at_once - untouched).abs().max()
    assert error > 1e-3, "two bits are seen"
    assert (torch.cat(pieces, dim=1) - at_once).abs().max() < 0.2 * error
