"""The architecture table: where the decoder blocks, their linears and the norms before them are. Data, no branches.

A new family is one entry here and one row in `tests/models/test_architectures.py`, or one file of a user's package that
registers it; docs/extending.md walks through it. Plugins import this module, so it is light: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cushion.errors import ConfigError, UnsupportedModelError, did_you_mean
from cushion.models.architecture import Architecture as Architecture
from cushion.models.architecture import Requirements as Requirements
from cushion.models.architecture import ResidualStream as ResidualStream
from cushion.models.architecture import Values as Values
from cushion.models.architecture import cache_shape as cache_shape
from cushion.registry import PLUGINS, Registry

if TYPE_CHECKING:
    from torch import nn


_ATTENTION = ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_LLAMA_SMOOTHING = (_ATTENTION, ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")))
_GEMMA2_SMOOTHING = (_ATTENTION, ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")))
_EXPERTS = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")

_SHARED_EXPERT = ("mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
_EVERY_BLOCK_SPARSE: Requirements = (("decoder_sparse_step", 1), ("mlp_only_layers", []))
"""Every block of a Qwen mixture of experts has experts, and none a plain MLP in their place."""

_VALUES = Values("self_attn.v_proj", "self_attn.o_proj")
_RESIDUAL = ResidualStream(
    embeddings=("model.embed_tokens",), final_norm="model.norm", writers=("self_attn.o_proj", "mlp.down_proj")
)
_GEMMA2_RESIDUAL = ResidualStream(
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_BLOOM_SMOOTHING = (
    ("input_layernorm", ("self_attention.query_key_value",)),
    ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
_FALCON = Architecture(
    "falcon",
    "transformer.h",
    (("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),),
    down_projection="mlp.dense_4h_to_h",
    residual=ResidualStream(
        embeddings=("transformer.word_embeddings",),
        final_norm="transformer.ln_f",
        writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    values=Values("self_attention.query_key_value", "self_attention.dense"),
)
"""What Falcon's variants share; they differ in the norms of a block and in the heads of its cache."""

_FALCON_GROUPS = Values("self_attention.query_key_value", "self_attention.dense", groups="num_kv_heads")
_FALCON_HEADS = Values("self_attention.query_key_value", "self_attention.dense", groups="num_attention_heads")

