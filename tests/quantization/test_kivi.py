"""KIVI's layout of the cache, against one that is filled token by token as its public code does; protected tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_texts
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cushion.activations import observe_inputs
from cushion.config import ActivationConfig, AttentionConfig, KvCacheConfig, QuantizerConfig, WeightConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.cache_ranges import CacheRanges, keys_of
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(2, 23)


def cache(**changes: Any) -> QuantizerConfig:
    own = {"bits": 2, "layout": "kivi", "group_size": 3, "residual": 6, **changes}
    return QuantizerConfig(
        name="t",
        weights=WeightConfig(bits=None),
        activations=ActivationConfig(bits=None),
        kv_cache=KvCacheConfig(**own),
    )


@torch.no_grad()
def logits(lm: LanguageModel, prefix: Prefix | None = None, texts: Tensor = TEXTS) -> Tensor:
    behind = (prefix or Prefix.empty()).cache(lm.model, len(texts))
    return lm.model(texts, past_key_values=behind, use_cache=True).logits


def planted(lm: LanguageModel, factor: float = 50) -> Prefix:
    """A prefix whose keys and values are far larger than any of a text's."""
    found = Prefix.from_tokens(lm.model, [17, 42, 99])
    return replace(found, keys=tuple(k * factor for k in found.keys), values=tuple(v * factor for v in found.values))


def rounded(values: Tensor, bits: int) -> Tensor:
    low, high = values.min(), values.max()
    scale = (high - low) / (2**bits - 1)
    return torch.round((values - low) / scale) * scale + low


class Decoded:
    """One head's cache as it grows: what is rounded and what waits, each a list of vectors."""

    def __init__(self, config: KvCacheConfig, keys: Tensor, values: Tensor) -> None:
        self.config, self.protected = config, config.protect
        self.keys, self.values = list(keys), list(values)
        self.waiting: list[Tensor] = []
        self.recent: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bits, size, residual = self.config.bits, self.config.group_size, self.config.residual
        assert bits is not None
        keys = torch.stack([*self.keys, *self.waiting, key])
        values = torch.stack([*self.values, *self.recent, value])
        output = torch.softmax(keys @ query / math.sqrt(len(query)), dim=0) @ values
        if self.protected:
            self.keys, self.values, self.protected = [*self.keys, key], [*self.values, value], self.protected - 1
            return output
        self.waiting.append(key)
        self.recent.append(value)
        if len(self.waiting) == residual:
            for group in torch.stack(self.waiting).split(size):
                self.keys += torch.stack([rounded(channel, bits) for channel in group.T], dim=1)
            self.waiting = []
        if len(self.recent) > residual:
            self.values.append(torch.cat([rounded(part, bits) for part in self.recent.pop(0).split(size)]))
        return output


