"""The architecture table: an entry for each family of Cushion's own, or for each of its variants. Data, no branches.

A new family is one entry here and one row in `tests/models/test_architectures.py`; docs/extending.md walks through it.
"""

from __future__ import annotations

from dataclasses import replace

from cushion.models.entry import Architecture, Requirements, ResidualStream, Values

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
_EXPERTS_RESIDUAL = replace(_RESIDUAL, writers=("self_attn.o_proj", "mlp.experts.*.down_proj"))
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

ENTRIES = (
    Architecture(  # also SmolLM and SOLAR
        "llama",
        "model.layers",
        _LLAMA_SMOOTHING,
        down_projection="mlp.down_proj",
        up_projection="mlp.up_proj",
        residual=_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(
        "mistral",
        "model.layers",
        _LLAMA_SMOOTHING,
        down_projection="mlp.down_proj",
        up_projection="mlp.up_proj",
        residual=_RESIDUAL,
        values=_VALUES,
        multimodal=("mistral3",),
    ),
    Architecture(
        "mixtral",
        "model.layers",
        (_ATTENTION, ("post_attention_layernorm", _EXPERTS)),
        experts="mlp.experts",
        full_precision=("mlp.gate",),
        down_projection="mlp.experts.*.down_proj",
        up_projection="mlp.experts.*.up_proj",
        residual=_EXPERTS_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(
        "qwen2",
        "model.layers",
        _LLAMA_SMOOTHING,
        down_projection="mlp.down_proj",
        up_projection="mlp.up_proj",
        residual=_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(
        "qwen3",
        "model.layers",
        _LLAMA_SMOOTHING,
        down_projection="mlp.down_proj",
        up_projection="mlp.up_proj",
        residual=_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(
        "qwen3_moe",
        "model.layers",
        (_ATTENTION, ("post_attention_layernorm", _EXPERTS)),
        requires=_EVERY_BLOCK_SPARSE,
        experts="mlp.experts",
        full_precision=("mlp.gate",),
        down_projection="mlp.experts.*.down_proj",
        up_projection="mlp.experts.*.up_proj",
        residual=_EXPERTS_RESIDUAL,
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
        up_projection=("mlp.experts.*.up_proj", "mlp.shared_expert.up_proj"),
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
        residual=_EXPERTS_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(  # its multipliers are numbers by which whole tensors are scaled: what is folded passes through them
        "granite",
        "model.layers",
        _LLAMA_SMOOTHING,
        down_projection="mlp.down_proj",
        up_projection="mlp.up_proj",
        residual=_RESIDUAL,
        values=_VALUES,
    ),
    Architecture(  # its norms stand behind the linears, before the stream: nothing can take a scale or a rotation
        "olmo2",
        "model.layers",
        smoothing=(),
        down_projection="mlp.down_proj",
        up_projection="mlp.up_proj",
        values=_VALUES,
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
        up_projection="mlp.up_proj",
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
            up_projection="mlp.up_proj",
            residual=_GEMMA2_RESIDUAL,
            values=_VALUES,
            multimodal=multimodal,
        )
        for model_type, multimodal in (("gemma2", ()), ("gemma3_text", ("gemma3",)))
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
_LATENT_ATTENTION = (
    "its latent attention caches keys and values of different sizes and has norms inside, and its first blocks have a "
    "plain MLP in place of the experts"
)
_LLAMA_4 = (
    "its experts scale their inputs, not their outputs, by the router's weights, and only some of its blocks have any"
)
BEYOND_AN_ENTRY = {
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "llama4": _LLAMA_4,
    "llama4_text": _LLAMA_4,
}
"""Families that people ask for and that need more than an entry, with the reason."""