_ENTRIES = (
    Architecture(  # also SmolLM and SOLAR
        "llama",
        "model.layers",
        _LLAMA_SMOOTHING,
        down_projection="mlp.down_proj",
        residual=_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(
        "mistral", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj", residual=_RESIDUAL, values=_VALUES
    ),
    Architecture(
        "mixtral",
        "model.layers",
        (_ATTENTION, ("post_attention_layernorm", _EXPERTS)),
        experts="mlp.experts",
        full_precision=("mlp.gate",),
        down_projection="mlp.experts.*.down_proj",
        residual=replace(_RESIDUAL, writers=("self_attn.o_proj", "mlp.experts.*.down_proj")),
        values=_VALUES,
    ),
    Architecture(
        "qwen2", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj", residual=_RESIDUAL, values=_VALUES
    ),
    Architecture(
        "qwen3", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj", residual=_RESIDUAL, values=_VALUES
    ),
    Architecture(
        "qwen3_moe",
        "model.layers",
        (_ATTENTION, ("post_attention_layernorm", _EXPERTS)),
        requires=_EVERY_BLOCK_SPARSE,
        experts="mlp.experts",
        full_precision=("mlp.gate",),
        down_projection="mlp.experts.*.down_proj",
        residual=replace(_RESIDUAL, writers=("self_attn.o_proj", "mlp.experts.*.down_proj")),
        values=_VALUES,
    ),
    Architecture(
        "qwen2_moe",
        "model.layers",
        (_ATTENTION, ("post_attention_layernorm", (*_EXPERTS, *_SHARED_EXPERT))),
        requires=_EVERY_BLOCK_SPARSE,
        experts="mlp.experts",
        full_precision=("mlp.gate", "mlp.shared_expert_gate"),
        down_projection=("mlp.experts.*.down_proj", "mlp.shared_expert.down_proj"),
        residual=replace(
            _RESIDUAL, writers=("self_attn.o_proj", "mlp.experts.*.down_proj", "mlp.shared_expert.down_proj")
        ),
        values=_VALUES,
    ),
    Architecture(
        "gpt_oss",
        "model.layers",
        (
            _ATTENTION,
            ("post_attention_layernorm", ("mlp.router", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        ),
        experts="mlp.experts",
        full_precision=("mlp.router",),
        down_projection="mlp.experts.*.down_proj",
        residual=replace(_RESIDUAL, writers=("self_attn.o_proj", "mlp.experts.*.down_proj")),
        values=_VALUES,
    ),
    Architecture(  # its multipliers are numbers by which whole tensors are scaled: what is folded passes through them
        "granite", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj", residual=_RESIDUAL, values=_VALUES
    ),
    Architecture(  # its norms stand behind the linears, before the stream: nothing can take a scale or a rotation
        "olmo2", "model.layers", smoothing=(), down_projection="mlp.down_proj", values=_VALUES
    ),
    Architecture(
        "starcoder2",
        "model.layers",
        (_ATTENTION, ("post_attention_layernorm", ("mlp.c_fc",))),
        down_projection="mlp.c_proj",
        residual=replace(_RESIDUAL, writers=("self_attn.o_proj", "mlp.c_proj")),
        values=_VALUES,
    ),
    Architecture(
        "gemma",
        "model.layers",
        _LLAMA_SMOOTHING,
        norm_offset=1.0,
        down_projection="mlp.down_proj",
        residual=_RESIDUAL,
        values=_VALUES,
    ),
    *(
        Architecture(
            model_type,
            "model.layers",
            _GEMMA2_SMOOTHING,
            norm_offset=1.0,
            down_projection="mlp.down_proj",
            residual=_GEMMA2_RESIDUAL,
            values=_VALUES,
        )
        for model_type in ("gemma2", "gemma3_text")
    ),
    Architecture(
        "phi3",
        "model.layers",
        (
            ("input_layernorm", ("self_attn.qkv_proj",)),
            ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
        down_projection="mlp.down_proj",
        residual=_RESIDUAL,
        values=Values("self_attn.qkv_proj", "self_attn.o_proj"),
    ),
    Architecture(
        "opt",
        "model.decoder.layers",
        (
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("final_layer_norm", ("fc1",)),
        ),
        smoothing_requires=(("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True)),
        down_projection="fc2",
        residual=ResidualStream(
            embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            final_norm="model.decoder.final_layer_norm",
            writers=("self_attn.out_proj", "fc2"),
            requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
        ),
        values=Values("self_attn.v_proj", "self_attn.out_proj"),
    ),
    Architecture(
        "bloom",
        "transformer.h",
        _BLOOM_SMOOTHING,
        smoothing_requires=(("apply_residual_connection_post_layernorm", False),),
        down_projection="mlp.dense_4h_to_h",
        residual=ResidualStream(
            embeddings=("transformer.word_embeddings",),
            embedding_norm="transformer.word_embeddings_layernorm",
            final_norm="transformer.ln_f",
            writers=("self_attention.dense", "mlp.dense_4h_to_h"),
            requires=(("apply_residual_connection_post_layernorm", False),),
        ),
        values=Values("self_attention.query_key_value", "self_attention.dense", groups="num_attention_heads"),
    ),
    Architecture(  # with and without a parallel residual, both norms read hidden states and have one reader each
        "gpt_neox",
        "gpt_neox.layers",
        (
            ("input_layernorm", ("attention.query_key_value",)),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        down_projection="mlp.dense_4h_to_h",
        residual=ResidualStream(
            embeddings=("gpt_neox.embed_in",),
            final_norm="gpt_neox.final_layer_norm",
            writers=("attention.dense", "mlp.dense_4h_to_h"),
        ),
        values=Values("attention.query_key_value", "attention.dense", groups="num_attention_heads"),
    ),
    replace(  # Falcon2-11B: the decoder of Falcon-40B with one norm before attention and MLP
        _FALCON,
        requires=(("new_decoder_architecture", True), ("num_ln_in_parallel_attn", 1)),
        key_value_heads="num_attention_heads",
        values=_FALCON_GROUPS,
    ),
    replace(  # Falcon-40B and -180B; the cache holds grouped heads once per query head
        _FALCON,
        smoothing=(("ln_attn", ("self_attention.query_key_value",)), ("ln_mlp", ("mlp.dense_h_to_4h",))),
        requires=(("new_decoder_architecture", True),),
        key_value_heads="num_attention_heads",
        values=_FALCON_GROUPS,
    ),
    replace(  # Falcon-7B: attention and MLP in parallel behind one norm, one key-value head
        _FALCON, requires=(("parallel_attn", True), ("multi_query", True)), key_value_heads=1
    ),
    replace(
        _FALCON,
        requires=(("parallel_attn", True), ("multi_query", False)),
        key_value_heads="num_kv_heads",
        values=_FALCON_HEADS,
    ),
    replace(
        _FALCON,
        smoothing=_BLOOM_SMOOTHING,
        requires=(("parallel_attn", False), ("multi_query", True)),
        key_value_heads=1,
    ),
    replace(  # Falcon-RW: one after the other, with ALiBi
        _FALCON,
        smoothing=_BLOOM_SMOOTHING,
        requires=(("parallel_attn", False), ("multi_query", False)),
        key_value_heads="num_kv_heads",
        values=_FALCON_HEADS,
    ),
)

ARCHITECTURES: Registry[tuple[Architecture, ...]] = Registry("model_type", __package__, PLUGINS)
"""The entries of each family, in the order in which they are tried: Cushion's own, then those of plugins."""


def register(*entries: Architecture) -> None:
    """Make a family known: all of its entries, in the order in which they are to be tried.

    Raises:
        ConfigError: they are not of one family, or the family is known already.

    """
    families = list(dict.fromkeys(entry.model_type for entry in entries))
    if len(families) != 1:
        raise ConfigError(f"model_type={', '.join(families)}: register the entries of one family, and of one alone")
    try:
        ARCHITECTURES.register(families[0], entries)
    except ConfigError as error:
        raise ConfigError(
            f"model_type={families[0]} is registered twice: all entries of a family are registered in one place"
        ) from error


for _model_type in dict.fromkeys(entry.model_type for entry in _ENTRIES):
    register(*(entry for entry in _ENTRIES if entry.model_type == _model_type))


def plugin_identity(architecture: Architecture) -> dict[str, Any] | None:
    """What an entry says, as plain JSON, where it is not one of this file: no version of code speaks for those."""
    return None if architecture in _ENTRIES else asdict(replace(architecture, tiny=None))


def expand(block: nn.Module, path: str) -> list[str]:
    """The paths that a path of the table stands for in `block`, every `*` replaced by the name of each child there."""
    parent, star, rest = path.partition(".*.")
    if not star:
        return [path]
    children = [name for name, _ in block.get_submodule(parent).named_children()]
    return [expanded for child in children for expanded in expand(block, f"{parent}.{child}.{rest}")]


def unmet(requirements: Requirements, config: Any) -> Iterable[tuple[str, Any]]:
    """The keys that a configuration does not have as required, with the values that it has."""
    for key, needed in requirements:
        value = getattr(config, key, None)
        if value != needed:
            yield key, value


def find_architecture(config: Any, model: str) -> Architecture:
    """The entry of the table for a transformers configuration.

    Args:
        config: of the model, or of its text part.
        model: `model.path`, for the message.

    Raises:
        UnsupportedModelError: naming the model, its architecture and what there is.

    """
    model_type = str(config.model_type)
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"model.path={model!r} has the architecture {model_type!r}, which is not supported (supported: {known})"
            f"{did_you_mean(model_type, ARCHITECTURES)}; a plugin of one file adds it, see docs/extending.md"
        )
    for entry in ARCHITECTURES[model_type]:
        if not any(unmet(entry.requires, config)):
            return entry
    keys = dict.fromkeys(key for entry in ARCHITECTURES[model_type] for key, _ in entry.requires)
    values = ", ".join(f"{key}={getattr(config, key, None)}" for key in keys)
    raise UnsupportedModelError(
        f"model.path={model!r} is a variant of {model_type!r} that is not supported ({values}); an entry of the "
        "table adds it, see docs/extending.md"
    )
