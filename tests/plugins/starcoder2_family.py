"""A model family in one file: StarCoder2, with a tiny model of it to try a configuration on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.models.architectures import Architecture, ResidualStream, register

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def tiny() -> PreTrainedConfig:
    """The configuration of `model.path=tiny:starcoder2`: the sizes of Cushion's own tiny models."""
    from transformers import Starcoder2Config  # imports torch: only here

    return Starcoder2Config(
        vocab_size=260,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
    )


register(
    Architecture(
        model_type="starcoder2",
        blocks="model.layers",
        smoothing=(
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.c_fc",)),
        ),
        down_projection="mlp.c_proj",
        residual=ResidualStream(
            embeddings=("model.embed_tokens",),
            final_norm="model.norm",
            writers=("self_attn.o_proj", "mlp.c_proj"),
        ),
        tiny=tiny,
    )
)
