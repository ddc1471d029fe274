"""Tiny random models with a tiny tokenizer, made on the spot: for tests and for trying a configuration in seconds.

They show no outliers of their own; `path="tiny:llama"` and the other names of `TINY` load them by configuration.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from cushion.errors import ModelNotFoundError, did_you_mean

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

TINY = {
    "llama": lambda: LlamaConfig(**_COMMON, **_LLAMA),
    "mistral": lambda: MistralConfig(**_COMMON, **_LLAMA, sliding_window=128),
    "qwen2": lambda: Qwen2Config(**_COMMON, **_LLAMA),
    "opt": lambda: OPTConfig(
        **_COMMON,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.0,
    ),
    "bloom": lambda: BloomConfig(**_COMMON, hidden_size=32, n_layer=3, n_head=4),
}


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
    if name not in TINY:
        raise ModelNotFoundError(
            f"model.path='tiny:{name}' does not exist: known are {', '.join(f'tiny:{key}' for key in TINY)}"
            f"{did_you_mean(name, TINY)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(TINY[name](), dtype=torch.float32)
        with torch.no_grad():  # a spread of weights at which attention and norms do something visible
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
