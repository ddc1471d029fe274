"""Tiny random models with a tiny tokenizer, made on the spot: for tests and for trying a configuration in seconds.

They show no outliers of their own; `path="tiny:llama"` and the other names of `tiny_configurations` load them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from cushion.errors import ModelNotFoundError, did_you_mean
from cushion.models.architectures import ARCHITECTURES

VOCABULARY_SIZE = 260
"""256 bytes and the four special tokens."""

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

_WIDE_HEADS: dict[str, Any] = {**_LLAMA, "head_dim": 16}
_HEADS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_POSITIONS: dict[str, Any] = {"max_position_embeddings": 256}
_WINDOW = 8
"""Positions in a sliding window: shorter than any text worth trying."""


def _opt(**options: Any) -> OPTConfig:
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    return OPTConfig(**{**_COMMON, **_HEADS, **_POSITIONS, **sizes, **options})


def _falcon(**options: Any) -> FalconConfig:
    return FalconConfig(**{**_COMMON, **_HEADS, **_POSITIONS, "ffn_hidden_size": 64, **options})


TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, **_LLAMA),
    "mistral": lambda: MistralConfig(**_COMMON, **_LLAMA, sliding_window=_WINDOW),
    "mixtral": lambda: MixtralConfig(**_COMMON, **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: Qwen2Config(**_COMMON, **_LLAMA),
    "qwen3": lambda: Qwen3Config(**_COMMON, **_LLAMA, head_dim=16),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, **_LLAMA, moe_intermediate_size=48, shared_expert_intermediate_size=96, **_EXPERTS
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_WIDE_HEADS, moe_intermediate_size=48, **_EXPERTS),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON,
        **_WIDE_HEADS,
        sliding_window=_WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granite": lambda: GraniteConfig(
        **_COMMON,
        **_LLAMA,
        embedding_multiplier=3.0,
        attention_multiplier=0.25,
        residual_multiplier=0.5,
        logits_scaling=4.0,
    ),
    "olmo2": lambda: Olmo2Config(**_COMMON, **_LLAMA),
    "starcoder2": lambda: Starcoder2Config(**_COMMON, **_LLAMA, sliding_window=_WINDOW),
    "gemma": lambda: GemmaConfig(**_COMMON, **{**_WIDE_HEADS, "num_key_value_heads": 1}),
    "gemma2": lambda: Gemma2Config(
        **_COMMON,
        **_WIDE_HEADS,
        query_pre_attn_scalar=16,
        sliding_window=_WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_COMMON,
        **_WIDE_HEADS,
        query_pre_attn_scalar=16,
        sliding_window=_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**_COMMON, **_LLAMA, sliding_window=_WINDOW),
    "opt": _opt,
    "bloom": lambda: BloomConfig(**_COMMON, hidden_size=32, n_layer=3, n_head=4),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, **_HEADS, **_POSITIONS, intermediate_size=64),
    "falcon": _falcon,
    # variants of a family
    "opt_post_norm": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(
        **_COMMON, **_HEADS, **_POSITIONS, intermediate_size=64, use_parallel_residual=False
    ),
    "falcon_new_decoder": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon_new_decoder_one_norm": lambda: _falcon(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon_alibi": lambda: _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
}
"""Configurations by name: `config.model_type` of every family of Cushion's own, and some of its variants."""


def tiny_configurations() -> dict[str, Callable[[], PreTrainedConfig]]:
    """`TINY`, and the tiny configurations that plugins bring with their families."""
    brought = {
        name: entry.tiny for name, entries in ARCHITECTURES.items() for entry in entries if entry.tiny is not None
    }
    return {**brought, **TINY}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, so that any text encodes and decodes to itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return fast


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of architecture `name` with three blocks and 32 hidden features, the same bits for a seed.

    Raises:
        ModelNotFoundError: no tiny model has this name.

    """
    configurations = tiny_configurations()
    if name not in configurations:
        raise ModelNotFoundError(
            f"model.path='tiny:{name}' does not exist: known are {', '.join(f'tiny:{key}' for key in configurations)}"
            f"{did_you_mean(name, configurations)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configurations[name](), dtype=torch.float32)
        with torch.no_grad():  # a spread of weights at which attention and norms do something visible
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
