"""Quantization inside attention: the key-value cache, and the inputs of the two matrix products.

Both are simulated in an attention function of transformers' attention interface, put on the model for the length of a
`with` block. Keys and values of a prefix are its own: they stay in full precision and enter no scale, and so do the
probabilities that weigh them; so do as many tokens at the start of a text as `kv_cache.protect` says, in the cache.
Ranges are dynamic, but for those of a cache whose scales were calibrated.

Formats of blocks have them along the dimension over which a product sums: the channels of a head for queries and keys,
the positions for probabilities and values. Cached keys and values both have them along the channels of a head.

## Inside attention

Off by default; ranges are dynamic, over the whole tensor (`per_tensor`, all texts of a batch together) or over the
head dimension of each head and token (`per_token`; for probabilities, over the row of each query).

- `quantizer.kv_cache`: q(K) and q(V) in place of K and V, the keys with their rotary positions applied, as they are
  cached.
- `quantizer.attention`: both inputs of both products: q(Q) q(K)^T, and q(P) q(V) with the probabilities P after the
  softmax. With both, K and V pass through the grid of the cache first.

With `quantizer.kv_cache.range=static` the keys of a layer have one scale, and its values another (`per_tensor`), or
each head has (`per_head`), from the extremes on calibration text behind the row's prefix. With `format=fp8_e4m3` and
`symmetric=true` these are the scales that servers load for an FP8 cache.

`quantizer.kv_cache.protect=N` leaves the first N tokens of every text in full precision in the cache, and out of its
scales: KVSink's baseline Preserve-First-N (arXiv [2508.04257](https://arxiv.org/abs/2508.04257)). `search=bos` goes
further: its keys and values are those of the full-precision model, as IntactKV keeps them (arXiv
[2403.01241](https://arxiv.org/abs/2403.01241)), while those of a protected token are what the quantized linears
before them give. In a row that is padded on the left, padding counts among these tokens, so tasks run one request at
a time. KVSink's own choice, the tokens with the largest values in one channel behind an early block, is not an
option; `sinks_in_prefix` ([attention](method.md#attention)) says whether there is anything left for it to protect.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from cushion.errors import ConfigError, UnsupportedModelError
from cushion.models import LanguageModel
from cushion.prefix import PrefixCache
from cushion.quantization.cache_ranges import keys_of, values_of
from cushion.quantization.effect import Effect, Work
from cushion.quantization.formats.blocks import BlockQuantizer, quantizer_of
from cushion.quantization.hadamard import HadamardTransform
from cushion.quantization.inputs import grid_of
from cushion.quantization.kivi import KiviLayout
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.parts.head_rotation import rotates_keys
from cushion.quantization.parts.kv_cache import KvCacheConfig, cache_ranges
from cushion.quantization.parts.registry import PARTS
from cushion.quantization.quantizer import QuantizerConfig

NAME = "cushion_quantized"

_ACTIVE: dict[int, AttentionQuantizer] = {}
"""What is on which model, by the identity of its configuration, which every attention module holds."""


class AttentionQuantizer:
    """Attention with quantized-dequantized keys and values, queries and probabilities.

    Args:
        config: `kv_cache` and `attention` say what is quantized, `levels` and `zero_point` how, and `head_rotation`
            whether queries and keys are rotated before. They are not both on with KIVI's layout.
        straight_through: let gradients pass as if nothing had been rounded.
        ranges: with a static cache, the ranges of each layer's keys and values, by `keys_of` and `values_of` its
            number: minimum and maximum of each head, (key-value heads,).

    Attributes:
        static: the quantizers of these, by the same names.

    """

    def __init__(
        self,
        config: QuantizerConfig,
        straight_through: bool,
        ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        def quantizer(own: Any, fixed: tuple[Tensor, Tensor] | None = None) -> ActivationQuantizer | None:
            if own.bits is None:
                return None
            ratio = own.clip_ratio if isinstance(own, KvCacheConfig) else 1.0
            return quantizer_of(grid_of(config, own), own.granularity, fixed, straight_through, ratio)

        self._cache = quantizer(config.kv_cache)
        self._inputs = quantizer(config.attention)
        self.static: dict[str, ActivationQuantizer | None] = {}
        for name, (low, high) in (ranges or {}).items():
            if config.kv_cache.granularity == "per_head":
                fixed = low[:, None, None], high[:, None, None]
            else:
                fixed = low.amin(), high.amax()
            self.static[name] = quantizer(config.kv_cache, fixed)
        self._rotated = HadamardTransform() if rotates_keys(config) else None
        self._protect = config.kv_cache.protect
        self._kivi: KiviLayout | None = None
        if self._cache is not None and config.kv_cache.layout == "kivi":
            self._kivi = KiviLayout(self._cache, config.kv_cache.group_size, config.kv_cache.residual)
        self._past = self._prefix = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the decoder: how many positions came before, and how many are the prefix's."""
        cache = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        self._prefix = cache.prefix_length if isinstance(cache, PrefixCache) else 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        layer: int = 0,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scaled dot-product attention.

        Args:
            query: (batch, heads, tokens, head size).
            key, value: (batch, key-value heads, cached and new positions, head size).
            mask: added to the scores, or None.
            layer: the number of the layer.
            sinks: learned scores, (heads,), that take their share of the softmax and weigh no value (gpt-oss), or None.

        Returns:
            The output, (batch, tokens, heads, head size), and the probabilities, (batch, heads, tokens, positions).

        """
        if self._rotated is not None:
            query, key = self._rotated(query), self._rotated(key)
        # a sliding window drops the oldest positions of its layer, those of the prefix first
        dropped = self._past + query.shape[2] - key.shape[2]
        kept, lost = max(0, self._prefix - dropped), max(0, dropped - self._prefix)
        start = min(kept + max(0, self._protect - lost), key.shape[2])  # of what the cache rounds
        groups, rounded = query.shape[1] // key.shape[1], None
        if self._kivi is not None:
            before = torch.arange(query.shape[2], device=query.device) + self._past - self._prefix - self._protect
            rounded = self._kivi(key, value, start, before, max(0, lost - self._protect)).repeated(groups)
        else:
            key = _beyond(key, start, self.static.get(keys_of(layer), self._cache), 2)
            value = _beyond(value, start, self.static.get(values_of(layer), self._cache), 2)
        key = _beyond(key, kept, self._inputs, 2)
        if isinstance(self._inputs, BlockQuantizer):
            value = _beyond(value.mT, kept, self._inputs, 3).mT
        else:
            value = _beyond(value, kept, self._inputs, 2)
        query = _beyond(query, 0, self._inputs, 2)
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.mT
        if rounded is not None:
            scores = rounded.in_scores(scores, query)
        scores = scores * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        if sinks is not None:
            probabilities = probabilities[..., :-1]
        probabilities = _beyond(probabilities, kept, self._inputs, 3)
        output = probabilities @ value if rounded is None else rounded.weighed(probabilities, value)
        return output.transpose(1, 2).contiguous(), probabilities


def static_cache_scales(lm: LanguageModel) -> dict[str, Tensor]:
    """The scales of the static cache that is on a model, by `keys_of` and `values_of` the layer's number.

    Returns:
        A scalar for the keys of a layer and one for its values, or (key-value heads, 1, 1).

    """
    static = _ACTIVE[id(lm.model.config)].static.items()
    return {name: own.parameters[0] for name, own in static if own is not None and own.parameters is not None}


def _beyond(values: Tensor, start: int, quantizer: ActivationQuantizer | None, dim: int) -> Tensor:
    """`values` with everything from position `start` of dimension `dim` on quantized, by its own range."""
    if quantizer is None or start == values.shape[dim]:
        return values
    own, rest = values.split([start, values.shape[dim] - start], dim=dim)
    return torch.cat([own, quantizer(rest)], dim=dim)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The attention function that transformers calls, for whichever model is quantized."""
    unknown = "position_bias" if others.get("position_bias") is not None else "dropout" if dropout else None
    if unknown is not None:
        raise UnsupportedModelError(
            f"quantizer.kv_cache and quantizer.attention cannot be used with this model: its attention has {unknown}; "
            "set their bits to null"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    quantizer = _ACTIVE[id(cast(Any, module).config)]
    return quantizer(query, key, value, attention_mask, scaling, softcap, cast(Any, module).layer_idx, s_aux)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def quantized_attention(
    lm: LanguageModel,
    config: QuantizerConfig,
    straight_through: bool = False,
    ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[LanguageModel]:
    """The model with its key-value cache and attention inputs quantized as `config` says; on leaving, as before.

    Arguments as those of `AttentionQuantizer`.

    Raises:
        ConfigError: the attention of this model cannot be replaced.

    """
    check_attention(lm, config)
    if config.kv_cache.bits is None and config.attention.bits is None:
        yield lm
        return
    settings, quantizer = lm.model.config, AttentionQuantizer(config, straight_through, ranges)
    assert id(settings) not in _ACTIVE, "already quantized"
    before = settings._attn_implementation
    # the module that owns the blocks: every way into the model runs it, and OPT's own pass runs no larger one
    decoder = lm.model.get_submodule(lm.architecture.blocks.rpartition(".")[0])
    handle = decoder.register_forward_pre_hook(quantizer.enter, with_kwargs=True)
    _ACTIVE[id(settings)] = quantizer
    settings._attn_implementation = NAME
    try:
        yield lm
    finally:
        settings._attn_implementation = before
        del _ACTIVE[id(settings)]
        handle.remove()


def check_attention(lm: LanguageModel, config: QuantizerConfig) -> None:
    """Raise `ConfigError` where the attention of this model cannot be replaced, without computing."""
    for key, bits in (("kv_cache", config.kv_cache.bits), ("attention", config.attention.bits)):
        if bits is not None and not lm.model._supports_attention_backend:
            raise ConfigError(
                f"quantizer.{key}.bits={bits} cannot be used with {lm.label}: the attention of the architecture "
                f"{lm.architecture.model_type!r} does not go through transformers' attention interface; use "
                f"quantizer.{key}.bits=null"
            )


class _QuantizedAttention(Effect):
    """Of the key-value cache and of the products' inputs: one attention function does both."""

    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The attention can be replaced."""
        check_attention(lm, config)

    def around(self, work: Work) -> AbstractContextManager[LanguageModel]:
        """The attention function in place."""
        ranges = None
        needed = cache_ranges(work.config)
        if needed in PARTS["kv_cache"].statistics(work.config):
            names = [of(layer) for layer in range(len(work.lm.blocks)) for of in (keys_of, values_of)]
            ranges = {name: work.gathered(needed, name) for name in names}
        return quantized_attention(work.lm, work.config, work.straight_through, ranges)


ATTENTION = _QuantizedAttention()