def attention_by_hand(lm: LanguageModel, hidden: Tensor, prefix: Prefix, config: KvCacheConfig) -> Tensor:
    """What the first block's o_proj reads: every text and head by itself, one token after another."""
    block, length = lm.blocks[0], len(prefix)
    x = block.input_layernorm(hidden)
    batch, tokens = x.shape[:2]
    query, key, value = (
        getattr(block.self_attn, name)(x).view(batch, tokens, -1, 8).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    positions = torch.arange(length, length + tokens)[None].expand(batch, -1)
    query, key = apply_rotary_pos_emb(query, key, *lm.model.model.rotary_emb(x, positions))
    output = torch.empty(batch, tokens, query.shape[1], 8)
    for row in range(batch):
        for head in range(query.shape[1]):
            own = head // 2
            decoded = Decoded(config, *((prefix.keys[0][own], prefix.values[0][own]) if length else ([], [])))
            for token in range(tokens):
                read = query[row, head, token], key[row, own, token], value[row, own, token]
                output[row, token, head] = decoded.attend(*read)
    return output.flatten(2)


@pytest.mark.parametrize("has_prefix", [False, True], ids=["no prefix", "prefix with outliers"])
@pytest.mark.parametrize("changes", [{}, {"group_size": 4, "residual": 4, "protect": 2, "bits": 3}], ids=str)
@torch.no_grad()
def test_attention_is_that_of_a_cache_filled_token_by_token(
    tiny: Tiny, has_prefix: bool, changes: dict[str, Any]
) -> None:
    lm, config = tiny("llama"), cache(**changes)
    prefix = planted(lm) if has_prefix else Prefix.empty()
    seen: dict[str, Tensor] = {}
    modules = {"block": lm.blocks[0], "o_proj": lm.blocks[0].self_attn.o_proj}
    with quantized(lm, config), observe_inputs(modules, lambda name, values: seen.update({name: values.clone()})):
        logits(lm, prefix)
    expected = attention_by_hand(lm, seen["block"], prefix, config.kv_cache)
    torch.testing.assert_close(seen["o_proj"], expected, rtol=1e-4, atol=1e-5)
    exact = attention_by_hand(lm, seen["block"], prefix, replace(config.kv_cache, residual=24, group_size=24))
    assert not torch.allclose(exact, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt", "granite", "qwen2_moe", "qwen3_moe", "olmo2"])
def test_a_text_in_pieces_gives_what_it_gives_at_once(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    prefix = Prefix.from_tokens(lm.model, [17, 42, 99])
    with quantized(lm, cache(protect=1)), torch.no_grad():
        whole = logits(lm, prefix)
        behind = prefix.cache(lm.model, len(TEXTS))
        parts = [lm.model(part, past_key_values=behind, use_cache=True).logits for part in TEXTS.split(5, dim=1)]
    error, difference = (whole - logits(lm, prefix)).abs().median(), (torch.cat(parts, dim=1) - whole).abs().median()
    assert difference < 1e-2 * error, "single values that lie between two codes may go either way"


def test_a_window_as_long_as_the_text_and_protection_of_all_of_it_are_full_precision(tiny: Tiny) -> None:
    lm = tiny("llama")
    untouched = logits(lm)
    for config in (cache(residual=24), cache(protect=23), cache(protect=40), cache(layout="token", protect=40)):
        with quantized(lm, config):
            torch.testing.assert_close(logits(lm), untouched)


@torch.no_grad()
def test_what_a_query_reads_rounded(tiny: Tiny) -> None:
    """The first predictions that differ are those behind as many tokens as the window holds, and protected ones."""
    lm = tiny("llama")
    untouched = logits(lm)
    for protect in (0, 2):
        with quantized(lm, cache(protect=protect)):
            same = torch.isclose(logits(lm), untouched, rtol=1e-4, atol=1e-5).all(-1).all(0)
        assert same.tolist() == [token < 6 + protect for token in range(23)]


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@torch.no_grad()
def test_protected_tokens_are_as_a_prefix_of_them(tiny: Tiny, granularity: str) -> None:
    """Behind tokens in full precision as a prefix, or as the protected start of the text, a cache is rounded alike."""
    lm = tiny("llama")
    prefix, text = Prefix.from_tokens(lm.model, TEXTS[0, :3].tolist()), TEXTS[:1, 3:]
    with quantized(lm, cache(layout="token", granularity=granularity)):
        behind = logits(lm, prefix, text)
        exposed = logits(lm, texts=TEXTS[:1])[:, 3:]
    with quantized(lm, cache(layout="token", granularity=granularity, protect=3)):
        protected = logits(lm, texts=TEXTS[:1])[:, 3:]
    assert (protected - behind).abs().median() < 1e-4
    assert (exposed - behind).abs().median() > 1e-3


@torch.no_grad()
def test_protected_tokens_are_in_no_static_range(tiny: Tiny) -> None:
    lm = tiny("llama")
    found = []
    for protect, text in ((0, TEXTS[:1]), (9, TEXTS[:1]), (0, TEXTS[:1, 9:])):
        prefix = Prefix.from_tokens(lm.model, TEXTS[0, :9].tolist()) if text.shape[1] < 23 else Prefix.empty()
        ranges, behind = CacheRanges(protect=protect), prefix.cache(lm.model)
        ranges.watch(behind)
        lm.body(text, past_key_values=behind, use_cache=True)
        found.append(torch.cat([torch.stack(ranges.ranges[keys_of(layer)]) for layer in range(len(lm.blocks))]))
    torch.testing.assert_close(found[1], found[2])
    assert not torch.allclose(found[0], found[1])


def test_a_sliding_window_that_cuts_a_group_is_refused(tiny: Tiny) -> None:
    lm = tiny("mistral")
    lm.model.config.sliding_window = 7
    with quantized(lm, cache()), torch.no_grad():
        logits(lm)
        behind = Prefix.empty().cache(lm.model, 2)
        lm.model(TEXTS[:, :10], past_key_values=behind, use_cache=True)
        with pytest.raises(ConfigError, match=r"dropped 4 tokens, no multiple of quantizer\.kv_cache\.group_size=3"):
            lm.model(TEXTS[:, 10:11], past_key_values=behind, use_cache=True)


def test_gradients_pass_straight_through_to_the_prefix(tiny: Tiny) -> None:
    lm = tiny("llama")
    found = Prefix.from_tokens(lm.model, [1, 2, 3])

    def gradient(config: QuantizerConfig) -> Tensor:
        keys = tuple(key.clone().requires_grad_() for key in found.keys)
        behind = replace(found, keys=keys).cache(lm.model, len(TEXTS))
        with quantized(lm, config, straight_through=True):
            lm.model(TEXTS, past_key_values=behind, use_cache=True).logits.square().sum().backward()
        return torch.cat([key.grad.flatten() for key in keys if key.grad is not None])

    rounded_gradient, plain = gradient(cache(bits=4)), gradient(cache(bits=None))
    assert not torch.equal(rounded_gradient, plain)
    assert torch.cosine_similarity(rounded_gradient, plain, dim=0) > 0.5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layout": "kvi"}, r"kv_cache\.layout='kvi'.*'kivi'\?"),
        ({"residual": 7}, r"kv_cache\.residual=7 .*multiple of quantizer\.kv_cache\.group_size=3"),
        ({"residual": 0}, r"kv_cache\.residual=0 "),
        ({"range": "static", "granularity": "per_head"}, r"kv_cache\.range='static'.*set dynamic"),
        ({"granularity": "per_tensor"}, r"kv_cache\.granularity='per_tensor'.*set per_token"),
        ({"protect": -1}, r"kv_cache\.protect=-1 "),
        (
            {"format": "mxfp4", "bits": 4, "symmetric": True},
            r"kv_cache\.format='mxfp4' .*groups of its own, one of fp8_e4m3, fp8_e5m2, int",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        cache(**changes)


def test_inputs_of_the_products_are_refused_with_it() -> None:
    with pytest.raises(ConfigError, match=r"quantizer\.attention\.bits=8 .*layout=\s*kivi"):
        replace(cache(), attention=AttentionConfig(bits=8))


def test_what_it_is_called_and_what_it_depends_on() -> None:
    assert cache(protect=1).scheme == "t W16A16KV2 KIVI g3 r6 first 1 protected"
    assert cache().spans_batch
    assert not cache(layout="token").spans_batch
    assert cache(layout="token", protect=1).spans_batch
